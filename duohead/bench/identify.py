"""What a step of gate training costs on a model of true shape: seconds, phases, memory, and the arithmetic behind them.

Whole identifications take hours on large models, so steps are timed at a few lengths and the time of a run over its
mix of lengths is read from a curve through them. Use `IdentifyBench(...).measure(length)` for several lengths and
`projected` on what came out; under torchrun all processes do the same and share each sample.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from duohead.bench.kernels import OUT_OF_MEMORY
from duohead.bench.model import peak_bytes, release, reset_peak
from duohead.bench.models import build
from duohead.bench.timing import first_run
from duohead.identify.assembly import Sample
from duohead.identify.gates import Gates, distillation, installed
from duohead.identify.options import IdentifyOptions
from duohead.identify.parallel import Ranks, shard
from duohead.shapes import LayerShape, text_config

PHASES = ("teacher", "student", "backward")
# Answers of the paper's task: ten passkeys of 32 words, about 40 tokens each.
_ANSWERS, _ANSWER_TOKENS = 10, 40
# A backward pass of attention has five products for the two of the forward pass.
_BACKWARD_ATTENTION = 2.5


@dataclass(frozen=True)
class StepCost:
    """One length: median seconds of each phase and of a whole step, or why there are none.

    ``flops`` counts the products of matrices in a step of all processes; the teacher runs forward once, the student
    forward once, once more in the backward pass if it recomputes, and back once, to its inputs alone, for the weights
    are frozen. Full attention is not recomputed. ``peak_bytes`` is this process's.
    """

    length: int
    outcome: str | None
    seconds: dict[str, float]
    step_seconds: float
    peak_bytes: int
    flops: float

    def numbers(self, matmul_tflop_per_s: float, *, world: int = 1) -> dict[str, Any]:
        """For a record; the floor is the arithmetic at the rate of one large product."""
        if self.outcome is not None:
            return {"outcome": self.outcome, "flops": self.flops}
        floor = self.flops / (matmul_tflop_per_s * 1e12 * world)
        return {
            "step_seconds": self.step_seconds,
            **{f"{name}_seconds": seconds for name, seconds in self.seconds.items()},
            "peak_bytes": self.peak_bytes,
            "flops": self.flops,
            "floor_seconds": floor,
            "share_of_matmul_ceiling": floor / self.step_seconds,
        }


class IdentifyBench:
    """A model with random weights and gates at one half, to time steps on.

    Args:
        model: a name of `duohead.bench.models.SHAPES`.
        device, dtype: where and in what it computes.
        options: deterministic, gradient_checkpointing, shard, sink and recent count.
        ranks: the processes that share each sample.

    Raises:
        ValueError: unknown model; or the gated model with gates of one is not the model itself.
    """

    def __init__(
        self,
        model: str,
        *,
        device: torch.device,
        dtype: torch.dtype,
        options: IdentifyOptions,
        ranks: Ranks | None = None,
    ) -> None:
        self.device, self.options, self.ranks = device, options, ranks or Ranks()
        torch.manual_seed(0)  # every process draws the same weights
        self.model: Any = build(model, device=device, dtype=dtype)
        self.config = text_config(self.model)
        self.linear = _linear_weights(self.model.base_model)
        if options.shard:
            shard(self.model, device=device)
        self.gates = Gates.of(
            self.model,
            sink=options.sink,
            recent=options.recent,
            initial=0.5,
            deterministic=options.deterministic,
            ranks=self.ranks,
        )
        self.ranks.check(self.gates.shapes, self.config)

    def verify(self, length: int) -> None:
        """Raise ValueError unless gates of one leave the model as it is, to the bit, and gates of one half learn."""
        sample = _sample(length, self.config.vocab_size)
        with self._installed() as backbone:
            with torch.no_grad():
                self.gates.values.fill_(1)
                same = self.ranks.sum_(distillation(backbone, self.gates, sample)).item()
                self.gates.values.fill_(0.5)
            self.gates.values.grad = None
            distillation(backbone, self.gates, sample).backward()
        # The type checker remembers the None from above.
        gradient = self.ranks.sum_(cast("Tensor", self.gates.values.grad))
        if same != 0 or not gradient.isfinite().all() or not gradient.any():
            raise ValueError(
                f"gates of one must leave the model as it is and gates of one half must learn, got a loss of {same} "
                f"and {int(gradient.count_nonzero())} of {len(gradient)} gradients; do not use these times"
            )

    def measure(self, length: int, *, runs: int = 3) -> StepCost:
        """Time steps on a sample of ``length`` tokens: one to warm up, ``runs`` that count."""
        flops = step_flops(
            self.gates.shapes,
            heads=self.config.num_attention_heads,
            linear=self.linear,
            length=length,
            options=self.options,
        )
        blank = StepCost(length, None, {}, 0.0, 0, flops)
        sample = _sample(length, self.config.vocab_size)
        release(self.device)
        try:
            with self._installed() as backbone:
                self._step(backbone, sample)
                reset_peak(self.device)
                found = [self._step(backbone, sample) for _ in range(runs)]
        except torch.OutOfMemoryError:
            return replace(blank, outcome=OUT_OF_MEMORY)
        median = {name: statistics.median(seconds[name] for seconds in found) for name in PHASES}
        whole = statistics.median(sum(seconds.values()) for seconds in found)
        return replace(
            blank, seconds=median, step_seconds=whole, peak_bytes=peak_bytes(self.device)
        )

    def _installed(self) -> Any:
        return installed(
            self.model, self.gates, gradient_checkpointing=self.options.gradient_checkpointing
        )

    def _step(self, backbone: nn.Module, sample: Sample) -> dict[str, float]:
        """Seconds of each phase; a step runs the teacher inside `distillation`, here once more by itself."""
        ids, places = self.ranks.part(sample.input_ids)
        inputs = {"input_ids": ids[None].to(self.device)}
        if self.ranks.sequence > 1:
            inputs["position_ids"] = places[None].to(self.device)

        def teach() -> None:
            with self.gates.teaching():
                backbone(**inputs, use_cache=False)

        self.gates.values.grad = None
        _, teacher = first_run(teach, device=self.device)
        loss, forward = first_run(
            lambda: distillation(backbone, self.gates, sample), device=self.device
        )
        _, backward = first_run(loss.backward, device=self.device)
        return {
            "teacher": teacher / 1000,
            "student": max(forward - teacher, 0.0) / 1000,
            "backward": backward / 1000,
        }


def step_flops(
    shapes: Sequence[LayerShape],
    *,
    heads: int,
    linear: int,
    length: int,
    options: IdentifyOptions,
) -> float:
    """Floating-point operations of a step's products: ``linear`` weights per token, and attention."""
    passes = 4 if options.gradient_checkpointing else 3
    total = passes * 2.0 * linear * length
    seen = min(length, options.sink + options.recent)
    for shape in shapes:
        pair = 2 * heads * (shape.head_dim + shape.value_dim)
        if shape.window is not None or not shape.num_kv_heads:
            band = min(length, shape.window or 0) * length * pair
            total += band * (passes - 1 + _BACKWARD_ATTENTION)
            continue
        total += length**2 / 2 * pair * (2 + _BACKWARD_ATTENTION)
        total += seen * length * pair * (passes - 2 + _BACKWARD_ATTENTION)
    return total


def projected(costs: Sequence[StepCost], options: IdentifyOptions) -> dict[str, float] | None:
    """Seconds of a whole run: its mix of lengths along the curve a T + b T ** 2 through what was measured.

    None if fewer than two lengths could be measured, or the run has lengths more than a tenth beyond the longest.
    ``curve_error`` is the largest relative distance of a measured step from the curve.
    """
    found = [cost for cost in costs if cost.outcome is None]
    longest = options.longest(None)
    if len(found) < 2 or longest > 1.1 * max(cost.length for cost in found):
        return None
    lengths = np.array([cost.length for cost in found], dtype=float)
    seconds = np.array([cost.step_seconds for cost in found])
    terms = np.stack([lengths, lengths**2], 1)
    curve = np.linalg.lstsq(terms / seconds[:, None], np.ones(len(found)), rcond=None)[0]
    mix = np.linspace(options.context_min, longest, options.context_lengths)
    mean = float((curve[0] * mix + curve[1] * mix**2).mean())
    return {
        "steps": options.steps,
        "mean_step_seconds": mean,
        "run_hours": mean * options.steps / 3600,
        "curve_error": float(np.abs(terms @ curve / seconds - 1).max()),
    }


def _linear_weights(backbone: nn.Module) -> int:
    return sum(m.weight.numel() for m in backbone.modules() if isinstance(m, nn.Linear))


def _sample(length: int, vocabulary: int) -> Sample:
    """Random tokens; answers at the end, as in the paper's task, as many as a quarter of the sample holds."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(vocabulary, (length,), generator=generator)
    count = max(1, min(_ANSWERS, length // (8 * _ANSWER_TOKENS)))
    step = min(2 * _ANSWER_TOKENS, max(2, length // (4 * count)))
    ends = [length - index * step for index in range(count)][::-1]
    return Sample(ids, tuple((end - step // 2, end) for end in ends))

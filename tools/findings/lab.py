"""What every experiment needs: a model, texts, quickly trained gates, accuracies under a policy, and its records.

Gates are trained as `duohead identify` does, but on any samples, and policies are scored by `evaluate_needle`, so that
an experiment is only the list of what it varies. Make one with `Lab.open("pocket", ...)`.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from duohead import HeadPattern, pocket
from duohead.evaluate.needle import evaluate_needle
from duohead.evaluate.tasks import TASKS
from duohead.identify import haystack
from duohead.identify.assembly import Sample
from duohead.identify.gates import Gates, installed
from duohead.identify.options import IdentifyOptions
from duohead.identify.passkeys import passkey_sample
from duohead.identify.scorers import alphas
from duohead.identify.stability import Stability
from duohead.identify.train import train_gates
from duohead.pocket.loading import load_model
from duohead.record import write_record
from tools import finding_records

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from duohead.evaluate.results import NeedleResult
    from duohead.policy import HeadPolicy

T = TypeVar("T")
SINK, RECENT = 64, 256
RATIOS = (0.5, 0.25, 0.125)
# Formats that full attention of both pocket models answers, and that differ in key, value and wording.
RETRIEVAL = finding_records.TASKS
MakeSample = Callable[[torch.Generator], Sample]


@dataclass(frozen=True)
class Drawn:
    """Samples of ``make``, one after the other: the gate training asks for each step once, in order."""

    make: MakeSample
    generator: torch.Generator

    def __getitem__(self, step: int) -> Sample:
        return self.make(self.generator)


@dataclass(frozen=True)
class Effort:
    """How much an experiment spends: gate training, evaluation on needles and on prose, fine-tuning of the model.

    ``lengths`` are those of needles and ``prose`` those of prose, in tokens, with ``windows`` texts of each length;
    fine-tuning sees ``tuning_tokens`` at a learning rate whose peak is ``rate``.
    """

    steps: int = 60
    samples: int = 10
    lengths: tuple[int, ...] = (4096,)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    batch: int = 25
    prose: tuple[int, ...] = (1024, 2048, 8192, 16384)
    windows: int = 8
    tuning_tokens: int = 2_000_000
    rate: float = 3e-4

    @property
    def answers(self) -> int:
        """Scored samples of one task and length."""
        return self.samples * len(self.depths)


SMALL = Effort(
    steps=3,
    samples=1,
    lengths=(1024,),
    depths=(0.5,),
    batch=1,
    prose=(1024,),
    windows=1,
    tuning_tokens=20_000,
)


@dataclass
class Lab:
    """One model with the texts to identify on and to score on, which never are the same.

    ``pattern`` is the folder of the model's own pattern, for models that are not bundled. ``part`` (k, n) leaves to a
    question that can be shared among n processes its k-th part, and ``ratios`` are shares of heads, for questions that
    take them from the command line.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    text_ids: torch.Tensor
    held_out: torch.Tensor
    held_out_name: str
    out: Path
    effort: Effort = field(default_factory=Effort)
    seeds: tuple[int, ...] = (0, 1, 2)
    pattern: str | None = None
    part: tuple[int, int] = (1, 1)
    ratios: tuple[float, ...] = ()

    @classmethod
    def open(
        cls,
        name: str,
        *,
        out: Path,
        held_out: Sequence[str],
        device: str | None = None,
        dtype: str = "auto",
        effort: Effort,
        **fields: Any,
    ) -> Lab:
        """Load model and texts; heads are identified on the documentation inside CPython, scored on ``held_out``."""
        model, tokenizer = load_model(name, dtype=dtype, device=device)
        limit = 16 * 32768
        ids = haystack.tokens(haystack.default_text(), tokenizer, at_least=8192, at_most=limit)
        other = haystack.tokens(haystack.read_text(held_out), tokenizer, at_least=8192)
        label = ", ".join(Path(path).name.split(".")[0] for path in held_out)
        return cls(name, model, tokenizer, ids, other, label, out, effort, **fields)

    def bundled(self) -> HeadPattern:
        """The pattern that came with the model, or the one that ``pattern`` names."""
        if self.pattern is None and self.name not in pocket.NAMES:
            raise ValueError(
                f"pattern must name a folder for a model that is not bundled ({self.name}); identify its heads first"
            )
        return HeadPattern.load(self.pattern or pocket.pattern(self.name)).validate(self.model)

    def share(self, units: Iterable[T]) -> list[T]:
        """Those of a question's units that are this process's part."""
        part, parts = self.part
        return list(units)[part - 1 :: parts]

    def passkeys(self, *, length: int = 1280, **options: Any) -> MakeSample:
        """Samples of the paper's task; ``options`` are those of `passkey_sample`."""
        return lambda generator: passkey_sample(
            self.tokenizer, self.text_ids, context_length=length, generator=generator, **options
        )

    def task(self, name: str, *, length: int = 1280) -> MakeSample:
        """Samples of an evaluation format, over the text that heads are identified on."""

        def make(generator: torch.Generator) -> Sample:
            depth = 0.05 + 0.9 * float(torch.rand((), generator=generator))
            return TASKS[name].make(
                self.tokenizer,
                self.text_ids,
                context_length=length,
                depth=depth,
                generator=generator,
            )

        return make

    def prose(self, *, length: int = 1280) -> MakeSample:
        """Plain text; every token of its last quarter counts as an answer."""

        def make(generator: torch.Generator) -> Sample:
            start = int(torch.randint(len(self.text_ids) - length, (), generator=generator))
            ids = self.text_ids[start : start + length]
            return Sample(ids, ((length - length // 4, length),))

        return make

    def identify(
        self,
        make: MakeSample,
        *,
        sink: int = SINK,
        recent: int = RECENT,
        seed: int = 0,
        model: PreTrainedModel | None = None,
        **options: Any,
    ) -> HeadPattern:
        """Train gates on the samples of ``make``, with the schedule of `duohead identify`."""
        model = model or self.model
        values: dict[str, Any] = {
            "steps": self.effort.steps,
            "learning_rate": 0.05,
            "context_min": sink + recent + 1,
            "context_max": None,
            **options,
        }
        chosen = IdentifyOptions(sink=sink, recent=recent, seed=seed, **values)
        gates = Gates.of(model, sink=sink, recent=recent)
        optimizer = torch.optim.AdamW([gates.values], weight_decay=0.0, foreach=False)
        generator = torch.Generator().manual_seed(1_000_003 * (seed + 1))
        with installed(model, gates) as backbone:
            deque(
                train_gates(
                    backbone,
                    gates,
                    optimizer,
                    Drawn(make, generator),
                    chosen,
                    Stability(chosen),
                    start=0,
                ),
                maxlen=0,
            )
        return HeadPattern.from_alpha(gates.alpha, model=model, sink=sink, recent=recent)

    def accuracy(
        self,
        policies: Mapping[str, HeadPolicy | None],
        *,
        tasks: Sequence[str] = RETRIEVAL,
        lengths: Sequence[int] | None = None,
        model: PreTrainedModel | None = None,
    ) -> dict[str, dict[str, float]]:
        """Exact match on the held-out text, by policy and task, in percent."""
        result = self.answers(policies, tasks=tasks, lengths=lengths, model=model)
        return {
            name: {task: 100 * result.mean(method=name, task=task) for task in tasks}
            for name in policies
        }

    def answers(
        self,
        policies: Mapping[str, HeadPolicy | None],
        *,
        tasks: Sequence[str],
        lengths: Sequence[int] | None = None,
        depths: Sequence[float] | None = None,
        model: PreTrainedModel | None = None,
    ) -> NeedleResult:
        """What policies answer on the held-out text; lengths and depths are the effort's unless given."""
        effort = self.effort
        return evaluate_needle(
            model or self.model,
            self.tokenizer,
            self.held_out,
            policies=policies,
            tasks=tasks,
            lengths=lengths or effort.lengths,
            depths=depths or effort.depths,
            samples=effort.samples,
            batch=effort.batch,
        )

    def note(
        self,
        question: str,
        numbers: Mapping[str, Any],
        *,
        policy: HeadPolicy | None = None,
        ranked: HeadPattern | None = None,
        **variant: Any,
    ) -> None:
        """Append one record: what was varied is its shape, what came out its numbers.

        ``ranked`` is a pattern from a file that chose the heads; its digest stands in the shape as "pattern".
        """
        shape = {
            "model": self.name,
            "held_out": self.held_out_name,
            "steps": self.effort.steps,
            "samples": self.effort.answers,
            "lengths": list(self.effort.lengths),
            **variant,
        }
        if ranked is not None:
            shape["pattern"] = digest(ranked)
        write_record(
            self.out,
            op=f"findings.{question}",
            impl="gates",
            shape=shape,
            dtype=self.model.dtype,
            policy=policy,
            numbers=dict(numbers),
        )


def digest(pattern: HeadPattern) -> str:
    """Twelve digits that differ for different alphas: which heads are gated, and how they are ranked."""
    alpha = np.where(pattern.gated, pattern.alpha, np.float32("nan")).astype("<f4")
    return hashlib.sha256(f"{alpha.shape}".encode() + alpha.tobytes()).hexdigest()[:12]


def chosen(policy: HeadPolicy) -> list[str]:
    """The retrieval heads of a policy, each as "layer.head"."""
    return [f"{n}.{head}" for n, layer in enumerate(policy.layers) for head in layer.retrieval]


def overlap(first: HeadPattern, second: HeadPattern, ratio: float) -> float:
    """Share of the retrieval heads at ``ratio`` that two patterns have in common, 0 to 1."""
    mine, theirs = (
        set(chosen(pattern.policy(retrieval_ratio=ratio))) for pattern in (first, second)
    )
    return len(mine & theirs) / len(mine)


def rank_correlation(first: HeadPattern, second: HeadPattern) -> float:
    """Spearman's correlation of two patterns' alphas over gated heads; ties share their mean rank."""
    ranks = [alphas(torch.as_tensor(x.alpha[x.gated])).double() for x in (first, second)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1].nan_to_num())

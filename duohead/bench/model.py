"""Whole models by the clock: time to read a prompt in chunks, time of a decode step, memory; ours and transformers'.

A decode step cannot be faster than reading every weight and the cache once, so each step is held against that floor at
the read rate measured in this process. Decode steps run on a synthetic past (`duohead.bench.filling`), since their cost
depends on lengths alone. Run `duohead bench model --preset decode-table --json results/model-h100.jsonl`.
"""

from __future__ import annotations

import gc
import logging
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from duohead.attention import choose
from duohead.bench.cases import Case
from duohead.bench.ceilings import Ceilings
from duohead.bench.jobs import Job, read_bytes
from duohead.bench.kernels import OUT_OF_MEMORY, Place
from duohead.bench.models import build, config, weight_bytes
from duohead.bench.runners import Runner, runner
from duohead.bench.shares import Share, attention_share
from duohead.bench.timing import Timing, first_run, measure, timing_of
from duohead.bench.verify import verify
from duohead.policy import HeadPolicy
from duohead.shapes import layer_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
# Decode steps of one run, whose mean is one time, and runs; the first run is not counted.
BURST, BURSTS = 8, 8
# The rehearsal reads two chunks of at most so many tokens: one without a past and one with.
WARM_CHUNK = 8192


@dataclass(frozen=True)
class _Outcome:
    """What every result has: the job, the policy it ran under, and how it ended."""

    job: Job
    policy: HeadPolicy

    @property
    def failed(self) -> bool:
        """Whether something went wrong that is not a lack of memory."""
        told = getattr(self, "timing", None) or getattr(self, "found", None)
        return isinstance(told, str) and told.startswith("failed")

    def attention(self, device: str) -> str:
        """Name of the attention implementation that ran on this kind of device."""
        return "sdpa" if self.job.method == "transformers" else choose(self.job.impl, device)


@dataclass(frozen=True)
class ModelResult(_Outcome):
    """What became of one job: a time and bytes, or the reason why there are none.

    ``timing`` is per decode step, or of the whole prefill. ``weight_bytes_read`` and ``kv_bytes_read`` are what one
    decode step cannot but read. ``error`` and ``budget`` are those of `duohead.bench.verify`; None for transformers.
    """

    timing: Timing | str
    weight_bytes: int = 0
    weight_bytes_read: int = 0
    kv_bytes: int = 0
    kv_bytes_read: int = 0
    peak_bytes: int = 0
    prepare_seconds: float = 0.0
    error: float | None = None
    budget: float | None = None

    def floor_ms(self, limits: Ceilings) -> float | None:
        """Least time of a decode step: weights and cache read once at the measured rate; None for prefill."""
        if self.job.measure != "decode":
            return None
        return (self.weight_bytes_read + self.kv_bytes_read) / 1e6 / limits.read_gb_per_s

    def numbers(self, limits: Ceilings) -> dict[str, Any]:
        """For a record: every number with its unit in the name; no memory left is written as such."""
        what = self.job.measure
        if isinstance(self.timing, str):
            return {f"{what}_median_ms": self.timing, **limits.numbers()}
        found = {f"{what}_{name}": value for name, value in asdict(self.timing).items()}
        for name in ("weight_bytes", "kv_bytes", "peak_bytes", "prepare_seconds"):
            found[name] = getattr(self, name)
        if self.error is not None:
            found |= {"logits_error": self.error, "logits_error_budget": self.budget}
        floor = self.floor_ms(limits)
        tokens = self.job.batch * self.job.length
        if floor is not None:
            found |= {
                "weight_bytes_read": self.weight_bytes_read,
                "kv_bytes_read": self.kv_bytes_read,
                "floor_ms": floor,
                "over_floor": self.timing.median_ms / floor,
            }
            tokens = self.job.batch
        found["tokens_per_s"] = 1000 * tokens / self.timing.median_ms
        return found | limits.numbers()


@dataclass(frozen=True)
class ShareResult(_Outcome):
    """What part of the attention time of a prefill the streaming heads take, or why it was not measured."""

    found: Share | str

    def numbers(self, limits: Ceilings) -> dict[str, Any]:
        """For a record."""
        if isinstance(self.found, str):
            return {"streaming_share": self.found, **limits.numbers()}
        return {**self.found.numbers(), **limits.numbers()}


class ModelBench:
    """Does jobs one after the other; a model is built once for all jobs in a row that use it.

    Args:
        device: where.
        dtype: dtype of the weights and of "auto" storage.
        seconds: repeat a prefill for about so long; it is done once at least.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, *, seconds: float = 1.0) -> None:
        self.device, self.dtype, self.seconds = device, dtype, seconds
        self._built: tuple[str, str] | None = None
        self._model: Any = None
        self._checked: dict[tuple[str, ...], tuple[float, float]] = {}

    def model(self, name: str, weights: str) -> PreTrainedModel:
        """The model of a preset; the one before it is dropped first."""
        if self._built != (name, weights):
            self._model, self._built = None, None
            release(self.device)
            self._model = build(name, device=self.device, dtype=self.dtype, weights=weights)
            self._built = (name, weights)
        return self._model

    def run(self, job: Job, *, strict: bool = True) -> ModelResult | ShareResult:
        """Do one job; too little memory is a result, and so is any failure unless ``strict``.

        Raises:
            ValueError: the results are off, or the job cannot be done here.
        """
        try:
            return self.share(job) if job.measure == "share" else self._timed(job)
        except Exception as error:
            if strict:
                raise
            logger.warning("%s failed", job, exc_info=error)
            reason = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            kind = ShareResult if job.measure == "share" else ModelResult
            return kind(job, job.policy(), reason)
        finally:
            release(self.device)

    def _timed(self, job: Job) -> ModelResult:
        failed = ModelResult(job, job.policy(), OUT_OF_MEMORY)
        try:
            model = self.model(job.model, job.weights)
            whole, read = weight_bytes(model)
            policy = failed.policy.bind(model)
            failed = replace(failed, policy=policy, weight_bytes=whole, weight_bytes_read=read)
            if job.method != "transformers":
                error, budget = self._verified(job, policy, model)
                failed = replace(failed, error=error, budget=budget)
            release(self.device)
            reset_peak(self.device)
            return self._with_runner(failed, model)
        except torch.OutOfMemoryError:
            return failed

    def share(self, job: Job) -> ShareResult:
        """Streaming heads' part of the attention time of one layer's prefill."""
        made = config(job.model)
        case = Case(
            "prefill",
            job.length,
            made.num_attention_heads,
            made.num_key_value_heads,
            layer_shapes(made)[0].head_dim,
            job.batch,
            job.sink,
            job.recent,
            job.ratio,
            retrieval_dtype=job.retrieval_dtype,
            streaming_dtype=job.streaming_dtype,
        )
        place = Place(self.device, self.dtype, min(self.seconds, 0.1))
        try:
            found = attention_share(case, place, chunk=job.chunk, impl=job.impl)
        except torch.OutOfMemoryError:
            return ShareResult(job, job.policy(), OUT_OF_MEMORY)
        return ShareResult(job, job.policy(), found)

    def _verified(
        self, job: Job, policy: HeadPolicy, model: PreTrainedModel
    ) -> tuple[float, float]:
        """Error and budget of the model's logits under this policy, looked at once."""
        key = (job.model, job.weights, policy.digest(), job.impl)
        if key not in self._checked:
            self._checked[key] = verify(model, policy, impl=job.impl)
        return self._checked[key]

    def _with_runner(self, blank: ModelResult, model: PreTrainedModel) -> ModelResult:
        job = blank.job
        room = job.length + (BURST * BURSTS if job.measure == "decode" else 0)
        subject = runner(
            job.method,
            model,
            blank.policy,
            batch=job.batch,
            max_length=room,
            compile=job.compile,
            impl=job.impl,
        )
        try:
            timing = (
                self._prefill(job, subject)
                if job.measure == "prefill"
                else self._decode(job, subject)
            )
            return replace(
                blank,
                timing=timing,
                kv_bytes=subject.kv_bytes(),
                kv_bytes_read=read_bytes(blank.policy, job.length, job.batch),
                peak_bytes=peak_bytes(self.device),
                prepare_seconds=subject.prepare_seconds,
            )
        finally:
            subject.close()

    def _prefill(self, job: Job, subject: Runner) -> Timing:
        vocabulary = self._model.config.vocab_size
        tokens = torch.randint(vocabulary, (job.batch, job.length), device=self.device)
        step = min(job.chunk, WARM_CHUNK)
        rehearsal = tokens[:, : 2 * step]
        _, first = first_run(lambda: subject.prefill(rehearsal, step), device=self.device)
        reset_peak(self.device)
        times: list[float] = []
        while not times or sum(times) < 1000 * self.seconds:
            subject.reset()
            release(self.device)
            times.append(
                first_run(lambda: subject.prefill(tokens, job.chunk), device=self.device)[1]
            )
        return timing_of(times, first_ms=first)

    def _decode(self, job: Job, subject: Runner) -> Timing:
        subject.prepare()
        reset_peak(self.device)
        subject.fill(job.length)
        return decode_timing(subject, device=self.device)


def decode_timing(subject: Runner, *, device: torch.device) -> Timing:
    """Time of a decode step: runs of BURST steps one after the other on a filled cache, the first not counted."""
    found = measure(lambda: subject.steps(BURST), device=device, seconds=0.0, least=BURSTS - 1)
    per_step: dict[str, Any] = {
        name: value / BURST for name, value in asdict(found).items() if name.endswith("_ms")
    }
    return replace(found, **per_step)


def release(device: torch.device) -> None:
    """Give unused memory back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reset_peak(device: torch.device) -> None:
    """Count peak memory from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Most bytes that tensors took at a time since `reset_peak`; 0 on a CPU, which does not count."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0

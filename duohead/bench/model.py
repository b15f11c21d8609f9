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
from torch import Tensor

from duohead.attention import choose
from duohead.bench.cases import Case
from duohead.bench.ceilings import Ceilings
from duohead.bench.chosen import kernels_of
from duohead.bench.jobs import Job, read_bytes
from duohead.bench.kernels import OUT_OF_MEMORY, Place
from duohead.bench.models import build, config, weight_bytes
from duohead.bench.runners import EngineRunner, Runner, runner
from duohead.bench.shares import Share, attention_share
from duohead.bench.timing import Timing, first_run, measure, timing_of
from duohead.bench.verify import verify
from duohead.policy import HeadPolicy
from duohead.shapes import layer_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
# Decode steps of one run, whose mean is one time, runs, and all steps; the first run is not counted.
BURST, BURSTS = 8, 8
STEPS = BURST * BURSTS
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

    def attention(self, device: torch.device) -> str:
        """Name of the attention implementation that ran on this device."""
        if self.job.method == "transformers":
            return "sdpa"
        return choose(self.job.impl, device.type, index=device.index)


@dataclass(frozen=True)
class ModelResult(_Outcome):
    """What became of one job: a time and bytes, or the reason why there are none.

    ``timing`` is per decode step, or of the whole prefill. ``weight_bytes_read`` and ``kv_bytes_read`` are what one
    decode step cannot but read. ``error`` and ``budget`` are those of `duohead.bench.verify`; None for transformers.
    ``kernels`` are those that attended (`duohead.bench.chosen`), in prefill those of the last chunk.
    """

    timing: Timing | str
    weight_bytes: int = 0
    weight_bytes_read: int = 0
    kv_bytes: int = 0
    kv_bytes_read: int = 0
    peak_bytes: int = 0
    prepare_seconds: float = 0.0
    kernels: str = ""
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
        for name in ("weight_bytes", "kv_bytes", "peak_bytes", "prepare_seconds", "kernels"):
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
        self._kept: _Kept | None = None
        self._checked: dict[tuple[str, ...], tuple[float, float]] = {}

    def model(self, name: str, weights: str) -> PreTrainedModel:
        """The model of a preset; the one before it is dropped first."""
        if self._built != (name, weights):
            self.drop()
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
            self.drop()
            if strict:
                raise
            logger.warning("%s failed", job, exc_info=error)
            reason = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            kind = ShareResult if job.measure == "share" else ModelResult
            return kind(job, job.policy(), reason)
        finally:
            if job.method == "transformers":
                self.drop()
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
            self.drop()
            return failed

    def share(self, job: Job) -> ShareResult:
        """Streaming heads' part of the attention time of one layer's prefill."""
        self.drop()
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
            self.drop()
            self._checked[key] = verify(model, policy, impl=job.impl)
        return self._checked[key]

    def _with_runner(self, blank: ModelResult, model: PreTrainedModel) -> ModelResult:
        job = blank.job
        kept = self._runner(job, blank.policy, model)
        measured = self._prefill if job.measure == "prefill" else self._decode
        timing, peak = measured(job, kept), peak_bytes(self.device)
        return replace(
            blank,
            timing=timing,
            kernels=self._kernels(job, kept.runner),
            kv_bytes=kept.runner.kv_bytes(),
            kv_bytes_read=read_bytes(blank.policy, mean_length(job.length), job.batch),
            peak_bytes=peak,
            prepare_seconds=kept.runner.prepare_seconds,
        )

    def _kernels(self, job: Job, subject: Runner) -> str:
        """What attends in a decode step, or in the last chunk of a prefill, of this runner."""
        if not isinstance(subject, EngineRunner):
            return "sdpa"
        new = 1 if job.measure == "decode" else min(job.chunk, job.length)
        subject.reset()
        subject.fill(job.length - new)
        heads = int(self._model.config.num_attention_heads)
        found = kernels_of(subject.engine.cache, heads=heads, tokens=new, impl=job.impl)
        subject.reset()
        return found

    def _runner(self, job: Job, policy: HeadPolicy, model: PreTrainedModel) -> _Kept:
        """The runner of the job before, if it does for this one too, else a new one."""
        room = max(job.room, job.length)
        key = (job.method, policy.digest(), job.batch, job.compile, job.impl, room, job.measure)
        if self._kept is None or self._kept.key != key:
            self.drop()
            made = runner(
                job.method,
                model,
                policy,
                batch=job.batch,
                max_length=room,
                compile=job.compile,
                impl=job.impl,
            )
            self._kept = _Kept(key, made)
        return self._kept

    def drop(self) -> None:
        """Give back the cache of the last job; the model stays."""
        kept, self._kept = self._kept, None
        if kept is not None:
            kept.runner.close()
        release(self.device)

    def _prefill(self, job: Job, kept: _Kept) -> Timing:
        vocabulary = self._model.config.vocab_size
        tokens = torch.randint(vocabulary, (job.batch, job.length), device=self.device)
        subject = kept.runner
        if isinstance(subject, EngineRunner) and not subject.engine.compiles:
            # What compile="auto" compiles for this length counts as preparing.
            subject.reset()
            subject.engine.prepare(tokens=job.length)
        if kept.first_ms is None:
            step = min(job.chunk, WARM_CHUNK)
            kept.first_ms = self._clocked(subject, tokens[:, : 2 * step], step)
        reset_peak(self.device)
        times: list[float] = []
        while not times or sum(times) < 1000 * self.seconds:
            times.append(self._clocked(subject, tokens, job.chunk))
        return timing_of(times, first_ms=kept.first_ms)

    def _clocked(self, subject: Runner, tokens: Tensor, chunk: int) -> float:
        """Milliseconds of one prefill into an empty cache."""
        subject.reset()
        release(self.device)
        return first_run(lambda: subject.prefill(tokens, chunk), device=self.device)[1]

    def _decode(self, job: Job, kept: _Kept) -> Timing:
        reset_peak(self.device)
        kept.runner.fill(max(job.length - STEPS, 1))
        return decode_timing(kept.runner, device=self.device)


@dataclass
class _Kept:
    """A runner, what it is for, and the milliseconds of its rehearsal once there was one."""

    key: tuple[object, ...]
    runner: Runner
    first_ms: float | None = None


def mean_length(length: int) -> int:
    """Tokens that the steps counted by `decode_timing` read on average, when they end at ``length``."""
    return max(length - (STEPS - BURST) // 2, 1)


def decode_timing(subject: Runner, *, device: torch.device) -> Timing:
    """Time of a decode step on a filled cache, the mean of BURST steps a run; STEPS in all.

    The first run, which may compile and capture, is not counted; ``first_ms`` is all of it.
    """
    found = measure(lambda: subject.steps(BURST), device=device, seconds=0.0, least=BURSTS - 1)
    median, low, high = (ms / BURST for ms in (found.median_ms, found.p20_ms, found.p80_ms))
    return replace(found, median_ms=median, p20_ms=low, p80_ms=high)


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

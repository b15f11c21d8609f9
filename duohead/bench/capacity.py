"""How many tokens fit on a card, measured: the measurement that `duohead.bench.fitting`'s estimate has to agree with.

An estimate that nobody filled is a hope. `measure_capacity` allocates the estimated cache, fills it, decodes at that
length, shows that a few per cent more do not fit, and reads a real prompt, which takes longest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from duohead.bench.ceilings import Ceilings
from duohead.bench.chosen import kernels_of
from duohead.bench.fitting import Estimate, estimate, gib
from duohead.bench.jobs import Job, read_bytes
from duohead.bench.kernels import OUT_OF_MEMORY
from duohead.bench.model import (
    BURST,
    STEPS,
    WARM_CHUNK,
    ModelBench,
    decode_timing,
    mean_length,
    peak_bytes,
    release,
    reset_peak,
)
from duohead.bench.models import config, weight_bytes
from duohead.bench.runners import EngineRunner
from duohead.bench.timing import Timing, first_run
from duohead.bench.verify import verify
from duohead.cache import DuoCache
from duohead.policy import HeadPolicy

logger = logging.getLogger(__name__)
# More than the estimate by this share must not fit, or the estimate is too low.
MARGIN = 0.03
# What is tried if the estimate does not fit, as shares taken off it.
BACKWARDS = (0.0, 0.01, 0.02, 0.03)


@dataclass(frozen=True)
class CapacityResult:
    """An estimate and what became of it: times of a decode step at that length, and of a real prefill.

    ``kernels`` and ``prefill_kernels`` are those that attended (`duohead.bench.chosen`), in a prefill those of its
    last chunk.
    """

    job: Job
    policy: HeadPolicy
    estimate: Estimate
    tokens: int
    timing: Timing | str
    weight_bytes: int = 0
    weight_bytes_read: int = 0
    kv_bytes: int = 0
    kv_bytes_read: int = 0
    peak_bytes: int = 0
    free_bytes: int = 0
    beyond: int = 0
    beyond_fits: bool | None = None
    prefill_tokens: int = 0
    prefill_seconds: float | str | None = None
    prefill_peak_bytes: int = 0
    prefill_kernels: str = ""
    kernels: str = ""
    prepare_seconds: float = 0.0
    error: float | None = None
    budget: float | None = None

    def numbers(self, limits: Ceilings) -> dict[str, Any]:
        """For a record: every number with its unit in the name."""
        found: dict[str, Any] = {
            f"estimated_{name}": value for name, value in asdict(self.estimate).items()
        }
        found["tokens"] = self.tokens
        found |= limits.numbers()
        if isinstance(self.timing, str):
            return found | {"decode_median_ms": self.timing}
        floor = (self.weight_bytes_read + self.kv_bytes_read) / 1e6 / limits.read_gb_per_s
        found |= {f"decode_{name}": value for name, value in asdict(self.timing).items()}
        found |= {"floor_ms": floor, "over_floor": self.timing.median_ms / floor}
        for name in (
            "weight_bytes", "weight_bytes_read", "kv_bytes", "kv_bytes_read", "peak_bytes", "free_bytes",
            "prepare_seconds", "kernels",
        ):  # fmt: skip
            found[name] = getattr(self, name)
        found |= {"logits_error": self.error, "logits_error_budget": self.budget}
        if self.beyond_fits is not None:
            found |= {
                "beyond_tokens": self.beyond,
                "beyond": "fits" if self.beyond_fits else OUT_OF_MEMORY,
            }
        if self.prefill_seconds is not None:
            found |= {
                "prefill_tokens": self.prefill_tokens,
                "prefill_seconds": self.prefill_seconds,
                "prefill_peak_bytes": self.prefill_peak_bytes,
                "prefill_kernels": self.prefill_kernels,
            }
        return found


def measure_capacity(
    bench: ModelBench,
    job: Job,
    *,
    memory_bytes: int,
    tokens: int | None = None,
    prefill: int = 0,
    tell: Callable[[str], object] = lambda _: None,
) -> Iterator[CapacityResult]:
    """Estimate, allocate, fill, decode; then try a few per cent more; then a real prefill, if asked for.

    If the estimate turns out too high, lengths down to MARGIN below it are tried. The prefill has a cache of its own
    and is not compiled: it shows that the pipeline holds, not how fast it can be.

    Args:
        bench: builds the model.
        job: model, policy, weights, batch and chunk; its length is not used.
        memory_bytes: memory of the card, for the estimate.
        tokens: length to measure at; None for the estimate.
        prefill: tokens of a real prefill; 0 for none.
        tell: called with what is about to be done, before everything that takes seconds.

    Yields:
        The result after every stage, each with all that was measured before.

    Raises:
        ValueError: the weights do not fit, or the model's logits are off.
    """
    found = estimate(
        config(job.model),
        replace(job.policy(), native_dtype=str(bench.dtype).removeprefix("torch.")),
        memory_bytes=memory_bytes,
        weights=job.weights,
        batch=job.batch,
    )
    tell(f"{found.tokens:,} tokens estimated; making {job.model} with {job.weights} weights")
    model = bench.model(job.model, job.weights)
    policy = job.policy().bind(model)
    whole, read = weight_bytes(model)
    tell("comparing its logits with those of the reference implementation")
    error, budget = verify(model, policy, impl=job.impl)
    result = CapacityResult(
        job, policy, found, found.tokens, OUT_OF_MEMORY, whole, read, error=error, budget=budget
    )
    for length in [tokens] if tokens else [int(found.tokens * (1 - step)) for step in BACKWARDS]:
        result = replace(result, tokens=length)
        tell(f"allocating a cache of {length:,} tokens, preparing the engine")
        with _running(result, model, bench.device, tokens=length, compile=job.compile) as subject:
            if subject is None:
                continue
            try:
                result = _decoded(result, subject, bench.device, tell)
            except torch.OutOfMemoryError:
                continue
            yield result
        break
    if isinstance(result.timing, str):
        yield result
    elif bench.device.type == "cuda" and tokens is None:
        beyond = int(found.tokens * (1 + MARGIN))
        tell(f"trying {beyond:,} tokens, which shall not fit")
        fits = _fits(policy, model, beyond, job.batch)
        result = replace(result, beyond=beyond, beyond_fits=fits)
        yield result
    if prefill:
        yield _with_prefill(result, model, bench.device, prefill, tell)


@contextmanager
def _running(
    result: CapacityResult,
    model: Any,
    device: torch.device,
    *,
    tokens: int,
    compile: bool | str,
) -> Iterator[EngineRunner | None]:
    """An engine with a cache of ``tokens``, or None if that does not fit; memory is given back afterwards."""
    job, subject = result.job, None
    release(device)
    reset_peak(device)
    try:
        with suppress(torch.OutOfMemoryError):
            subject = EngineRunner(
                model,
                result.policy,
                batch=job.batch,
                max_length=tokens,
                compile=compile,
                impl=job.impl,
            )
        yield subject
    finally:
        if subject is not None:
            subject.close()
        release(device)


def _decoded(
    result: CapacityResult,
    subject: EngineRunner,
    device: torch.device,
    tell: Callable[[str], object],
) -> CapacityResult:
    """The same with the time of a decode step that ends at the last token."""
    kernels = _kernels(result.job, subject, past=0, new=1)
    tell(f"filling the cache of {gib(subject.kv_bytes())}")
    subject.fill(max(result.tokens - STEPS, 1))
    tell(f"decoding {STEPS} steps, capturing the first")
    timing, peak = decode_timing(subject, device=device), peak_bytes(device)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    return replace(
        result,
        timing=timing,
        kernels=kernels,
        kv_bytes=subject.kv_bytes(),
        kv_bytes_read=read_bytes(result.policy, mean_length(result.tokens), result.job.batch),
        peak_bytes=peak,
        free_bytes=free,
        prepare_seconds=subject.prepare_seconds,
    )


def _with_prefill(
    result: CapacityResult,
    model: Any,
    device: torch.device,
    count: int,
    tell: Callable[[str], object],
) -> CapacityResult:
    """The same with a real prefill of ``count`` tokens and a few decode steps after it, or the reason why not."""
    result = replace(result, prefill_tokens=count, prefill_seconds=OUT_OF_MEMORY)
    tokens = torch.randint(model.config.vocab_size, (result.job.batch, count), device=device)
    step, chunk = min(result.job.chunk, WARM_CHUNK), result.job.chunk
    done = 0

    def count_up(more: int) -> None:
        nonlocal done
        done += more
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the host is ahead, and this shall be true
        tell(f"read {done:,} of {count:,} tokens")

    tell(f"a real prompt of {count:,} tokens in chunks of {chunk:,}, after a rehearsal")
    with _running(result, model, device, tokens=count + BURST, compile=False) as subject:
        if subject is None:
            return result
        try:
            subject.prefill(tokens[:, : 2 * step], step)  # compiles kernels
            release(device)
            new = min(chunk, count)
            kernels = _kernels(result.job, subject, past=count - new, new=new)
            reset_peak(device)
            tell("rehearsed; reading")
            _, spent = first_run(
                lambda: subject.prefill(tokens, chunk, progress=count_up), device=device
            )
            tell(f"decoding {BURST} steps after it")
            subject.steps(BURST)
        except torch.OutOfMemoryError:
            return result
        except Exception as error:
            # What was measured before is worth keeping.
            logger.warning("prefill of %d tokens failed", count, exc_info=error)
            reason = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return replace(result, prefill_seconds=reason)
        return replace(
            result,
            prefill_seconds=spent / 1000,
            prefill_peak_bytes=peak_bytes(device),
            prefill_kernels=kernels,
        )


def _kernels(job: Job, subject: EngineRunner, *, past: int, new: int) -> str:
    """What attends to ``new`` tokens after ``past`` ones in this runner, which forgets what it holds."""
    subject.reset()
    if past:
        subject.fill(past)
    heads = int(config(job.model).num_attention_heads)
    found = kernels_of(subject.engine.cache, heads=heads, tokens=new, impl=job.impl)
    subject.reset()
    return found


def _fits(policy: HeadPolicy, model: Any, tokens: int, batch: int) -> bool:
    """Whether a cache for ``tokens`` tokens can be allocated beside the model."""
    cache = DuoCache(policy, model, max_length=tokens)
    try:
        cache.allocate(batch, dtype=model.dtype, device=model.device)
        torch.cuda.synchronize(model.device)
    except torch.OutOfMemoryError:
        return False
    finally:
        del cache
        release(model.device)
    return True


def limit_memory(device: torch.device, memory_bytes: int) -> None:
    """Let tensors take no more than a card of that size would leave them, on a GPU that has more."""
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    if memory_bytes < total:
        outside = total - free - torch.cuda.memory_reserved(device)
        torch.cuda.set_per_process_memory_fraction(max(memory_bytes - outside, 0) / total, device)

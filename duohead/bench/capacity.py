"""How many tokens fit on a card: an estimate from shapes alone, and the measurement that it has to agree with.

Memory holds the weights, the cache (`HeadPolicy.kv_bytes` counts it to the byte), the activations of the longest
forward, and what the runtime keeps for itself. `estimate` adds these up; `measure_capacity` allocates that cache, fills
it, decodes at that length, and shows that a few per cent more do not fit.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from duohead.bench.ceilings import Ceilings
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
from duohead.bench.models import config, estimated_weight_bytes, weight_bytes
from duohead.bench.runners import EngineRunner
from duohead.bench.timing import Timing, first_run
from duohead.bench.verify import verify
from duohead.cache import DuoCache
from duohead.models.engine import REHEARSAL
from duohead.policy import HeadPolicy

logger = logging.getLogger(__name__)
# The CUDA context, loaded kernels, libraries' workspaces and captured graphs.
RUNTIME_BYTES = 768 * 2**20
# More than the estimate by this share must not fit, or the estimate is too low.
MARGIN = 0.03
MOST_TOKENS = 1 << 40
# What is tried if the estimate does not fit, as shares taken off it.
BACKWARDS = (0.0, 0.01, 0.02, 0.03)


@dataclass(frozen=True)
class Estimate:
    """What fills a card, in bytes, and the tokens that its cache holds."""

    tokens: int
    memory_bytes: int
    weight_bytes: int
    kv_bytes: int
    activation_bytes: int
    runtime_bytes: int = RUNTIME_BYTES


def estimate(
    made: Any,
    policy: HeadPolicy,
    *,
    memory_bytes: int,
    weights: str = "bf16",
    chunk: int = 1,
    batch: int = 1,
) -> Estimate:
    """Tokens that fit beside everything else.

    Args:
        made: transformers config of the model.
        policy: which heads keep what; bound to the model here.
        memory_bytes: memory of the card.
        weights: "bf16", "int8" or "int4".
        chunk: tokens per forward; 1 for decoding alone.
        batch: rows.

    Raises:
        ValueError: not even the weights fit.
    """
    whole = estimated_weight_bytes(made, weights)
    acts = activation_bytes(made, chunk=chunk, batch=batch, weights=weights)
    free = memory_bytes - whole - acts - RUNTIME_BYTES
    bound = policy.bind(made, dtype=policy.native_dtype)
    tokens = tokens_within(bound, free, batch=batch)
    if tokens < 1:
        raise ValueError(
            f"--memory must exceed weights, activations and runtime ({gib(whole + acts + RUNTIME_BYTES)}), got "
            f"{gib(memory_bytes)}; use smaller weights or a smaller chunk"
        )
    return Estimate(tokens, memory_bytes, whole, bound.kv_bytes(tokens, batch), acts)


def tokens_within(policy: HeadPolicy, free_bytes: int, *, batch: int = 1) -> int:
    """The most tokens whose cache takes at most ``free_bytes``, for a policy that is bound to a model.

    A policy that no length fills (no retrieval heads) gives MOST_TOKENS.
    """
    low, high = 0, MOST_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        if policy.kv_bytes(middle, batch) <= free_bytes:
            low = middle
        else:
            high = middle - 1
    return low


def activation_bytes(made: Any, *, chunk: int, batch: int = 1, weights: str = "bf16") -> int:
    """Bytes that a forward of ``chunk`` tokens takes at its peak, beside weights and cache.

    The feed-forward is the widest place: its two inner products, their product and the residual stream in 16 bits. The
    last position alone goes through the vocabulary, in fp32 too. Quantised weights are decoded one layer at a time.
    """
    text = made.get_text_config(decoder=True)
    rows = max(chunk * batch, REHEARSAL)
    wide = rows * (3 * text.intermediate_size + 4 * text.hidden_size) * 2
    logits = batch * text.vocab_size * (2 + 4 + 4)
    decoded = 0 if weights == "bf16" else text.vocab_size * text.hidden_size * 2
    return wide + logits + decoded


@dataclass(frozen=True)
class CapacityResult:
    """An estimate and what became of it: times of a decode step at that length, and of a real prefill."""

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
            "prepare_seconds",
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
            }
        return found


def measure_capacity(
    bench: ModelBench,
    job: Job,
    *,
    memory_bytes: int,
    tokens: int | None = None,
    prefill: int = 0,
) -> Iterator[CapacityResult]:
    """Estimate, allocate, fill, decode; then a real prefill, if asked for; then try a few per cent more.

    If the estimate turns out too high, lengths down to MARGIN below it are tried. The prefill has a cache of its own
    and is not compiled: it shows that the pipeline holds, not how fast it can be.

    Args:
        bench: builds the model.
        job: model, policy, weights, batch and chunk; its length is not used.
        memory_bytes: memory of the card, for the estimate.
        tokens: length to measure at; None for the estimate.
        prefill: tokens of a real prefill; 0 for none.

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
    model = bench.model(job.model, job.weights)
    policy = job.policy().bind(model)
    whole, read = weight_bytes(model)
    error, budget = verify(model, policy, impl=job.impl)
    result = CapacityResult(
        job, policy, found, found.tokens, OUT_OF_MEMORY, whole, read, error=error, budget=budget
    )
    for length in [tokens] if tokens else [int(found.tokens * (1 - step)) for step in BACKWARDS]:
        result = replace(result, tokens=length)
        with _running(result, model, bench.device, tokens=length, compile=job.compile) as subject:
            if subject is None:
                continue
            try:
                result = _decoded(result, subject, bench.device)
            except torch.OutOfMemoryError:
                continue
            yield result
        break
    if isinstance(result.timing, str):
        yield result
    if prefill:
        result = _with_prefill(result, model, bench.device, prefill)
        yield result
    if isinstance(result.timing, str):
        return
    if bench.device.type == "cuda" and tokens is None:
        beyond = int(found.tokens * (1 + MARGIN))
        yield replace(result, beyond=beyond, beyond_fits=_fits(policy, model, beyond, job.batch))


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


def _decoded(result: CapacityResult, subject: EngineRunner, device: torch.device) -> CapacityResult:
    """The same with the time of a decode step that ends at the last token."""
    subject.fill(max(result.tokens - STEPS, 1))
    timing = decode_timing(subject, device=device)
    return replace(
        result,
        timing=timing,
        kv_bytes=subject.kv_bytes(),
        kv_bytes_read=read_bytes(result.policy, mean_length(result.tokens), result.job.batch),
        peak_bytes=peak_bytes(device),
        free_bytes=torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0,
        prepare_seconds=subject.prepare_seconds,
    )


def _with_prefill(
    result: CapacityResult, model: Any, device: torch.device, count: int
) -> CapacityResult:
    """The same with a real prefill of ``count`` tokens and a few decode steps after it, or the reason why not."""
    result = replace(result, prefill_tokens=count, prefill_seconds=OUT_OF_MEMORY)
    tokens = torch.randint(model.config.vocab_size, (result.job.batch, count), device=device)
    step = min(result.job.chunk, WARM_CHUNK)
    with _running(result, model, device, tokens=count + BURST, compile=False) as subject:
        if subject is None:
            return result
        try:
            subject.prefill(tokens[:, : 2 * step], step)  # compiles kernels
            release(device)
            _, spent = first_run(lambda: subject.prefill(tokens, result.job.chunk), device=device)
            subject.steps(BURST)
        except torch.OutOfMemoryError:
            return result
        except Exception as error:
            # What was measured before is worth keeping.
            logger.warning("prefill of %d tokens failed", count, exc_info=error)
            reason = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return replace(result, prefill_seconds=reason)
        return replace(result, prefill_seconds=spent / 1000, prefill_peak_bytes=peak_bytes(device))


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


def device_memory(device: torch.device) -> int:
    """Bytes of memory of a GPU, or of this machine for the CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    import os

    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def gib(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB"

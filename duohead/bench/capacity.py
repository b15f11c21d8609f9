"""How many tokens fit on a card: an estimate from shapes alone, and the measurement that it has to agree with.

Memory holds the weights, the cache (`HeadPolicy.kv_bytes` counts it to the byte), the activations of the longest
forward, and what the runtime keeps for itself. `estimate` adds these up; `measure_capacity` allocates that cache, fills
it, decodes at that length, and shows that a few per cent more do not fit.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from duohead.bench.ceilings import Ceilings
from duohead.bench.jobs import Job, read_bytes
from duohead.bench.kernels import OUT_OF_MEMORY
from duohead.bench.model import (
    BURST,
    BURSTS,
    ModelBench,
    decode_timing,
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

# The CUDA context, loaded kernels, libraries' workspaces and captured graphs.
RUNTIME_BYTES = 768 * 2**20
# More than the estimate by this share must not fit, or the estimate is too low.
MARGIN = 0.03
MOST_TOKENS = 1 << 40


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
    prefill_decode_ms: float | None = None
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
                "prefill_decode_ms": self.prefill_decode_ms,
            }
        return found


def measure_capacity(
    bench: ModelBench,
    job: Job,
    *,
    memory_bytes: int,
    tokens: int | None = None,
    prefill: int = 0,
) -> CapacityResult:
    """Estimate, allocate, fill, decode; then a real prefill, if asked for, on the same cache.

    Args:
        bench: builds the model.
        job: model, policy, weights, batch and chunk; its length is not used.
        memory_bytes: memory of the card, for the estimate.
        tokens: length to measure at; None for the estimate.
        prefill: tokens of a real prefill; 0 for none.

    Raises:
        ValueError: the weights do not fit, or the model's logits are off.
    """
    made = config(job.model)
    chunk = job.chunk if prefill else 1
    found = estimate(
        made,
        replace(job.policy(), native_dtype=str(bench.dtype).removeprefix("torch.")),
        memory_bytes=memory_bytes,
        weights=job.weights,
        chunk=chunk,
        batch=job.batch,
    )
    model = bench.model(job.model, job.weights)
    policy = job.policy().bind(model)
    length = tokens or found.tokens
    whole, read = weight_bytes(model)
    result = CapacityResult(job, policy, found, length, OUT_OF_MEMORY, whole, read)
    error, budget = verify(model, policy, impl=job.impl)
    result = replace(result, error=error, budget=budget)
    release(bench.device)
    reset_peak(bench.device)
    try:
        result = _measured(result, model, bench.device, prefill)
    except torch.OutOfMemoryError:
        return result
    finally:
        release(bench.device)
    if bench.device.type == "cuda" and tokens is None and not isinstance(result.timing, str):
        beyond = int(length * (1 + MARGIN))
        fits = _fits(policy, model, beyond, job.batch)
        result = replace(result, beyond=beyond, beyond_fits=fits)
    return result


def _measured(
    result: CapacityResult, model: Any, device: torch.device, prefill: int
) -> CapacityResult:
    job = result.job
    subject = EngineRunner(
        model,
        result.policy,
        batch=job.batch,
        max_length=result.tokens,
        compile=job.compile,
        impl=job.impl,
    )
    try:
        subject.prepare()
        subject.fill(result.tokens - BURST * BURSTS)
        timing = decode_timing(subject, device=device)
        result = replace(
            result,
            timing=timing,
            kv_bytes=subject.kv_bytes(),
            kv_bytes_read=read_bytes(result.policy, result.tokens, job.batch),
            peak_bytes=peak_bytes(device),
            free_bytes=torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0,
            prepare_seconds=subject.prepare_seconds,
        )
        return _with_prefill(result, subject, device, prefill) if prefill else result
    finally:
        subject.close()


def _with_prefill(
    result: CapacityResult, subject: EngineRunner, device: torch.device, count: int
) -> CapacityResult:
    """The same with a real prefill of ``count`` tokens, and a decode step after it."""
    vocabulary = subject.engine.model.config.vocab_size
    tokens = torch.randint(vocabulary, (result.job.batch, count), device=device)
    try:
        _, spent = first_run(lambda: subject.prefill(tokens, result.job.chunk), device=device)
        after = decode_timing(subject, device=device)
    except torch.OutOfMemoryError:
        return replace(result, prefill_tokens=count, prefill_seconds=OUT_OF_MEMORY)
    return replace(
        result,
        prefill_tokens=count,
        prefill_seconds=spent / 1000,
        prefill_decode_ms=after.median_ms,
        peak_bytes=peak_bytes(device),
    )


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

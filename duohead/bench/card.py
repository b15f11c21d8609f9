"""What a person reads at the end of a benchmark: one line a case, units beside every number.

The machine's copy is the record; this is made from the same results. Use `kernel_line(result, limits)`.
"""

from __future__ import annotations

from duohead.bench.capacity import CapacityResult
from duohead.bench.cases import Case
from duohead.bench.ceilings import Ceilings
from duohead.bench.fitting import gib
from duohead.bench.jobs import Job
from duohead.bench.kernels import Result
from duohead.bench.model import ModelResult, ShareResult
from duohead.bench.timing import Timing


def kernel_line(result: Result, limits: Ceilings | None) -> str:
    """One case: its time, rate and share, and how it compares with the fastest baseline."""
    head = f"{describe(result.case):<52} {result.impl:>9}"
    if isinstance(result.outcome, str):
        return f"{head}  {result.outcome}"
    parts = [f"{head} {milliseconds(result.outcome)}"]
    rates = result.rates(limits)
    if "read_gb_per_s" in rates:
        parts.append(f"{rates['read_gb_per_s']:5.0f} GB/s")
    if "tflop_per_s" in rates:
        parts.append(f"{rates['tflop_per_s']:5.1f} TFLOP/s")
    share = rates.get("share_of_read_ceiling", rates.get("share_of_matmul_ceiling"))
    if share is not None:
        parts.append(f"{share:4.0%} of the ceiling")
    if result.fastest is not None and result.speedup is not None:
        name, time = result.fastest
        factor = result.speedup
        word = f"{factor:5.2f} times faster" if factor >= 1 else f"{1 / factor:5.2f} times slower"
        parts.append(f"{word} than {name} {milliseconds(time).strip()}")
    parts.append(f"error {result.error:.1e} of {result.budget:.1e}")
    return ", ".join(parts)


def limits_lines(limits: Ceilings | None) -> list[str]:
    """What this machine was measured to do at most."""
    if limits is None:
        return []
    return [
        f"ceilings here: read {limits.read_gb_per_s:.0f} GB/s ({limits.read_by}), matrix product "
        f"{limits.matmul_tflop_per_s:.1f} TFLOP/s ({limits.matmul_dtype})"
    ]


def milliseconds(time: Timing) -> str:
    """The median with digits that suit it."""
    value = time.median_ms
    return f"{value:9.4f} ms" if value < 1 else f"{value:9.2f} ms"


def describe(case: Case) -> str:
    """A case in a few words: what differs from a plain bf16 layer."""
    words = [case.op, f"{case.length:,} tokens"]
    if case.past:
        words.append(f"({case.past:,} past)")
    if case.batch > 1:
        words.append(f"B{case.batch}")
    words.append(f"H{case.heads}/{case.kv_heads} D{case.head_dim}")
    if case.op != "streaming":
        words.append(f"{case.retrieval_ratio:.0%}")
    if case.op == "streaming" or case.retrieval_ratio < 1:
        words.append(f"{case.sink}+{case.recent}")
    if case.queries > 1:
        words.append(f"Q{case.queries}")
    stored = dict.fromkeys((case.retrieval_dtype, case.streaming_dtype))
    if list(stored) != ["auto"]:
        words.append("/".join(stored))
    return " ".join(words)


def model_line(result: ModelResult | ShareResult, limits: Ceilings) -> str:
    """One job: its time, how far above the floor, and the memory it took."""
    head = f"{describe_job(result.job):<68}"
    if isinstance(result, ShareResult):
        if isinstance(result.found, str):
            return f"{head} {result.found}"
        share = result.found
        return (
            f"{head} streaming heads {share.streaming_ms:.2f} ms of "
            f"{share.streaming_ms + share.retrieval_ms:.1f} ms, {share.share:.1%}"
        )
    if isinstance(result.timing, str):
        return f"{head} {result.timing}"
    parts = [_prefill_time(result.timing)]
    floor = result.floor_ms(limits)
    if floor is not None:
        ratio = result.timing.median_ms / floor
        parts = [f"{milliseconds(result.timing)} a token, {ratio:.2f} x floor {floor:.2f} ms"]
    parts.append(f"cache {gib(result.kv_bytes)}")
    if result.peak_bytes:
        over = result.peak_bytes - result.weight_bytes - result.kv_bytes
        parts.append(f"peak {gib(result.peak_bytes)} ({gib(over)} over weights and cache)")
    if result.prepare_seconds >= 0.1:
        parts.append(f"prepared in {result.prepare_seconds:.1f} s")
    return f"{head} {', '.join(parts)}"


def capacity_lines(result: CapacityResult, limits: Ceilings) -> list[str]:
    """The estimate and what became of it."""
    found = result.estimate
    lines = [
        f"{describe_job(result.job)}: {found.tokens:,} tokens estimated in {gib(found.memory_bytes)} "
        f"(weights {gib(found.weight_bytes)}, cache {gib(found.kv_bytes)}, "
        f"activations and runtime {gib(found.activation_bytes + found.runtime_bytes)})"
    ]
    if isinstance(result.timing, str):
        return [*lines, f"at {result.tokens:,} tokens: {result.timing}"]
    numbers = result.numbers(limits)
    lines.append(
        f"at {result.tokens:,} tokens: {milliseconds(result.timing).strip()} a token, "
        f"{numbers['over_floor']:.2f} x floor {numbers['floor_ms']:.2f} ms; cache {gib(result.kv_bytes)}, "
        f"peak {gib(result.peak_bytes)}, free {gib(result.free_bytes)}, prepared in {result.prepare_seconds:.1f} s"
    )
    if result.beyond_fits is not None:
        lines.append(f"at {result.beyond:,} tokens: {numbers['beyond']}")
    if result.prefill_seconds is not None:
        told = result.prefill_seconds
        told = (
            told
            if isinstance(told, str)
            else f"{told:.1f} s, peak {gib(result.prefill_peak_bytes)}"
        )
        lines.append(f"prefill of {result.prefill_tokens:,} tokens: {told}")
    return lines


def describe_job(job: Job) -> str:
    """A job in a few words."""
    words = [job.model, job.measure, job.method]
    if job.method == "duo":
        words.append(f"{job.retrieval_ratio:.1%}".replace(".0%", "%"))
    stored = dict.fromkeys((job.retrieval_dtype, job.streaming_dtype))
    if job.method != "transformers" and list(stored) != ["auto"]:
        words.append("/".join(stored))
    if job.weights != "bf16":
        words.append(f"{job.weights} weights")
    if job.length > 1:
        words.append(f"{job.length:,} tokens")
    if job.measure != "decode":
        words.append(f"by {job.chunk:,}")
    if job.batch > 1:
        words.append(f"B{job.batch}")
    return " ".join(words)


def _prefill_time(time: Timing) -> str:
    return f"{time.median_ms / 1000:9.3f} s"

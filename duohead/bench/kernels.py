"""Attention of one layer by the clock: one implementation against the best full attention there is, in one process.

Every case is built, held against dense fp64 attention, and only then timed; a wrong result has no speed. Inputs are
rotated so that nothing waits in the L2 cache, and short calls run in a CUDA graph (`duohead.bench.timing`). Run
`duohead bench kernels --preset decode-table --device cuda --json results/kernels-h100.jsonl`.

Shape letters: B rows, H query heads, G KV heads, Q query tokens, K key tokens, D head size.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from duohead import attention
from duohead.bench import baselines
from duohead.bench.cases import Case
from duohead.bench.ceilings import Ceilings
from duohead.bench.check import Truth, sampled
from duohead.bench.chosen import kernel_name
from duohead.bench.filling import fill_layer
from duohead.bench.timing import Timing, first_run, input_sets, measure_rotated
from duohead.cache import DuoLayer
from duohead.cache.direct import direct_views
from duohead.cache.view import HeadView, StoredView

logger = logging.getLogger(__name__)
CHECKED_QUERIES = 64
OUT_OF_MEMORY = "out of memory"
Outcome = Timing | str


@dataclass(frozen=True)
class Place:
    """Where and how to measure: device, dtype of the tensors, seconds for each time, L2 cache to outrun (0: none)."""

    device: torch.device
    dtype: torch.dtype
    seconds: float = 2.0
    cache_bytes: int = 0

    def sets(self, bytes_read: int) -> int:
        """Input sets to rotate."""
        return input_sets(bytes_read, self.cache_bytes) if self.cache_bytes else 1


@dataclass(frozen=True)
class Result:
    """What became of one case: a time, or the reason why there is none, beside those of the baselines.

    ``impl`` is what ran (`what_runs`), or what was chosen to run if nothing did. ``error`` and ``budget`` are those of
    the output row that came closest to its budget; both None without a time.
    """

    case: Case
    impl: str
    dtype: torch.dtype
    outcome: Outcome
    rivals: Mapping[str, Outcome] = field(default_factory=dict)
    error: float | None = None
    budget: float | None = None
    input_sets: int = 1

    @property
    def fastest(self) -> tuple[str, Timing] | None:
        """The quickest baseline and its time, or None if none ran."""
        timed = [(name, time) for name, time in self.rivals.items() if isinstance(time, Timing)]
        return min(timed, key=lambda pair: pair[1].median_ms) if timed else None

    @property
    def speedup(self) -> float | None:
        """How many times faster than the quickest baseline; None if one of the two did not run."""
        if self.fastest is None or isinstance(self.outcome, str):
            return None
        return self.fastest[1].median_ms / self.outcome.median_ms

    def rates(self, limits: Ceilings | None = None) -> dict[str, float]:
        """Bytes or operations over time, and their share of what the machine was measured to do."""
        if isinstance(self.outcome, str) or self.case.op == "append":
            return {}
        if self.case.op == "decode":
            size = self.case.kv_bytes(self.dtype)
            rate = size / 1e6 / self.outcome.median_ms
            found = {"kv_bytes_read": size, "read_gb_per_s": rate}
            if limits is not None:
                found["share_of_read_ceiling"] = rate / limits.read_gb_per_s
            return found
        rate = self.case.flops() / 1e9 / self.outcome.median_ms
        found = {"flops": self.case.flops(), "tflop_per_s": rate}
        if limits is not None:
            found["share_of_matmul_ceiling"] = rate / limits.matmul_tflop_per_s
        return found

    def numbers(self, limits: Ceilings | None = None) -> dict[str, Any]:
        """For a record: every number with its unit in the name; what did not run, as text."""
        found = _named(self.case.op, self.outcome)
        for name, rival in self.rivals.items():
            found |= _named("causal_sdpa" if name == "sdpa" else name.replace("-", "_"), rival)
        found |= {"threads": torch.get_num_threads(), "input_sets": self.input_sets}
        if self.error is not None:
            found |= {"error": self.error, "error_budget": self.budget}
        if self.fastest is not None:
            found["fastest_baseline"] = self.fastest[0]
        if self.speedup is not None:
            found["speedup"] = self.speedup
        return found | self.rates(limits) | ({} if limits is None else limits.numbers())


def run_case(
    case: Case,
    place: Place,
    *,
    impl: str = "auto",
    rivals: Mapping[str, Outcome] | None = None,
    strict: bool = True,
) -> Result:
    """Check one case against fp64 and time it.

    Args:
        case: what to build.
        place: where and how to measure.
        impl: attention implementation (`duohead.attention.IMPLEMENTATIONS`).
        rivals: results of `run_baselines` for the case.
        strict: raise what goes wrong, instead of telling it as the outcome so that a long run goes on. Too little
            memory is an outcome either way.

    Raises:
        ValueError: the result is off by more than the error budget, so its speed is not worth reporting; or ``impl``
            cannot do the case.
    """
    blank = Result(case, impl, place.dtype, OUT_OF_MEMORY, rivals or {})
    try:
        device = place.device
        blank = replace(blank, impl=attention.choose(impl, device.type, index=device.index))
        with _clean(place.device):
            return (
                _append_result(blank, place) if case.op == "append" else _timed(blank, place, impl)
            )
    except torch.OutOfMemoryError:
        return blank
    except Exception as error:
        if strict:
            raise
        logger.warning("%s by %s failed", case, impl, exc_info=error)
        reason = " ".join(str(error).split())[:200]
        return replace(blank, outcome=f"failed: {type(error).__name__}: {reason}")


def run_baselines(case: Case, names: Sequence[str], place: Place) -> dict[str, Outcome]:
    """Time full attention of the same sizes by each baseline, after a check against fp64.

    What a baseline cannot do is told as text. "flex" gets the mask of streaming heads for the operation "streaming".
    """
    found: dict[str, Outcome] = {}
    for name in names if case.op != "append" else ():
        try:
            with _clean(place.device):
                found[name] = _timed_baseline(case, name, place)
        except torch.OutOfMemoryError:
            found[name] = OUT_OF_MEMORY
        except baselines.Unavailable as refusal:
            found[name] = f"not available: {refusal}"
        except Exception as error:  # a competitor that breaks must not end our run
            logger.warning("baseline %s failed", name, exc_info=error)
            reason = " ".join(str(error).split())[:200]
            found[name] = f"not available: {type(error).__name__}: {reason}"
    return found


def baseline_key(case: Case) -> Case:
    """Cases with the same key have the same baselines, so that each is timed once."""
    plain = replace(case, retrieval_ratio=1.0, retrieval_dtype="auto", streaming_dtype="auto")
    return plain if case.op == "streaming" else replace(plain, sink=0, recent=1)


@contextmanager
def _clean(device: torch.device) -> Iterator[None]:
    """Without gradients, and afterwards all memory given back, so that the next case starts with all of it."""
    try:
        with torch.no_grad():
            yield
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _timed(blank: Result, place: Place, impl: str) -> Result:
    case, scale = blank.case, blank.case.head_dim**-0.5
    sets = place.sets(_touched(case, place.dtype))
    calls: list[Callable[[], Tensor]] = []
    error, budget, first = 0.0, 0.0, 0.0
    for seed in range(sets):
        query, views, store = case_inputs(case, place, seed)
        if seed == 0:
            rows = sampled(case.new_tokens, most=CHECKED_QUERIES, device=place.device)
            # Before anything is stored: a ring forgets what the views still see.
            truth = Truth.of(query, views, rows, scale=scale)
            blank = replace(blank, impl=what_runs(case, query, views, impl))
        calls.append(_call(case, query, views, store, impl))
        if seed == 0:
            found, first = first_run(calls[0], device=place.device)
            error, budget = truth.verdict(found[:, rows])
            if not error <= budget:
                raise ValueError(
                    f"{case.op} by {blank.impl} is off by {error:.3g}, more than {budget:.3g}; no speed is reported"
                )
            del truth, found
    time = measure_rotated(calls, device=place.device, seconds=place.seconds, first_ms=first)
    return replace(blank, outcome=time, error=error, budget=budget, input_sets=sets)


def _call(
    case: Case,
    query: Tensor,
    views: Sequence[HeadView],
    store: Callable[[], Sequence[StoredView]],
    impl: str,
) -> Callable[[], Tensor]:
    """What is timed: attention alone, over storage where the implementation reads storage."""
    scale = case.head_dim**-0.5
    if case.op == "decode" and attention.reads_storage(query, impl=impl):
        stored = store()
        return lambda: attention.decode(query, stored, scale=scale)
    return lambda: attention.prefill(query, views, scale=scale, impl=impl)


def what_runs(case: Case, query: Tensor, views: Sequence[HeadView], impl: str) -> str:
    """What attends when ``impl`` is asked for: its name, or those of several kernels with a plus between them."""
    if case.op == "decode" and attention.reads_storage(query, impl=impl):
        return "triton"  # has the one decode kernel
    names = [kernel_name(query, view, impl) for view in views]
    if "tiled" in names:  # one view without a kernel, and all of them go that way
        return "tiled"
    # "hopper_prefill": the implementation that the kernel comes from.
    return "+".join(dict.fromkeys(name.partition("_")[0] for name in names))


def case_inputs(
    case: Case, place: Place, seed: int
) -> tuple[Tensor, Sequence[HeadView], Callable[[], Sequence[StoredView]]]:
    """Query [B, H, Q, D], its views, and a function that stores the new tokens and views what is stored then."""
    query, keys, values = random_inputs(case, place, seed, tokens=case.new_tokens)
    policy, past = case.policy(), case.length - case.new_tokens
    if past == 0 and case.op != "decode":
        views = direct_views(policy, 0, keys, values, queries=case.new_tokens, mask=None)
        return query, views, lambda: ()
    layer = filled_layer(case, keys, values, tokens=past, seed=seed)
    handle, _ = layer.update(keys, values)
    opened = handle.open(None)

    def store() -> Sequence[StoredView]:
        handle.commit()
        return layer.stored_views(reaches(layer))

    return query, opened, store


def filled_layer(
    case: Case, keys: Tensor, values: Tensor, *, tokens: int, seed: int = 0
) -> DuoLayer:
    """A static layer for the case, like ``keys`` and ``values`` [B, G, K, D], that holds ``tokens`` random tokens."""
    # A ring has to keep what the oldest of several new queries sees.
    layer = DuoLayer(case.policy(), 0, max_length=case.length, rollback=case.queries - 1)
    layer.lazy_initialization(keys[:, :, :0], values[:, :, :0])
    fill_layer(layer, tokens, seed=seed)
    return layer


def reaches(layer: DuoLayer) -> tuple[int | None, ...]:
    """Tokens back that a decoding query of each kind of head sees; None for all."""
    return tuple(kind.spec.ring for kind in layer.kinds)


def random_inputs(
    case: Case, place: Place, seed: int, *, tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Query [B, H, Q, D] of the new tokens, keys and values [B, G, tokens, D]."""
    generator = torch.Generator(device=place.device).manual_seed(1000 + seed)

    def normal(heads: int, count: int) -> Tensor:
        size = (case.batch, heads, count, case.head_dim)
        return torch.randn(size, generator=generator, device=place.device, dtype=place.dtype)

    query = normal(case.heads, case.new_tokens)
    return query, normal(case.kv_heads, tokens), normal(case.kv_heads, tokens)


def _timed_baseline(case: Case, name: str, place: Place) -> Timing:
    scale = case.head_dim**-0.5
    windowed = case.op == "streaming" and name == "flex"
    window = (case.sink, case.recent) if windowed else None
    same = replace(case, retrieval_dtype="auto", streaming_dtype="auto")
    policy = (same if windowed else replace(same, op="prefill", retrieval_ratio=1.0)).policy()
    inputs = [
        random_inputs(case, place, seed, tokens=case.length)
        for seed in range(place.sets(case.full_kv_bytes(place.dtype)))
    ]

    def call(entry: tuple[Tensor, Tensor, Tensor]) -> Callable[[], Tensor]:
        return lambda: baselines.attend(name, *entry, scale=scale, window=window)

    query, keys, values = inputs[0]
    views = direct_views(policy, 0, keys, values, queries=case.new_tokens, mask=None)
    rows = sampled(case.new_tokens, most=CHECKED_QUERIES, device=place.device)
    whole, first = first_run(call(inputs[0]), device=place.device)
    found = whole[:, :, rows].transpose(1, 2)
    error, budget = Truth.of(query, views, rows, scale=scale).verdict(found)
    if not error <= budget:
        raise baselines.Unavailable(f"off by {error:.3g}, more than {budget:.3g}")
    del views, whole, found
    return measure_rotated(
        [call(entry) for entry in inputs],
        device=place.device,
        seconds=place.seconds,
        first_ms=first,
    )


def _append_result(blank: Result, place: Place) -> Result:
    from duohead.bench.appending import timed_append

    return timed_append(blank, place)


def _touched(case: Case, dtype: torch.dtype) -> int:
    """Bytes that one call reads and writes, roughly: what has to leave the L2 cache between two uses."""
    if case.op == "decode":
        return case.kv_bytes(dtype)
    vectors = 2 * case.heads * case.new_tokens + 2 * case.kv_heads * case.length
    return case.batch * vectors * case.head_dim * dtype.itemsize


def _named(name: str, outcome: Outcome) -> dict[str, Any]:
    if isinstance(outcome, str):
        return {f"{name}_median_ms": outcome}
    return {f"{name}_{key}": value for key, value in asdict(outcome).items()}

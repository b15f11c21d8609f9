"""Decode in Triton: a few query tokens against everything that is stored, in one launch for both kinds of heads.

The cache is read once, as it is stored, by programs that each take an equal share of one KV head's tokens; a second
small kernel joins their results. How many programs there are depends on shapes and capacities only; lengths and
paddings are read on the device, so a captured CUDA graph stays valid while the cache fills.
Use `attend(query, views, scale=...)` after the new tokens have been stored; `supports` says whether it can.

Shape letters: B rows, H query heads, G KV heads of one view, R = H / (KV heads) query heads per KV head, Q query
tokens, T slots of a segment, D head size of queries and keys, Dv of values.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from duohead.attention.triton_decode_join import join_kernel
from duohead.attention.triton_decode_kernels import split_kernel
from duohead.attention.triton_decode_numbers import NUMBERS, prescale, unit
from duohead.cache.view import Segment, StoredView

MAX_TOKENS = 8
MAX_HEAD_SIZE = 256
# Stands for "no limit" where distances between tokens are compared.
UNLIMITED = 1 << 30
LOG2E = 1.4426950408889634
_NATIVE = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_MAX_ROWS = 64
_empty = torch.empty
# Whether kernels are compiled for NVIDIA GPUs, neither for AMD's nor run by the interpreter.
_PTX = torch.version.hip is None and isinstance(split_kernel, triton.JITFunction)
_MAX_SPLITS = 512
# In the interpreter, which runs programs one after the other.
_CPU_PROCESSORS = 4


@dataclass(frozen=True)
class Tiles:
    """How one view is cut: slots of a tile, tiles in flight, programs that share a multiprocessor, warps of each."""

    block: int
    stages: int
    resident: int
    warps: int = 4


@dataclass(frozen=True)
class _Part:
    """One segment of one view in one launch: its constants, and where its splits go among those of its heads."""

    constants: dict[str, Any]
    splits: int
    offset: int
    programs: int


@dataclass(frozen=True)
class _Plan:
    """Everything about a call that depends on shapes alone.

    ``launches`` holds, for each launch, a part or None for every view; ``totals`` the splits of each view's heads over
    all launches; ``starts`` the first row of partial results of each view; ``rows`` their number.
    """

    group: int
    rows: int
    block_m: int
    warps: int
    launches: tuple[tuple[_Part | None, ...], ...]
    totals: tuple[int, ...]
    starts: tuple[int, ...]
    partials: int


def supports(
    query: Tensor,
    views: Sequence[StoredView] = (),
    *,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> str | None:
    """None if `attend` can take these queries [B, H, Q, D] (and views, where they are known), else why not."""
    if query.dtype not in _NATIVE.values():
        return (
            f"query has dtype {query.dtype}; the kernel computes in float16, bfloat16 and float32"
        )
    if torch.is_grad_enabled() and query.requires_grad:
        return "the kernel has no gradient; decode under torch.no_grad()"
    sizes = {query.shape[3]} | {_value_size(view, query) for view in views}
    if any(size % 4 or size > MAX_HEAD_SIZE for size in sizes):
        return f"the head size must be a multiple of 4 up to {MAX_HEAD_SIZE}, got {max(sizes)}"
    if any(view.codec not in _NATIVE and view.codec not in NUMBERS for view in views):
        return f"the kernel reads {', '.join((*_NATIVE, *NUMBERS))}, not {[v.codec for v in views]}"
    return None


def attend(
    query: Tensor,
    views: Sequence[StoredView],
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attention of the last Q stored tokens on everything that their heads see.

    Args:
        query: [B, H, Q, D] with contiguous last dimension; query head h belongs to KV head h // R.
        views: one or two kinds of heads, which together cover every KV head once; their tokens include the new ones.
        scale: factor on the scores.
        softcap: cap * tanh(score / cap) on the scaled scores, or None.
        sink_logits: learned logit per query head [H] in the softmax, without a value, or None.

    Returns:
        [B, Q, H, Dv] in the dtype of ``query``, each head at its original place; zeros for padding queries.

    Raises:
        ValueError: more than MAX_TOKENS query tokens or two views, what `supports` refuses, storage that is not
            contiguous, or a ring too short for the oldest query.
    """
    plan = _plan(query, views)
    batch, heads, count, _ = query.shape
    value_size = _value_size(views[0], query)
    out = _empty(batch, count, heads, value_size, dtype=query.dtype, device=query.device)
    acc = _empty(plan.partials, value_size, dtype=torch.float32, device=query.device)
    stat = _empty(plan.partials, 2, dtype=torch.float32, device=query.device)
    # Scores are kept in base 2; a cap applies before the change of base.
    factor = scale if softcap is not None else scale * LOG2E
    early = _early_start(query.device)
    for index, parts in enumerate(plan.launches):
        present = [(number, part) for number, part in enumerate(parts) if part is not None]
        arguments: list[Any] = []
        constants: dict[str, Any] = {}
        for place, (number, part) in enumerate((*present, present[0])[:2]):
            view = views[number]
            arguments += _view_arguments(view, view.segments[index], part, plan, number)
            constants |= {f"{name}{place}": value for name, value in part.constants.items()}
        split_kernel[(sum(part.programs for _, part in present),)](
            query, query.stride(0), query.stride(1), query.stride(2), acc, stat,
            factor, softcap or 1.0, present[0][1].programs, *arguments,
            ROWS=plan.rows, GROUP=plan.group, BLOCK_M=plan.block_m, CAPPED=softcap is not None,
            SHIFT=_shift(query.dtype), PTX=_PTX, EARLY=bool(early), BOTH=len(present) == 2,
            num_warps=plan.warps, **early, **constants,
        )  # fmt: skip
    _join(query, views, plan, acc, stat, out, sink_logits)
    return out


def _join(
    query: Tensor,
    views: Sequence[StoredView],
    plan: _Plan,
    acc: Tensor,
    stat: Tensor,
    out: Tensor,
    sink_logits: Tensor | None,
) -> None:
    early = _early_start(query.device)
    groups = [_kv_heads(view) for view in views]
    rows = [query.shape[0] * count * plan.rows for count in groups]
    last = len(views) - 1
    width = out.shape[3]
    block = min(triton.next_power_of_2(width), 64)
    join_kernel[(sum(rows), triton.cdiv(width, block))](
        acc, stat, out, sink_logits, query.shape[1], views[0].heads, views[last].heads,
        groups[0], groups[last], plan.totals[0], plan.totals[last], plan.starts[last], rows[0],
        ROWS=plan.rows, GROUP=plan.group, WIDTH=width, BLOCK_W=block,
        BLOCK_S=min(triton.next_power_of_2(max(plan.totals)), 128), EARLY=bool(early), num_warps=4, **early,
    )  # fmt: skip


def _view_arguments(
    view: StoredView, segment: Segment, part: _Part, plan: _Plan, number: int
) -> list[Any]:
    keys, values = (*segment.keys, None, None)[:3], (*segment.values, None, None)[:3]
    return [
        view.heads, *keys, *values, view.tokens, view.padding, view.floor, segment.first,
        segment.keys[0].shape[2], _kv_heads(view), part.splits, part.offset, plan.totals[number],
        plan.starts[number], view.sink, view.ring or 1,
        UNLIMITED if view.reach is None else view.reach,
        UNLIMITED if view.window is None else view.window,
    ]  # fmt: skip


def _kv_heads(view: StoredView) -> int:
    return view.segments[0].keys[0].shape[1]


def _value_size(view: StoredView, query: Tensor) -> int:
    """Dv; a payload of 4-bit numbers holds two in a byte."""
    return view.segments[0].values[0].shape[3] * (2 if view.codec == "int4" else 1)


def _shift(dtype: torch.dtype) -> float:
    """Exponent added to softmax weights, so that the small ones of long texts do not underflow in fp16."""
    return 12.0 if dtype == torch.float16 else 0.0


@functools.cache
def _early_start(device: torch.device) -> dict[str, bool]:
    """Launch option by which the joining kernel starts while the last splits still run, where there is such a thing."""
    if not _PTX or torch.cuda.get_device_capability(device)[0] < 9:
        return {}
    return {"launch_pdl": True}


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type == "cpu":
        return _CPU_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


_plans: dict[tuple[Any, ...], _Plan] = {}
_MAX_PLANS = 1024


def _plan(query: Tensor, views: Sequence[StoredView]) -> _Plan:
    """The plan of this call, made once for every step of a generation and every layer of one kind."""
    key = (
        query.shape, query.stride(3), query.dtype, query.device,
        torch.is_grad_enabled() and query.requires_grad,
        *(
            (
                view.codec, view.ring, view.sink, view.reach, isinstance(view.tokens, Tensor),
                *(
                    (part.shape, part.is_contiguous())
                    for segment in view.segments
                    for part in (*segment.keys, *segment.values)
                ),
            )
            for view in views
        ),
    )  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        _check(query, views)
        if len(_plans) >= _MAX_PLANS:
            _plans.clear()
        plan = _plans[key] = _make_plan(query, views)
    return plan


def _check(query: Tensor, views: Sequence[StoredView]) -> None:
    count = query.shape[2]
    if not 1 <= count <= MAX_TOKENS:
        raise ValueError(
            f"decode takes 1 to {MAX_TOKENS} query tokens, got {count}; use prefill for more"
        )
    if not 1 <= len(views) <= 2:
        raise ValueError(
            f"decode takes one or two views, got {len(views)}; call it once for every two kinds of heads"
        )
    reason = supports(query, views)
    if reason is not None:
        raise ValueError(f"the Triton decode kernel cannot do this: {reason}; use impl='tiled'")
    total = sum(_kv_heads(view) for view in views)
    if query.shape[1] % total:
        raise ValueError(
            f"query must have a multiple of the {total} KV heads of its views, got {query.shape[1]} heads; "
            f"pass the views of every kind of head"
        )
    if query.stride(3) != 1 or not all(
        part.is_contiguous()
        for view in views
        for segment in view.segments
        for part in (*segment.keys, *segment.values)
    ):
        raise ValueError(
            "query must be contiguous in its last dimension, and stored keys and values in all, but they are not; "
            "call .contiguous() on what is a slice or a transposition"
        )
    for view in views:
        if view.ring is not None and view.reach is not None and view.ring < view.reach + count - 1:
            raise ValueError(
                f"ring must have {view.reach + count - 1} slots, so that the first of {count} query tokens sees "
                f"{view.reach} tokens back, got {view.ring}; make the cache with rollback={count - 1} or more"
            )


def _make_plan(query: Tensor, views: Sequence[StoredView]) -> _Plan:
    batch, heads, count, _ = query.shape
    group = heads // sum(_kv_heads(view) for view in views)
    rows = group * count
    block_m = min(max(8, triton.next_power_of_2(rows)), _MAX_ROWS)
    blocks = triton.cdiv(rows, block_m)
    processors = _processors(query.device)
    tiles = [_tiles(view, query, block_m) for view in views]
    launches: list[tuple[_Part | None, ...]] = []
    totals = [0] * len(views)
    for index in range(max(len(view.segments) for view in views)):
        present = [number for number, view in enumerate(views) if index < len(view.segments)]
        counts = _splits(
            [
                (
                    batch * _kv_heads(views[number]) * blocks,
                    triton.cdiv(
                        views[number].segments[index].keys[0].shape[2], tiles[number].block
                    ),
                    views[number].ring is not None,
                )
                for number in present
            ],
            slots=processors * min(tiles[number].resident for number in present),
        )
        parts: list[_Part | None] = [None] * len(views)
        for number, splits in zip(present, counts, strict=True):
            parts[number] = _Part(
                constants=_constants(views[number], query, tiles[number]),
                splits=splits,
                offset=totals[number],
                programs=batch * _kv_heads(views[number]) * blocks * splits,
            )
            totals[number] += splits
        launches.append(tuple(parts))
    sizes = [
        batch * _kv_heads(view) * total * rows for view, total in zip(views, totals, strict=True)
    ]
    return _Plan(
        group=group,
        rows=rows,
        block_m=block_m,
        warps=tiles[0].warps,
        launches=tuple(launches),
        totals=tuple(totals),
        starts=tuple(sum(sizes[:number]) for number in range(len(sizes))),
        partials=sum(sizes),
    )


def _splits(works: Sequence[tuple[int, int, bool]], *, slots: int) -> list[int]:
    """Splits of each view's heads, given (heads times rows, tiles of one, is a ring) of each view in a launch.

    The programs of stores that keep every token are to fill ``slots`` places in whole rounds, next to those of rings.
    """
    longest = max(units * tiles for units, tiles, _ in works)
    share = max(2, min(8, triton.cdiv(longest, slots)))
    rings = [ring and len(works) > 1 for _, _, ring in works]
    counts = [max(1, triton.cdiv(tiles, share)) for _, tiles, _ in works]
    taken = sum(
        units * count
        for (units, _, _), count, ring in zip(works, counts, rings, strict=True)
        if ring
    )
    left = max(slots - taken, slots // 2)
    return [
        count if ring else max(1, min(_rounds(units, left), tiles, _MAX_SPLITS))
        for (units, tiles, _), count, ring in zip(works, counts, rings, strict=True)
    ]


def _rounds(units: int, slots: int) -> int:
    """Splits of ``units`` heads so that their programs fill ``slots`` places evenly, in as few rounds as that takes."""
    if units <= slots // 4:
        return slots // units
    options = range(max(1, slots // units), max(1, 4 * slots // units) + 1)

    def filled(splits: int) -> float:
        rounds = units * splits / slots
        return rounds / -(-rounds // 1)

    best = max(filled(splits) for splits in options)
    return next(splits for splits in options if filled(splits) >= 0.97 * best)


def _tiles(view: StoredView, query: Tensor, block_m: int) -> Tiles:
    """Tile sizes by what a slot weighs."""
    if query.device.type == "cpu":
        return Tiles(64, 1, 2)
    width = max(query.shape[3], _value_size(view, query))
    if query.dtype == torch.float32:
        return Tiles(32, 2, 1)
    if width > 128:
        return Tiles(32, 2, 2)
    if block_m > 16 or view.codec in _NATIVE:
        return Tiles(64, 3, 2)
    return Tiles(128, 3, 2)


def _constants(view: StoredView, query: Tensor, tiles: Tiles) -> dict[str, Any]:
    """Compile-time arguments of one view."""
    segment = view.segments[0]
    numbers = NUMBERS.get(view.codec, 1)
    sizes = (query.shape[3], _value_size(view, query))
    words = [size // numbers for size in sizes]
    groups = [1, 1]
    if view.codec == "int4":
        groups = [segment.keys[1].shape[3], segment.values[1].shape[3]]
    padded = [max(16, triton.next_power_of_2(width)) for width in words]
    return {
        "ON_DEVICE": isinstance(view.tokens, Tensor),
        "RING": view.ring is not None,
        "CODEC": view.codec if numbers > 1 else "native",
        "FOLD": max(groups) == 1,
        "NUMBERS": numbers,
        "PRE": prescale(view.codec, query.dtype) if max(groups) == 1 else 1.0,
        "UNIT": unit(view.codec, query.dtype) if max(groups) == 1 else 1.0,
        "KW": words[0],
        "KW_PAD": padded[0],
        "KEY_GROUPS": groups[0],
        "KEY_GROUP": sizes[0] // groups[0],
        "VW": words[1],
        "VW_PAD": padded[1],
        "VALUE_GROUPS": groups[1],
        "VALUE_GROUP": sizes[1] // groups[1],
        "BLOCK_N": tiles.block,
        "STAGES": tiles.stages,
    }

"""How a decode call is cut into programs: tile sizes, splits of each head, launches of each segment.

All of it follows from shapes and capacities, never from lengths, so that a captured CUDA graph stays valid while the
cache fills; programs whose share is still empty leave at once. `duohead.attention.triton_decode` keeps the plans.

Shape letters: B rows, H query heads, G KV heads of one view, Q query tokens, T slots of a segment, D head size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from duohead import codec
from duohead.attention.triton_decode_numbers import NUMBERS, prescale, unit
from duohead.cache.view import StoredView

NATIVE = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Rows of one program: the narrow side of a tensor-core tile, and what its registers hold.
_LEAST_ROWS, _MAX_ROWS = (16 if torch.version.hip else 8), 64
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
class Part:
    """One segment of one view in one launch: its constants, and where its splits go among those of its heads."""

    constants: dict[str, Any]
    splits: int
    offset: int
    programs: int


@dataclass(frozen=True)
class Plan:
    """Everything about a call that depends on shapes alone.

    ``launches`` holds, for each launch, a part or None for every view; ``totals`` the splits of each view's heads over
    all launches; ``starts`` the first row of partial results of each view; ``rows`` their number; ``bits`` how each
    view's values are rotated (`duohead.codec.rotation`).
    """

    group: int
    rows: int
    block_m: int
    warps: int
    launches: tuple[tuple[Part | None, ...], ...]
    totals: tuple[int, ...]
    starts: tuple[int, ...]
    partials: int
    bits: tuple[int, ...]


class _Work(NamedTuple):
    """What a launch has to do for one view: heads times rows, tiles of each, whether it is a ring, bytes in all."""

    units: int
    tiles: int
    ring: bool
    size: int


def make_plan(query: Tensor, views: Sequence[StoredView]) -> Plan:
    """Tiles, splits and launches for queries [B, H, Q, D] over views that `attend` accepts."""
    batch, heads, count, _ = query.shape
    group = heads // sum(kv_heads(view) for view in views)
    rows = group * count
    block_m = min(max(_LEAST_ROWS, triton.next_power_of_2(rows)), _MAX_ROWS)
    blocks = triton.cdiv(rows, block_m)
    processors = _processors(query.device)
    tiles = [_tiles(view, query, block_m) for view in views]
    launches: list[tuple[Part | None, ...]] = []
    totals = [0] * len(views)
    for index in range(max(len(view.segments) for view in views)):
        present = [number for number, view in enumerate(views) if index < len(view.segments)]
        counts = _splits(
            [
                _work(views[number], index, blocks=blocks, block=tiles[number].block)
                for number in present
            ],
            slots=processors * min(tiles[number].resident for number in present),
        )
        parts: list[Part | None] = [None] * len(views)
        for number, splits in zip(present, counts, strict=True):
            parts[number] = Part(
                constants=_constants(views[number], query, tiles[number]),
                splits=splits,
                offset=totals[number],
                programs=batch * kv_heads(views[number]) * blocks * splits,
            )
            totals[number] += splits
        launches.append(tuple(parts))
    sizes = [
        batch * kv_heads(view) * total * rows for view, total in zip(views, totals, strict=True)
    ]
    return Plan(
        group=group,
        rows=rows,
        block_m=block_m,
        warps=tiles[0].warps,
        launches=tuple(launches),
        totals=tuple(totals),
        starts=tuple(sum(sizes[:number]) for number in range(len(sizes))),
        partials=sum(sizes),
        bits=tuple(codec.rotation(view.codecs[1], value_size(view)) for view in views),
    )


def _work(view: StoredView, index: int, *, blocks: int, block: int) -> _Work:
    segment = view.segments[index]
    batch, heads, slots, _ = segment.keys[0].shape
    return _Work(
        units=batch * heads * blocks,
        tiles=triton.cdiv(slots, block),
        ring=view.ring is not None,
        size=sum(part.nbytes for part in (*segment.keys, *segment.values)),
    )


def _splits(works: Sequence[_Work], *, slots: int) -> list[int]:
    """Splits of each view's heads, given the work of each view in a launch.

    The programs of stores that keep every token are to fill ``slots`` places in whole rounds, next to those of rings.
    """
    longest = max(work.units * work.tiles for work in works)
    share = max(2, min(8, triton.cdiv(longest, slots)))
    rings = [work.ring and len(works) > 1 for work in works]
    counts = [max(1, triton.cdiv(work.tiles, share)) for work in works]
    taken = sum(
        work.units * count for work, count, ring in zip(works, counts, rings, strict=True) if ring
    )
    kept = [work for work, ring in zip(works, rings, strict=True) if not ring]
    filling = iter(_rounds(kept, max(slots - taken, slots // 2)) if kept else ())
    return [
        count if ring else max(1, min(next(filling), work.tiles, _MAX_SPLITS))
        for work, count, ring in zip(works, counts, rings, strict=True)
    ]


def _rounds(works: Sequence[_Work], slots: int) -> list[int]:
    """Splits of the heads of each view, so that programs fill ``slots`` places evenly, in as few rounds as that takes.

    All programs are to read about as many bytes, so heads in a narrower format are cut into fewer: the last round would
    otherwise wait for a few long ones.
    """
    sizes = [work.size / work.units for work in works]
    weights = [size / max(*sizes, 1.0) for size in sizes]
    units = sum(work.units * weight for work, weight in zip(works, weights, strict=True))

    def cut(splits: int) -> list[int]:
        return [max(1, round(splits * weight)) for weight in weights]

    def rounds(splits: int) -> float:
        programs = sum(work.units * count for work, count in zip(works, cut(splits), strict=True))
        return programs / slots

    if units <= slots // 4:
        fitting = range(int(slots // units), 0, -1)
        return cut(next((splits for splits in fitting if rounds(splits) <= 1), 1))
    options = range(max(1, int(slots // units)), max(1, int(4 * slots // units)) + 1)
    filled = {splits: rounds(splits) / math.ceil(rounds(splits)) for splits in options}
    best = max(filled.values())
    return cut(next(splits for splits in options if filled[splits] >= 0.97 * best))


def _tiles(view: StoredView, query: Tensor, block_m: int) -> Tiles:
    """Tile sizes, from timings of all-retrieval decode at 8K to 128K tokens on an H200 (bf16 queries, head size 128).

    Native: two programs of 64 slots and three stages read 98 % of what the memory gives at 128K; twice as many programs
    in two rounds 90 %, 128 slots in two stages 82-87 %. Narrow codecs are bound by the latency between barriers, which
    128 slots halve: 85 % for fp8, where a third program with fewer stages came to 61 %. Shared memory has no room for
    128 slots of which one side, keys or values, is native.

    From 16 rows on, tiles of 64 slots become warp-group products, whose compiled form (Triton 3.6) read beyond its
    shared memory on an H100; 32 slots keep to the products of single warps.
    """
    if query.device.type == "cpu":
        return Tiles(64, 1, 2)
    width = max(query.shape[3], value_size(view))
    if query.dtype == torch.float32:
        return Tiles(32, 2, 1)
    if width > 128:
        return Tiles(32, 2, 2)
    if block_m >= 16:
        return Tiles(32, 3, 2)
    if any(name in NATIVE for name in view.codecs):
        return Tiles(64, 3, 2)
    return Tiles(128, 3, 2)


def _constants(view: StoredView, query: Tensor, tiles: Tiles) -> dict[str, Any]:
    """Compile-time arguments of one view."""
    segment = view.segments[0]
    return {
        "ON_DEVICE": isinstance(view.tokens, Tensor),
        "RING": view.ring is not None,
        "K_BITS": codec.rotation(view.codecs[0], query.shape[3]),
        **_side("K", view.codecs[0], segment.keys, query.shape[3], query.dtype),
        **_side("V", view.codecs[1], segment.values, value_size(view), query.dtype),
        "BLOCK_N": tiles.block,
        "STAGES": tiles.stages,
    }


def _side(
    letter: str, name: str, stored: tuple[Tensor, ...], size: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Compile-time arguments of the keys or of the values of one view, which begin with ``letter``."""
    name = codec.layout(name)
    numbers = NUMBERS.get(name, 1)
    groups = stored[1].shape[3] if name == "int4" else 1
    words = size // numbers
    constants = {
        "CODEC": name if numbers > 1 else "native",
        "FOLD": groups == 1,
        "NUMBERS": numbers,
        "PRE": prescale(name, dtype) if groups == 1 else 1.0,
        "UNIT": unit(name, dtype) if groups == 1 else 1.0,
        "W": words,
        "W_PAD": max(16, triton.next_power_of_2(words)),
        "GROUPS": groups,
        "GROUP": size // groups,
    }
    return {
        f"{letter}{'' if key[0] == 'W' else '_'}{key}": value for key, value in constants.items()
    }


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type == "cpu":
        return _CPU_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def kv_heads(view: StoredView) -> int:
    """G."""
    return view.segments[0].keys[0].shape[1]


def value_size(view: StoredView) -> int:
    """Dv; a payload of 4-bit numbers holds two in a byte."""
    return view.segments[0].values[0].shape[3] * (
        2 if codec.layout(view.codecs[1]) == "int4" else 1
    )

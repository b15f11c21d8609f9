"""Streaming heads through flash-attn-4: its mask function decides, and block lists skip what nobody sees.

The keys become one sequence, [sinks | ring in order | new keys], in which a query sees a range of sinks and a range of
the rest, so that the lists and the mask need integers only. Rows with padding differ in those integers, not in the
lists. This serves the GPUs for which there is no own kernel; `duohead.attention.cute_prefill` calls it.

Shape letters: B rows, H query heads, G KV heads of one kind, Q query tokens, S sink slots, R ring slots, K new tokens,
T keys of the sequence (S + R + K), M query tiles, N key blocks of a tile, D head size.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from duohead.cache.view import HeadView, KeysAndValues

# Stands for no native window: farther than any token, and far from overflow.
UNLIMITED = 1 << 30
TILE = 128


class Lists(NamedTuple):
    """Key blocks that each query tile visits: int32, counts [1, 1, M] and indices [1, 1, M, N], ascending.

    The mask function looks at every score of a masked block and at none of a full one.
    """

    masked_count: Tensor
    masked: Tensor
    full_count: Tensor
    full: Tensor


@dataclass(frozen=True)
class Sequence:
    """What streaming heads see, as one sequence.

    Attributes:
        keys, values: [B, G, T, D] and [B, G, T, Dv].
        sinks: how many of the first keys are sinks (S).
        ring: how many keys after them were in the ring (R).
        numbers: int32 [B, 6], what the mask function reads for each row: S; the first key of the rest that is a real
            token and no sink; tokens a query sees of the rest, its own included; the native window; index of the own
            key of query 0; position of query 0.
    """

    keys: Tensor
    values: Tensor
    sinks: int
    ring: int
    numbers: Tensor


def sequence(view: HeadView, queries: int) -> Sequence:
    """The sequence of a view whose ``queries`` belong to its last keys."""
    reach = view.reach
    assert reach is not None, "a view without a band is for the dense path"
    rows = view.keys.shape[0]
    past, past_position = _in_order(view)
    position = torch.cat([past_position, view.key_position], dim=-1)
    parts = [past, (view.keys, view.values)] if past is not None else [(view.keys, view.values)]
    if view.sinks is not None:
        parts.insert(0, view.sinks.read())
    keys, values = _joined(parts)
    sinks = 0 if view.sinks is None else view.sinks.position.shape[-1]
    # Positions ascend, so those that a query must not take from here, empty ones and sinks, come first.
    skipped = (position < (0 if view.sinks is None else view.sink)).sum(-1)
    numbers = skipped.new_empty(rows, 6)
    numbers[:, 0] = sinks
    numbers[:, 1] = sinks + skipped
    numbers[:, 2] = reach
    numbers[:, 3] = UNLIMITED if view.window is None else view.window
    numbers[:, 4] = keys.shape[2] - queries
    numbers[:, 5] = view.query_position[:, -1] - (queries - 1)
    return Sequence(keys, values, sinks, past_position.shape[-1], numbers.int())


def _in_order(view: HeadView) -> tuple[KeysAndValues | None, Tensor]:
    """Keys and values [B, G, R, D] of the past in the order of their positions [B or 1, R], empty slots first."""
    if not view.past:
        return None, view.key_position[:, :0]
    read = [piece.read() for piece in view.past]
    keys, values = (torch.cat(parts, dim=2) for parts in zip(*read, strict=True))
    position, order = torch.cat([piece.position for piece in view.past], dim=-1).sort(dim=-1)

    def sorted_by(x: Tensor) -> Tensor:
        if order.shape[0] == 1:
            return x.index_select(2, order[0])
        return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

    return (sorted_by(keys), sorted_by(values)), position


def _joined(parts: list[KeysAndValues]) -> KeysAndValues:
    if len(parts) == 1:
        return parts[0]
    keys, values = zip(*parts, strict=True)
    return torch.cat(keys, dim=2), torch.cat(values, dim=2)


@functools.lru_cache(maxsize=64)
def lists(
    queries: int,
    keys: int,
    *,
    sinks: int,
    reach: int,
    block: int,
    solid: int,
    known: int | None,
    window: int | None = None,
    device: torch.device | None = None,
) -> Lists:
    """The blocks that tiles of TILE queries visit in a sequence of ``keys`` (the same lists for every layer).

    Args:
        queries: Q; they belong to the last keys.
        keys: T.
        sinks: S.
        reach: tokens of the rest that a query sees, its own included.
        block: keys in a block.
        solid: index from which on every key is surely a real token and no sink; T if that is not known.
        known: least position that query 0 surely has, or None; it tells which tiles surely see every sink.
        window: native window, which limits the sinks; None for none.
        device: where the lists are needed.
    """
    first = torch.arange(0, queries, TILE, device=device)[:, None]
    last = (first + TILE - 1).clamp(max=queries - 1)
    own_first, own_last = first + keys - queries, last + keys - queries
    oldest = (own_first - reach + 1).clamp(min=sinks)
    sink_blocks = -(-sinks // block)
    band_blocks = -(-(TILE + reach - 1) // block) + 1
    band = torch.div(oldest, block, rounding_mode="floor")
    band = band + torch.arange(band_blocks, device=device)[None, :]
    index = torch.arange(sink_blocks, device=device)[None, :].expand(len(first), -1)
    index = torch.cat([index, band], dim=1)
    is_sink = torch.arange(index.shape[1], device=device)[None, :] < sink_blocks
    start, stop = index * block, index * block + block
    visited = torch.where(is_sink, index < band[:, :1], start <= own_last)
    in_band = (start >= max(solid, sinks)) & (start > own_last - reach) & (stop - 1 <= own_first)
    sees_sinks = known is not None and window is None
    in_sinks = (stop <= sinks) & (first + (known or 0) >= stop - 1) & sees_sinks
    full = visited & torch.where(is_sink, in_sinks, in_band)
    return Lists(*_packed(index, visited & ~full), *_packed(index, full))


def _packed(index: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and chosen indices, those first and in order, of [M, N]."""
    order = (~chosen).to(torch.int8).sort(dim=1, stable=True).indices
    return chosen.sum(1).int()[None, None], index.gather(1, order).int()[None, None]


def lists_for(view: HeadView, seen: Sequence, queries: int, *, block: int) -> Lists:
    """The lists of a sequence; a padded row may hold anything anywhere, so then every block is masked."""
    keys = seen.keys.shape[2]
    reach = view.reach
    assert reach is not None
    # A ring that holds something means that every sink came before this call.
    past_sinks = view.sink if view.sinks is not None else 0
    solid = seen.sinks + seen.ring + (0 if seen.ring else past_sinks)
    return lists(
        queries,
        keys,
        sinks=seen.sinks,
        reach=reach,
        block=block,
        solid=keys if view.padded else solid,
        known=None if view.padded else (past_sinks if seen.ring else 0),
        window=view.window,
        device=seen.keys.device,
    )

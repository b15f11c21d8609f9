"""The portable fast path: query tiles over the key pieces that they can reach, through PyTorch's own attention.

A streaming head's tile reads its sinks, the ring and a band of the chunk, so prefill costs grow with the length, not
with its square. Long pasts are merged piece by piece with a running softmax, so that a decoded piece and a tile of
scores are the only temporaries. Runs on any device that torch supports, with gradients.

Shape letters: B rows, G KV heads of one kind, R query heads per KV head, Q query tokens, K key tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from duohead.cache.view import HeadView, MaskedPiece

BAND_TILE = 128
FULL_TILE = 512
# Key columns of one call over several tiles of a band: bounds the copies that overlapping bands need.
GROUP_COLUMNS = 16384
MIN_TILE = 32
JOIN_LIMIT = 8192
JOIN_QUERIES = 8
SCORE_LIMIT = 1 << 21
FLOOR = -1e30


def attend(
    query: Tensor,
    view: HeadView,
    *,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """Attention of queries [B, G, R, Q, D] over a view; returns [B, G, R, Q, D]. Arguments as in the reference."""
    plain = softcap is None and sink_logits is None
    count = query.shape[3]
    if plain and _is_causal(view, count):
        return _sdpa(query, view.keys, view.values, None, scale=scale, causal=count > 1)
    tile = FULL_TILE if view.reach is None else min(max(BAND_TILE, view.reach // 4), FULL_TILE)
    if plain and _is_short(view, count):
        if view.reach is None:
            # The mask of one tile covers every key: as many entries at most as FULL_TILE x JOIN_LIMIT.
            tile = max(MIN_TILE, min(tile, FULL_TILE * JOIN_LIMIT // view.keys.shape[2]))
        tiles = list(_joined_tiles(query, view, tile, scale=scale))
    else:
        tiles = [
            _merge(
                query[:, :, :, start : start + tile],
                _blocks(
                    view, start, min(start + tile, count), rows=query[:, :, :, :tile, 0].numel()
                ),
                scale=scale,
                softcap=softcap,
                sink_logits=sink_logits,
            )
            for start in range(0, count, tile)
        ]
    return tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=3)


def _joined_tiles(query: Tensor, view: HeadView, tile: int, *, scale: float) -> Iterator[Tensor]:
    """The tiles in order; those far from the start share one mask, so many of them are one call."""
    start, count = 0, query.shape[3]
    while start < count:
        whole = (count - start) // tile
        if whole and view.reach is not None and view.steady(start):
            width = view.reach - 1 + tile
            tiles = min(whole, max(GROUP_COLUMNS // (view.sink + width), 1))
            stop = start + tiles * tile
            yield _band(query[:, :, :, start:stop], view, start, tiles, width=width, scale=scale)
        else:
            stop = min(start + tile, count)
            pieces = list(view.pieces(start, stop))
            keys, values, mask = (
                _join(parts, dim)
                for parts, dim in zip(zip(*pieces, strict=True), (2, 2, -1), strict=True)
            )
            yield _sdpa(query[:, :, :, start:stop], keys, values, mask, scale=scale)
        start = stop


def _band(
    query: Tensor, view: HeadView, start: int, tiles: int, *, width: int, scale: float
) -> Tensor:
    """Several tiles under the mask of the first one: they become rows of one call, each with its ``width`` keys."""
    rows, tile = query.shape[0], query.shape[3] // tiles
    *sinks, (keys, values, position, _) = view.reads(start, start + query.shape[3])
    asked = view.query_position[:, start : start + tile]
    masks = [view.mask(asked, place, sinks=True) for _, _, place, _ in sinks]
    mask = _join([*masks, view.mask(asked, position[:, :width], sinks=False)], -1)

    def per_tile(band: Tensor, first: list[Tensor]) -> Tensor:
        parts = [part.expand(tiles, *part.shape) for part in first]
        parts.append(band.unfold(2, width, tile).permute(2, 0, 1, 4, 3))
        return torch.cat(parts, dim=3).flatten(0, 1)

    out = _sdpa(
        query.unflatten(3, (tiles, tile)).permute(3, 0, 1, 2, 4, 5).flatten(0, 1),
        per_tile(keys, [piece[0] for piece in sinks]),
        per_tile(values, [piece[1] for piece in sinks]),
        mask,
        scale=scale,
    )
    return out.unflatten(0, (tiles, rows)).permute(1, 2, 3, 0, 4, 5).flatten(3, 4)


def _is_causal(view: HeadView, count: int) -> bool:
    """Whether the view is just these tokens under the plain causal mask."""
    # Under visibility="chunk" the reach is unlimited, but a native window still holds.
    within = all(limit is None or count <= limit for limit in (view.reach, view.window))
    return (
        len(view.past) == 0
        and view.sinks is None
        and not view.padded
        and within
        and view.keys.shape[2] == count
    )


def _is_short(view: HeadView, count: int) -> bool:
    """Whether to join the keys that one tile reaches: they fit, and there are queries enough to pay for the copy."""
    if view.reach is not None:
        return view.reach <= JOIN_LIMIT
    past = sum(piece.position.shape[1] for piece in view.past)
    return len(view.past) == 0 or (count > JOIN_QUERIES and past + view.keys.shape[2] <= JOIN_LIMIT)


def _join(parts: Sequence[Tensor], dim: int) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    rows = max(part.shape[0] for part in parts)
    return torch.cat([part.expand(rows, *part.shape[1:]) for part in parts], dim=dim)


def _sdpa(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    causal: bool = False,
) -> Tensor:
    shape = query.shape
    out = F.scaled_dot_product_attention(
        query.flatten(1, 2),
        keys,
        values,
        mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=shape[2] > 1,
    )
    return out.unflatten(1, shape[1:3])


def _blocks(view: HeadView, start: int, stop: int, *, rows: int) -> Iterator[MaskedPiece]:
    """What the queries [start, stop) reach, in blocks of at most SCORE_LIMIT scores for ``rows`` rows of scores."""
    width = max(SCORE_LIMIT // rows, 1)
    query_position = view.query_position[:, start:stop]
    for keys, values, position, sinks in view.reads(start, stop):
        for first in range(0, keys.shape[2], width):
            block = slice(first, first + width)
            mask = view.mask(query_position, position[:, block], sinks=sinks)
            yield keys[:, :, block], values[:, :, block], mask


def _merge(
    query: Tensor,
    pieces: Iterable[MaskedPiece],
    *,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """Softmax over all pieces with a running maximum, one piece in memory at a time; in fp32 or wider."""
    wide = torch.promote_types(query.dtype, torch.float32)
    shape = query.shape
    folded = query.to(wide).flatten(2, 3) * scale
    top: Tensor | None = None
    for keys, values, mask in pieces:
        scores = (folded @ keys.to(wide).transpose(-1, -2)).unflatten(2, shape[2:4])
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill_(~mask[:, :, None], FLOOR)
        # The result does not depend on the maximum, so no gradient goes through it. What a row without a visible key
        # gathers meanwhile fades to zero at its first one, at the latest its own.
        best = scores.detach().amax(-1, keepdim=True)
        new_top = best if top is None else torch.maximum(top, best)
        weights = scores.sub_(new_top).exp_()
        gain = (weights.flatten(2, 3) @ values.to(wide)).unflatten(2, shape[2:4])
        if top is None:
            total, out = weights.sum(-1, keepdim=True), gain
        else:
            fade = (top - new_top).exp()
            total, out = total * fade + weights.sum(-1, keepdim=True), out * fade + gain
        top = new_top
    assert top is not None, "a view always has the new tokens as a piece"
    if sink_logits is not None:
        logit = sink_logits.to(wide)[None, :, :, None, None]
        new_top = torch.maximum(top, logit.detach())
        fade = (top - new_top).exp()
        total, out = total * fade + (logit - new_top).exp(), out * fade
    return (out / total).to(query.dtype)

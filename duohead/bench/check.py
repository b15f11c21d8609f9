"""The oracle of the benchmarks: dense attention in fp64 over the very views that an implementation got.

A speed is reported only for a result that keeps the error budget of docs/numerics.md: twice what the same dense code is
off in the target dtype, plus one rounding step of it. One KV head is computed at a time, so that long caches fit.

Shape letters: B rows, H query heads, G KV heads, Q query tokens, K key tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from duohead.cache.view import HeadView


def sampled(queries: int, *, most: int, device: torch.device) -> Tensor:
    """Evenly spaced query indices, the first and the last among them."""
    return torch.linspace(0, queries - 1, min(most, queries), device=device).long()


def dense(
    query: Tensor, views: Sequence[HeadView], rows: Tensor, *, scale: float, dtype: torch.dtype
) -> Tensor:
    """Attention of the queries ``rows`` [R] of query [B, H, Q, D] in ``dtype``; returns [B, R, H, Dv]."""
    groups = sum(view.keys.shape[1] for view in views)
    asked = query[:, :, rows].unflatten(1, (groups, -1)).to(dtype)
    out = asked.new_empty(*asked.shape[:-1], views[0].values.shape[-1])
    for view in views:
        pieces = [
            (keys, values, view.mask(view.query_position[:, rows], position, sinks=sinks))
            for keys, values, position, sinks in view.reads(0, query.shape[2])
        ]
        keys, values = (torch.cat([piece[part] for piece in pieces], dim=2) for part in (0, 1))
        batch = query.shape[0]
        mask = torch.cat([piece[2].expand(batch, -1, -1, -1) for piece in pieces], dim=-1)
        heads = range(groups) if view.heads is None else view.heads.tolist()
        for place, head in enumerate(heads):
            key, value = keys[:, None, place].to(dtype), values[:, None, place].to(dtype)
            scores = asked[:, head] @ key.transpose(-1, -2) * scale
            out[:, head] = scores.masked_fill(~mask, -torch.inf).softmax(-1).to(dtype) @ value
    return out.flatten(1, 2).transpose(1, 2)


def budget_of(eager: Tensor, exact: Tensor) -> float:
    """Largest error allowed, given the same dense result in the target dtype and in fp64."""
    theirs = (eager.double() - exact).abs().max()
    band = torch.finfo(eager.dtype).eps * exact.abs().max()
    return float(2 * (theirs + band))


def error_of(found: Tensor, exact: Tensor) -> float:
    """Largest distance to the truth."""
    return float((found.double() - exact).abs().max())

"""Attention of streaming heads that are more than sinks and a window: windows of their own, an entry for the evicted.

Both would cost kernels and formats, so they are tried first where that costs nothing: plain PyTorch in fp32, with
queries in tiles against sinks and band, so that time is linear in the length. Under `with installed(model, streams)`
the model attends as `streams.variant` says.

Shape letters: B batch, T tokens, H query heads, G KV heads, D head size, N tiles, K keys that a tile can reach.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from duohead.identify.banded import TILE, Scores, _band_mask, _bands, _tiles, full_attention
from duohead.identify.gates import Gates


@dataclass(frozen=True)
class Variant:
    """Which heads keep everything, how many recent tokens each head sees, and what stands for the evicted ones.

    ``entry`` is "" for nothing, "mean" for one entry with the mean key and the mean value of all evicted tokens, and
    "count" for that entry with the logarithm of their number on its score, as if each had the mean key.
    """

    name: str
    kept: frozenset[int]
    recent: tuple[int, ...]
    entry: str = ""

    def slots(self, length: int, *, sink: int) -> int:
        """Token slots of one sequence, all heads together; an entry takes one."""
        window = [min(length, sink + recent + bool(self.entry)) for recent in self.recent]
        return sum(length if head in self.kept else own for head, own in enumerate(window))


class Streams(Gates):
    """Attention in which every head is what `variant` says; forward only."""

    variant: Variant

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scores: Scores) -> Tensor:
        """[B, H, T, D] as `Gates.attend`; heads of a layer that see alike are computed together."""
        if not scores.plain:
            raise ValueError("streams attend without softcap and learned sinks; use another model")
        first, groups = self._slices[layer].start, q.shape[1] // k.shape[1]
        alike: dict[int, list[int]] = {}
        for head in range(k.shape[1]):
            kept = first + head in self.variant.kept
            alike.setdefault(0 if kept else self.variant.recent[first + head], []).append(head)
        out = torch.empty_like(q)
        for recent, heads in alike.items():
            index = torch.tensor(heads, device=q.device)
            queries = (index[:, None] * groups + torch.arange(groups, device=q.device)).flatten()
            part = q[:, queries], k[:, index], v[:, index]
            if recent:
                entry = self.variant.entry
                got = stream(*part, sink=self.sink, recent=recent, entry=entry, scores=scores)
            else:
                got = full_attention(*part, scores=scores, deterministic=False)
            out[:, queries] = got
        self._attended.add(layer)
        return out


def stream(
    q: Tensor, k: Tensor, v: Tensor, *, sink: int, recent: int, entry: str, scores: Scores
) -> Tensor:
    """Attention to sinks, recent tokens and perhaps the entry of the others, in fp32.

    ``q`` [B, H, T, D], ``k`` and ``v`` [B, G, T, D] with T of at least ``sink``; returns [B, H, T, D] in q's dtype.
    """
    dtype, groups, length = q.dtype, q.shape[1] // k.shape[1], q.shape[2]
    scale = q.shape[-1] ** -0.5 if scores.scaling is None else scores.scaling
    q, k, v = q.float() * scale, k.float(), v.float()
    tiles, back = -(-length // TILE), -(-(recent - 1) // TILE)
    seen = _band_mask(tiles, sink=sink, recent=recent, back=back, device=q.device)
    keys, values = (_bands(x, sink=sink, tiles=tiles, back=back) for x in (k, v))
    # Queries of a group share their keys: [N B, G, groups * TILE, D].
    queries = _tiles(q, tiles).flatten(0, 1).unflatten(1, (-1, groups)).flatten(2, 3)
    logits = (queries @ keys.mT).view(tiles, len(q), -1, groups, TILE, keys.shape[2])
    logits.masked_fill_(~seen[:, None, None, None], -torch.inf)
    out = _whole(logits.softmax(-1).view(*queries.shape[:3], -1) @ values, q, groups)
    if not entry:
        return out.to(dtype)
    total = _whole(logits.logsumexp(-1).view(*queries.shape[:3], 1), q, groups)
    evicted = (torch.arange(length, device=q.device) - recent - sink + 1).clamp(min=0)
    key, value = (_means(x[:, :, sink:], evicted).repeat_interleave(groups, 1) for x in (k, v))
    score = (q * key).sum(-1, keepdim=True)
    if entry == "count":
        score = score + evicted.clamp(min=1).log()[:, None]
    share = torch.where(evicted[:, None] > 0, (score - total).sigmoid(), 0.0)
    return torch.lerp(out, value, share).to(dtype)


def _whole(x: Tensor, q: Tensor, groups: int) -> Tensor:
    """[N B, G, groups * TILE, D] as [B, H, T, D] of ``q``."""
    x = x.unflatten(2, (groups, TILE)).flatten(1, 2).unflatten(0, (-1, len(q)))
    return x.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : q.shape[2]]


def _means(x: Tensor, count: Tensor) -> Tensor:
    """The mean of the first ``count`` [T] vectors of x [B, G, .., D], for each count: [B, G, T, D]."""
    # Summed along the last dimension, the only one along which a GPU does it in parallel.
    sums = torch.nn.functional.pad(x.mT.contiguous().cumsum(-1), (1, 0))
    return sums.index_select(-1, count).mT / count.clamp(min=1)[:, None]

"""The readable twin: every key at once, a dense mask, one softmax. Slow, and what the fast paths are tested against.

Shape letters: B rows, G KV heads of one kind, R query heads per KV head, Q query tokens, K key tokens, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from duohead.cache.view import HeadView


def attend(
    query: Tensor,
    view: HeadView,
    *,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """Attention of queries [B, G, R, Q, D] over a view; returns [B, G, R, Q, D].

    Args:
        query: queries of the heads of this view, grouped by KV head.
        view: what they see.
        scale: factor on the scores.
        softcap: cap * tanh(score / cap) on the scaled scores (Gemma 2), or None.
        sink_logits: learned logit per query head [G, R] that takes part in the softmax and has no value (gpt-oss).
    """
    keys, values, masks = zip(*view.pieces(0, query.shape[3]), strict=True)
    rows = query.shape[0]
    mask = torch.cat([part.expand(rows, -1, -1, -1) for part in masks], dim=-1)[:, :, None]
    wide = torch.promote_types(query.dtype, torch.float32)
    key, value = torch.cat(keys, dim=2).to(wide), torch.cat(values, dim=2).to(wide)
    scores = torch.einsum("bgrqd,bgkd->bgrqk", query.to(wide), key) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sink_logits is not None:
        extra = sink_logits.to(wide)[None, :, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, extra], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    return torch.einsum("bgrqk,bgkd->bgrqd", weights, value).to(query.dtype)

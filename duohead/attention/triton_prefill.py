"""Prefill in Triton for any GPU that Triton serves: streaming and dense heads, with the work really skipped.

A streaming head's query tile visits its sinks, the part of the ring that it still reaches and a band of the new keys,
so the time is linear in the length; a dense head visits everything up to its diagonal, a bounded block of decoded past
at a time. Only tiles that cross a border of what their queries see are masked element by element.
Use `attend(query, view, out, scale=..., kv_heads=...)` after `supports` has said that it can.

Shape letters: B rows, H query heads, G KV heads of one kind, Q query tokens, D head size of keys, Dv of values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from duohead.attention.triton_launch import Launch
from duohead.attention.triton_tiles import refusal
from duohead.cache.view import HeadView, MaskedPiece, Piece

# Decoded keys and values of the past that are in memory at a time, in bytes.
PAST_BYTES = 128 << 20


def supports(
    query: Tensor,
    view: HeadView,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> str | None:
    """Why these kernels cannot attend, or None if they can.

    Args:
        query: [B, H, Q, D].
        view: what the heads of one kind see.
        scale: factor on the scores.
        softcap: cap of the scores or None.
        sink_logits: logits [H] or None.
    """
    tensors = [query, view.keys, view.values] + ([] if sink_logits is None else [sink_logits])
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "a gradient is asked for; the prefill kernels have none"
    if view.chunk_start is not None:
        return 'visibility="chunk" sees whole chunks; the kernels are token-exact'
    return refusal(query, view.keys, view.values, scale=scale, softcap=softcap)


def attend(
    query: Tensor,
    view: HeadView,
    out: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    kv_heads: int | None = None,
) -> None:
    """Attention of the heads of one view, written to their places in ``out``.

    Args:
        query: [B, H, Q, D], all heads of the layer; query head h belongs to KV head h // (H / kv_heads).
        view: what the heads of one kind see.
        out: [B, Q, H, Dv], of which the heads of this view are written.
        scale: factor on the scores.
        softcap: cap * tanh(score / cap) on the scaled scores, or None.
        sink_logits: learned logit per query head [H] in the softmax, without a value, or None.
        kv_heads: KV heads of the layer, of all kinds; needed if ``view.heads`` is given.

    Raises:
        ValueError: what `supports` says, or ``kv_heads`` is missing.
    """
    reason = supports(query, view, scale=scale, softcap=softcap, sink_logits=sink_logits)
    if reason is not None:
        raise ValueError(f'impl="triton" cannot prefill here: {reason}; use impl="auto" or "tiled"')
    kv_heads = view.layer_heads(kv_heads)
    if query.shape[2] == 0:
        return
    launch = Launch(
        query,
        view.keys,
        view.values,
        out,
        heads=view.heads,
        kv_heads=kv_heads,
        position=view.key_position,
        sink=0 if view.sinks is None else view.sink,
        reach=view.reach,
        window=view.window,
        scale=scale,
        softcap=softcap,
        sink_logits=sink_logits,
    )
    blocks = _blocks(view.past, (view.keys.nbytes + view.values.nbytes) // view.keys.shape[2])
    if len(blocks) > 1:
        launch.allocate_carry()
    for index, block in enumerate(blocks[:-1]):
        launch(past=_read(block), new=False, resume=index > 0, suspend=True)
    sinks = None if view.sinks is None else view.sinks.read()
    launch(sinks=sinks, past=_read(blocks[-1]) if blocks else None, resume=len(blocks) > 1)


def _blocks(past: Sequence[Piece], token_bytes: int) -> list[list[Piece]]:
    """Consecutive pieces, grouped up to PAST_BYTES of decoded keys and values."""
    blocks: list[list[Piece]] = []
    tokens = 0
    for piece in past:
        count = piece.position.shape[1]
        if not blocks or (tokens + count) * token_bytes > PAST_BYTES:
            blocks.append([])
            tokens = 0
        blocks[-1].append(piece)
        tokens += count
    return blocks


def _read(pieces: Sequence[Piece]) -> MaskedPiece:
    """Keys and values of consecutive pieces, and their positions; a copy only if they do not lie in a row."""
    keys, values = zip(*(piece.read() for piece in pieces), strict=True)
    position = [piece.position for piece in pieces]
    return (
        _joined(keys),
        _joined(values),
        position[0] if len(position) == 1 else torch.cat(position, 1),
    )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Parts [B, G, t, D] as one tensor [B, G, T, D]."""
    first, tokens = parts[0], 0
    if len(parts) == 1:
        return first
    for part in parts:
        here = first.storage_offset() + tokens * first.stride(2)
        if (
            part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
            or part.stride() != first.stride()
            or part.storage_offset() != here
        ):
            return torch.cat(list(parts), dim=2)
        tokens += part.shape[2]
    return first.as_strided((*first.shape[:2], tokens, first.shape[3]), first.stride())

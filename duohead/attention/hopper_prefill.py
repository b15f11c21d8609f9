"""Prefill on Hopper through the own kernel of `hopper_launch`, for streaming and for retrieval heads.

A tile of queries reads nothing but its sinks and its band, a block of keys at a time, so the time of streaming heads is
linear in the length; for retrieval heads the band is the whole text. Left padding, sinks, the ring and the native
windows of retrieval heads are ranges of keys, found on the device, so no call waits for it.
Use `attend(query, view, out, scale=..., kv_heads=...)` after `supports` has said that it can.

Shape letters: B rows, H query heads, G KV heads of one kind, R query heads per KV head, Q query tokens, K new keys,
P past tokens, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from duohead.attention.hopper_launch import (
    EVERYTHING,
    UNIT,
    WARP_GROUP_ROWS,
    Reads,
    Shape,
    launch,
    missing,
)
from duohead.cache.view import HeadView, KeysAndValues, on_device

# Decoded keys and values of the past that may be in memory, in bytes.
PAST_BYTES = 2 << 30
# Blocks of keys to choose from for a head size; registers and shared memory end at the largest.
BLOCKS = {64: (96, 112, 128, 144, 160, 176, 192), 128: (96, 112, 128, 144, 160)}
# What the start of one more block costs, in keys.
BLOCK_COST = 16
_DTYPES = (torch.float16, torch.bfloat16)


def supports(
    query: Tensor,
    view: HeadView,
    *,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> str | None:
    """None if `attend` can do this, else why not.

    Args:
        query: [B, H, Q, D], all heads.
        view: what the heads of one kind see.
        softcap: cap on the scores, or None.
        sink_logits: learned logits [H], or None.
    """
    device = query.device
    if (
        device.type != "cuda"
        or torch.version.hip
        or torch.cuda.get_device_capability(device) != (9, 0)
    ):
        return "the kernel is for Hopper GPUs; use impl='triton'"
    if torch.compiler.is_compiling():
        return "torch.compile cannot trace the kernel; compile decode only"
    return missing(query.get_device()) or unfit(
        query, view, softcap=softcap, sink_logits=sink_logits
    )


def unfit(
    query: Tensor, view: HeadView, *, softcap: float | None, sink_logits: Tensor | None
) -> str | None:
    """What of the call itself the kernel does not do, on any machine; None if nothing."""
    if view.chunk_start is not None:
        return "visibility='chunk' is for reproducing published numbers; use impl='tiled'"
    if view.window is not None and view.sinks is not None:
        return "the kernel does not limit sinks by a native window; use impl='triton'"
    if softcap is not None:
        return "the kernel does not cap scores; use impl='triton'"
    if view.heads is None and query.shape[1] > WARP_GROUP_ROWS * view.keys.shape[1]:
        return f"a KV head may have at most {WARP_GROUP_ROWS} query heads here; use impl='triton'"
    sizes = {x.shape[-1] for x in (query, view.keys, view.values)}
    if len(sizes) > 1 or not sizes <= BLOCKS.keys():
        return f"head sizes must be equal and one of {list(BLOCKS)}, got {sorted(sizes)}"
    if query.dtype not in _DTYPES or {view.keys.dtype, view.values.dtype} != {query.dtype}:
        return f"the kernel takes fp16 and bf16, got queries of {query.dtype} and keys of {view.keys.dtype}"
    if view.reach is None and _past_bytes(view) > PAST_BYTES:
        return f"the past takes more than {PAST_BYTES >> 30} GiB once decoded; use impl='triton'"
    inputs = (query, view.keys, view.values, sink_logits)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return "gradients are asked for; use impl='tiled' or torch.no_grad()"
    return None


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
    """Write the outputs of a view's heads into ``out`` at their original places; the other heads stay as they were.

    Args:
        query: [B, H, Q, D], all heads; query head h belongs to KV head h // (H / kv_heads).
        view: what its heads see.
        out: [B, Q, H, D], all heads.
        scale: factor on the scores, of any sign.
        softcap: None; `supports` refuses others.
        sink_logits: learned logit per query head [H] in the softmax, without a value, or None.
        kv_heads: KV heads of the layer, of all kinds; needed if ``view.heads`` is given.

    Raises:
        ValueError: ``kv_heads`` is missing, or the call is one that `unfit` names.
    """
    reason = unfit(query, view, softcap=softcap, sink_logits=sink_logits)
    if reason is not None:
        raise ValueError(f"the Hopper kernel cannot do this call: {reason}")
    query, scale = _positive(query, scale)
    kv_heads = view.layer_heads(kv_heads)
    if query.shape[2] == 0:
        return
    group = query.shape[1] // kv_heads
    reads = gather(view, query.shape[2])
    dim = query.shape[-1]
    shape = Shape(dim, group, block_for(reads, group, dim), query.dtype == torch.float16)
    with on_device(query):
        launch(shape, query, reads, out, heads=view.heads, scale=scale, sink_logits=sink_logits)


def _positive(query: Tensor, scale: float) -> tuple[Tensor, float]:
    """Queries and a scale above 0 with the same scores: the kernel finds the largest score before it scales."""
    if scale > 0:
        return query, scale
    return (torch.zeros_like(query), 1.0) if scale == 0 else (-query, -scale)


def _past_bytes(view: HeadView) -> int:
    """Bytes of the past that would have to be decoded into one place."""
    if view.whole is not None:
        return 0
    tokens = sum(piece.position.shape[1] for piece in view.past)
    return tokens * (view.keys.nbytes + view.values.nbytes) // max(view.keys.shape[2], 1)


def gather(view: HeadView, queries: int) -> Reads:
    """What the heads of a view read whose ``queries`` belong to its last keys, without waiting for the device."""
    new, ring, skipped = (view.keys, view.values), None, None
    # The kernel finds from the last position alone where the band of the new keys may begin.
    last, bound = view.key_position[:, -1], 0 if view.sinks is None else view.sink
    if view.whole is not None and view.reach is None:
        new = view.whole
    elif view.past:
        ring, position = _in_order(view)
        skipped = (position < bound).sum(-1)
    sinks = None
    if view.sinks is not None and view.sinks.position.shape[-1]:
        sinks = view.sinks.read()
    reach = EVERYTHING if view.reach is None else view.reach
    return Reads(new, ring, sinks, last, skipped, bound, reach)


def _in_order(view: HeadView) -> tuple[KeysAndValues, Tensor]:
    """The past in the order of its positions, empty slots first, and these positions [B or 1, P].

    Slots are added so that P is a multiple of UNIT. What empty ones hold is hidden, but finite.
    """
    position = torch.cat([piece.position for piece in view.past], dim=-1)
    missing = -position.shape[-1] % UNIT
    position = torch.nn.functional.pad(position, (missing, 0), value=-1)
    keys, values = (
        x.new_empty(*x.shape[:2], position.shape[-1], x.shape[3]) for x in (view.keys, view.values)
    )
    keys[:, :, :missing], values[:, :, :missing] = 0, 0
    start = missing
    for piece in view.past:
        stop = start + piece.position.shape[1]
        keys[:, :, start:stop], values[:, :, start:stop] = piece.read()
        start = stop
    if view.reach is None:
        return (keys, values), position
    position, order = position.sort(dim=-1)
    return (_sorted_by(keys, order), _sorted_by(values, order)), position


def _sorted_by(x: Tensor, order: Tensor) -> Tensor:
    """Tokens of [B, G, P, D] in the order [B or 1, P]."""
    if order.shape[0] == 1:
        return x.index_select(2, order[0])
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def block_for(reads: Reads, group: int, dim: int) -> int:
    """The block size with the least waste for tiles in the middle of a long text."""
    if reads.reach >= EVERYTHING:
        return 144
    tokens = 2 * (WARP_GROUP_ROWS // group)
    band = -(-(tokens + reads.reach - 1) // UNIT)
    sinks = 0 if reads.sinks is None else -(-reads.sinks[0].shape[2] // UNIT)
    keys = (band + sinks) * UNIT
    return min(BLOCKS[dim], key=lambda block: (-(-keys // block) * (block + BLOCK_COST), block))

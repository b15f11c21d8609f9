"""Backward pass of streaming attention, in Triton, with the work skipped as in the forward pass.

Each query tile sums its own gradient over the keys that it saw, and each key tile over the queries that saw it; the
sinks, which every query sees, sum over slices of the queries first. All sums have a fixed order and no atomics.
`duohead.attention.triton_training` makes it the gradient of an operation.

Shape letters: B rows, H query heads, G KV heads, R query heads per KV head, T tokens, D head size, Dv value size.
"""

# Kernels are written in Triton, which has types of its own.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from duohead.attention.triton_tiles import (
    Tiles,
    accelerated,
    block_width,
    descriptor,
    score_factors,
    shared_memory,
    tanh,
    tile_of,
)
from duohead.cache.view import on_device

# Programs that share the sinks' sums: enough to fill a large GPU, and the same on every one, as the bits must be.
_SINK_PROGRAMS = 1024


@triton.jit
def weights_of(s, lse, scale, cap_in, cap_out, SOFTCAP: tl.constexpr):
    """Softmax weights from raw scores and log2 denominators, and the derivative of the cap."""
    slope = 1.0
    if SOFTCAP:
        bent = tanh(s * cap_in)
        slope = 1 - bent * bent
        s = bent * cap_out
    return tl.exp2(s * scale - lse), slope


@triton.jit
def pull(
    acc, q, grad, lse, delta, key, value, row, head, k_b, k_h, k_t, v_b, v_h, v_t,
    start, tiles, low, high, first, limit, scale, cap_in, cap_out,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, SOFTCAP: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Gradient that a tile of queries from ``first`` on gets from the keys [low, high) less than ``limit`` back."""
    m = tl.arange(0, acc.shape[0])
    n = tl.arange(0, BLOCK_N)
    whole_from = tl.maximum(low, first + BLOCK_Q - limit)
    whole_to = tl.minimum(high, first + 1)
    for t in range(0, tiles):
        j = start + t * BLOCK_N
        k = tile_of(key, row, head, k_b, k_h, k_t, j, low, high, DIM, BLOCK_D, BLOCK_N, TMA)
        v = tile_of(value, row, head, v_b, v_h, v_t, j, low, high, VALUE_DIM, BLOCK_V, BLOCK_N, TMA)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        p, slope = weights_of(s, lse[:, None], scale, cap_in, cap_out, SOFTCAP)
        if (j < whole_from) | (j + BLOCK_N > whole_to):
            index = j + n
            distance = (first + m % BLOCK_Q)[:, None] - index[None, :]
            seen = (distance >= 0) & (distance < limit) & ((index >= low) & (index < high))[None, :]
            p = tl.where(seen, p, 0.0)
        dp = tl.dot(grad, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None]) * slope
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["tokens", "heads", "sink", "recent"])
def query_gradient_kernel(
    q_ptr, key, value, out_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t, g_b, g_h, g_t, dq_b, dq_h, dq_t,
    tokens, heads, sink, recent, scale, cap_in, cap_out, factor,
    R: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_Q: tl.constexpr, PACK: tl.constexpr, BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries, and sum(out * grad) per query, which the keys' gradient needs."""
    PACKS: tl.constexpr = (R + PACK - 1) // PACK
    tiles = tl.cdiv(tokens, BLOCK_Q)
    pid = tl.program_id(0)
    pack = pid % PACKS
    first = (pid // PACKS) % tiles * BLOCK_Q
    place = pid // (PACKS * tiles)
    head = place % heads
    row = place // heads

    m = tl.arange(0, BLOCK_Q * PACK)
    query = first + m % BLOCK_Q
    member = pack * PACK + m // BLOCK_Q
    real = (query < tokens) & (member < R)
    wide_row = tl.cast(row, tl.int64)
    q_head = tl.cast(head, tl.int64) * R + member
    wide = query.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_V)
    d_mask = real[:, None] & (d < DIM)[None, :]
    v_mask = real[:, None] & (dv < VALUE_DIM)[None, :]
    q_row = wide_row * q_b + q_head * q_h + wide * q_t
    o_row = wide_row * o_b + q_head * o_h + wide * o_t
    g_row = wide_row * g_b + q_head * g_h + wide * g_t
    q = tl.load(q_ptr + q_row[:, None] + d[None, :], mask=d_mask, other=0.0)
    grad = tl.load(grad_ptr + g_row[:, None] + dv[None, :], mask=v_mask, other=0.0)
    out = tl.load(out_ptr + o_row[:, None] + dv[None, :], mask=v_mask, other=0.0)
    flat = (wide_row * heads * R + q_head) * tokens + query
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(delta_ptr + flat, delta, mask=real)
    lse = tl.load(lse_ptr + flat, mask=real, other=float("inf"))

    acc = tl.zeros([BLOCK_Q * PACK, BLOCK_D], tl.float32)
    stop = tl.minimum(first + BLOCK_Q, tokens)
    acc = pull(
        acc, q, grad, lse, delta, key, value, row, head, k_b, k_h, k_t, v_b, v_h, v_t,
        0, tl.cdiv(tl.minimum(sink, stop), BLOCK_N), 0, sink, first, 1 << 30, scale, cap_in, cap_out,
        BLOCK_Q, BLOCK_N, DIM, VALUE_DIM, BLOCK_D, BLOCK_V, SOFTCAP, TMA,
    )  # fmt: skip
    count = tl.maximum(tl.cdiv(stop - tl.maximum(sink, first - recent + 1), BLOCK_N), 0)
    acc = pull(
        acc, q, grad, lse, delta, key, value, row, head, k_b, k_h, k_t, v_b, v_h, v_t,
        stop - count * BLOCK_N, count, sink, tokens, first, recent, scale, cap_in, cap_out,
        BLOCK_Q, BLOCK_N, DIM, VALUE_DIM, BLOCK_D, BLOCK_V, SOFTCAP, TMA,
    )  # fmt: skip
    dq_row = wide_row * dq_b + q_head * dq_h + wide * dq_t
    dq = (acc * factor).to(dq_ptr.dtype.element_ty)
    tl.store(dq_ptr + dq_row[:, None] + d[None, :], dq, mask=d_mask)


@triton.jit(do_not_specialize=["tokens", "slice_tokens", "heads", "sink", "recent"])
def key_gradient_kernel(
    query, key_ptr, value_ptr, grad, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t, dk_s, dk_b, dk_h, dk_t,
    dv_s, dv_b, dv_h, dv_t, tokens, slice_tokens, heads, sink, recent, scale, cap_in, cap_out,
    factor,
    R: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
    SINKS: tl.constexpr, SOFTCAP: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values, from all queries of the group's heads that see them.

    With SINKS these are sinks and a slice of the queries, and the result is a part of a sum; else other tokens and the
    ``recent`` queries that reach them.
    """
    head = tl.program_id(1) % heads
    row = tl.program_id(1) // heads
    part = tl.program_id(2)
    j = tl.program_id(0) * BLOCK_N
    if SINKS:
        low = 0
        high = sink
        limit = 1 << 30
        begin = tl.maximum(j, part * slice_tokens)
        end = tl.minimum((part + 1) * slice_tokens, tokens)
    else:
        j += sink
        low = sink
        high = tokens
        limit = recent
        begin = j
        end = tl.minimum(j + BLOCK_N + recent - 1, tokens)

    key_at = j + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_V)
    k = tile_of(key_ptr, row, head, k_b, k_h, k_t, j, low, high, DIM, BLOCK_D, BLOCK_N, False)
    v = tile_of(
        value_ptr, row, head, v_b, v_h, v_t, j, low, high, VALUE_DIM, BLOCK_V, BLOCK_N, False
    )
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    m = tl.arange(0, BLOCK_Q)
    count = tl.maximum(tl.cdiv(end - begin, BLOCK_Q), 0)
    wide_row = tl.cast(row, tl.int64)
    for t in range(0, R * count):
        q_head = head * R + t // count
        i = begin + (t % count) * BLOCK_Q
        q = tile_of(query, row, q_head, q_b, q_h, q_t, i, begin, end, DIM, BLOCK_D, BLOCK_Q, TMA)
        g = tile_of(
            grad, row, q_head, g_b, g_h, g_t, i, begin, end, VALUE_DIM, BLOCK_V, BLOCK_Q, TMA
        )
        flat = (wide_row * heads * R + q_head) * tokens + i
        # Queries behind the end get the weight 0.
        inside = i + m < end
        lse = tl.load(lse_ptr + flat + m, mask=inside, other=float("inf"))
        delta = tl.load(delta_ptr + flat + m, mask=inside, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision="ieee")
        p, slope = weights_of(s, lse[None, :], scale, cap_in, cap_out, SOFTCAP)
        if (i < j + BLOCK_N - 1) | (i + BLOCK_Q - j > limit):
            distance = (i + m)[None, :] - key_at[:, None]
            p = tl.where((distance >= 0) & (distance < limit), p, 0.0)
        dv_acc = tl.dot(p.to(g.dtype), g, dv_acc, input_precision="ieee")
        dp = tl.dot(v, tl.trans(g), input_precision="ieee")
        ds = p * (dp - delta[None, :]) * slope
        dk_acc = tl.dot(ds.to(q.dtype), q, dk_acc, input_precision="ieee")
    held = (key_at < high)[:, None]
    wide = key_at.to(tl.int64)
    wide_head = tl.cast(head, tl.int64)
    dk_row = tl.cast(part, tl.int64) * dk_s + wide_row * dk_b + wide_head * dk_h + wide * dk_t
    dv_row = tl.cast(part, tl.int64) * dv_s + wide_row * dv_b + wide_head * dv_h + wide * dv_t
    tl.store(dk_ptr + dk_row[:, None] + d[None, :], (dk_acc * factor).to(dk_ptr.dtype.element_ty),
             mask=held & (d < DIM)[None, :])  # fmt: skip
    tl.store(dv_ptr + dv_row[:, None] + dv[None, :], dv_acc.to(dv_ptr.dtype.element_ty),
             mask=held & (dv < VALUE_DIM)[None, :])  # fmt: skip


def backward_tiles(dim: int, dtype: torch.dtype, *, tma: bool, shared: int) -> tuple[Tiles, Tiles]:
    """Tile sizes of the queries' and of the keys' kernel, from measurements on an H200; see `forward_tiles`.

    Two accumulators fill the registers of the second one, hence its narrow tiles. Two stages at most: with three and
    the accelerator, Triton 3.6 gave wrong results for tiles of 32 queries and 64 keys.
    """
    if dtype == torch.float32:
        tiles = (Tiles(32, 1, 32, 4, 1), Tiles(32, 1, 32, 4, 1))
    elif dim > 128:
        tiles = (Tiles(64, 1, 32, 4, 1), Tiles(32, 1, 32, 4, 1))
    else:
        tiles = (Tiles(64, 1, 64, 4, 2), Tiles(64 if tma else 32, 1, 64, 4, 2))
    width = dtype.itemsize * block_width(dim)
    # Queries come with the gradient of their output; keys and values stay while queries pass.
    return tiles[0].within(shared, 2 * width), tiles[1].within(shared, 2 * width)


def gradients_of(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    grad: Tensor,
    lse: Tensor,
    *,
    sink: int,
    recent: int,
    scale: float,
    softcap: float | None,
    tiles: tuple[Tiles, Tiles] | None = None,
    tma: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, keys and values.

    Args:
        query: [B, H, T, D].
        keys: [B, G, T, D].
        values: [B, G, T, Dv].
        out: [B, H, T, Dv], the forward pass's output.
        grad: [B, H, T, Dv], the gradient of ``out``.
        lse: [B, H, T], log2 of the softmax denominators.
        sink: first tokens that every query sees, at most T.
        recent: last tokens that a query sees.
        scale: factor on the scores.
        softcap: cap of the scores or None.
        tiles: tile sizes instead of the table's.
        tma: whether the tensor memory accelerator loads; None for wherever it can.
    """
    rows, heads, tokens, dim = query.shape
    kv_heads, value_dim = keys.shape[1], values.shape[-1]
    group = heads // kv_heads
    tma = accelerated(query, keys, values, grad) if tma is None else tma
    for_queries, for_keys = tiles or backward_tiles(
        max(dim, value_dim), query.dtype, tma=tma, shared=shared_memory(query)
    )
    dq, dk, dv = torch.empty_like(query), torch.empty_like(keys), torch.empty_like(values)
    delta = torch.empty_like(lse)
    shared: dict[str, Any] = {
        "R": group,
        "DIM": dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": block_width(dim),
        "BLOCK_V": block_width(value_dim),
        "SOFTCAP": softcap is not None,
        "TMA": tma,
    }
    numbers = (kv_heads, sink, recent, *score_factors(scale, softcap), scale)

    def loaded(x: Tensor, count: int) -> Any:
        return descriptor(x, count) if tma else x

    programs = triton.cdiv(group, for_queries.pack) * triton.cdiv(tokens, for_queries.queries)
    with on_device(query):
        query_gradient_kernel[(programs * kv_heads * rows,)](
            query, loaded(keys, for_queries.keys), loaded(values, for_queries.keys), out, grad, lse,
            delta, dq,
            *(step for x in (query, keys, values, out, grad, dq) for step in x.stride()[:3]),
            tokens, *numbers, BLOCK_Q=for_queries.queries, PACK=for_queries.pack,
            BLOCK_N=for_queries.keys, **for_queries.options(), **shared,
        )  # fmt: skip

    def pass_queries(dk: Tensor, dv: Tensor, slice_tokens: int, *, count: int, sinks: bool) -> None:
        """Gradients of ``count`` keys into parts [parts, B, G, t, D]."""
        grid = (triton.cdiv(count, for_keys.keys), kv_heads * rows, dk.shape[0])
        with on_device(query):
            key_gradient_kernel[grid](
                loaded(query, for_keys.queries), keys, values, loaded(grad, for_keys.queries),
                lse, delta, dk, dv,
                *(step for x in (query, keys, values, grad) for step in x.stride()[:3]),
                *dk.stride()[:4], *dv.stride()[:4], tokens, slice_tokens, *numbers,
                BLOCK_Q=for_keys.queries, BLOCK_N=for_keys.keys, SINKS=sinks,
                **for_keys.options(), **shared,
            )  # fmt: skip

    if sink < tokens:
        pass_queries(dk[None], dv[None], 0, count=tokens - sink, sinks=False)
    if sink:
        programs = triton.cdiv(sink, for_keys.keys) * kv_heads * rows
        slices = max(1, _SINK_PROGRAMS // programs)
        slice_tokens = for_keys.queries * triton.cdiv(tokens, slices * for_keys.queries)
        parts = (triton.cdiv(tokens, slice_tokens), rows, kv_heads, sink)
        dk_parts = keys.new_empty(*parts, dim, dtype=torch.float32)
        dv_parts = keys.new_empty(*parts, value_dim, dtype=torch.float32)
        pass_queries(dk_parts, dv_parts, slice_tokens, count=sink, sinks=True)
        dk[:, :, :sink] = dk_parts.sum(0)
        dv[:, :, :sink] = dv_parts.sum(0)
    return dq, dk, dv

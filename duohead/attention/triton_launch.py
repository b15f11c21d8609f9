"""The Triton prefill kernel and its launch: sinks, a block of the past and a band of the new keys, for a group's heads.

`Launch` holds what the launches for one set of heads share; a call visits what it is told to and can leave its sums
unfinished, for a past that comes in several blocks. `duohead.attention.triton_prefill` drives it for views and
`duohead.attention.triton_backward` for training.

Shape letters: B rows, H query heads, G KV heads, R query heads per KV head, Q query tokens, K new keys, P past tokens,
S sink slots, D head size of queries and keys, Dv of values.
"""

# Kernels are written in Triton, which has types of its own.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from duohead.attention.triton_tiles import (
    UNLIMITED,
    Tiles,
    accelerated,
    block_width,
    descriptor,
    forward_tiles,
    rows_contiguous,
    score_factors,
    shared_memory,
    tanh,
    tile_of,
)
from duohead.cache.view import KeysAndValues, MaskedPiece, on_device


@triton.jit
def scores(q, k, cap_in, cap_out, SOFTCAP: tl.constexpr):
    """Raw scores, or capped ones where the model bends them."""
    # fp32 stays fp32, which is also all that some AMD chips know; half precision does not care.
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if SOFTCAP:
        s = tanh(s * cap_in) * cap_out
    return s


@triton.jit
def absorb(acc, total, top, s, v, scale):
    """One tile of scores joins the running softmax (base 2: ``scale`` includes log2 e); masked scores are -inf."""
    # The first maximum is a finite number, so a row that has seen nothing yet adds exact zeros.
    best = tl.maximum(top, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - best[:, None])
    fade = tl.exp2(top - best)
    total = total * fade + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return acc, total, best


@triton.jit
def visit(
    acc, total, top, q, key, value, row, head, k_b, k_h, k_t, v_b, v_h, v_t,
    start, tiles, low, high, own, limit, scale, cap_in, cap_out,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, SOFTCAP: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """The keys [start, start + tiles * BLOCK_N), as far as they lie in [low, high) and less than ``limit`` back.

    ``own`` is the index, among these keys, that the tile's first query has itself.
    """
    m = tl.arange(0, acc.shape[0])
    n = tl.arange(0, BLOCK_N)
    whole_from = tl.maximum(low, own + BLOCK_Q - limit)
    whole_to = tl.minimum(high, own + 1)
    for t in range(0, tiles):
        j = start + t * BLOCK_N
        k = tile_of(key, row, head, k_b, k_h, k_t, j, low, high, DIM, BLOCK_D, BLOCK_N, TMA)
        v = tile_of(value, row, head, v_b, v_h, v_t, j, low, high, VALUE_DIM, BLOCK_V, BLOCK_N, TMA)
        s = scores(q, k, cap_in, cap_out, SOFTCAP)
        # Most tiles lie within what all their queries see: those pay one branch instead of a mask.
        if (j < whole_from) | (j + BLOCK_N > whole_to):
            index = j + n
            distance = (own + m % BLOCK_Q)[:, None] - index[None, :]
            seen = (distance >= 0) & (distance < limit) & ((index >= low) & (index < high))[None, :]
            s = tl.where(seen, s, float("-inf"))
        acc, total, top = absorb(acc, total, top, s, v, scale)
    return acc, total, top


# Numbers that change from call to call must not make another kernel each: that stalls a prefill for seconds.
_NUMBERS = "queries keys slots past heads rows sink reach window pos_b ppos_b".split()


@triton.jit(do_not_specialize=_NUMBERS)
def attend_kernel(
    q_ptr, out_ptr, lse_ptr, key, value, sink_key, sink_value, past_key, past_value,
    past_key_ptr, past_value_ptr, position_ptr, past_position_ptr, heads_ptr, logit_ptr, carry_ptr,
    stat_ptr,
    q_b, q_h, q_t, o_b, o_t, o_h, k_b, k_h, k_t, v_b, v_h, v_t, sk_b, sk_h, sk_t, sv_b, sv_h, sv_t,
    pk_b, pk_h, pk_t, pv_b, pv_h, pv_t, pos_b, ppos_b,
    queries, keys, slots, past, heads, rows, sink, reach, window, scale, cap_in, cap_out,
    R: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_Q: tl.constexpr, PACK: tl.constexpr, BLOCK_N: tl.constexpr,
    POSITIONS: tl.constexpr, HEADS: tl.constexpr, LOGITS: tl.constexpr, SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr, PAST: tl.constexpr, NEW: tl.constexpr,
    CARRY_IN: tl.constexpr, CARRY_OUT: tl.constexpr, LSE: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_Q queries of PACK query heads that share a KV head.

    Packing heads instead of taking more queries keeps the band of a tile narrow, so fewer of its scores are masked.
    PAST is 0 (none), 1 (tokens in order) or 2 (ring slots in any order, whose positions decide).
    """
    # Heads of one group are neighbours and read the same keys while these are in L2.
    PACKS: tl.constexpr = (R + PACK - 1) // PACK
    tiles = tl.cdiv(queries, BLOCK_Q)
    pid = tl.program_id(0)
    pack = pid % PACKS
    # The last queries have the most keys to visit: they start first, so that no long tile is left over at the end.
    tile = tiles - 1 - (pid // PACKS) % tiles
    place = pid // (PACKS * tiles)
    head = place % heads
    row = place // heads
    kv_head = tl.cast(head, tl.int64)
    if HEADS:
        kv_head = tl.load(heads_ptr + head)

    BLOCK_M: tl.constexpr = BLOCK_Q * PACK
    first = tile * BLOCK_Q
    m = tl.arange(0, BLOCK_M)
    query = first + m % BLOCK_Q
    member = pack * PACK + m // BLOCK_Q
    real = (query < queries) & (member < R)
    q_head = kv_head * R + member
    wide_row = tl.cast(row, tl.int64)
    wide_query = query.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_V)
    q_mask = real[:, None]
    if DIM != BLOCK_D:
        q_mask = q_mask & (d < DIM)[None, :]
    q_row = q_ptr + wide_row * q_b + q_head * q_h + wide_query * q_t
    q = tl.load(q_row[:, None] + d[None, :], mask=q_mask, other=0.0)

    # Key index j is position base + j: a row is contiguous but for its padding.
    base = 0
    if POSITIONS:
        base = tl.load(position_ptr + wide_row * pos_b + keys - 1).to(tl.int32) - (keys - 1)
    offset = keys - queries
    own = first + offset
    position = base + own

    # Index of a query in scratch of the view's own heads, [B, G * R, Q].
    flat = ((wide_row * heads + head) * R + member) * queries + query
    out_mask = real[:, None]
    if VALUE_DIM != BLOCK_V:
        out_mask = out_mask & (dv < VALUE_DIM)[None, :]
    carry = carry_ptr
    stats = stat_ptr
    if CARRY_IN or CARRY_OUT:
        carry += flat[:, None] * VALUE_DIM + dv[None, :]
        stats += flat
    all_queries = tl.cast(rows, tl.int64) * heads * R * queries
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    top = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if CARRY_IN:
        acc = tl.load(carry, mask=out_mask, other=0.0)
        top = tl.load(stats, mask=real, other=0.0)
        total = tl.load(stats + all_queries, mask=real, other=1.0)
    elif LOGITS:
        # A logit without a value is a softmax that has started already.
        logit = tl.load(logit_ptr + q_head, mask=real, other=0.0).to(tl.float32)
        top = logit * 1.4426950408889634
        total += 1.0

    oldest = own - reach + 1
    if SINKS:
        # Slot s of the sinks holds position s, and distances to it are limited by the native window alone.
        count = tl.cdiv(slots, BLOCK_N)
        if (position - slots + 1 >= window) | (position + BLOCK_Q <= 0):
            count = 0
        acc, total, top = visit(
            acc, total, top, q, sink_key, sink_value, row, head, sk_b, sk_h, sk_t, sv_b, sv_h, sv_t,
            0, count, 0, slots, position, window, scale, cap_in, cap_out,
            BLOCK_Q, BLOCK_N, DIM, VALUE_DIM, BLOCK_D, BLOCK_V, SOFTCAP, TMA,
        )  # fmt: skip
    if PAST != 0:
        past_position = past_position_ptr + wide_row * ppos_b
        begin = 0
        if PAST == 1:
            # Tokens in order end with the latest one, and only padding at their start is to be left out. Else this is
            # a block of nothing but padding, or a static cache of unknown length: the positions decide below.
            last = tl.load(past_position + past - 1).to(tl.int32)
            if last >= 0:
                begin = past
            low = tl.maximum(past - 1 - last, 0)
            start = low // BLOCK_N * BLOCK_N
            count = tl.where(last >= 0, tl.cdiv(past - start, BLOCK_N), 0)
            acc, total, top = visit(
                acc, total, top, q, past_key, past_value, row, head, pk_b, pk_h, pk_t,
                pv_b, pv_h, pv_t, start, count, low, past, 1 << 29, 1 << 30, scale, cap_in, cap_out,
                BLOCK_Q, BLOCK_N, DIM, VALUE_DIM, BLOCK_D, BLOCK_V, SOFTCAP, TMA,
            )  # fmt: skip
        elif oldest >= 0:
            begin = past
        n = tl.arange(0, BLOCK_N)
        # Few tiles come here. What the compiler would prepare ahead of the loop would spill in the loops of all others.
        for j in tl.range(begin, past, BLOCK_N, num_stages=1, disable_licm=True):
            held = tl.load(past_position + j + n, mask=j + n < past, other=-1).to(tl.int32)
            # Sinks are read from their own slots.
            usable = (held >= sink) & (position - held < reach)
            if tl.max(usable.to(tl.int32), 0) > 0:
                k = tile_of(past_key_ptr, row, head, pk_b, pk_h, pk_t, j, 0, past, DIM, BLOCK_D,
                            BLOCK_N, False)  # fmt: skip
                v = tile_of(past_value_ptr, row, head, pv_b, pv_h, pv_t, j, 0, past, VALUE_DIM,
                            BLOCK_V, BLOCK_N, False)  # fmt: skip
                s = scores(q, k, cap_in, cap_out, SOFTCAP)
                distance = (position + m % BLOCK_Q)[:, None] - held[None, :]
                seen = usable[None, :] & (distance >= 0) & (distance < reach)
                s = tl.where(seen, s, float("-inf"))
                acc, total, top = absorb(acc, total, top, s, v, scale)
    if NEW:
        low = tl.maximum(sink - base, 0)
        stop = tl.minimum(first + BLOCK_Q, queries) + offset
        count = tl.maximum(tl.cdiv(stop - tl.maximum(low, oldest), BLOCK_N), 0)
        # The tiles end at the diagonal, so that the borders fall into as few of them as possible.
        acc, total, top = visit(
            acc, total, top, q, key, value, row, head, k_b, k_h, k_t, v_b, v_h, v_t,
            stop - count * BLOCK_N, count, low, keys, own, reach, scale, cap_in, cap_out,
            BLOCK_Q, BLOCK_N, DIM, VALUE_DIM, BLOCK_D, BLOCK_V, SOFTCAP, TMA,
        )  # fmt: skip

    if CARRY_OUT:
        tl.store(carry, acc, mask=out_mask)
        tl.store(stats, top, mask=real)
        tl.store(stats + all_queries, total, mask=real)
    else:
        # A padding query sees nothing; zeros are as good as anything finite.
        total = tl.where(total > 0, total, 1.0)
        if LSE:
            tl.store(lse_ptr + flat, top + tl.log2(total), mask=real)
        out_row = out_ptr + wide_row * o_b + wide_query * o_t + q_head * o_h
        result = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_row[:, None] + dv[None, :], result, mask=out_mask)


class Launch:
    """What the launches for one set of heads share.

    Args:
        query: [B, H, Q, D].
        keys: [B, G, K, D], of which the queries belong to the last Q.
        values: [B, G, K, Dv].
        out: [B, Q, H, Dv].
        heads: KV heads [G] of the layer that ``keys`` holds; None if it holds all of them.
        kv_heads: KV heads of the layer.
        position: [B or 1, K], of which the last one counts; None if the first key is the first token of every row.
        sink: leading tokens that come as sinks.
        reach: tokens back that a query sees besides, its own included; None for all.
        window: native window, which limits the sinks as well; None for none.
        scale: factor on the scores.
        softcap: cap of the scores or None.
        sink_logits: [H] or None.
        lse: fp32 [B, G * R, Q], which takes log2 of the softmax denominators; None if they are not needed.
        tma: whether the tensor memory accelerator loads; None for wherever it can.
    """

    def __init__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        out: Tensor,
        *,
        heads: Tensor | None,
        kv_heads: int,
        position: Tensor | None,
        sink: int,
        reach: int | None,
        window: int | None,
        scale: float,
        softcap: float | None,
        sink_logits: Tensor | None,
        lse: Tensor | None = None,
        tma: bool | None = None,
    ) -> None:
        self.query, self.keys, self.values = map(rows_contiguous, (query, keys, values))
        self.out, self.heads, self.position, self.lse = out, heads, position, lse
        self.group = query.shape[1] // kv_heads
        self.sink, self.banded = sink, reach is not None
        self.reach = UNLIMITED if reach is None else reach
        self.window = UNLIMITED if window is None else window
        self.scale, self.softcap, self.sink_logits = scale, softcap, sink_logits
        self.tma = tma
        self.carry: Tensor | None = None
        self.stats: Tensor | None = None

    def allocate_carry(self) -> None:
        """Make room for unfinished sums, in fp32, when the past comes in several blocks."""
        flat = (self.keys.shape[0], self.keys.shape[1] * self.group, self.query.shape[2])
        self.carry = self.query.new_empty(*flat, self.values.shape[-1], dtype=torch.float32)
        self.stats = self.query.new_empty(2, *flat, dtype=torch.float32)

    def __call__(
        self,
        *,
        sinks: KeysAndValues | None = None,
        past: MaskedPiece | None = None,
        new: bool = True,
        resume: bool = False,
        suspend: bool = False,
        tiles: Tiles | None = None,
    ) -> None:
        """Visit the sinks, a block of the past and, if ``new``, the new keys.

        ``resume`` goes on with the sums that a launch with ``suspend`` left behind. ``tiles`` replaces the table's.
        """
        query, keys, values, position = self.query, self.keys, self.values, self.position
        rows, view_heads, count, dim = keys.shape
        value_dim = values.shape[-1]
        own = (keys, values)
        sources = [
            *own,
            *(own if sinks is None else map(rows_contiguous, sinks)),
            *(own if past is None else map(rows_contiguous, past[:2])),
        ]
        # The ring is read by pointers, whatever its slots look like.
        loaded = sources[:4] if self.banded else sources
        tma = accelerated(*loaded) if self.tma is None else self.tma
        tiles = tiles or forward_tiles(
            max(dim, value_dim), query.dtype, group=self.group, queries=query.shape[2],
            banded=self.banded, tma=tma, shared=shared_memory(query),
        )  # fmt: skip
        views = [descriptor(x, tiles.keys) for x in loaded] if tma else loaded
        views += views[:2] if len(views) == 4 else []
        past_position = position if past is None else past[2]
        packs = triton.cdiv(self.group, tiles.pack)
        grid = (packs * triton.cdiv(query.shape[2], tiles.queries) * view_heads * rows,)
        with on_device(query):
            attend_kernel[grid](
                query, self.out, self.lse, *views, sources[4], sources[5],
                position, past_position, self.heads, self.sink_logits, self.carry, self.stats,
                *query.stride()[:3], *self.out.stride()[:3],
                *(step for x in sources for step in x.stride()[:3]),
                _row_step(position), _row_step(past_position),
                query.shape[2], count, 0 if sinks is None else sources[2].shape[2],
                0 if past is None else sources[4].shape[2], view_heads, rows,
                self.sink, self.reach, self.window, *score_factors(self.scale, self.softcap),
                R=self.group, DIM=dim, VALUE_DIM=value_dim,
                BLOCK_D=block_width(dim), BLOCK_V=block_width(value_dim),
                BLOCK_Q=tiles.queries, PACK=tiles.pack, BLOCK_N=tiles.keys,
                POSITIONS=position is not None, HEADS=self.heads is not None,
                LOGITS=self.sink_logits is not None and not resume,
                SOFTCAP=self.softcap is not None, SINKS=sinks is not None,
                PAST=0 if past is None else 2 if self.banded else 1, NEW=new,
                CARRY_IN=resume, CARRY_OUT=suspend, LSE=self.lse is not None,
                TMA=tma, **tiles.options(),
            )  # fmt: skip


def _row_step(position: Tensor | None) -> int:
    """Elements from one row's positions to the next one's; 0 if all rows share them."""
    return 0 if position is None or position.shape[0] == 1 else position.stride(0)

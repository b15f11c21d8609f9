"""Triton code of split-KV decode: the kernel that reads stored keys and values, once, for both kinds of heads.

Decode is bound by reading the cache, so everything here serves the memory system: stored numbers travel as they lie in
memory, in 16-bit words, and become tensor-core operands in registers (`triton_decode_numbers`); scales are applied to
scores and weights, never to keys and values. `duohead.attention.triton_decode` launches this and joins the splits.

Tokens are the long side of every product and query rows the short one; scores are [N, M], sums [W, M]: few query rows
then waste least, since the narrow side of a tensor-core tile is 8, and so do registers and softmax.

Shape letters: B rows, G KV heads of one view, R query heads per KV head, Q query tokens, M rows (of Q * R) of one
program, N slots of a tile, W words of a stored vector, J numbers of a word, S splits of one head.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from duohead.attention.triton_decode_numbers import centred, of_group, operand
from duohead.cache.rotation_kernel import rotated_parts

# Integers of a view that change from call to call or from layer to layer: not worth a compilation each.
_PER_VIEW = "tokens first groups splits offset total start sink ring reach window".split()
PER_CALL = ["programs0"] + [f"{name}{view}" for view in (0, 1) for name in _PER_VIEW]


@triton.jit
def _tile(
    start, state_m, state_l, extra, top_scale, acc0, acc1, acc2, acc3,
    q0, q1, q2, q3, q_sum, key_scale, key_least, value_scale, value_least,
    seen, live, keys, keys_s, keys_m, values, values_s, values_m, factor, softcap,
    MASKED: tl.constexpr, CAPPED: tl.constexpr, SHIFT: tl.constexpr,
    DTYPE: tl.constexpr, PTX: tl.constexpr, BLOCK_N: tl.constexpr,
    K_CODEC: tl.constexpr, K_FOLD: tl.constexpr, K_NUMBERS: tl.constexpr, K_PRE: tl.constexpr,
    K_UNIT: tl.constexpr, KW: tl.constexpr, KW_PAD: tl.constexpr, K_GROUPS: tl.constexpr, K_GROUP: tl.constexpr,
    V_CODEC: tl.constexpr, V_FOLD: tl.constexpr, V_NUMBERS: tl.constexpr, V_PRE: tl.constexpr,
    VW: tl.constexpr, VW_PAD: tl.constexpr, V_GROUPS: tl.constexpr, V_GROUP: tl.constexpr,
):  # fmt: skip
    """Online softmax over the slots [start, start + BLOCK_N); ``seen`` [N, M] and ``live`` [N] only if MASKED."""
    slot = tl.arange(0, BLOCK_N)[:, None]
    word = tl.arange(0, KW_PAD)[None, :]
    value_slot = tl.arange(0, BLOCK_N)[None, :]
    value_word = tl.arange(0, VW_PAD)[:, None]
    # A head of 4M tokens is longer than 32 bits of bytes, a tile is not.
    key_at = keys + tl.cast(start, tl.int64) * KW + (slot * KW + word)
    value_at = values + tl.cast(start, tl.int64) * VW + (value_slot * VW + value_word)
    if MASKED:
        # What was never written may be NaN, which would survive a weight of zero.
        key_live, value_live = live[:, None] & (word < KW), live[None, :] & (value_word < VW)
        k = tl.load(key_at, mask=key_live, other=0)
        v = tl.load(value_at, mask=value_live, other=0)
    else:
        key_live, value_live = word < KW, value_word < VW
        if KW == KW_PAD:
            k = tl.load(key_at)
        else:
            k = tl.load(key_at, mask=key_live, other=0)
        if VW == VW_PAD:
            v = tl.load(value_at)
        else:
            v = tl.load(value_at, mask=value_live, other=0)

    s = tl.zeros([BLOCK_N, q0.shape[1]], dtype=tl.float32)
    for j in tl.static_range(K_NUMBERS):
        scale, least = 0.0, 0.0
        if not K_FOLD:
            at = tl.cast(start, tl.int64) * K_GROUPS
            scale = of_group(keys_s + at, slot, word, key_live, j, K_GROUPS, K_GROUP)
            least = of_group(keys_m + at, slot, word, key_live, j, K_GROUPS, K_GROUP)
        k_j = operand(k, scale, least, j, K_CODEC, K_FOLD, DTYPE, PTX)
        q_j = q0 if j == 0 else (q1 if j == 1 else (q2 if j == 2 else q3))
        s = tl.dot(k_j, q_j, s, input_precision="ieee")
    if K_CODEC == "native" or not K_FOLD:
        s = s * factor
    elif K_CODEC == "fp8":
        s = s * (key_scale.to(tl.float32) * (factor / (K_PRE * K_UNIT)))[:, None]
    elif K_CODEC == "int8":
        # q_sum holds what the numbers' offset of 128 adds.
        s = (s - q_sum[None, :]) * (key_scale.to(tl.float32) * (factor / (K_PRE * K_UNIT)))[:, None]
    else:
        s = s * (key_scale.to(tl.float32) * (factor / (K_PRE * K_UNIT)))[:, None]
        s += q_sum[None, :] * (key_least.to(tl.float32) * factor)[:, None]
    if CAPPED:
        grown = tl.exp2(tl.abs(s) * (-2.8853900817779268 / softcap))
        s = tl.where(s < 0, -1.0, 1.0) * (1.0 - grown) / (1.0 + grown)
        s = s * (softcap * 1.4426950408889634)
    if MASKED:
        s = tl.where(seen, s, float("-inf"))

    m = tl.maximum(state_m, tl.max(s, 0))
    # A row that has seen nothing yet must not compute inf - inf.
    m_safe = tl.where(m == float("-inf"), 0.0, m) if MASKED else m
    fade = tl.exp2(state_m - m_safe)
    p = tl.exp2(s - (m_safe - SHIFT)[None, :])
    state_l = state_l * fade[None, :] + p
    if V_CODEC != "native" and V_FOLD:
        weight = value_scale.to(tl.float32)
        if V_CODEC == "int4":
            extra = extra * fade[None, :] + p * value_least.to(tl.float32)[:, None]
        if tl.float16 == DTYPE:
            # fp16 has no room for weights times scales: keep the scales at most 1.
            top = tl.maximum(top_scale, tl.max(weight, 0))
            fade = fade * (top_scale / top)
            weight, top_scale = weight / top, top
        p = p * (weight * V_PRE)[:, None]
    p = p.to(DTYPE)
    for j in tl.static_range(V_NUMBERS):
        scale, least = 0.0, 0.0
        if not V_FOLD:
            at = tl.cast(start, tl.int64) * V_GROUPS
            scale = of_group(
                values_s + at, value_slot, value_word, value_live, j, V_GROUPS, V_GROUP
            )
            least = of_group(
                values_m + at, value_slot, value_word, value_live, j, V_GROUPS, V_GROUP
            )
        v_j = operand(v, scale, least, j, V_CODEC, V_FOLD, DTYPE, PTX)
        if V_CODEC == "int8":
            v_j = centred(v_j, DTYPE, PTX)
        if j == 0:
            acc0 = tl.dot(v_j, p, acc0 * fade[None, :], input_precision="ieee")
        elif j == 1:
            acc1 = tl.dot(v_j, p, acc1 * fade[None, :], input_precision="ieee")
        elif j == 2:
            acc2 = tl.dot(v_j, p, acc2 * fade[None, :], input_precision="ieee")
        else:
            acc3 = tl.dot(v_j, p, acc3 * fade[None, :], input_precision="ieee")
    return m, state_l, extra, top_scale, acc0, acc1, acc2, acc3


@triton.jit
def _scales_at(
    start, least_slot, slots, keys_s, keys_m, values_s, values_m,
    K_CODEC: tl.constexpr, K_FOLD: tl.constexpr, V_CODEC: tl.constexpr, V_FOLD: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Scales and minima of the keys and of the values of one tile, each [N]; zeros where the codec has none."""
    slot = start + tl.arange(0, BLOCK_N)
    live = (slot >= least_slot) & (slot < slots)
    key_scale = tl.zeros([BLOCK_N], dtype=tl.float16)
    key_least, value_scale, value_least = key_scale, key_scale, key_scale
    if K_CODEC != "native" and K_FOLD:
        key_scale = tl.load(keys_s + slot, mask=live, other=0.0)
    if V_CODEC != "native" and V_FOLD:
        value_scale = tl.load(values_s + slot, mask=live, other=0.0)
    if K_CODEC == "int4" and K_FOLD:
        key_least = tl.load(keys_m + slot, mask=live, other=0.0)
    if V_CODEC == "int4" and V_FOLD:
        value_least = tl.load(values_m + slot, mask=live, other=0.0)
    return key_scale, key_least, value_scale, value_least


@triton.jit
def _query_part(
    query, stride_h, stride_q, row, J: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, NUMBERS: tl.constexpr, KW: tl.constexpr, KW_PAD: tl.constexpr,
):  # fmt: skip
    """The numbers J, NUMBERS + J, ... of each query row [W, M]: those that meet the J-th numbers of stored words."""
    word = tl.arange(0, KW_PAD)[:, None]
    at = (row % GROUP) * stride_h + (row // GROUP) * stride_q
    mask = (row < ROWS)[None, :] & (word < KW)
    return tl.load(query + at[None, :] + (NUMBERS * word + J), mask=mask, other=0.0)


@triton.jit
def _put(
    partial, row, ROWS: tl.constexpr, value, J: tl.constexpr,
    NUMBERS: tl.constexpr, VW: tl.constexpr, VW_PAD: tl.constexpr,
):  # fmt: skip
    """Store the J-th numbers [W, M] of the weighted values of one split."""
    word = tl.arange(0, VW_PAD)[:, None]
    mask = (row < ROWS)[None, :] & (word < VW)
    tl.store(partial + row[None, :] * (NUMBERS * VW) + (NUMBERS * word + J), value, mask=mask)


@triton.jit
def _attend_split(
    pid, query, stride_b, stride_h, stride_q, acc_out, stat_out,
    heads, keys, keys_s, keys_m, values, values_s, values_m, tokens, padding, floor,
    first, slots, groups, splits, slot_offset, split_total, row_offset, sink, ring, reach, window,
    factor, softcap, ROWS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, CAPPED: tl.constexpr, SHIFT: tl.constexpr, PTX: tl.constexpr,
    ON_DEVICE: tl.constexpr, RING: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, K_BITS: tl.constexpr,
    K_CODEC: tl.constexpr, K_FOLD: tl.constexpr, K_NUMBERS: tl.constexpr, K_PRE: tl.constexpr,
    K_UNIT: tl.constexpr, KW: tl.constexpr, KW_PAD: tl.constexpr, K_GROUPS: tl.constexpr, K_GROUP: tl.constexpr,
    V_CODEC: tl.constexpr, V_FOLD: tl.constexpr, V_NUMBERS: tl.constexpr, V_PRE: tl.constexpr,
    V_UNIT: tl.constexpr, VW: tl.constexpr, VW_PAD: tl.constexpr, V_GROUPS: tl.constexpr, V_GROUP: tl.constexpr,
):  # fmt: skip
    """One split of one KV head of one view: its softmax maximum and sum, and its weighted values."""
    DTYPE: tl.constexpr = query.dtype.element_ty
    COUNT: tl.constexpr = ROWS // GROUP
    BLOCKS: tl.constexpr = (ROWS + BLOCK_M - 1) // BLOCK_M
    split = pid % splits
    rest = pid // splits
    row = (rest % BLOCKS) * BLOCK_M + tl.arange(0, BLOCK_M)
    rest = rest // BLOCKS
    group = rest % groups
    batch = (rest // groups).to(tl.int64)

    length = tl.load(tokens).to(tl.int32) if ON_DEVICE else tokens
    pad = 0 if padding is None else tl.load(padding + batch).to(tl.int32)
    oldest = 0 if floor is None else tl.load(floor).to(tl.int32) - pad
    # Positions count from the first real token of the row; those of padding are negative.
    row_position = length - COUNT - pad + row // GROUP
    if RING:
        high = tl.minimum(slots, length - pad)
        low = 0
    else:
        high = tl.minimum(slots, length - first)
        limit = tl.minimum(reach, window)
        low = tl.maximum(tl.maximum(pad, length - COUNT - limit + 1) - first, 0)
    tile_low = low // BLOCK_N
    tiles = tl.maximum(tl.cdiv(high, BLOCK_N) - tile_low, 0)
    share = tl.cdiv(tiles, splits)
    begin = tile_low + split * share
    end = tl.minimum(begin + share, tile_low + tiles)

    base = batch * groups + group
    place = (row_offset + (base * split_total + slot_offset + split) * ROWS).to(tl.int64)
    stat = stat_out + 2 * (place + row)
    if begin >= end:
        tl.store(stat, float("-inf"), mask=row < ROWS)
        tl.store(stat + 1, 0.0, mask=row < ROWS)
        return

    head = group if heads is None else tl.load(heads + group)
    query += batch * stride_b + head.to(tl.int64) * GROUP * stride_h
    q0 = _query_part(query, stride_h, stride_q, row, 0, GROUP, ROWS, K_NUMBERS, KW, KW_PAD)
    q1, q2, q3, q_sum = q0, q0, q0, 0.0
    if K_NUMBERS > 1:
        q1 = _query_part(query, stride_h, stride_q, row, 1, GROUP, ROWS, K_NUMBERS, KW, KW_PAD)
    if K_NUMBERS > 2:
        q2 = _query_part(query, stride_h, stride_q, row, 2, GROUP, ROWS, K_NUMBERS, KW, KW_PAD)
        q3 = _query_part(query, stride_h, stride_q, row, 3, GROUP, ROWS, K_NUMBERS, KW, KW_PAD)
    if K_BITS > 0:
        q0, q1, q2, q3 = rotated_parts(q0, q1, q2, q3, K_BITS)
    if K_CODEC == "int4" and K_FOLD:
        q_sum = tl.sum(
            q0.to(tl.float32) + q1.to(tl.float32) + q2.to(tl.float32) + q3.to(tl.float32), 0
        )
        ODD: tl.constexpr = 1.0 if tl.float32 == DTYPE else 0.0625
        q1 = (q1.to(tl.float32) * ODD).to(DTYPE)
        q3 = (q3.to(tl.float32) * ODD).to(DTYPE)
    if K_CODEC == "int8":
        q_sum = tl.sum(q0.to(tl.float32) + q1.to(tl.float32), 0) * (128.0 * K_PRE * K_UNIT)
    if K_PRE != 1.0:
        q0 = (q0.to(tl.float32) * K_PRE).to(DTYPE)
        q1 = (q1.to(tl.float32) * K_PRE).to(DTYPE)
        q2 = (q2.to(tl.float32) * K_PRE).to(DTYPE)
        q3 = (q3.to(tl.float32) * K_PRE).to(DTYPE)

    skip = base * slots
    if K_CODEC != "native":
        keys = keys.to(tl.pointer_type(tl.uint16), bitcast=True)
        keys_s += skip * K_GROUPS
    if V_CODEC != "native":
        values = values.to(tl.pointer_type(tl.uint16), bitcast=True)
        values_s += skip * V_GROUPS
    if K_CODEC == "int4":
        keys_m += skip * K_GROUPS
    if V_CODEC == "int4":
        values_m += skip * V_GROUPS
    keys += skip * KW
    values += skip * VW

    # Tiles that every row sees whole need no mask: all but those at the ends, for a store that keeps every token.
    if RING:
        full_low, full_high = begin, begin
    else:
        seen_by_last = tl.maximum(tl.maximum(pad, length - limit) - first, 0)
        seen_by_first = tl.minimum(high, length - COUNT + 1 - first)
        full_low = tl.minimum(tl.maximum(tl.cdiv(seen_by_last, BLOCK_N), begin), end)
        full_high = tl.maximum(tl.minimum(tl.maximum(seen_by_first, 0) // BLOCK_N, end), full_low)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)  # noqa: E741
    extra = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    top_scale = 6.103515625e-05
    acc0 = tl.zeros([VW_PAD, BLOCK_M], tl.float32)
    acc1, acc2, acc3 = acc0, acc0, acc0

    if not RING:
        ks, km, vs, vm = _scales_at(
            full_low * BLOCK_N, 0, slots, keys_s, keys_m, values_s, values_m,
            K_CODEC, K_FOLD, V_CODEC, V_FOLD, BLOCK_N,
        )  # fmt: skip
        for tile in tl.range(full_low, full_high, num_stages=STAGES):
            # Rows of 16-bit scales are too short for asynchronous copies, so they are fetched one tile ahead.
            ahead = tl.minimum(tile + 1, full_high - 1) * BLOCK_N
            ks1, km1, vs1, vm1 = _scales_at(
                ahead, 0, slots, keys_s, keys_m, values_s, values_m,
                K_CODEC, K_FOLD, V_CODEC, V_FOLD, BLOCK_N,
            )  # fmt: skip
            m, l, extra, top_scale, acc0, acc1, acc2, acc3 = _tile(  # noqa: E741
                tile * BLOCK_N, m, l, extra, top_scale, acc0, acc1, acc2, acc3,
                q0, q1, q2, q3, q_sum, ks, km, vs, vm, None, None,
                keys, keys_s, keys_m, values, values_s, values_m, factor, softcap,
                False, CAPPED, SHIFT, DTYPE, PTX, BLOCK_N,
                K_CODEC, K_FOLD, K_NUMBERS, K_PRE, K_UNIT, KW, KW_PAD, K_GROUPS, K_GROUP,
                V_CODEC, V_FOLD, V_NUMBERS, V_PRE, VW, VW_PAD, V_GROUPS, V_GROUP,
            )  # fmt: skip
            ks, km, vs, vm = ks1, km1, vs1, vm1

    before = full_low - begin
    for index in tl.range(0, before + end - full_high, num_stages=2 if RING else 1):
        tile = begin + index if index < before else full_high + index - before
        slot = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        live = (slot >= low) & (slot < high)
        if RING:
            turns = tl.maximum(length - pad - 1 - slot, 0) // ring
            position = tl.where(slot < sink, slot, slot + turns * ring)
            back = row_position[None, :] - position[:, None]
            near = (position < sink)[:, None] | ((back < reach) & (position >= oldest)[:, None])
            seen = live[:, None] & (back >= 0) & near & (back < window)
        else:
            back = row_position[None, :] - (first + slot - pad)[:, None]
            seen = live[:, None] & (back >= 0) & (back < limit)
        ks, km, vs, vm = _scales_at(
            tile * BLOCK_N, low, high, keys_s, keys_m, values_s, values_m,
            K_CODEC, K_FOLD, V_CODEC, V_FOLD, BLOCK_N,
        )  # fmt: skip
        m, l, extra, top_scale, acc0, acc1, acc2, acc3 = _tile(  # noqa: E741
            tile * BLOCK_N, m, l, extra, top_scale, acc0, acc1, acc2, acc3,
            q0, q1, q2, q3, q_sum, ks, km, vs, vm, seen, live,
            keys, keys_s, keys_m, values, values_s, values_m, factor, softcap,
            True, CAPPED, SHIFT, DTYPE, PTX, BLOCK_N,
            K_CODEC, K_FOLD, K_NUMBERS, K_PRE, K_UNIT, KW, KW_PAD, K_GROUPS, K_GROUP,
            V_CODEC, V_FOLD, V_NUMBERS, V_PRE, VW, VW_PAD, V_GROUPS, V_GROUP,
        )  # fmt: skip

    tl.store(stat, m - SHIFT, mask=row < ROWS)
    tl.store(stat + 1, tl.sum(l, 0), mask=row < ROWS)
    even, odd = 1.0, 1.0
    if V_CODEC != "native" and V_FOLD:
        even = 1.0 / (V_PRE * V_UNIT)
        odd = even
        if tl.float16 == DTYPE:
            even, odd = even * top_scale, odd * top_scale
        if V_CODEC == "int4":
            odd = even if tl.float32 == DTYPE else even * 0.0625
    add = 0.0
    if V_CODEC == "int4" and V_FOLD:
        add = tl.sum(extra, 0)[None, :]
    acc_out += place * (V_NUMBERS * VW)
    _put(acc_out, row, ROWS, acc0 * even + add, 0, V_NUMBERS, VW, VW_PAD)
    if V_NUMBERS > 1:
        _put(acc_out, row, ROWS, acc1 * odd + add, 1, V_NUMBERS, VW, VW_PAD)
    if V_NUMBERS > 2:
        _put(acc_out, row, ROWS, acc2 * even + add, 2, V_NUMBERS, VW, VW_PAD)
        _put(acc_out, row, ROWS, acc3 * odd + add, 3, V_NUMBERS, VW, VW_PAD)


@triton.jit(do_not_specialize=PER_CALL)
def split_kernel(
    query, stride_b, stride_h, stride_q, acc_out, stat_out, factor, softcap, programs0,
    heads0, keys0, keys_s0, keys_m0, values0, values_s0, values_m0, tokens0, padding0, floor0,
    first0, slots0, groups0, splits0, offset0, total0, start0, sink0, ring0, reach0, window0,
    heads1, keys1, keys_s1, keys_m1, values1, values_s1, values_m1, tokens1, padding1, floor1,
    first1, slots1, groups1, splits1, offset1, total1, start1, sink1, ring1, reach1, window1,
    ROWS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, CAPPED: tl.constexpr, SHIFT: tl.constexpr,
    PTX: tl.constexpr, EARLY: tl.constexpr, BOTH: tl.constexpr,
    ON_DEVICE0: tl.constexpr, RING0: tl.constexpr, BLOCK_N0: tl.constexpr, STAGES0: tl.constexpr, K_BITS0: tl.constexpr,
    K_CODEC0: tl.constexpr, K_FOLD0: tl.constexpr, K_NUMBERS0: tl.constexpr, K_PRE0: tl.constexpr,
    K_UNIT0: tl.constexpr, KW0: tl.constexpr, KW_PAD0: tl.constexpr, K_GROUPS0: tl.constexpr,
    K_GROUP0: tl.constexpr,
    V_CODEC0: tl.constexpr, V_FOLD0: tl.constexpr, V_NUMBERS0: tl.constexpr, V_PRE0: tl.constexpr,
    V_UNIT0: tl.constexpr, VW0: tl.constexpr, VW_PAD0: tl.constexpr, V_GROUPS0: tl.constexpr,
    V_GROUP0: tl.constexpr,
    ON_DEVICE1: tl.constexpr, RING1: tl.constexpr, BLOCK_N1: tl.constexpr, STAGES1: tl.constexpr, K_BITS1: tl.constexpr,
    K_CODEC1: tl.constexpr, K_FOLD1: tl.constexpr, K_NUMBERS1: tl.constexpr, K_PRE1: tl.constexpr,
    K_UNIT1: tl.constexpr, KW1: tl.constexpr, KW_PAD1: tl.constexpr, K_GROUPS1: tl.constexpr,
    K_GROUP1: tl.constexpr,
    V_CODEC1: tl.constexpr, V_FOLD1: tl.constexpr, V_NUMBERS1: tl.constexpr, V_PRE1: tl.constexpr,
    V_UNIT1: tl.constexpr, VW1: tl.constexpr, VW_PAD1: tl.constexpr, V_GROUPS1: tl.constexpr,
    V_GROUP1: tl.constexpr,
):  # fmt: skip
    """Programs [0, programs0) do the first view, the rest the second one, whose argument names end with 1."""
    if EARLY:
        # What comes before in the stream is waited for here; what comes after may be set up from now on.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    pid = tl.program_id(0)
    if pid < programs0:
        _attend_split(
            pid, query, stride_b, stride_h, stride_q, acc_out, stat_out,
            heads0, keys0, keys_s0, keys_m0, values0, values_s0, values_m0, tokens0, padding0, floor0,
            first0, slots0, groups0, splits0, offset0, total0, start0, sink0, ring0, reach0, window0,
            factor, softcap, ROWS, GROUP, BLOCK_M, CAPPED, SHIFT, PTX, ON_DEVICE0, RING0, BLOCK_N0, STAGES0, K_BITS0,
            K_CODEC0, K_FOLD0, K_NUMBERS0, K_PRE0, K_UNIT0, KW0, KW_PAD0, K_GROUPS0, K_GROUP0,
            V_CODEC0, V_FOLD0, V_NUMBERS0, V_PRE0, V_UNIT0, VW0, VW_PAD0, V_GROUPS0, V_GROUP0,
        )  # fmt: skip
    elif BOTH:
        _attend_split(
            pid - programs0, query, stride_b, stride_h, stride_q, acc_out, stat_out,
            heads1, keys1, keys_s1, keys_m1, values1, values_s1, values_m1, tokens1, padding1, floor1,
            first1, slots1, groups1, splits1, offset1, total1, start1, sink1, ring1, reach1, window1,
            factor, softcap, ROWS, GROUP, BLOCK_M, CAPPED, SHIFT, PTX, ON_DEVICE1, RING1, BLOCK_N1, STAGES1, K_BITS1,
            K_CODEC1, K_FOLD1, K_NUMBERS1, K_PRE1, K_UNIT1, KW1, KW_PAD1, K_GROUPS1, K_GROUP1,
            V_CODEC1, V_FOLD1, V_NUMBERS1, V_PRE1, V_UNIT1, VW1, VW_PAD1, V_GROUPS1, V_GROUP1,
        )  # fmt: skip

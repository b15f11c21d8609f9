"""Triton code of `duohead.cache.append`: positions to slots, and the codecs of `duohead.codec` to the bit.

Bits have to be the same wherever a token is encoded, so divisions are correctly rounded (`/` is not, on a GPU),
rounding is half to even by adding a number whose unit in the last place is 1, and NaN is told by its bits, since
minimum and maximum drop it. Products of a level and an fp16 scale are exact in fp32, so fused multiply-adds change
nothing.

Shape letters: B rows, G KV heads, K new tokens, N tokens of a tile, T slots.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl
from triton.runtime import JITFunction

from duohead.cache.rotation_kernel import rotated


@triton.jit
def _half_up(scale):
    """fp16 no smaller than ``scale``, within [least normal, largest]; the largest for infinity and NaN."""
    # 2^-14 and 65504 (0x7BFF) are the least normal and the largest number of fp16.
    half = tl.minimum(tl.maximum(scale, 6.103515625e-05), 65504.0).to(tl.float16)
    # The bits of positive halves are in their order.
    bits = half.to(tl.int16, bitcast=True).to(tl.int32) + (half.to(tl.float32) < scale).to(tl.int32)
    bits = tl.where(scale == scale, tl.minimum(bits, 0x7BFF), 0x7BFF)
    return bits.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _magnitude(x):
    """Bits of the absolute value of fp32 numbers: in their order, infinity and NaN above all."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _e4m3(y):
    """fp8 e4m3 codes (int32) of fp32 numbers, half to even, clipped to ±448; NaN stays NaN."""
    magnitude = _magnitude(y)
    # Bits of 448; the exponent's bias changes from 127 to 7, by 120 units of 2^3.
    clipped = tl.minimum(magnitude, 0x43E00000)
    normal = ((clipped + 0x7FFFF + ((clipped >> 20) & 1)) >> 20) - 960
    # Below 2^-6 the spacing is 2^-9, which is the unit in the last place of 16384.
    fixed = (clipped.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(clipped < 0x3C800000, fixed, normal)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return code | ((y.to(tl.int32, bitcast=True) >> 24) & 0x80)


@triton.jit
def _from_e4m3(code):
    """fp32 numbers of fp8 e4m3 codes."""
    level = code & 0x7F
    normal = ((level << 20) + 0x3C000000).to(tl.float32, bitcast=True)
    size = tl.where(level < 8, level.to(tl.float32) * 0.001953125, normal)
    size = tl.where(level == 0x7F, float("nan"), size)
    return (size.to(tl.int32, bitcast=True) | ((code & 0x80) << 24)).to(tl.float32, bitcast=True)


@triton.jit
def _over(x, scale):
    """``x`` / fp16 ``scale`` in fp32, correctly rounded."""
    return tl.div_rn(x, scale.to(tl.float32) + tl.zeros_like(x))


@triton.jit
def _rounded(level, least, most):
    """int32 nearest to fp32 numbers, half to even, within [least, most]; 0 for NaN."""
    level = tl.minimum(tl.maximum(tl.where(level == level, level, 0.0), least), most)
    # The sum's unit in the last place is 1, and its low bits are the number.
    return (level + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def _cast(x, dtype: tl.constexpr):
    """``x`` in another floating-point dtype, half to even; spelt out for bf16, which Triton's interpreter truncates."""
    if dtype == tl.bfloat16 and x.dtype != tl.bfloat16:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        y = tl.where(x == x, bits, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(dtype)
    return y


@triton.jit
def _vectors(
    source,
    row_stride,
    head_stride,
    token_stride,
    payload,
    scales,
    minima,
    decoded,
    row,
    head,
    index,
    load,
    vector,
    keep,
    new_vector,
    inside,
    CODEC: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_WIDTH: tl.constexpr,
    GROUPS_WIDTH: tl.constexpr,
    BITS: tl.constexpr,
):
    """Encode the new tokens ``index`` [N, 1, 1] of a head and store those to ``keep`` as vectors number ``vector``.

    ``decoded``, where given, gets what is read back of the tokens ``inside`` as its vectors number ``new_vector``.
    """
    group = tl.arange(0, GROUPS_WIDTH)[None, :, None]
    place = tl.arange(0, GROUP_WIDTH)[None, None, :]
    real = (group < GROUPS) & (place < GROUP)
    number = group * GROUP + place
    source += row.to(tl.int64) * row_stride + head.to(tl.int64) * head_stride
    x = tl.load(source + index * token_stride + number, mask=load & real, other=0.0)
    if CODEC == "raw":
        code = _cast(x, payload.dtype.element_ty)
        seen = code
    else:
        x = x.to(tl.float32)
        if BITS > 0:
            x = rotated(x, place, BITS, False)
        peak = tl.max(_magnitude(x), axis=2, keep_dims=True)
        if CODEC == "int4":
            low = tl.min(tl.where(real, x, float("inf")), axis=2, keep_dims=True)
            high = tl.max(tl.where(real, x, float("-inf")), axis=2, keep_dims=True)
            low = tl.minimum(tl.maximum(low, -65504.0), 65504.0)
            low = tl.where(peak > 0x7F800000, float("nan"), low).to(tl.float16)
            top = high - low.to(tl.float32)
            top = tl.where(top == top, tl.maximum(top, 0.0), top)
            scale = _half_up(tl.div_rn(top, tl.full(top.shape, 15.0, tl.float32)))
            level = _over(x - low.to(tl.float32), scale)
            code = _rounded(level, 0.0, 15.0)
            seen = code.to(tl.float32) * scale.to(tl.float32) + low.to(tl.float32)
            tl.store(minima + vector * GROUPS + group, low, mask=keep & (group < GROUPS))
        else:
            limit: tl.constexpr = 448.0 if CODEC == "fp8" else 127.0
            top = peak.to(tl.float32, bitcast=True)
            scale = _half_up(tl.div_rn(top, tl.full(top.shape, limit, tl.float32)))
            level = _over(x, scale)
            if CODEC == "fp8":
                code = _e4m3(level)
                seen = _from_e4m3(code) * scale.to(tl.float32)
            else:
                code = _rounded(level, -127.0, 127.0)
                seen = code.to(tl.float32) * scale.to(tl.float32)
        tl.store(scales + vector * GROUPS + group, scale, mask=keep & (group < GROUPS))
    if CODEC == "int4":
        pairs = tl.reshape(code, code.shape[0], GROUPS_WIDTH, GROUP_WIDTH // 2, 2)
        even, odd = tl.split(pairs)
        half = tl.arange(0, GROUP_WIDTH // 2)[None, None, :]
        tl.store(
            payload + vector * (DIM // 2) + group * (GROUP // 2) + half,
            (even | (odd << 4)).to(tl.uint8),
            mask=keep & (group < GROUPS) & (half < GROUP // 2),
        )
    else:
        stored = code.to(payload.dtype.element_ty)
        tl.store(payload + vector * DIM + number, stored, mask=keep & real)
    if decoded is not None:
        if BITS > 0:
            seen = rotated(seen, place, BITS, True)
        seen = _cast(seen, decoded.dtype.element_ty)
        tl.store(decoded + new_vector * DIM + number, seen, mask=inside & real)


@triton.jit
def _part(
    keys,
    values,
    key_row_stride,
    key_head_stride,
    key_token_stride,
    value_row_stride,
    value_head_stride,
    value_token_stride,
    count,
    tokens,
    padding,
    part,
    heads,
    key_payload,
    key_scales,
    key_minima,
    value_payload,
    value_scales,
    value_minima,
    decoded_keys,
    decoded_values,
    num_heads,
    slots,
    first,
    sink,
    ring,
    floor,
    KEY_CODEC: tl.constexpr,
    VALUE_CODEC: tl.constexpr,
    RING: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    KEY_GROUPS: tl.constexpr,
    KEY_GROUP_WIDTH: tl.constexpr,
    KEY_GROUPS_WIDTH: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    VALUE_GROUP_WIDTH: tl.constexpr,
    VALUE_GROUPS_WIDTH: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    EVICT: tl.constexpr,
    N: tl.constexpr,
):
    """Keys (``part`` even) or values (odd) of a tile of new tokens, of head number ``part // 2`` of one view."""
    row = tl.program_id(2)
    local = part // 2
    head = local if heads is None else tl.load(heads + local)
    index = tl.program_id(0) * N + tl.arange(0, N)
    inside = index < count
    token = tokens - count + index
    if RING:
        skipped = 0 if padding is None else tl.load(padding + row).to(tl.int32)
        position = token - skipped
        wanted = position < sink
        if EVICT:
            # Of the tokens that share a slot only the last is stored, so that no two programs write there.
            wanted = wanted | (position >= tokens - skipped - ring)
            if floor is not None:
                once = (tl.program_id(0) == 0) & (row == 0) & (part == 0)
                oldest = tl.maximum(tl.load(floor, mask=once), (tokens - ring).to(tl.int64))
                tl.store(floor, oldest, mask=once)
        slot = tl.where(position < sink, position, sink + (position - sink) % ring)
        keep = inside & (position >= 0) & wanted & (slot < slots)
    else:
        slot = token - first
        keep = inside & (slot >= 0) & (slot < slots)
    own = row.to(tl.int64) * num_heads + local
    vector = (own * slots + slot)[:, None, None]
    new_vector = (own * count + index)[:, None, None]
    index, keep, inside = (
        index.to(tl.int64)[:, None, None],
        keep[:, None, None],
        inside[:, None, None],
    )
    load = keep if decoded_keys is None else inside
    # Most tiles of a long chunk leave nothing in a ring.
    if tl.max(load.to(tl.int32)) > 0:
        if part % 2 == 0:
            _vectors(
                keys, key_row_stride, key_head_stride, key_token_stride,
                key_payload, key_scales, key_minima, decoded_keys,
                row, head, index, load, vector, keep, new_vector, inside,
                KEY_CODEC, DIM, KEY_GROUP, KEY_GROUPS, KEY_GROUP_WIDTH, KEY_GROUPS_WIDTH, KEY_BITS,
            )  # fmt: skip
        else:
            _vectors(
                values, value_row_stride, value_head_stride, value_token_stride,
                value_payload, value_scales, value_minima, decoded_values,
                row, head, index, load, vector, keep, new_vector, inside,
                VALUE_CODEC, VALUE_DIM, VALUE_GROUP, VALUE_GROUPS, VALUE_GROUP_WIDTH, VALUE_GROUPS_WIDTH,
                VALUE_BITS,
            )  # fmt: skip


# Lengths change with every call and must not make another kernel of it.
_NUMBERS = ["count", "tokens"] + [
    f"{which}_{name}" for which in "ab" for name in ("num_heads", "slots", "first", "sink", "ring")
]


@triton.jit(do_not_specialize=_NUMBERS)
def append_kernel(
    keys,
    values,
    key_row_stride,
    key_head_stride,
    key_token_stride,
    value_row_stride,
    value_head_stride,
    value_token_stride,
    count,
    tokens,
    padding,
    a_heads,
    a_key_payload,
    a_key_scales,
    a_key_minima,
    a_value_payload,
    a_value_scales,
    a_value_minima,
    a_decoded_keys,
    a_decoded_values,
    a_num_heads,
    a_slots,
    a_first,
    a_sink,
    a_ring,
    a_floor,
    b_heads,
    b_key_payload,
    b_key_scales,
    b_key_minima,
    b_value_payload,
    b_value_scales,
    b_value_minima,
    b_decoded_keys,
    b_decoded_values,
    b_num_heads,
    b_slots,
    b_first,
    b_sink,
    b_ring,
    b_floor,
    A_KEY_CODEC: tl.constexpr,
    A_VALUE_CODEC: tl.constexpr,
    A_RING: tl.constexpr,
    A_KEY_GROUP: tl.constexpr,
    A_KEY_GROUPS: tl.constexpr,
    A_KEY_GROUP_WIDTH: tl.constexpr,
    A_KEY_GROUPS_WIDTH: tl.constexpr,
    A_KEY_BITS: tl.constexpr,
    A_VALUE_GROUP: tl.constexpr,
    A_VALUE_GROUPS: tl.constexpr,
    A_VALUE_GROUP_WIDTH: tl.constexpr,
    A_VALUE_GROUPS_WIDTH: tl.constexpr,
    A_VALUE_BITS: tl.constexpr,
    B_KEY_CODEC: tl.constexpr,
    B_VALUE_CODEC: tl.constexpr,
    B_RING: tl.constexpr,
    B_KEY_GROUP: tl.constexpr,
    B_KEY_GROUPS: tl.constexpr,
    B_KEY_GROUP_WIDTH: tl.constexpr,
    B_KEY_GROUPS_WIDTH: tl.constexpr,
    B_KEY_BITS: tl.constexpr,
    B_VALUE_GROUP: tl.constexpr,
    B_VALUE_GROUPS: tl.constexpr,
    B_VALUE_GROUP_WIDTH: tl.constexpr,
    B_VALUE_GROUPS_WIDTH: tl.constexpr,
    B_VALUE_BITS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    LENGTH_ON_DEVICE: tl.constexpr,
    EVICT: tl.constexpr,
    N: tl.constexpr,
):
    """Grid: tiles of N tokens, twice the heads of both views (keys and values), rows."""
    now = (tl.load(tokens) if LENGTH_ON_DEVICE else tokens).to(tl.int32)
    part = tl.program_id(1)
    parts_of_a = 2 * a_num_heads
    if part < parts_of_a:
        _part(
            keys, values, key_row_stride, key_head_stride, key_token_stride,
            value_row_stride, value_head_stride, value_token_stride, count, now, padding, part,
            a_heads, a_key_payload, a_key_scales, a_key_minima, a_value_payload,
            a_value_scales, a_value_minima, a_decoded_keys, a_decoded_values, a_num_heads,
            a_slots, a_first, a_sink, a_ring, a_floor,
            A_KEY_CODEC, A_VALUE_CODEC, A_RING,
            A_KEY_GROUP, A_KEY_GROUPS, A_KEY_GROUP_WIDTH, A_KEY_GROUPS_WIDTH, A_KEY_BITS,
            A_VALUE_GROUP, A_VALUE_GROUPS, A_VALUE_GROUP_WIDTH, A_VALUE_GROUPS_WIDTH, A_VALUE_BITS,
            DIM, VALUE_DIM, EVICT, N,
        )  # fmt: skip
    elif B_KEY_CODEC is not None:
        _part(
            keys, values, key_row_stride, key_head_stride, key_token_stride,
            value_row_stride, value_head_stride, value_token_stride, count, now, padding, part - parts_of_a,
            b_heads, b_key_payload, b_key_scales, b_key_minima, b_value_payload,
            b_value_scales, b_value_minima, b_decoded_keys, b_decoded_values, b_num_heads,
            b_slots, b_first, b_sink, b_ring, b_floor,
            B_KEY_CODEC, B_VALUE_CODEC, B_RING,
            B_KEY_GROUP, B_KEY_GROUPS, B_KEY_GROUP_WIDTH, B_KEY_GROUPS_WIDTH, B_KEY_BITS,
            B_VALUE_GROUP, B_VALUE_GROUPS, B_VALUE_GROUP_WIDTH, B_VALUE_GROUPS_WIDTH, B_VALUE_BITS,
            DIM, VALUE_DIM, EVICT, N,
        )  # fmt: skip


INTERPRETED = not isinstance(append_kernel, JITFunction)

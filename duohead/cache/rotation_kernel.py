"""Triton code of the rotation in `duohead.codec`: signs, and Walsh-Hadamard sums in the same order.

Stored bits must be those of the codec, so numbers are added in pairs of the same partners, and factors are powers of
two, which are exact wherever a compiler puts them. Where bits do not matter, `rotated_parts` lets the tensor cores add.
`duohead.cache.append` and `duohead.attention.triton_decode` use it; BITS is `duohead.codec.rotation` of a codec.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _odd(number):
    """1 where a number below 256 has an odd count of ones, else 0."""
    number = number ^ (number >> 4)
    number = number ^ (number >> 2)
    return (number ^ (number >> 1)) & 1


@triton.jit
def _signs(channel, BITS: tl.constexpr):
    """The sign of each channel as fp32."""
    place = channel & (2**BITS - 1)
    return 1.0 - 2.0 * _odd(place & (place >> 1)).to(tl.float32)


@triton.jit
def rotated(x, channel, BITS: tl.constexpr, BACK: tl.constexpr):
    """fp32 vectors, whose last dimension goes over ``channel``, as int4 encodes them, or BACK as they were before."""
    SIZE: tl.constexpr = 2**BITS
    COUNT: tl.constexpr = x.numel // SIZE
    HALF: tl.constexpr = (BITS + 1) // 2 if BACK else BITS // 2
    ahead: tl.constexpr = 1.0 / SIZE
    after: tl.constexpr = SIZE / 2**HALF
    sign = _signs(channel, BITS)
    y = tl.reshape(x * (sign * ahead), COUNT, SIZE)
    for _ in tl.static_range(BITS):
        even, odd = tl.split(tl.reshape(y, COUNT, SIZE // 2, 2))
        y = tl.permute(tl.join(even + odd, even - odd), 0, 2, 1)
        y = tl.reshape(y, COUNT, SIZE)
    return tl.reshape(y, x.shape) * (sign * after)


@triton.jit
def _word_sums(x, sign, WORDS: tl.constexpr):
    """Walsh-Hadamard sums of ``x * sign`` [W, M] in fp32, over each WORDS rows."""
    # From 64 rows on it would be a product of warp groups, which not every compiler gets right (docs/log.md).
    ROWS: tl.constexpr = 32 if x.shape[0] > 32 else x.shape[0]
    PARTS: tl.constexpr = x.shape[0] // ROWS
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, ROWS)[None, :]
    matrix = 1.0 - 2.0 * _odd(row & column & (WORDS - 1)).to(tl.float32)
    matrix = tl.where(row // WORDS == column // WORDS, matrix, 0.0).to(x.dtype)
    # Exact, in 16 bits as well: signs change no digits.
    x = (x * sign).to(x.dtype)
    if PARTS == 1:
        y = tl.dot(matrix, x, input_precision="ieee")
    else:
        x = tl.permute(tl.reshape(x, PARTS, ROWS, x.shape[1]), 1, 0, 2)
        y = tl.dot(matrix, tl.reshape(x, ROWS, PARTS * x.shape[2]), input_precision="ieee")
        y = tl.permute(tl.reshape(y, ROWS, PARTS, x.shape[2]), 1, 0, 2)
        y = tl.reshape(y, PARTS * ROWS, x.shape[2])
    return y


@triton.jit
def rotated_parts(x0, x1, x2, x3, BITS: tl.constexpr):
    """Queries for rotated keys: scores with keys as they were are those of these queries with keys as they are stored.

    Part j [W, M] holds the numbers 4 w + j of M queries, in the dtype of the result; the sums are fp32.
    """
    WORDS: tl.constexpr = 2 ** (BITS - 2)
    factor: tl.constexpr = 1.0 / 2 ** ((BITS + 1) // 2)
    dtype: tl.constexpr = x0.dtype
    row = tl.arange(0, x0.shape[0])[:, None]
    s0, s1 = _signs(4 * row, BITS), _signs(4 * row + 1, BITS)
    s2, s3 = _signs(4 * row + 2, BITS), _signs(4 * row + 3, BITS)
    y0, y1 = _word_sums(x0, s0, WORDS), _word_sums(x1, s1, WORDS)
    y2, y3 = _word_sums(x2, s2, WORDS), _word_sums(x3, s3, WORDS)
    even, odd = y0 + y1, y0 - y1
    other_even, other_odd = y2 + y3, y2 - y3
    return (
        ((even + other_even) * (s0 * factor)).to(dtype),
        ((odd + other_odd) * (s1 * factor)).to(dtype),
        ((even - other_even) * (s2 * factor)).to(dtype),
        ((odd - other_odd) * (s3 * factor)).to(dtype),
    )

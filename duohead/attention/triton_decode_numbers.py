"""Triton code that turns stored words into tensor-core operands, with one or two integer instructions a pair.

Stored 8-bit and 4-bit levels are turned into floats without converting them: the bits of a small integer, read as a
float of 16 bits, are that integer times a fixed power of two (a subnormal number, which tensor cores multiply
exactly). The power is undone in fp32, after the sum. An e4m3 number likewise only changes its exponent bias. Where the
power is too small for sums in fp32 (bf16), the caller enlarges the other factor by `prescale` first.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl

NUMBERS = {"int4": 4, "int8": 2, "fp8": 2}


def unit(codec: str, dtype: torch.dtype) -> float:
    """What `number` counts in."""
    if dtype == torch.float32 or codec not in NUMBERS:
        return 1.0
    if codec == "fp8":
        return 2.0**-120 if dtype == torch.bfloat16 else 2.0**-8
    return 2.0**-133 if dtype == torch.bfloat16 else 2.0**-24


def prescale(codec: str, dtype: torch.dtype) -> float:
    """Power of two for the other factor, so that products and sums stay normal fp32 numbers."""
    return 2.0**96 if codec in NUMBERS and dtype == torch.bfloat16 else 1.0


@triton.jit
def pairs(words, dtype: tl.constexpr, CODE: tl.constexpr):
    """PTX over two words at a time, $1 to $0: what LLVM makes of 16-bit tensors takes twice the instructions."""
    bits = tl.inline_asm_elementwise(CODE, "=r,r", [words], dtype=tl.uint16, is_pure=True, pack=2)
    return bits.to(dtype, bitcast=True)


@triton.jit
def number_in_ptx(words, J: tl.constexpr, CODEC: tl.constexpr, dtype: tl.constexpr):
    """`number` for 16-bit floats on NVIDIA GPUs."""
    if CODEC == "int4":
        if J == 0:
            value = pairs(words, dtype, "and.b32 $0, $1, 0x000F000F;")
        elif J == 1:
            value = pairs(words, dtype, "and.b32 $0, $1, 0x00F000F0;")
        elif J == 2:
            value = pairs(
                words, dtype, "{ .reg .b32 t; shr.b32 t, $1, 8; and.b32 $0, t, 0x000F000F; }"
            )
        else:
            value = pairs(
                words, dtype, "{ .reg .b32 t; shr.b32 t, $1, 8; and.b32 $0, t, 0x00F000F0; }"
            )
    elif CODEC == "int8":
        if J == 0:
            value = pairs(words, dtype, "lop3.b32 $0, $1, 0x00800080, 0x00FF00FF, 0x28;")
        else:
            value = pairs(
                words,
                dtype,
                "{ .reg .b32 t; shr.b32 t, $1, 8; lop3.b32 $0, t, 0x00800080, 0x00FF00FF, 0x28; }",
            )
    elif dtype == tl.bfloat16:
        if J == 0:
            value = pairs(
                words,
                dtype,
                "{ .reg .b32 t, u; shl.b32 t, $1, 8; shr.b32 u, t, 4; and.b32 u, u, 0x07F007F0; "
                "lop3.b32 $0, t, 0x80008000, u, 0xEA; }",
            )
        else:
            value = pairs(
                words,
                dtype,
                "{ .reg .b32 u; shr.b32 u, $1, 4; and.b32 u, u, 0x07F007F0; "
                "lop3.b32 $0, $1, 0x80008000, u, 0xEA; }",
            )
    else:
        if J == 0:
            value = pairs(
                words,
                dtype,
                "{ .reg .b32 t, u; shl.b32 t, $1, 8; shr.b32 u, t, 1; and.b32 u, u, 0x3F803F80; "
                "lop3.b32 $0, t, 0x80008000, u, 0xEA; }",
            )
        else:
            value = pairs(
                words,
                dtype,
                "{ .reg .b32 u; shr.b32 u, $1, 1; and.b32 u, u, 0x3F803F80; "
                "lop3.b32 $0, $1, 0x80008000, u, 0xEA; }",
            )
    return value


@triton.jit
def number(words, J: tl.constexpr, CODEC: tl.constexpr, dtype: tl.constexpr):
    """The J-th number of each word in dtype, counted in `unit` (16 units for the odd ones of int4 in 16-bit floats).

    Numbers of int8 come out 128 higher, so that they need no sign.
    """
    if CODEC == "int4":
        if dtype == tl.float32:
            value = ((words >> (4 * J)) & 0xF).to(tl.float32)
        else:
            # The upper nibble of a byte stays where it is: bits below the exponent's second bit are linear.
            low = words if J < 2 else words >> 8
            value = (low & (0xF0 if J % 2 else 0xF)).to(dtype, bitcast=True)
    elif CODEC == "int8":
        biased = words ^ 0x8080
        byte = biased & 0xFF if J == 0 else biased >> 8
        value = byte.to(tl.float32) if dtype == tl.float32 else byte.to(dtype, bitcast=True)
    else:
        high = words << 8 if J == 0 else words
        sign = high & 0x8000
        if dtype == tl.float32:
            wide = (sign.to(tl.uint32) << 16) | ((high & 0x7F00).to(tl.uint32) << 12)
            # Subnormals of fp32 here, so the unit is undone at once, before anything can flush them.
            value = wide.to(tl.float32, bitcast=True) * 1.329227995784916e36
        elif dtype == tl.bfloat16:
            value = (sign | ((high >> 4) & 0x07F0)).to(dtype, bitcast=True)
        else:
            value = (sign | ((high >> 1) & 0x3F80)).to(dtype, bitcast=True)
    return value


@triton.jit
def centred(numbers, dtype: tl.constexpr, PTX: tl.constexpr):
    """Numbers of int8 with their sign: what `number` made 128 higher, lowered again."""
    if dtype == tl.float32:
        value = numbers - 128.0
    elif PTX and dtype == tl.bfloat16:
        # As a number, this constant would be flushed to zero before it gets to the GPU.
        value = pairs(
            numbers, dtype, "{ .reg .b32 c; mov.b32 c, 0x00800080; sub.rn.bf16x2 $0, $1, c; }"
        )
    else:
        value = numbers - tl.full([1, 1], 0x80, tl.uint16).to(dtype, bitcast=True)
    return value


@triton.jit
def operand(
    words, scale, least, J: tl.constexpr, CODEC: tl.constexpr, FOLD: tl.constexpr, dtype: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """The J-th numbers [N, W] of a tile as tensor-core operand; with FOLD, scales are left to the caller."""
    if CODEC == "native":
        tile = words.to(dtype)
    elif FOLD:
        if PTX and dtype != tl.float32:
            tile = number_in_ptx(words, J, CODEC, dtype)
        else:
            tile = number(words, J, CODEC, dtype)
    else:
        level = ((words >> (4 * J)) & 0xF).to(tl.float32)
        tile = (level * scale + least).to(dtype)
    return tile


@triton.jit
def of_group(base, slot, word, live, J: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """Scale or minimum [N, W] of int4 vectors with several groups of SIZE numbers."""
    group = tl.minimum((4 * word + J) // SIZE, GROUPS - 1)
    return tl.load(base + slot * GROUPS + group, mask=live, other=0.0).to(tl.float32)

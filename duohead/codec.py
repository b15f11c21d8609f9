"""Storage codecs for keys and values: plain tensor functions, encode beside decode.

A codec turns vectors [..., D] into a payload and, where it scales, one or two 16-bit numbers per vector and group, and
back. Tokens are encoded once, when they arrive, and attention always reads the decoded form, so that a result does not
depend on whether a token was seen in its own chunk or from the cache. Error bounds are in docs/numerics.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Encoded = tuple[Tensor, ...]
# Largest stored level of each format.
FP8_MAX, INT8_MAX, INT4_MAX = 448.0, 127.0, 15.0
GROUP = 128
HADAMARD = "int4-hadamard"
# Channels that a rotation mixes, at least.
LEAST_BLOCK = 4


@dataclass(frozen=True)
class Codec:
    """One storage format.

    ``encode`` maps float [..., D] to a tuple of tensors that all keep the leading dimensions; ``decode`` maps it back
    to float [..., D] of the asked dtype; ``parts`` gives (dtype, last dimension) of each stored tensor for a head size.
    """

    name: str
    encode: Callable[[Tensor], Encoded]
    decode: Callable[[Encoded, int, torch.dtype], Tensor]
    parts: Callable[[int], tuple[tuple[torch.dtype, int], ...]]

    def __deepcopy__(self, memo: dict[int, Any]) -> Codec:
        """There is one codec of each name, and whether it is the native one is told by identity."""
        return self

    def vector_bytes(self, head_dim: int) -> int:
        """Bytes that one key or value vector of ``head_dim`` numbers takes."""
        return sum(dtype.itemsize * width for dtype, width in self.parts(head_dim))

    def round_trip(self, x: Tensor) -> Tensor:
        """What attention sees of ``x`` [..., D] once it is stored; same shape and dtype."""
        return self.decode(self.encode(x), x.shape[-1], x.dtype)


class Pair(NamedTuple):
    """The formats of one kind of heads, of its keys and of its values."""

    keys: Codec
    values: Codec

    def __deepcopy__(self, memo: dict[int, Any]) -> Pair:
        """Copies of a cache share their formats, as `Codec` says."""
        return self

    def vector_bytes(self, key_dim: int, value_dim: int) -> int:
        """Bytes that the key and the value of one token take."""
        return self.keys.vector_bytes(key_dim) + self.values.vector_bytes(value_dim)

    def round_trip(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What attention sees of keys [..., D] and values [..., Dv] once they are stored."""
        return self.keys.round_trip(keys), self.values.round_trip(values)

    def lossless(self, native: torch.dtype) -> bool:
        """Whether keys and values of dtype ``native`` are stored unchanged."""
        return all(storage is get("auto", native=native) for storage in self)


def _raw(name: str, dtype: torch.dtype) -> Codec:
    return Codec(
        name=name,
        encode=lambda x: (x.to(dtype),),
        decode=lambda stored, head_dim, out: stored[0].to(out),
        parts=lambda head_dim: ((dtype, head_dim),),
    )


def _encode_fp8(x: Tensor) -> Encoded:
    """e4m3 with one fp16 scale per vector; stored as uint8 because float8 lacks index_copy and gather on CPU."""
    x32 = x.float()
    scale = _half_up(_over(x32.abs().amax(-1, keepdim=True), FP8_MAX))
    stored = (x32 / scale.float()).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return stored.view(torch.uint8), scale


def _decode_fp8(stored: Encoded, head_dim: int, out: torch.dtype) -> Tensor:
    payload, scale = stored
    return (payload.view(torch.float8_e4m3fn).float() * scale.float()).to(out)


def _encode_int8(x: Tensor) -> Encoded:
    """Symmetric int8 with one fp16 scale per vector."""
    x32 = x.float()
    scale = _half_up(_over(x32.abs().amax(-1, keepdim=True), INT8_MAX))
    return (x32 / scale.float()).round().clamp(-127, 127).to(torch.int8), scale


def _decode_int8(stored: Encoded, head_dim: int, out: torch.dtype) -> Tensor:
    payload, scale = stored
    return (payload.float() * scale.float()).to(out)


def _encode_int4(x: Tensor) -> Encoded:
    """Asymmetric int4 in groups along the head dimension: fp16 scale and minimum per group, even element low nibble."""
    head_dim = x.shape[-1]
    group = _group(head_dim)
    x32 = x.float().unflatten(-1, (head_dim // group, group))
    # The stored (rounded) minimum is what decode adds, so the scale must span from it to the maximum.
    minimum = _to_half(x32.amin(-1))
    top = (x32.amax(-1) - minimum.float()).clamp(min=0.0)
    scale = _half_up(_over(top, INT4_MAX))
    level = (
        ((x32 - minimum.float()[..., None]) / scale.float()[..., None])
        .round()
        .clamp(0, 15)
        .to(torch.uint8)
    )
    level = level.flatten(-2)
    return level[..., 0::2] | (level[..., 1::2] << 4), scale, minimum


def _decode_int4(stored: Encoded, head_dim: int, out: torch.dtype) -> Tensor:
    payload, scale, minimum = stored
    group = _group(head_dim)
    level = torch.stack((payload & 0xF, payload >> 4), dim=-1).flatten(-2)
    grouped = level.float().unflatten(-1, (head_dim // group, group))
    return (grouped * scale.float()[..., None] + minimum.float()[..., None]).flatten(-2).to(out)


def _int4_parts(head_dim: int) -> tuple[tuple[torch.dtype, int], ...]:
    groups = head_dim // _group(head_dim)
    return (torch.uint8, head_dim // 2), (torch.float16, groups), (torch.float16, groups)


def _group(head_dim: int) -> int:
    """Largest even divisor of the head size that is at most GROUP."""
    if head_dim % 2:
        raise ValueError(
            f"head_dim must be even for int4 storage, got {head_dim}; use 'int8' for this model"
        )
    return max(size for size in range(2, min(head_dim, GROUP) + 1, 2) if head_dim % size == 0)


def rotation(name: str, head_dim: int) -> int:
    """Log2 of the number of consecutive channels that a codec mixes with each other; 0 if it rotates nothing.

    Raises:
        ValueError: a head size whose channels cannot be mixed in blocks of LEAST_BLOCK or more.
    """
    if name != HADAMARD:
        return 0
    group = _group(head_dim)
    # The largest power of two that divides it.
    block = group & -group
    if block < LEAST_BLOCK:
        raise ValueError(
            f"{HADAMARD} storage needs groups of a multiple of {LEAST_BLOCK} channels, but those of head_dim "
            f"{head_dim} have {group}; use 'int4' for this model"
        )
    return block.bit_length() - 1


def layout(name: str) -> str:
    """How the vectors of a codec lie in memory: the codec with the same parts that rotates nothing."""
    return "int4" if name == HADAMARD else name


def _encode_hadamard(x: Tensor) -> Encoded:
    head_dim = x.shape[-1]
    bits = rotation(HADAMARD, head_dim)
    return _encode_int4(_rotated(x.float(), bits, -(bits // 2)))


def _decode_hadamard(stored: Encoded, head_dim: int, out: torch.dtype) -> Tensor:
    bits = rotation(HADAMARD, head_dim)
    return _rotated(_decode_int4(stored, head_dim, torch.float32), bits, -((bits + 1) // 2)).to(out)


def _hadamard_parts(head_dim: int) -> tuple[tuple[torch.dtype, int], ...]:
    rotation(HADAMARD, head_dim)  # refuses head sizes before anything is stored
    return _int4_parts(head_dim)


def _rotated(x: Tensor, bits: int, power: int) -> Tensor:
    """``2^power S H S x`` of each block of 2^bits channels: H the Walsh-Hadamard matrix, S signs; (S H S)^2 = 2^bits.

    Powers of two are exact, so that a rotation and its inverse share the factor 2^-bits between them, and sums have a
    fixed order: the bits are the same on every device and in every batch.
    """
    size = 1 << bits
    signs = _signs(size, x.device)
    x = x.unflatten(-1, (x.shape[-1] // size, size))
    # Ahead of the sums, which could overflow otherwise.
    x = x * (signs * 2.0**-bits)
    for _ in range(bits):
        even, odd = x[..., 0::2], x[..., 1::2]
        x = torch.cat((even + odd, even - odd), dim=-1)
    return (x * (signs * 2.0 ** (bits + power))).flatten(-2)


def _signs(size: int, device: torch.device) -> Tensor:
    """The first Golay-Rudin-Shapiro signs: -1 where a number has an odd count of adjacent ones in binary.

    H alone would gather a vector of equal numbers into one large one, and an error that all numbers of a stored vector
    share into one channel. These signs spread both evenly, within the root of two; signs drawn at random do less well.
    """
    # On the device and without a table: a captured graph must neither copy from the host nor keep what it has made.
    channel = torch.arange(size, device=device)
    pairs = channel & (channel >> 1)
    for shift in (4, 2, 1):
        pairs = pairs ^ (pairs >> shift)
    return 1.0 - 2.0 * (pairs & 1).float()


def _over(x: Tensor, levels: float) -> Tensor:
    """``x`` / ``levels``, rounded correctly on every device, so that the stored bits are the same on all of them."""
    # By a number, CUDA would multiply with its rounded reciprocal instead.
    return x / torch.full((), levels, device=x.device)


def _to_half(x: Tensor) -> Tensor:
    return x.clamp(-65504.0, 65504.0).half()


def _half_up(scale: Tensor) -> Tensor:
    """fp16 no smaller than ``scale`` (so that nothing saturates) and no smaller than the least normal fp16."""
    tiny = torch.finfo(torch.float16).tiny
    half = _to_half(scale.clamp(min=tiny))
    step = torch.where(half.float() < scale, 1, 0).to(torch.int16)
    # Adding one to the bits of a positive finite half is the next larger half; the clamp keeps infinity out.
    return (half.view(torch.int16) + step).clamp(max=0x7BFF).view(torch.float16)


_CODECS = {
    "fp32": _raw("fp32", torch.float32),
    "fp16": _raw("fp16", torch.float16),
    "bf16": _raw("bf16", torch.bfloat16),
    "fp64": _raw("fp64", torch.float64),
    "fp8": Codec("fp8", _encode_fp8, _decode_fp8, lambda d: ((torch.uint8, d), (torch.float16, 1))),
    "int8": Codec(
        "int8", _encode_int8, _decode_int8, lambda d: ((torch.int8, d), (torch.float16, 1))
    ),
    "int4": Codec("int4", _encode_int4, _decode_int4, _int4_parts),
    HADAMARD: Codec(HADAMARD, _encode_hadamard, _decode_hadamard, _hadamard_parts),
}
NAMES = ("auto", "bf16", "fp8", "int8", "int4", HADAMARD)
_NATIVE = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
}


def get(name: str, *, native: torch.dtype) -> Codec:
    """The codec called ``name``; "auto" stores the model's own dtype ``native`` unchanged.

    Raises:
        ValueError: unknown name, or a native dtype that is not a floating-point type of 2 to 8 bytes.
    """
    if name != "auto" and name not in NAMES:
        raise ValueError(f"storage dtype must be one of {', '.join(NAMES)}, got {name!r}")
    if name != "auto":
        return _CODECS[name]
    if native not in _NATIVE:
        raise ValueError(
            f"dtype must be a floating-point type that a model computes in, got {native}; "
            f"use one of {', '.join(str(dtype) for dtype in _NATIVE)}"
        )
    return _CODECS[_NATIVE[native]]


def split(spec: str, *, field: str = "storage dtype") -> tuple[str, str]:
    """The names of the keys' and of the values' codec in "KEYS/VALUES"; one name alone stands for both.

    Raises:
        ValueError: anything else; the message calls it ``field``.
    """
    names = spec.split("/") if isinstance(spec, str) else []
    if len(names) == 1:
        names = names * 2
    if len(names) != 2 or any(name not in NAMES for name in names):
        raise ValueError(
            f"{field} must be one of {', '.join(NAMES)}, or two of them as KEYS/VALUES such as 'fp8/int4', got {spec!r}"
        )
    return names[0], names[1]


def normal(spec: str, *, field: str) -> str:
    """The shortest spelling of what `split` reads: "fp8" for "fp8/fp8". Errors as there."""
    return "/".join(dict.fromkeys(split(spec, field=field)))


def pair(spec: str, *, native: torch.dtype) -> Pair:
    """The codecs of keys and values for a storage dtype such as "auto", "fp8" or "fp8/int4"; errors as in `get`."""
    keys, values = split(spec)
    return Pair(get(keys, native=native), get(values, native=native))


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A torch dtype from itself or from its name ("bfloat16", "bf16", "torch.float32")."""
    if isinstance(dtype, torch.dtype):
        return dtype
    for candidate, short in _NATIVE.items():
        if dtype in (short, str(candidate), str(candidate).removeprefix("torch.")):
            return candidate
    raise ValueError(f"dtype must name a floating-point type such as 'bfloat16', got {dtype!r}")

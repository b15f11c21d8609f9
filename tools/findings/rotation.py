"""INT4 storage in a rotated basis, for measuring what a rotation of keys and values would gain.

An orthogonal matrix spreads a vector's outliers over all of its channels, so that sixteen levels between its smallest
and its largest number lie closer together. Under `with rotated("hadamard"):` everything stored as int4 is rotated
before it is encoded and back after it is decoded, which gives what a product that rotates queries and outputs instead
would compute; the Triton kernels refuse the format, and PyTorch does the work.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from duohead import codec
from duohead.codec import Codec, Encoded


@contextmanager
def rotated(kind: str | None) -> Iterator[None]:
    """Rotate whatever is stored as int4 by the matrix called ``kind``, a name in MATRICES; None changes nothing."""
    if kind is None:
        yield
        return
    plain = codec._CODECS["int4"]
    codec._CODECS["int4"] = _within(plain, kind)
    try:
        yield
    finally:
        codec._CODECS["int4"] = plain


def hadamard(size: int) -> Tensor:
    """A Walsh-Hadamard matrix with random signs, orthogonal, fp32 [size, size]; ``size`` is a power of two."""
    if size & (size - 1):
        raise ValueError(
            f"size must be a power of two for a Hadamard matrix, got {size}; use 'random'"
        )
    made = torch.ones(1, 1, dtype=torch.float64)
    while len(made) < size:
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
    # Without signs a vector of equal numbers would become a single large one.
    signs = torch.randint(0, 2, (size, 1), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return (signs * made / math.sqrt(size)).float()


def random_orthogonal(size: int) -> Tensor:
    """An orthogonal matrix drawn at random, fp32 [size, size]."""
    drawn = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q, r = torch.linalg.qr(drawn)
    return (q * r.diagonal().sign()).float()


MATRICES: dict[str, Callable[[int], Tensor]] = {
    "hadamard": hadamard,
    "random": random_orthogonal,
}


@functools.cache
def _matrix(kind: str, size: int, device: torch.device) -> Tensor:
    return MATRICES[kind](size).to(device)


def _within(plain: Codec, kind: str) -> Codec:
    """``plain`` in the rotated basis, under a name that no kernel knows."""

    def encode(x: Tensor) -> Encoded:
        return plain.encode(x.float() @ _matrix(kind, x.shape[-1], x.device))

    def decode(stored: Encoded, head_dim: int, out: torch.dtype) -> Tensor:
        found = plain.decode(stored, head_dim, torch.float32)
        return (found @ _matrix(kind, head_dim, found.device).T).to(out)

    return Codec(f"{plain.name}, {kind}", encode, decode, plain.parts)

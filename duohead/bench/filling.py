"""Caches full of random tokens, without a model that computed them: what decoding costs depends on lengths alone.

The contents are encoded like real ones (keys and values drawn from a normal distribution), so that a kernel may be
checked on them. `fill_layer(layer, tokens)` does one layer, `fill(cache, tokens)` a whole cache.

Shape letters: B rows, G KV heads of one kind, T slots, D head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from duohead import codec
from duohead.cache.ring import RingStore
from duohead.cache.store import GrowingStore

if TYPE_CHECKING:
    from duohead.cache import DuoCache
    from duohead.cache.layer import DuoLayer
    from duohead.codec import Codec, Encoded

BLOCK = 16384


def fill(cache: DuoCache, tokens: int, *, seed: int = 0) -> None:
    """Give an allocated cache the length ``tokens``; every block of BLOCK slots holds the same random tokens."""
    for layer in cache.duo_layers:
        fill_layer(layer, tokens, seed=seed + layer.index, fresh=False)


def fill_layer(layer: DuoLayer, tokens: int, *, seed: int = 0, fresh: bool = True) -> None:
    """Give an initialised layer the length ``tokens``.

    Args:
        layer: a layer whose stores exist (`DuoLayer.allocate`, or a first call).
        tokens: how many tokens it shall hold.
        seed: of the random contents.
        fresh: draw every slot, instead of repeating one block of slots, which is faster.

    Raises:
        ValueError: more tokens than a static layer was made for, or a layer without stores.
    """
    if not layer.is_initialized:
        raise ValueError("layer has no stores yet; allocate it before filling")
    if layer.max_length is not None and tokens > layer.max_length:
        raise ValueError(
            f"tokens must be at most the {layer.max_length} that the layer was made for, got {tokens}"
        )
    generator = torch.Generator(device=layer.device).manual_seed(seed)
    for kind in layer.kinds:
        if isinstance(kind.store, GrowingStore | RingStore):
            kind.store.reserve(tokens)
        for segment in kind.store.segments():
            for storage, parts in zip(kind.codec, (segment.keys, segment.values), strict=True):
                _fill_parts(storage, parts, layer.dtype, generator, fresh=fresh)
        if isinstance(kind.store, RingStore):
            oldest = max(tokens - kind.store.ring, 0)
            if isinstance(kind.store.floor, Tensor):
                kind.store.floor.fill_(oldest)
            else:
                kind.store.floor = oldest
    if isinstance(layer.length, Tensor):
        layer.length.fill_(tokens)
    else:
        layer.length = tokens


def _fill_parts(
    storage: Codec, parts: Encoded, dtype: torch.dtype, generator: torch.Generator, *, fresh: bool
) -> None:
    """Write encoded random vectors into the parts [B, G, T, width] of one codec."""
    rows, heads, slots = parts[0].shape[:3]
    width = _head_dim(storage, parts)
    block: Encoded | None = None
    for start in range(0, slots, BLOCK):
        count = min(BLOCK, slots - start)
        if block is None or fresh:
            size = (rows, heads, count, width)
            x = torch.randn(size, generator=generator, device=parts[0].device, dtype=dtype)
            block = storage.encode(x)
        for part, new in zip(parts, block, strict=True):
            part[:, :, start : start + count] = new[:, :, :count]


def _head_dim(storage: Codec, parts: Encoded) -> int:
    """Head size of the vectors that the parts of a codec store."""
    width = parts[0].shape[-1]
    return 2 * width if codec.layout(storage.name) == "int4" else width

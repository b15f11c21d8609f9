"""Storing new tokens ahead of attention, and the views of storage that decode kernels read.

For a few tokens at a time this is the shorter way: one kernel encodes and stores the tokens of every head, one reads
what is stored, and nothing waits for the host. It is exact as long as a ring has room for what the oldest of the new
queries still sees, which `can_append` tells; where it has not, attention comes first (`duohead.cache.opened`).
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from torch import Tensor

from duohead.cache.ring import RingStore
from duohead.cache.store import GrowingStore
from duohead.cache.view import StoredView

if TYPE_CHECKING:
    from duohead.cache.layer import DuoLayer, Kind

_static: weakref.WeakValueDictionary[int, DuoLayer] = weakref.WeakValueDictionary()


def register(layer: DuoLayer) -> None:
    """Let `layer_at` find a static layer by the address of its length."""
    assert isinstance(layer.length, Tensor), "a static layer has its length on the device"
    _static[layer.length.data_ptr()] = layer


def layer_at(length: Tensor) -> DuoLayer | None:
    """The static layer whose length this tensor is, if any."""
    return _static.get(length.data_ptr())


def can_append(layer: DuoLayer, count: int) -> bool:
    """Whether ``count`` tokens may be stored ahead of attention: they overwrite nothing that one of them sees."""
    if layer.policy.visibility == "chunk":
        return False
    for kind in layer.kinds:
        if isinstance(kind.store, RingStore):
            reach = _reach(layer, kind, count)
            assert reach is not None, "the heads of a ring see only so far back"
            if kind.store.ring < reach + count - 1:
                return False
    return True


def append(
    layer: DuoLayer, keys: Tensor, values: Tensor, mask: Tensor | None
) -> tuple[StoredView, ...]:
    """Store new keys and values [B, G, K, D] of every head; returns what each kind holds then.

    Args:
        layer: the layer; `can_append` must hold for these tokens.
        keys: new keys [B, G, K, D].
        values: new values [B, G, K, Dv].
        mask: 2-D padding mask [B, tokens] or None.
    """
    from duohead.cache import append as kernel

    count = keys.shape[2]
    layer.set_padding(mask, count)
    if isinstance(layer.length, int):
        reserve(layer, layer.length + count)
        evict(layer, layer.length + count)
    reaches = [_reach(layer, kind, count) for kind in layer.kinds]
    layer.advance(count)
    views = layer.stored_views(tuple(reaches))
    kernel.append(keys, values, views)
    return views


def view(layer: DuoLayer, kind: Kind, reach: int | None) -> StoredView:
    """What the heads of one kind hold now, for queries that see ``reach`` tokens back."""
    ring = kind.store if isinstance(kind.store, RingStore) else None
    return StoredView(
        heads=kind.heads,
        codecs=(kind.codec.keys.name, kind.codec.values.name),
        segments=kind.store.segments(),
        sink=ring.sink if ring else 0,
        ring=ring.ring if ring else None,
        reach=reach,
        window=layer.policy.layers[layer.index].window,
        tokens=layer.length,
        padding=layer.padding,
        floor=ring.floor if ring and isinstance(ring.floor, Tensor) else None,
    )


def _reach(layer: DuoLayer, kind: Kind, count: int) -> int | None:
    """Tokens back that one of ``count`` new queries sees outside the sinks, its own included; None for all."""
    window = layer.policy.layers[layer.index].window
    if kind.spec.sees_all:
        return window
    length = int(layer.length) if layer.record_past else layer.length
    recent = layer.recent_tokens(count, length)
    return recent if window is None else min(recent, window)


def reserve(layer: DuoLayer, tokens: int) -> None:
    """Room for a length of ``tokens`` in stores that grow."""
    for kind in layer.kinds:
        if isinstance(kind.store, RingStore | GrowingStore):
            kind.store.reserve(tokens)


def evict(layer: DuoLayer, tokens: int) -> None:
    """Note in growing rings that tokens up to a length of ``tokens`` are stored; the kernel does it in static ones."""
    for kind in layer.kinds:
        if isinstance(kind.store, RingStore) and not kind.store.static:
            kind.store.evict(tokens)

"""Views of what the new tokens of one call see, and storing those tokens where that evicts others, after attention.

Heads that keep everything, and sinks, are stored when the handle is opened; a ring takes the new tokens only on commit,
since they overwrite what the first of them still see. On a GPU, lossy formats go through the append kernel, which
stores tokens and gives what attention sees of them in one pass.

Shape letters: B rows, G KV heads, K new tokens, D head size.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from duohead.cache import stored
from duohead.cache.ring import RingStore
from duohead.cache.store import decode_pair, encode_pair, positions
from duohead.cache.view import HeadView, KeysAndValues, StoredView, pick_heads

if TYPE_CHECKING:
    from duohead.cache.handle import DuoHandle
    from duohead.cache.layer import DuoLayer, Kind


def open_handle(handle: DuoHandle, mask: Tensor | None) -> list[HeadView]:
    """What each kind of head sees, stored tokens and new ones, given the 2-D padding mask [B, tokens] or None."""
    layer = handle.layer
    layer.set_padding(mask, handle.keys.shape[2])
    length = layer.now()
    if isinstance(length, int) and _kernel_takes(layer, handle):
        seen = _store_by_kernel(layer, handle, length)
    else:
        seen = [_store(layer, kind, handle, length) for kind in layer.kinds]
    return [_view(layer, *each, length) for each in zip(layer.kinds, seen, strict=True)]


def commit(handle: DuoHandle) -> None:
    """Store the new tokens in rings, and count them."""
    layer, count = handle.layer, handle.keys.shape[2]
    length = layer.now()
    if handle.encoded:
        for kind, encoded in zip(layer.kinds, handle.encoded, strict=True):
            if isinstance(kind.store, RingStore):
                kind.store.append(length, encoded, layer.padding)
    else:
        from duohead.cache import append as kernel

        assert isinstance(length, int), "the kernel path knows its length"
        rings = [kind for kind in layer.kinds if isinstance(kind.store, RingStore)]
        if rings:
            kernel.append(handle.keys, handle.values, _targets(layer, rings, length + count))
        stored.evict(layer, length + count)
    layer.advance(count)


def _store(layer: DuoLayer, kind: Kind, handle: DuoHandle, length: int | Tensor) -> KeysAndValues:
    """Encode the new tokens of one kind, store what evicts nothing, and return what attention sees of them."""
    keys, values = pick_heads(handle.keys, kind.heads), pick_heads(handle.values, kind.heads)
    encoded = encode_pair(kind.codec, keys, values)
    handle.encoded.append(encoded)
    if isinstance(kind.store, RingStore):
        if kind.spec.sink:
            kind.store.put_sinks(length, encoded, layer.padding)
    else:
        kind.store.append(length, encoded, layer.padding)
    if _lossless(layer, kind):
        return keys, values
    return decode_pair(
        kind.codec, encoded, dims=(keys.shape[-1], values.shape[-1]), dtype=layer.dtype
    )


def _kernel_takes(layer: DuoLayer, handle: DuoHandle) -> bool:
    """Whether the append kernel is there and worth it: without loss, storing is one copy anyway."""
    if layer.device.type != "cuda" or all(_lossless(layer, kind) for kind in layer.kinds):
        return False
    if importlib.util.find_spec("triton") is None:
        return False
    from duohead.cache import append as kernel

    views = _targets(layer, layer.kinds, 0)
    return kernel.supports(handle.keys, handle.values, views) is None


def _store_by_kernel(layer: DuoLayer, handle: DuoHandle, length: int) -> list[KeysAndValues]:
    """`_store` for every kind at once."""
    from duohead.cache import append as kernel

    tokens = length + handle.keys.shape[2]
    stored.reserve(layer, tokens)
    seen: list[KeysAndValues] = []
    for kind in layer.kinds:
        pair = handle.keys, handle.values
        if _lossless(layer, kind):
            seen.append((pick_heads(pair[0], kind.heads), pick_heads(pair[1], kind.heads)))
        else:
            seen.append((_like(pair[0], kind), _like(pair[1], kind)))
    kernel.append(
        handle.keys,
        handle.values,
        _targets(layer, layer.kinds, tokens),
        evict=False,
        round_trip=[
            None if _lossless(layer, kind) else pair
            for kind, pair in zip(layer.kinds, seen, strict=True)
        ],
    )
    return seen


def _like(x: Tensor, kind: Kind) -> Tensor:
    heads = x.shape[1] if kind.heads is None else len(kind.heads)
    return torch.empty(x.shape[0], heads, *x.shape[2:], dtype=x.dtype, device=x.device)


def _targets(layer: DuoLayer, kinds: list[Kind], tokens: int) -> list[StoredView]:
    """The stores of some kinds for the append kernel, once ``tokens`` tokens will have come."""
    return [replace(stored.view(layer, kind, None), tokens=tokens) for kind in kinds]


def _lossless(layer: DuoLayer, kind: Kind) -> bool:
    return kind.codec.lossless(layer.dtype)


def _view(layer: DuoLayer, kind: Kind, new: KeysAndValues, length: int | Tensor) -> HeadView:
    """What the heads of one kind see; ``new`` are the new keys and values as decoded from storage."""
    keys, values = new
    count, padding, store = keys.shape[2], layer.padding, kind.store
    position = positions(0, count, None, layer.device) + length
    position = position if padding is None else (position - padding[:, None]).clamp(min=-1)
    sinks, whole = None, None
    if not isinstance(store, RingStore):
        whole = store.whole(length + count) if _lossless(layer, kind) else None
    elif kind.spec.sink:
        sinks = store.sink_piece(length + count, padding, layer.dtype)
    return HeadView(
        heads=kind.heads,
        retrieval=kind.spec.sees_all,
        sinks=sinks,
        past=store.pieces(length, padding, layer.dtype),
        keys=keys,
        values=values,
        key_position=position,
        query_position=position,
        sink=layer.policy.sink,
        recent=layer.recent_tokens(count, length),
        window=layer.policy.layers[layer.index].window,
        chunk_start=position[:, :1] if layer.policy.visibility == "chunk" else None,
        padded=padding is not None,
        whole=whole,
    )

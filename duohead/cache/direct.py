"""Views of keys and values that come as plain tensors: a forward without a cache, or with a cache of transformers' own.

Every token is there, so the policy acts as a mask; lossy storage is applied as if the tokens had been stored, so that a
forward without a cache computes what prefill and decode compute.

Shape letters: B rows, G KV heads, Q query tokens, K key tokens, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from duohead import codec
from duohead.cache.store import positions
from duohead.cache.view import HeadView, Piece, left_padding, pick_heads
from duohead.policy import HeadPolicy


def direct_views(
    policy: HeadPolicy,
    index: int,
    keys: Tensor,
    values: Tensor,
    *,
    queries: int,
    mask: Tensor | None,
) -> list[HeadView]:
    """What each kind of head of layer ``index`` sees of keys and values [B, G, K, D].

    Args:
        policy: the bound policy.
        index: layer.
        keys: [B, G, K, D].
        values: [B, G, K, Dv].
        queries: number of queries Q; they belong to the last Q keys.
        mask: 2-D padding mask [B, K] or None.

    Raises:
        ValueError: the layer has another number of KV heads in the policy.
    """
    layer = policy.layers[index]
    if keys.shape[1] != layer.num_kv_heads:
        raise ValueError(
            f"layer {index} got {keys.shape[1]} KV heads but its policy has {layer.num_kv_heads}; "
            f"use a policy made for this model"
        )
    padding = None if mask is None else left_padding(mask)
    position = positions(0, keys.shape[2], padding, keys.device)
    query_position = position[:, keys.shape[2] - queries :]
    views = []
    for spec in policy.stores(index):
        heads = (
            torch.tensor(spec.heads, device=keys.device)
            if len(spec.heads) < keys.shape[1]
            else None
        )
        key, value = pick_heads(keys, heads), pick_heads(values, heads)
        storage = codec.pair(spec.dtype, native=keys.dtype)
        if not storage.lossless(keys.dtype):
            key, value = storage.round_trip(key, value)
        views.append(
            HeadView(
                heads=heads,
                retrieval=spec.sees_all,
                sinks=_sinks(key, value, spec.sink, padding) if spec.sink else None,
                past=(),
                keys=key,
                values=value,
                key_position=position,
                query_position=query_position,
                sink=policy.sink,
                recent=policy.window_tokens if queries > 1 else policy.recent,
                window=layer.window,
                chunk_start=query_position[:, :1] if policy.visibility == "chunk" else None,
                padded=padding is not None,
            )
        )
    return views


def _sinks(keys: Tensor, values: Tensor, sink: int, padding: Tensor | None) -> Piece:
    """The first ``sink`` real tokens of each row."""
    count = keys.shape[2]
    slot = torch.arange(min(sink, count), device=keys.device)[None, :]
    if padding is None:
        key, value = keys[:, :, : slot.shape[1]], values[:, :, : slot.shape[1]]
        return Piece(lambda: (key, value), slot)
    place = (slot + padding[:, None]).clamp(max=count - 1)
    position = torch.where(slot + padding[:, None] < count, slot, -1)

    def gathered(x: Tensor) -> Tensor:
        return x.gather(2, place[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

    return Piece(lambda: (gathered(keys), gathered(values)), position)

"""The dense reference of `tiny` over keys and values as they come back from storage, for policies of any precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tiny import dense_reference, masked
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from duohead import HeadPolicy, codec
from duohead.shapes import layer_shapes

NAME = "stored_reference"
# Storage of each KV head of each layer, while `stored` runs a model.
_storage: list[list[str]] = []


def round_trip(x: Tensor, names: list[str], place: int) -> Tensor:
    """Keys (place 0) or values (place -1) [B, G, T, D], each head through the storage it is named."""
    return torch.stack(
        [
            codec.get(name.split("/")[place], native=x.dtype).round_trip(x[:, head])
            for head, name in enumerate(names)
        ],
        dim=1,
    )


def stored_reference(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any
) -> tuple[Tensor, None]:
    names = _storage[module.layer_idx]
    seen = round_trip(key, names, 0), round_trip(value, names, -1)
    return dense_reference(module, query, *seen, *rest, **options)


AttentionInterface.register(NAME, stored_reference)
AttentionMaskInterface.register(NAME, lambda *args, attention_mask=None, **options: attention_mask)


@contextmanager
def stored(model: Any, policy: HeadPolicy) -> Iterator[None]:
    """Run ``model`` with dense attention over stored keys and values (forward without a cache only).

    Heads that are not evicted from see as retrieval heads do.
    """
    every = [range(layer.num_kv_heads) for layer in policy.layers]
    with masked(model, policy if policy.evict else policy.with_retrieval(every)):
        for layer, shape in zip(policy.layers, layer_shapes(model), strict=True):
            kept = policy.retrieval_dtype if shape.window is None else policy.window_dtype
            _storage.append(
                [
                    kept if head in layer.retrieval else policy.streaming_dtype
                    for head in range(layer.num_kv_heads)
                ]
            )
        model.set_attn_implementation(NAME)
        try:
            yield
        finally:
            _storage.clear()

"""Tiny models with four KV heads a layer, a policy that moves all of them, and what of the weights has changed."""

from __future__ import annotations

from typing import Any

import torch
from tiny import kv_heads, tiny
from torch import nn

from duohead import HeadPolicy

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
# Orders 2013, 1302 and 0312: none of them its own inverse, and layers differ.
KEPT = ([2], [1, 3], [0, 3], [3])


def build(family: str, **fields: Any) -> Any:
    """A tiny model with four KV heads a layer, whose norms have weights that differ."""
    model = tiny(family, **{**HEADS, **fields})
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    return model


def kept(model: Any) -> HeadPolicy:
    heads = kv_heads(model)
    return HeadPolicy.from_heads(
        retrieval=[KEPT[index] if count else [] for index, count in enumerate(heads)],
        num_kv_heads=heads,
        sink=3,
        recent=5,
    )


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    after = model.state_dict()
    return {name for name in before if not torch.equal(after[name], before[name])}

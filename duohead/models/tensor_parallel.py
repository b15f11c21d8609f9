"""Which heads of a model this process runs, where tensor parallelism (``tp_plan`` of transformers) spreads it out.

A plan may split heads or gather them again (OLMo 2), and configs count all heads either way, so a few tokens through
the model's own attention tell. `duohead.models.interface.enable` asks here, and `duo` then works in every process.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers.cache_utils import DynamicCache

from duohead.models.probe import evaluating, some_tokens
from duohead.models.ranks import rank_policy
from duohead.policy import HeadPolicy
from duohead.shapes import text_config


def own_heads(model: Any, policy: HeadPolicy) -> HeadPolicy:
    """The part of a bound policy for the heads that this process runs: all of it on a model that is not split.

    Every process of a split model has to ask, since one forward of it answers.

    Raises:
        ValueError: the processes do not run equal runs of every layer's KV heads.
    """
    mesh = _mesh_of(model)
    if mesh is None:
        return policy
    heads = {index: layer.num_kv_heads for index, layer in enumerate(policy.layers)}
    own = _kv_heads_run(model, heads, mesh.size())
    if all(count == heads[index] for index, count in own.items()):
        return policy
    if mesh.ndim != 1 or any(count * mesh.size() != heads[index] for index, count in own.items()):
        counts = ", ".join(f"{count} of {heads[index]}" for index, count in own.items())
        raise ValueError(
            f"{type(model).__name__} is split over {mesh.size()} processes in {mesh.ndim} dimensions, and the layers "
            f"of this one run {counts} KV heads; duohead needs all heads, or equal parts in one dimension (tp_plan)"
        )
    return rank_policy(policy, mesh.get_local_rank(), ranks=mesh.size())


def _mesh_of(model: nn.Module) -> Any:
    """The processes over which the weights of attention layers are spread (a DeviceMesh), or None."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    from torch.distributed.tensor import DTensor

    layers = (part for part in model.modules() if isinstance(getattr(part, "layer_idx", None), int))
    weights = (weight for layer in layers for weight in layer.parameters())
    return next((weight.device_mesh for weight in weights if isinstance(weight, DTensor)), None)


def _kv_heads_run(model: Any, heads: dict[int, int], ranks: int) -> dict[int, int]:
    """For each layer that caches keys, of how many KV heads they are in this process."""
    cache = DynamicCache(config=text_config(model))
    try:
        with torch.no_grad(), evaluating(model):
            model(input_ids=some_tokens(model), past_key_values=cache, use_cache=True)
    except RuntimeError as error:
        uneven = {count for count in heads.values() if count % ranks}
        if not uneven:
            raise
        raise ValueError(
            f"{type(model).__name__} does not run with {uneven.pop()} KV heads split over {ranks} processes ({error}); "
            f"use as many processes as divide the KV heads of every layer"
        ) from error
    keys = [getattr(layer, "keys", None) for layer in cache.layers]
    return {
        index: key.shape[1] for index, key in enumerate(keys) if key is not None and heads[index]
    }

"""A policy on a model that transformers has spread over several processes by tensor parallelism (``tp_plan``).

Each process then runs every layer on its own run of heads, while the model's configs still count all of them. Inside
``with on_rank(model, policy) as own, duo(model, own):`` configs and policy speak of this process's heads alone; its
cache holds these, and outputs are the whole model's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from duohead.models.interface import unwrap
from duohead.models.ranks import rank_policy
from duohead.policy import HeadPolicy
from duohead.shapes import layer_shapes, text_config

COUNTS = ("num_attention_heads", "num_key_value_heads", "num_attention_heads_per_layer")


@contextmanager
def on_rank(model: Any, policy: HeadPolicy) -> Iterator[HeadPolicy]:
    """Let the configs of ``model`` count the heads of this process only, until the end of the block.

    Args:
        model: a transformers causal language model whose attention is split by heads (DTensor weights).
        policy: which heads of the whole model keep what; the same in every process.

    Yields:
        The part of the policy for the heads of this process. Leave `duo` before this block.

    Raises:
        ValueError: the model is not split by heads, evenly, or its config does not name head counts in the usual way.
    """
    target = unwrap(model)
    rank, ranks = rank_of(target)
    own = rank_policy(policy.bind(target), rank, ranks=ranks)
    configs = [(module, module.config) for module in target.modules() if "config" in vars(module)]
    memo: dict[int, Any] = {}
    for module, config in configs:
        module.config = copy.deepcopy(config, memo)
    try:
        _count_own(text_config(target), own.shapes[0].head_dim, ranks)
        if layer_shapes(target) != own.shapes:
            raise ValueError(
                f"the heads of one rank cannot be written into {type(text_config(target)).__name__}, which counts "
                f"them in a way of its own; use the model in one process"
            )
        yield own
    finally:
        for module, config in configs:
            module.config = config


def rank_of(model: Any) -> tuple[int, int]:
    """Which run of heads this process has, and how many runs there are.

    Raises:
        ValueError: the weights of keys are not split by rows over a one-dimensional mesh.
    """
    from torch.distributed.tensor import DTensor, Shard

    projection = next(
        (module for name, module in model.named_modules() if name.endswith(".k_proj")), None
    )
    weight = getattr(projection, "weight", None)
    if not isinstance(weight, DTensor):
        raise ValueError(
            f"model must be split over processes by tensor parallelism, got k_proj weights of type "
            f"{type(weight).__name__}; load it under torchrun with a tp_plan, or use duo(model, policy) alone"
        )
    if weight.device_mesh.ndim != 1 or tuple(weight.placements) != (Shard(0),):
        raise ValueError(
            f"k_proj must be split by rows over one dimension of processes, got {weight.placements} over "
            f"{weight.device_mesh.ndim} dimensions; load the model with tp_plan='auto' alone"
        )
    return weight.device_mesh.get_local_rank(), weight.device_mesh.size()


def _count_own(config: Any, head_dim: int, ranks: int) -> None:
    """Divide the head counts of a config, and name the head size, which otherwise follows from them."""
    if getattr(config, "head_dim", None) is None:
        config.head_dim = head_dim
    for name in COUNTS:
        count = getattr(config, name, None)
        if isinstance(count, (list, tuple)):
            setattr(config, name, [heads // ranks for heads in count])
        elif count is not None:
            setattr(config, name, count // ranks)

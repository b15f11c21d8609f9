"""Which kernels a number is about: asked of the choice that attention itself makes, on the views of the measured run.

Under "auto" a head size, a format or a window may call for another kernel than the implementation's first one, so a
record names the kernels and not only the implementation. Use `kernels_of(cache, heads=32, tokens=1, impl="auto")`.

Shape letters: B rows, H query heads, G KV heads, K new tokens, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from duohead import attention
from duohead.attention import choice
from duohead.cache import DuoCache, DuoHandle, DuoLayer, HeadView
from duohead.cache.stored import can_append

DECODE = "triton_decode"


@torch.no_grad()
def kernels_of(cache: DuoCache, *, heads: int, tokens: int, impl: str) -> str:
    """What attends to ``tokens`` new tokens on top of what ``cache`` holds, without soft cap and learned sinks.

    Args:
        cache: an allocated cache with room for them; what it holds is of no more use afterwards.
        heads: query heads of every layer.
        tokens: new tokens of one call; 1 for a decode step.
        impl: the implementation that the model ran with.

    Returns:
        For instance "triton_decode", or "retrieval cute_prefill, streaming hopper_prefill".
    """
    found: dict[str, None] = {}
    for layer in cache.duo_layers:
        found |= dict.fromkeys(_of_layer(layer, heads, tokens, impl))
    return ", ".join(sorted(found))


def kernel_name(query: Tensor, view: HeadView, impl: str) -> str:
    """What attends to a view under ``impl`` for queries [B, H, K, D]: a kernel, or an implementation without any."""
    name = attention.choose(impl, query.device.type, index=query.device.index)
    if name not in attention.KERNELS:
        return name
    kernel = choice.kernel_for(query, view, name=name, impl=impl, softcap=None, sink_logits=None)
    return "tiled" if kernel is None else vars(kernel)["__name__"].rpartition(".")[2]


def _of_layer(layer: DuoLayer, heads: int, tokens: int, impl: str) -> list[str]:
    shape = layer.policy.shapes[layer.index]
    query, keys, values = (
        # Only shapes matter here, so one token stands for all of them.
        torch.zeros(layer.batch_size, count, 1, dim, dtype=layer.dtype, device=layer.device).expand(
            -1, -1, tokens, -1
        )
        for count, dim in (
            (heads, shape.head_dim),
            (shape.num_kv_heads, shape.head_dim),
            (shape.num_kv_heads, shape.value_dim),
        )
    )
    by_storage = attention.reads_storage(query, value_dim=shape.value_dim, impl=impl)
    if by_storage and can_append(layer, tokens):
        return [DECODE]
    views = DuoHandle(layer, keys, values).open(None)
    # A view of streaming heads that evict nothing looks like one of retrieval heads.
    kinds = [store.kind for store in layer.policy.stores(layer.index)]
    names = [kernel_name(query, view, impl) for view in views]
    if "tiled" in names:  # one view without a kernel, and all of them go that way
        return ["tiled"]
    return [f"{kind} {name}" for kind, name in zip(kinds, names, strict=True)]

"""Attention on a static cache as one opaque operation, so that compiled graphs call the kernels as they are.

Traced as Python, the cache's bookkeeping would be specialised to one cache and one layer each; as an operation it is
the same node in every layer, with the addresses of the cache as its inputs, so that CUDA graphs notice another cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from duohead import attention
from duohead.cache import DuoHandle
from duohead.cache.stored import can_append, layer_at


def attend(
    query: Tensor,
    handle: DuoHandle,
    mask: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    impl: str,
) -> Tensor:
    """Attention of new tokens on what a cache layer holds, and storing them; [B, Q, H, Dv] for queries [B, H, Q, D].

    Arguments as in `duohead.attention.prefill`; ``mask`` is the 2-D padding mask [B, tokens] or None.
    """
    inputs = (query, handle.keys, handle.values)
    # Stored tokens carry no gradient; the way through views keeps it or says that it cannot.
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    by_storage = not differentiated and attention.reads_storage(
        query, value_dim=handle.values.shape[-1], impl=impl
    )
    if by_storage and can_append(handle.layer, query.shape[2]):
        stored = handle.append(mask)
        return attention.decode(
            query, stored, scale=scale, softcap=softcap, sink_logits=sink_logits
        )
    views = handle.open(mask)
    out = attention.prefill(
        query, views, scale=scale, softcap=softcap, sink_logits=sink_logits, impl=impl
    )
    handle.commit()
    return out


def attend_in_graph(
    query: Tensor,
    handle: DuoHandle,
    mask: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    impl: str,
) -> Tensor:
    """The same as `attend`, as one node of a compiled graph; the layer must be `DuoLayer.addressed`."""
    layer = handle.layer
    assert isinstance(layer.length, Tensor), "a static layer has its length on the device"
    return _attend_op(
        query, handle.keys, handle.values, mask, layer.tensors(), layer.length, scale, softcap,
        sink_logits, impl, handle.values.shape[-1],
    )  # fmt: skip


@torch.library.custom_op("duohead::attend", mutates_args=("stored", "length"))
def _attend_op(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    stored: list[Tensor],
    length: Tensor,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    impl: str,
    value_dim: int,
) -> Tensor:
    layer = layer_at(length)
    if layer is None or any(
        mine.data_ptr() != given.data_ptr()
        for mine, given in zip(layer.tensors(), stored, strict=True)
    ):
        raise RuntimeError(
            "a compiled graph did not pass the cache itself to attention, but copies of it; "
            "please report this with your version of torch"
        )
    handle = DuoHandle(layer, keys, values)
    out = attend(
        query, handle, mask, scale=scale, softcap=softcap, sink_logits=sink_logits, impl=impl
    )
    return out.contiguous()


@_attend_op.register_fake
def _(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    stored: list[Tensor],
    length: Tensor,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    impl: str,
    value_dim: int,
) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value_dim)

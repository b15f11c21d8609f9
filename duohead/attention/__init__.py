"""Attention under a policy: `prefill` over whatever each head can see, `decode` over what is stored.

``impl`` names the machinery: "reference" (dense and readable), "tiled" (portable, PyTorch only), "triton" (own kernels
for any GPU that Triton knows), "hopper" (the same for decode, an own CUDA kernel for prefill), "cute" (as "hopper", but
flash-attn-4 for the retrieval heads of a prefill), or "auto": the last of these that the machine has, logged once. An
explicit request is met or raises; it never falls back.

Shape letters: B rows, H query heads, Q query tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from duohead.attention import choice
from duohead.attention.choice import IMPLEMENTATIONS, KERNELS, MAX_DECODE_TOKENS, check_impl, choose
from duohead.cache.view import HeadView, StoredView

__all__ = [
    "IMPLEMENTATIONS",
    "KERNELS",
    "MAX_DECODE_TOKENS",
    "check_impl",
    "choose",
    "decode",
    "prefill",
    "reads_storage",
]


def prefill(
    query: Tensor,
    views: Sequence[HeadView],
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention of any number of new tokens.

    Args:
        query: [B, H, Q, D]; query head h belongs to KV head h // (H / G).
        views: what each kind of head sees; together they cover every KV head once.
        scale: factor on the scores.
        softcap: cap * tanh(score / cap) on the scaled scores, or None.
        sink_logits: learned logit per query head [H] in the softmax, without a value, or None.
        impl: one of `IMPLEMENTATIONS`.

    Returns:
        [B, Q, H, Dv], each head at its original place.

    Raises:
        ValueError: unknown ``impl``, or one that cannot do this here.
    """
    name = choose(impl, query.device.type, index=query.device.index)
    if name in KERNELS:
        out = query.new_empty(
            query.shape[0], query.shape[2], query.shape[1], views[0].values.shape[-1]
        )
        if _by_kernels(
            query, views, out, name, impl, scale=scale, softcap=softcap, sink_logits=sink_logits
        ):
            return out
        name = "tiled"
    from duohead.attention import reference, tiled

    attend = reference.attend if name == "reference" else tiled.attend
    return _by_kind(attend, query, views, scale=scale, softcap=softcap, sink_logits=sink_logits)


def reads_storage(query: Tensor, *, value_dim: int | None = None, impl: str = "auto") -> bool:
    """Whether `decode` over storage is what ``impl`` uses for queries [B, H, Q, D] and values of size ``value_dim``.

    Raises:
        ValueError: an explicit ``impl`` that has a decode kernel, which cannot do this here.
    """
    if query.shape[2] > MAX_DECODE_TOKENS:
        return False
    name = choose(impl, query.device.type, index=query.device.index)
    if name not in KERNELS:
        return False
    from duohead.attention import triton_decode

    return choice.accept(triton_decode.supports(query, value_dim=value_dim), name, impl)


def decode(
    query: Tensor,
    views: Sequence[StoredView],
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attention of at most MAX_DECODE_TOKENS new tokens, stored already, on everything that is stored.

    Arguments and result as in `prefill`; `reads_storage` tells whether it can be used.

    Raises:
        ValueError: too many query tokens.
    """
    if query.shape[2] > MAX_DECODE_TOKENS:
        raise ValueError(
            f"decode takes at most {MAX_DECODE_TOKENS} query tokens, got {query.shape[2]}; use prefill"
        )
    from duohead.attention import triton_decode

    return triton_decode.attend(query, views, scale=scale, softcap=softcap, sink_logits=sink_logits)


def _by_kernels(
    query: Tensor,
    views: Sequence[HeadView],
    out: Tensor,
    name: str,
    impl: str,
    *,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> bool:
    """Fill ``out`` [B, Q, H, Dv] view by view; False if "auto" has to do without kernels."""
    chosen = []
    groups = sum(view.keys.shape[1] for view in views)
    for view in views:
        kernel = choice.kernel_for(
            query, view, name=name, impl=impl, softcap=softcap, sink_logits=sink_logits
        )
        if kernel is None:
            return False
        chosen.append(kernel)
    for view, kernel in zip(views, chosen, strict=True):
        kernel.attend(
            query, view, out, scale=scale, softcap=softcap, sink_logits=sink_logits, kv_heads=groups
        )
    return True


def _by_kind(
    attend: Callable[..., Tensor],
    query: Tensor,
    views: Sequence[HeadView],
    *,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """Each kind's query heads on their own, and the outputs put together: [B, Q, H, Dv]."""
    groups = sum(view.keys.shape[1] for view in views)
    grouped = query.unflatten(1, (groups, query.shape[1] // groups))
    logits = None if sink_logits is None else sink_logits.unflatten(0, grouped.shape[1:3])
    outs = []
    for view in views:
        part, part_logits = grouped, logits
        if view.heads is not None:
            part = grouped.index_select(1, view.heads)
            part_logits = None if logits is None else logits.index_select(0, view.heads)
        outs.append(attend(part, view, scale=scale, softcap=softcap, sink_logits=part_logits))
    return _in_place(outs, views).flatten(1, 2).transpose(1, 2)


def _in_place(outs: Sequence[Tensor], views: Sequence[HeadView]) -> Tensor:
    """Put the kinds' outputs [B, g, R, Q, D] back at their KV heads' places."""
    if len(outs) == 1:
        return outs[0]
    order = torch.cat([view.heads for view in views if view.heads is not None])
    return torch.cat(list(outs), dim=1).index_select(1, order.argsort())

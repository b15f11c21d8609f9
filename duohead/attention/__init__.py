"""Attention under a policy: two operations, `prefill` and `decode`, over whatever each head can see.

``impl`` names the machinery: "reference" (dense and readable), "tiled" (portable and fast, PyTorch only), or "auto",
which logs its choice once. An explicit request is met or raises; it never falls back.

Shape letters: B rows, H query heads, Q query tokens, D head size.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from duohead.cache.view import HeadView

logger = logging.getLogger(__name__)
IMPLEMENTATIONS = ("auto", "reference", "tiled")
MAX_DECODE_TOKENS = 8


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
        ValueError: unknown ``impl``.
    """
    attend = _implementation(impl, query.device.type)
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


def decode(
    query: Tensor,
    views: Sequence[HeadView],
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention of a handful of new tokens (at most MAX_DECODE_TOKENS) on a long past; arguments as in `prefill`."""
    if query.shape[2] > MAX_DECODE_TOKENS:
        raise ValueError(
            f"decode takes at most {MAX_DECODE_TOKENS} query tokens, got {query.shape[2]}; use prefill"
        )
    return prefill(query, views, scale=scale, softcap=softcap, sink_logits=sink_logits, impl=impl)


def check_impl(impl: str) -> None:
    """Raise ValueError unless ``impl`` is a known name."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")


def choose(impl: str, device: str) -> str:
    """The implementation that ``impl`` means on a device type ("cpu", "cuda"); what "auto" chooses is logged once."""
    check_impl(impl)
    if impl != "auto":
        return impl
    if not torch.compiler.is_compiling():
        _log_choice("tiled", device)
    return "tiled"


def _implementation(impl: str, device: str) -> Callable[..., Tensor]:
    from duohead.attention import reference, tiled

    return reference.attend if choose(impl, device) == "reference" else tiled.attend


@functools.cache
def _log_choice(impl: str, device: str) -> None:
    logger.info("attention on %s: impl=%s", device, impl)


def _in_place(outs: Sequence[Tensor], views: Sequence[HeadView]) -> Tensor:
    """Put the kinds' outputs [B, g, R, Q, D] back at their KV heads' places."""
    if len(outs) == 1:
        return outs[0]
    order = torch.cat([view.heads for view in views if view.heads is not None])
    return torch.cat(list(outs), dim=1).index_select(1, order.argsort())

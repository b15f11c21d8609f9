"""Streaming attention with a gradient, in Triton, for gate training: time and memory linear in the length.

The forward pass is the prefill kernel, the backward pass `duohead.attention.triton_backward`; neither adds up in an
order that changes from run to run, so that a resumed training repeats to the bit.
Use `streaming(query, keys, values, sink=128, recent=256, scale=...)` after `trains` has said that it can.

Shape letters: B rows, H query heads, G KV heads, T tokens, D head size, Dv value size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from duohead.attention.triton_backward import gradients_of
from duohead.attention.triton_launch import Launch
from duohead.attention.triton_tiles import UNLIMITED, refusal, rows_contiguous


def streaming(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    sink: int,
    recent: int | None,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attention to the first ``sink`` and the last ``recent`` tokens of an unpadded sequence, differentiable.

    Args:
        query: [B, H, T, D].
        keys: [B, G, T, D].
        values: [B, G, T, Dv].
        sink: first tokens that every query sees.
        recent: last tokens that a query sees, its own included; None for all of them, in which case ``sink`` is 0.
        scale: factor on the scores.
        softcap: cap * tanh(score / cap) on the scaled scores, or None.
        sink_logits: learned logit per query head [H] in the softmax, without a value; taken as a constant; or None.

    Returns:
        [B, H, T, Dv].

    Raises:
        ValueError: what `trains` says.
    """
    reason = trains(query, keys, values, scale=scale, softcap=softcap, sink_logits=sink_logits)
    if reason is not None:
        raise ValueError(f"the Triton kernels cannot train here: {reason}; use identify.banded")
    return _Streaming.apply(query, keys, values, sink, recent, scale, softcap, sink_logits)


def trains(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> str | None:
    """Why `streaming` cannot take these tensors, or None if it can; arguments as there."""
    if sink_logits is not None and sink_logits.requires_grad:
        return "sink_logits wants a gradient, which the kernels do not have"
    return refusal(query, keys, values, scale=scale, softcap=softcap)


class _Streaming(torch.autograd.Function):
    """`streaming` with its gradient; keeps the output and one number per query besides the inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        sink: int,
        recent: int | None,
        scale: float,
        softcap: float | None,
        sink_logits: Tensor | None,
    ) -> Tensor:
        rows, heads, tokens, _ = query.shape
        sink = 0 if recent is None else min(sink, tokens)
        query, keys, values = map(rows_contiguous, (query, keys, values))
        out = query.new_empty(rows, tokens, heads, values.shape[-1])
        lse = query.new_empty(rows, heads, tokens, dtype=torch.float32)
        launch = Launch(
            query,
            keys,
            values,
            out,
            heads=None,
            kv_heads=keys.shape[1],
            position=None,
            sink=sink,
            reach=recent,
            window=None,
            scale=scale,
            softcap=softcap,
            sink_logits=sink_logits,
            lse=lse,
        )
        launch(sinks=(keys[:, :, :sink], values[:, :, :sink]) if sink else None)
        ctx.save_for_backward(query, keys, values, out, lse)
        ctx.numbers = (sink, recent, scale, softcap)
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, keys, values, out, lse = ctx.saved_tensors
        sink, recent, scale, softcap = ctx.numbers
        gradients = gradients_of(
            query,
            keys,
            values,
            out.transpose(1, 2),
            rows_contiguous(grads[0]),
            lse,
            sink=sink,
            recent=UNLIMITED if recent is None else recent,
            scale=scale,
            softcap=softcap,
        )
        return *gradients, None, None, None, None, None

"""A check at run time that moving heads changed no output, beside the check of names and shapes before it.

Names cannot tell what code does with a head's number (a slope or a frequency of its own for each head, say). So every
attention layer that is to change runs once before, on a handful of tokens, and again afterwards on the very same
inputs, which keeps differences from adding up over layers or tipping a router.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from duohead.models.head_tensors import INSTEAD
from duohead.models.probe import evaluating, relative_error, some_tokens

# Relative difference of an attention module's output: sums of the output projection are rounded in another order, and
# norms of a fp64 model may work in fp32.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
LOW_PRECISION_TOLERANCE = 0.03


@dataclass(frozen=True)
class AttentionCall:
    """One call of an attention module: what went in, and its output [rows, tokens, hidden]."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


@torch.no_grad()
def record_calls(model: Any, modules: Sequence[nn.Module]) -> list[AttentionCall]:
    """What ``modules`` of ``model`` do on a handful of tokens, dropout off."""
    calls: list[AttentionCall] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append(AttentionCall(module, args, kwargs, _first(output)))

    if not modules:
        return calls
    hooks = [module.register_forward_hook(keep, with_kwargs=True) for module in modules]
    try:
        with evaluating(model):
            model(input_ids=some_tokens(model), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


@torch.no_grad()
def check_unchanged(calls: Sequence[AttentionCall]) -> None:
    """Repeat the calls and compare.

    Raises:
        ValueError: a module's output differs by more than rounding; the message names its layer.
    """
    for call in calls:
        with evaluating(call.module):
            found = _first(call.module(*call.args, **call.kwargs))
        error = relative_error(found.double(), call.output.double())
        limit = TOLERANCE.get(call.output.dtype, LOW_PRECISION_TOLERANCE)
        if not error <= limit:
            raise ValueError(
                f"cannot reorder heads: {type(call.module).__name__} of layer {call.module.layer_idx} gives other "
                f"outputs afterwards (by {error:.2g}, relative, limit {limit:g}), so it treats heads by their number; "
                f"{INSTEAD}"
            )


def _first(output: Any) -> Tensor:
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor

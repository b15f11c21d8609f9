"""Borrowing a model: frozen, in evaluation mode and with private configs inside a block, as it was found after it.

Identification runs somebody else's model with another attention function and must leave no trace, also when it is
interrupted; so whatever is set on a module is noted first and put back at the end. Use `with borrowed(model) as c:`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from duohead.shapes import text_config

_MISSING = object()
# Of what a layer computes, full attention costs most for each byte of its result, so that is kept.
_KEPT = (
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


class _Loan:
    """Attributes of objects that were changed, and what they were."""

    def __init__(self) -> None:
        self._notes: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute in the object's own dictionary, past properties and registration."""
        attributes = vars(owner)
        self._notes.append((owner, name, attributes.get(name, _MISSING)))
        attributes[name] = value

    def give_back(self) -> None:
        while self._notes:
            owner, name, value = self._notes.pop()
            if value is _MISSING:
                del vars(owner)[name]
            else:
                vars(owner)[name] = value


@contextmanager
def borrowed(model: nn.Module, *, gradient_checkpointing: bool = False) -> Iterator[Any]:
    """Freeze ``model``, put it in evaluation mode and give its modules private configs; yields the decoder's config.

    With ``gradient_checkpointing`` its layers recompute their activations in the backward pass (non-reentrant), all but
    the results of full attention.

    Raises:
        ValueError: gradient checkpointing is asked for and the model has no layers that support it.
    """
    loan = _Loan()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        for module in model.modules():
            loan.set(module, "training", False)
        config = _privatise(model, loan)
        if gradient_checkpointing:
            _checkpoint_layers(model, loan)
        yield config
    finally:
        loan.give_back()
        for parameter in trainable:
            parameter.requires_grad_(True)


def _privatise(model: nn.Module, loan: _Loan) -> Any:
    """Give every module a copy of the config it holds; configs shared or nested before stay so among the copies."""
    from transformers import PreTrainedConfig

    copies: dict[int, Any] = {}
    for module in model.modules():
        held = [(n, c) for n, c in vars(module).items() if isinstance(c, PreTrainedConfig)]
        for name, config in held:
            loan.set(module, name, copy.deepcopy(config, copies))
    return text_config(model)


def _checkpoint_layers(model: nn.Module, loan: _Loan) -> None:
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [
        module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    if not layers:
        raise ValueError(
            f"gradient_checkpointing needs layers that support it, and {type(model).__name__} has none; leave it off"
        )
    recompute = partial(
        checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=_keep_attention
    )
    for layer in layers:
        loan.set(layer, "_gradient_checkpointing_func", recompute)
        loan.set(layer, "gradient_checkpointing", True)
        # Layers checkpoint only in training mode; their submodules, dropout among them, stay in evaluation mode.
        loan.set(layer, "training", True)


def _keep_attention() -> Any:
    return create_selective_checkpoint_contexts(_what_to_do)


def _what_to_do(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    kept = operation in _KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

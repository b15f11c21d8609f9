"""Moving heads: in every layer the retrieval heads first, or first on each tensor-parallel rank.

Our kernels index heads and gain nothing from it; it is for code that cuts a layer's heads into two runs, as the
reference implementation does, and for ranks that should store equally much. Inside ``with reorder_heads(model, policy)
as reordered`` the model under ``reordered.policy`` computes what it did under ``policy``; leaving puts every bit back.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from duohead.models.head_tensors import INSTEAD, HeadLayer, head_tensors
from duohead.models.interface import policy_of, unwrap
from duohead.models.ranks import Orders, head_orders, in_order
from duohead.models.reorder_check import check_unchanged, record_calls
from duohead.policy import HeadPolicy

# Kept on the model, so that a copy of it knows its order as well.
STATE = "_duohead_orders"


class Reordered:
    """A model whose heads were moved; as a context manager it moves them back at the end of the block.

    Attributes:
        policy: what to do with the heads where they are now, bound to the model: what `duo` takes, and what belongs
            beside saved weights.
        original: the same before they were moved.
        orders: for every layer, which original KV head stands in each place.
    """

    def __init__(
        self, model: nn.Module, *, policy: HeadPolicy, original: HeadPolicy, orders: Orders
    ) -> None:
        self.policy = policy
        self.original = original
        self.orders = orders
        self._model = model

    def undo(self) -> None:
        """Move every head back; weights that were not trained meanwhile are the same bits as before.

        Raises:
            ValueError: they are back already, a policy is on the model, or its heads can no longer be moved (it was
                quantised or given adapters meanwhile); nothing has been moved then.
        """
        if vars(self._model).get(STATE) != self.orders:
            raise ValueError("the heads of this model are back in their places; undo works once")
        _move_back(self._model, self.original, self.orders)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if STATE in vars(self._model):
            self.undo()


def reorder_heads(
    model: Any, policy: HeadPolicy, *, ranks: int = 1, probe: bool = True
) -> Reordered:
    """Move the KV heads of every layer, and their query heads with them, so that retrieval heads come first. In place.

    Rows and biases of q_proj, k_proj, v_proj and of output gates, columns of o_proj, learned sinks and norms with
    weights for every head are moved, and their gradients (an optimizer's state is not); one tensor at a time is copied.
    Without a policy the model goes on computing what it did, to rounding: nothing in its weights or config tells that
    they were moved.

    Args:
        model: a transformers causal language model with plain linear projections, and no policy on it.
        policy: which heads keep what in the model as it is.
        ranks: tensor-parallel ranks, each holding an equal run of every layer's heads: retrieval heads come first in
            each run, and runs hold equally many (see `duohead.models.ranks.head_orders`).
        probe: run every attention layer on a handful of tokens before and afterwards, and compare.

    Raises:
        ValueError: the policy does not fit, ``ranks`` does not divide the heads, or a layer's heads cannot be moved
            (fused, quantised, shared or sharded weights, adapters, a tensor of unknown meaning). The message names the
            module, and the model is as it was.
    """
    target = unwrap(model)
    _check_free(target)
    _check_no_prefix(model)
    if STATE in vars(target):
        raise ValueError(
            "the heads of this model are reordered already; move them back first (undo, or restore_heads)"
        )
    original = policy.bind(target)
    orders = head_orders(original, ranks=ranks)
    layers = _moved(head_tensors(target, original.shapes), orders)
    calls = record_calls(target, [layer.attention for layer in layers] if probe else [])
    _move(layers, orders)
    try:
        check_unchanged(calls)
    except BaseException:
        _move(layers, _inverse(orders))
        raise
    vars(target)[STATE] = orders
    moved = in_order(original, ranks=ranks)
    return Reordered(target, policy=moved, original=original, orders=orders)


def restore_heads(model: Any, policy: HeadPolicy, *, ranks: int = 1) -> None:
    """Move the heads of a checkpoint that was saved reordered back to where they were, in place.

    Args:
        model: as for `reorder_heads`, with weights that were reordered by it or by the reference implementation.
        policy: the heads where they were originally, that is, what was given to `reorder_heads`. Of a checkpoint of the
            reference implementation, its retrieval heads.
        ranks: as they were given to `reorder_heads`.

    Raises:
        ValueError: as for `reorder_heads`; or the model is known to be reordered in another way.
    """
    target = unwrap(model)
    _check_no_prefix(model)
    original = policy.bind(target)
    orders = head_orders(original, ranks=ranks)
    if vars(target).get(STATE, orders) != orders:
        raise ValueError(
            "policy and ranks must be those that the heads of this model were reordered for, got others"
        )
    _move_back(target, original, orders)


def _move_back(model: Any, original: HeadPolicy, orders: Orders) -> None:
    _check_free(model)
    _move(_moved(head_tensors(model, original.shapes), orders), _inverse(orders))
    vars(model).pop(STATE, None)


def _check_free(model: Any) -> None:
    if policy_of(model) is not None:
        raise ValueError(
            "heads cannot be moved under a policy that says where they are; call duohead.disable(model) first"
        )


def _check_no_prefix(model: Any) -> None:
    """Refuse a prefix of PEFT, which holds keys and values of every head outside of the model."""
    config = getattr(getattr(model, "_orig_mod", model), "active_peft_config", None)
    if str(getattr(config, "peft_type", "")).endswith("PREFIX_TUNING"):
        raise ValueError(
            f"cannot reorder heads: prefix tuning keeps keys and values of heads in {type(model).__name__}, which "
            f"would not move; reorder the model inside (get_base_model) and train the prefix on it, or leave the heads "
            f"where they are: {INSTEAD}"
        )


def _moved(layers: Sequence[HeadLayer], orders: Orders) -> list[HeadLayer]:
    """The layers that an order changes."""
    return [
        layer for layer in layers if orders[layer.index] != tuple(range(len(orders[layer.index])))
    ]


@torch.no_grad()
def _move(layers: Sequence[HeadLayer], orders: Orders) -> None:
    """Bring every tensor of these layers into order, all of them or none."""
    done: list[tuple[Tensor, int, tuple[int, ...]]] = []
    try:
        for layer in layers:
            order = orders[layer.index]
            for item in layer.tensors:
                for tensor in (item.tensor, item.tensor.grad):
                    if tensor is not None:
                        shares, moved = _permuted(tensor, item.axis, order)
                        # Before the copy: Ctrl-C is raised once it is done, so it counts as done from here on.
                        done.append((tensor, item.axis, order))
                        shares.copy_(moved)
    except BaseException:
        for tensor, axis, order in reversed(done):
            shares, moved = _permuted(tensor, axis, _inverted(order))
            shares.copy_(moved)
        raise


def _permuted(tensor: Tensor, axis: int, order: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The equal shares that a tensor's axis consists of, as a view of it, and a copy of them in order."""
    shares = tensor.unflatten(axis, (len(order), -1))
    return shares, shares.index_select(axis, torch.tensor(order, device=tensor.device))


def _inverse(orders: Orders) -> Orders:
    return tuple(_inverted(order) for order in orders)


def _inverted(order: tuple[int, ...]) -> tuple[int, ...]:
    """For every head its place in an order."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))

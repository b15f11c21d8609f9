"""Tensor-parallel ranks: which heads each would hold, what they weigh there, and an order of heads that evens it out.

Tensor parallelism cuts every layer's heads into equal runs, one for each rank, so the order of heads decides who stores
the long caches: with retrieval heads first, as the reference implementation sorts them, the first ranks hold all of
them. `rank_shares` shows it for any policy, `in_order` is the policy after `reorder_heads`, so the two compare both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self, TypeVar

import torch

from duohead.policy import HeadPolicy, LayerPolicy
from duohead.shapes import LayerShape
from duohead.storage import is_int

Orders = tuple[tuple[int, ...], ...]
Layer = TypeVar("Layer", LayerPolicy, LayerShape)


@dataclass(frozen=True)
class RankShare:
    """What one rank stores: retrieval heads and KV heads of gated layers, and bytes of KV cache of all layers."""

    rank: int
    retrieval_heads: int
    kv_heads: int
    kv_bytes: int


@dataclass(frozen=True)
class RankPolicy(HeadPolicy):
    """A policy for the heads of one rank; it binds to the whole model, whose configs count the heads of all ranks.

    Attributes:
        ranks: how many equal runs of heads there are, of which this is one.
    """

    ranks: int = 1

    def bind(self, model_or_config: Any, *, dtype: torch.dtype | str | None = None) -> Self:
        """As `HeadPolicy.bind`, with the shapes of this rank's heads."""
        whole = tuple(
            replace(layer, num_kv_heads=layer.num_kv_heads * self.ranks) for layer in self.layers
        )
        bound = HeadPolicy(whole).bind(model_or_config, dtype=dtype)
        return replace(
            self,
            layers=_shares(bound.layers, self.ranks),
            shapes=_shares(bound.shapes, self.ranks),
            native_dtype=bound.native_dtype,
        )


def _shares(layers: Sequence[Layer], ranks: int) -> tuple[Layer, ...]:
    return tuple(replace(layer, num_kv_heads=layer.num_kv_heads // ranks) for layer in layers)


def rank_policy(policy: HeadPolicy, rank: int, *, ranks: int) -> RankPolicy:
    """The part of a policy for the heads of one rank, counted from the rank's first head.

    Raises:
        ValueError: ``ranks`` does not divide the KV heads of a layer, or there is no such rank.
    """
    _check_ranks(policy, ranks)
    if rank not in range(ranks):
        raise ValueError(f"rank must lie in 0..{ranks - 1}, got {rank!r}")
    layers = []
    for layer in policy.layers:
        block = layer.num_kv_heads // ranks
        own = range(rank * block, (rank + 1) * block)
        heads = tuple(head - own.start for head in layer.retrieval if head in own)
        layers.append(LayerPolicy(block, heads, layer.window))
    same = {field.name: getattr(policy, field.name) for field in fields(HeadPolicy)}
    parts = {"layers": tuple(layers), "shapes": _shares(policy.shapes, ranks), "ranks": ranks}
    return RankPolicy(**same | parts)


def rank_shares(
    policy: HeadPolicy,
    *,
    ranks: int,
    tokens: int,
    batch: int = 1,
    head_dim: int | None = None,
    dtype: torch.dtype | str | None = None,
) -> tuple[RankShare, ...]:
    """What every rank stores of ``tokens`` tokens; arguments and errors as for `HeadPolicy.kv_bytes`."""
    _check_ranks(policy, ranks)
    shares = []
    for rank in range(ranks):
        own = rank_policy(policy, rank, ranks=ranks)
        gated = [layer for layer in own.layers if layer.gated]
        shares.append(
            RankShare(
                rank,
                sum(len(layer.retrieval) for layer in gated),
                sum(layer.num_kv_heads for layer in gated),
                own.kv_bytes(tokens, batch, head_dim=head_dim, dtype=dtype),
            )
        )
    return tuple(shares)


def head_orders(policy: HeadPolicy, *, ranks: int = 1) -> Orders:
    """For every layer, which KV head to put in each place: retrieval heads first within each rank's run of heads.

    Heads of a kind keep their order. Ranks get equal shares of every layer's retrieval heads; those left over go to the
    ranks that have the fewest so far among layers of the same shape, so that over these no rank has more than one head
    more than another.

    Raises:
        ValueError: ``ranks`` does not divide the KV heads of a layer.
    """
    _check_ranks(policy, ranks)
    held: dict[LayerPolicy | LayerShape, Counter[int]] = {}
    orders = []
    for index, layer in enumerate(policy.layers):
        shape = policy.shapes[index] if policy.shapes else replace(layer, retrieval=())
        tally = held.setdefault(shape, Counter())
        each, left = divmod(len(layer.retrieval), ranks)
        neediest = sorted(range(ranks), key=tally.__getitem__)[:left]
        retrieval, streaming = iter(layer.retrieval), iter(layer.streaming)
        order: list[int] = []
        for rank in range(ranks):
            count = each + (rank in neediest)
            tally[rank] += count
            order += [next(retrieval) for _ in range(count)]
            order += [next(streaming) for _ in range(layer.num_kv_heads // ranks - count)]
        orders.append(tuple(order))
    return tuple(orders)


def in_order(policy: HeadPolicy, *, ranks: int = 1) -> HeadPolicy:
    """The same heads under the same policy once they stand in the order of `head_orders`."""
    return policy.with_retrieval(
        [
            [place for place, head in enumerate(order) if head in layer.retrieval]
            for order, layer in zip(head_orders(policy, ranks=ranks), policy.layers, strict=True)
        ]
    )


def _check_ranks(policy: HeadPolicy, ranks: int) -> None:
    if not is_int(ranks) or ranks < 1:
        raise ValueError(f"ranks must be an integer >= 1, got {ranks!r}")
    for index, layer in enumerate(policy.layers):
        if layer.num_kv_heads % ranks:
            raise ValueError(
                f"ranks must divide the KV heads of every layer ({layer.num_kv_heads} in layer {index}), got {ranks}; "
                f"a KV head that several ranks share is stored by each of them, whatever its place"
            )

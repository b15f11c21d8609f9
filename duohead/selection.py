"""Which heads keep everything: deterministic selection from alphas by ratio, byte budget or threshold.

Ties are common (gates saturate at 0 and 1), so the order is total: alpha descending, then layer, then head. The count
is exact, and layers may end with no retrieval head or with nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Head = tuple[int, int]
Heads = tuple[tuple[int, ...], ...]


def rank_heads(alpha: ArrayLike) -> list[Head]:
    """Gated heads (layer, KV head), most retrieval-like first.

    Args:
        alpha: [layers, kv_heads]; NaN marks a head that is not gated and is left out.
    """
    values = _matrix(alpha)
    gated = [(int(layer), int(head)) for layer, head in np.argwhere(~np.isnan(values))]
    return sorted(gated, key=lambda place: (-float(values[place]), *place))


def select_heads(
    alpha: ArrayLike,
    *,
    retrieval_ratio: float | None = None,
    kv_budget: float | None = None,
    threshold: float | None = None,
    ranks: int = 1,
    budget_share: Callable[[Heads], float] | None = None,
    evict: bool = True,
) -> Heads:
    """The retrieval heads of every layer. Heads that are not gated are always among them (they keep what they have).

    Args:
        alpha: [layers, kv_heads]; NaN marks heads that are not gated.
        retrieval_ratio: share of the gated heads to keep, in [0, 1]; the count is rounded half up.
        kv_budget: share of the dense cache's bytes that may be spent, in (0, 1]; needs ``budget_share``.
        threshold: keep every gated head with alpha >= threshold, in [0, 1].
        ranks: tensor-parallel ranks, each holding an equal block of every layer's heads: with ``retrieval_ratio``, each
            rank gets the same number of retrieval heads (the first ranks one more where it does not divide).
        budget_share: bytes of a selection as a share of the dense cache.
        evict: whether streaming heads forget, which decides what would help where a budget is too small.

    Raises:
        ValueError: not exactly one selector, a value out of range, or a budget below what streaming alone takes.
    """
    given = {
        name: value
        for name, value in (
            ("retrieval_ratio", retrieval_ratio),
            ("kv_budget", kv_budget),
            ("threshold", threshold),
        )
        if value is not None
    }
    if len(given) != 1:
        raise ValueError(
            f"exactly one of retrieval_ratio, kv_budget and threshold must be given, got {sorted(given) or 'none'}"
        )
    ((name, value),) = given.items()
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")
    values = _matrix(alpha)
    order = rank_heads(values)
    if ranks != 1 and name != "retrieval_ratio":
        raise ValueError(f"ranks goes with retrieval_ratio only, got {name}; leave ranks at 1")
    if name == "threshold":
        return _per_layer(values, [place for place in order if values[place] >= value])
    if name == "retrieval_ratio":
        return _per_layer(
            values, _take(order, int(value * len(order) + 0.5), values.shape[1], ranks)
        )
    if budget_share is None:
        raise ValueError(
            "kv_budget needs a length in tokens to count bytes at; use HeadPattern.policy(tokens=...)"
        )
    return _within_budget(values, order, value, budget_share, evict=evict)


def _matrix(alpha: ArrayLike) -> NDArray[np.float32]:
    values = np.asarray(alpha, dtype=np.float32)
    if values.ndim != 2:
        raise ValueError(f"alpha must have shape (layers, kv_heads), got {values.shape}")
    return values


def _take(order: Sequence[Head], count: int, num_heads: int, ranks: int) -> list[Head]:
    if ranks == 1:
        return list(order[:count])
    if ranks < 1 or num_heads % ranks:
        raise ValueError(f"ranks must divide the number of KV heads ({num_heads}), got {ranks}")
    block = num_heads // ranks
    chosen: list[Head] = []
    for rank in range(ranks):
        share = count // ranks + (rank < count % ranks)
        chosen += [place for place in order if place[1] // block == rank][:share]
    return chosen


def _within_budget(
    values: NDArray[np.float32],
    order: Sequence[Head],
    budget: float,
    budget_share: Callable[[Heads], float],
    *,
    evict: bool,
) -> Heads:
    """The longest prefix of ``order`` within the budget; bytes change by the same amount with every head."""
    everything = _per_layer(values, order)
    most = budget_share(everything)
    if most <= budget:
        return everything
    best: Heads | None = None
    low, high = 0, len(order) - 1
    while low <= high:
        count = (low + high) // 2
        heads = _per_layer(values, order[:count])
        if budget_share(heads) <= budget:
            best, low = heads, count + 1
        else:
            high = count - 1
    if best is None:
        # A retrieval head can be the cheaper kind: short texts, or a coarser retrieval_dtype.
        floor = min(most, budget_share(_per_layer(values, ())))
        remedy = (
            "lower sink, recent or the storage precision"
            if evict
            else "lower the storage precision, or let streaming heads forget (no evict=False, no --keep-all)"
        )
        raise ValueError(
            f"kv_budget must be at least {floor:.4f} here, the least that any selection takes, got {budget}; "
            f"raise it, or {remedy}"
        )
    return best


def _per_layer(values: NDArray[np.float32], places: Iterable[Head]) -> Heads:
    chosen = set(places)
    return tuple(
        tuple(
            head
            for head in range(values.shape[1])
            if np.isnan(values[layer, head]) or (layer, head) in chosen
        )
        for layer in range(values.shape[0])
    )

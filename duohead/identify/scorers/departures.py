"""The order in which heads leave, given what choices of heads lose: greedy, then mended where neighbours change places.

It knows nothing of models, so that it can be tried on losses whose best order is known. Use `order =
list(eliminate(loss, heads, options=options))`, then `refine(loss, order, options=options)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from duohead.identify.scorers.eliminate import EliminateOptions

Heads = frozenset[int]
# Heads whose order is looked at together once all have left.
_WINDOW = 4


class Loss(Protocol):
    """What choices of heads lose."""

    def __call__(self, sets: Sequence[Heads], *, rough: bool = False) -> list[float]:
        """For each set of heads that keep everything a number in [0, 1]; ``rough`` is cheap and nearly right."""
        ...


def eliminate(loss: Loss, heads: int, *, options: EliminateOptions) -> Iterator[int]:
    """Heads in the order in which they are given up, the most dispensable first.

    Each time that head leaves whose absence costs least. What an absence cost when more heads were there is a guess of
    what it costs now, and seldom too high, because heads stand in for one another: so heads are tried in the order of
    the guesses, and no further than the best found (lazy greedy selection, Minoux 1978). Those tries are rough; all
    texts judge between the best of them, unless several heads leave at once. The last few are ordered together.
    """
    kept = frozenset(range(heads))
    guess = _costs(loss, kept, sorted(kept), rough=True)
    while len(kept) > options.exhaustive:
        leave = 1 if len(kept) <= options.one_by_one else max(1, len(kept) // 16)
        found = _try(loss, kept, guess, leave, options.tries)
        guess.update(found)
        if leave == 1:
            best = sorted(found, key=lambda head: (found[head], head))[: options.finalists]
            found = _costs(loss, kept, best)
        gone = sorted(found, key=lambda head: (found[head], head))[:leave]
        yield from gone
        kept = kept - frozenset(gone)
    yield from _together(loss, frozenset(), kept, finalists=options.finalists)


def _costs(
    loss: Loss, kept: Heads, heads: Sequence[int], *, rough: bool = False
) -> dict[int, float]:
    """What the absence of each of ``heads`` adds to the loss of ``kept``."""
    now, *without = loss([kept, *(kept - {head} for head in heads)], rough=rough)
    return {head: cost - now for head, cost in zip(heads, without, strict=True)}


def _try(
    loss: Loss, kept: Heads, guess: dict[int, float], leave: int, tries: int
) -> dict[int, float]:
    """Rough costs of some heads' absence: those with the lowest guesses, until ``leave`` of them are clear."""
    order = sorted(kept, key=lambda head: (guess[head], head))
    step = max(leave, tries // 2)
    found: dict[int, float] = {}
    for start in range(0, min(max(tries, 2 * leave), len(order)), step):
        some = order[start : start + step]
        if found and sorted(found.values())[leave - 1] <= guess[some[0]]:
            break
        found |= _costs(loss, kept, some, rough=True)
    return found


def refine(loss: Loss, order: Sequence[int], *, options: EliminateOptions) -> list[int]:
    """An order of leaving in which heads that left one by one may have changed places, up to half of all.

    Greedy departures cannot be taken back. So from the last ones towards the first, a few neighbours in the order at a
    time are ordered together, given all that stay longer; windows overlap, and a head may move through several.
    """
    ranked = list(order[::-1])
    end = min(options.one_by_one, len(ranked) // 2 + _WINDOW // 2)
    for start in range(max(0, options.exhaustive - _WINDOW // 2), end - _WINDOW + 1, _WINDOW // 2):
        window = slice(start, start + _WINDOW)
        base, members = frozenset(ranked[:start]), frozenset(ranked[window])
        ranked[window] = _together(loss, base, members, finalists=options.finalists)[::-1]
    return ranked[::-1]


def _together(loss: Loss, base: Heads, members: Heads, *, finalists: int) -> list[int]:
    """The order in which ``members`` leave ``base`` alone with the least sum of losses on the way.

    Rough losses of all subsets say which few of each size lie on good ways; all texts judge the ways through those.
    """
    ordered = sorted(members)
    subsets = [
        frozenset(head for place, head in enumerate(ordered) if bits >> place & 1)
        for bits in range(2 ** len(ordered))
    ]
    cost = dict(zip(subsets, loss([base | subset for subset in subsets], rough=True), strict=True))
    # The best way through a subset is the best one on from it, and the best one to it: all that has left, mirrored.
    onward, leaves = _ways(cost)
    mirrored, _ = _ways({members - subset: value for subset, value in cost.items()})
    through = {s: onward[s] + cost[s] + mirrored[members - s] for s in subsets}
    # Of equally good ways one is there as a whole.
    order = _walk(leaves, members)
    best = [frozenset(order[place:]) for place in range(len(order) + 1)]
    for size in range(len(ordered) + 1):
        alike = [subset for subset in subsets if len(subset) == size]
        best += sorted(alike, key=lambda subset: (through[subset], sorted(subset)))[:finalists]
    sure = dict(zip(best, loss([base | subset for subset in best]), strict=True))
    return _walk(_ways(sure)[1], members)


def _walk(leaves: dict[Heads, int], members: Heads) -> list[int]:
    """The order in which ``members`` leave by what `_ways` found."""
    order = []
    while members:
        order.append(leaves[members])
        members = members - {leaves[members]}
    return order


def _ways(cost: dict[Heads, float]) -> tuple[dict[Heads, float], dict[Heads, int]]:
    """Of sets with their losses: the least sum of losses after each of them down to none, and who leaves it first.

    A set from which no way leads down through the others has no entry.
    """
    total: dict[Heads, float] = {frozenset(): 0.0}
    leaves: dict[Heads, int] = {}
    for subset in sorted(cost, key=len):
        ways = [
            (total[rest] + cost[rest], head)
            for head, rest in ((head, subset - {head}) for head in subset)
            if rest in total
        ]
        if ways:
            total[subset], leaves[subset] = min(ways)
    return total, leaves

"""Scores out of records of any evaluation: who answered what how well, for how many bytes of cache.

Evaluations write different records, but all name a task and the bytes of the cache that was filled; this module reads
just that, so that one picture serves all of them. `scored(entries)` gives the scores, `means(scores)` what a chart of
accuracy against footprint shows.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from duohead.evaluate.collect import Entry
from duohead.evaluate.svg import short_count

# The first of these that a record has is its score; else all its numbers that are no costs.
METRICS = ("exact_match", "accuracy", "acc", "score", "pass_at_1")
_COSTS = re.compile(
    r"bytes|stderr|(seconds|_ms|_s|_tokens)$|^(n|samples|answers|tokens|requests|windows)$"
)
_FALLING = re.compile(r"perplexity|loss|nll|(^|_)kl(_|$)|divergence|bits")
# Shares that a method is run at stand in its name: duo_50, random_25_0.
_SHARE = re.compile(r"(_\d+(\.\d+)?)+$")


@dataclass(frozen=True)
class Score:
    """One method's result on one task, or on one cell of it.

    `method` is without its share and draw ("duo", "random", a scorer's name), `share` the fraction of gated heads that
    are retrieval heads, `metric` a fraction of right answers or, if `falling`, something that should be small. `times`
    are all of the record's numbers that end in _seconds or _ms.
    """

    op: str
    model: str
    task: str
    method: str
    share: float
    draw: str
    metric: str
    value: float
    falling: bool
    kv_bytes: int
    weight: float
    length: int | None
    depth: float | None
    times: Mapping[str, float]

    @property
    def is_share(self) -> bool:
        """Whether the value is a share of what could be had, so that means over tasks say something."""
        return not self.falling and 0 <= self.value <= 1

    @property
    def chart(self) -> tuple[str, str, str, str]:
        """Scores with the same belong into one chart."""
        return self.op, self.model, self.task, self.metric


@dataclass(frozen=True)
class Mean:
    """Scores of one method at one share, averaged over cells and draws; `draws` are the means of each draw
    or seed by name.

    `footprint` is the mean of cache bytes over that of full attention in the same cells, None without full attention.
    """

    method: str
    share: float
    value: float
    kv_bytes: float
    footprint: float | None
    draws: Mapping[str, float]
    cells: int
    weight: float
    times: Mapping[str, float]


def scored(entries: Iterable[Entry]) -> list[Score]:
    """The scores among records; a record without a task, a metric or the bytes of a cache has none."""
    found = list(entries)
    apart = several_windows(found)
    return [score for entry in found for score in scores_of(entry, apart)]


Ways = Collection[tuple[str, str, str]]
"""Operation, model and method of records whose windows stand in the method's name."""


def several_windows(entries: Iterable[Entry]) -> Ways:
    """Methods that records have at more than one window: they cost different bytes, so no mean goes over them."""
    windows: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for entry in entries:
        if window := _window(entry):
            windows[_way(entry)].add(window)
    return {way for way, found in windows.items() if len(found) > 1}


def scores_of(entry: Entry, apart: Ways = ()) -> list[Score]:
    """The scores that a record holds. A part of a group whose mean is a record of its own has none."""
    shape, numbers = entry.shape, entry.numbers
    taken = numbers.get("kv_bytes")
    if "task" not in shape or shape.get("part_of") or not isinstance(taken, int | float):
        return []
    method, share = method_of(entry, apart)
    weight = numbers.get("answers") or shape.get("samples") or 1
    times = {
        name: float(value)
        for name, value in numbers.items()
        if name.endswith(("_seconds", "_ms")) and isinstance(value, int | float)
    }
    return [
        Score(
            op=entry.op,
            model=str(shape.get("model", "")),
            task=str(shape["task"]),
            method=method,
            share=share,
            draw=f"{entry.impl} {shape.get('seed', '')}",
            metric=metric,
            value=float(numbers[metric]),
            falling=bool(_FALLING.search(metric)),
            kv_bytes=int(taken),
            weight=float(weight),
            length=shape.get("length"),
            depth=shape.get("depth"),
            times=times,
        )
        for metric in metrics_of(numbers)
    ]


def method_of(entry: Entry, apart: Ways = ()) -> tuple[str, float]:
    """Whose choice of heads a record is about, without share and draw, and the share of retrieval heads.

    Methods in `apart` have their window in the name, as `duohead evaluate --windows` writes it: "duo@16+64".
    """
    way = _way(entry)
    method = f"{way[2]}@{_window(entry)}" if way in apart else way[2]
    ratio = entry.shape.get("retrieval_ratio")
    return method, 1.0 if ratio is None else round(float(ratio), 4)


def _way(entry: Entry) -> tuple[str, str, str]:
    named = str(entry.shape.get("scorer") or entry.impl)
    method = _SHARE.sub("", named) or named
    if entry.impl in ("full", "streaming"):
        method = entry.impl
    return entry.op, str(entry.shape.get("model", "")), method


def _window(entry: Entry) -> str:
    """Sink and recent tokens of a record, "16+64", and those of prompts if they differ; empty if it has none."""
    sink, recent, prompts = (entry.shape.get(n) for n in ("sink", "recent", "prefill_recent"))
    if sink is None or recent is None:
        return ""
    return f"{sink}+{recent}" + ("" if prompts in (None, recent) else f" ({prompts} in prompts)")


def metrics_of(numbers: Mapping[str, object]) -> list[str]:
    """The numbers of a record that say how well something was done: the usual one, else all that are no costs."""
    usable = [
        name
        for name, value in numbers.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    usual = [name for name in METRICS if name in usable]
    return usual[:1] or [name for name in usable if not _COSTS.search(name)]


def by_grid(scores: Sequence[Score]) -> list[Score]:
    """The scores; where a model's lengths were not all run at the same depths, those of each set of depths stand apart.

    Their model's name then ends in lengths and number of depths. Such runs may have different methods: a mean over
    both would be over other cells for each method, and a grid of both mostly holes.
    """
    depths: dict[tuple[str, str, int], set[float]] = defaultdict(set)
    for s in scores:
        if s.length is not None and s.depth is not None:
            depths[s.op, s.model, s.length].add(s.depth)
    grids: dict[tuple[str, str], dict[frozenset[float], list[int]]] = defaultdict(dict)
    for (op, model, length), own in sorted(depths.items()):
        grids[op, model].setdefault(frozenset(own), []).append(length)
    named: dict[tuple[str, str, int | None], str] = {
        (*place, length): f"{place[1]}, {_span(lengths)} at {len(own)} depth{'s'[: len(own) - 1]}"
        for place, found in grids.items()
        if len(found) > 1
        for own, lengths in found.items()
        for length in lengths
    }
    return [
        s if s.depth is None else replace(s, model=named.get((s.op, s.model, s.length), s.model))
        for s in scores
    ]


def _span(lengths: Sequence[int]) -> str:
    ends = dict.fromkeys((lengths[0], lengths[-1]))
    return f"{' to '.join(map(short_count, ends))} tokens"


def means(scores: Sequence[Score]) -> list[Mean]:
    """Per method and share of one chart's scores, in the order they came."""
    groups: dict[tuple[str, float], list[Score]] = defaultdict(list)
    for score in scores:
        groups[score.method, score.share].append(score)
    full = next((own for (method, _), own in groups.items() if method == "full"), [])
    dense = {(s.length, s.depth): s.kv_bytes for s in full}
    return [_mean(method, share, own, dense) for (method, share), own in groups.items()]


def _mean(
    method: str,
    share: float,
    own: Sequence[Score],
    dense: Mapping[tuple[int | None, float | None], int],
) -> Mean:
    draws: dict[str, list[Score]] = defaultdict(list)
    for score in own:
        draws[score.draw].append(score)
    known = [s for s in own if (s.length, s.depth) in dense]
    total = sum(dense[s.length, s.depth] for s in known)
    return Mean(
        method=method,
        share=share,
        value=average(own),
        kv_bytes=sum(s.kv_bytes for s in own) / len(own),
        footprint=sum(s.kv_bytes for s in known) / total if total else None,
        draws={name: average(part) for name, part in draws.items()},
        cells=len({(s.length, s.depth) for s in own}),
        weight=sum(s.weight for s in own),
        times={
            name: _mean_time(own, name) for name in dict.fromkeys(n for s in own for n in s.times)
        },
    )


def overall(tasks: Sequence[Sequence[Mean]]) -> list[Mean]:
    """Means over tasks, each counting the same; methods and shares that some task lacks are left out."""
    groups: dict[tuple[str, float], list[Mean]] = defaultdict(list)
    for found in tasks:
        for mean in found:
            groups[mean.method, mean.share].append(mean)
    return [_over_tasks(own) for own in groups.values() if len(own) == len(tasks)]


def _over_tasks(own: Sequence[Mean]) -> Mean:
    shares = [mean.footprint for mean in own if mean.footprint is not None]
    draws = [name for name in own[0].draws if all(name in mean.draws for mean in own)]
    times = [name for name in own[0].times if all(name in mean.times for mean in own)]
    return Mean(
        method=own[0].method,
        share=own[0].share,
        value=sum(mean.value for mean in own) / len(own),
        kv_bytes=sum(mean.kv_bytes for mean in own) / len(own),
        footprint=sum(shares) / len(shares) if len(shares) == len(own) else None,
        draws={name: sum(mean.draws[name] for mean in own) / len(own) for name in draws},
        cells=sum(mean.cells for mean in own),
        weight=sum(mean.weight for mean in own),
        times={name: sum(mean.times[name] for mean in own) / len(own) for name in times},
    )


def _mean_time(scores: Sequence[Score], name: str) -> float:
    found = [s.times[name] for s in scores if name in s.times]
    return sum(found) / len(found)


def average(scores: Sequence[Score]) -> float:
    """Mean value, each counting as many times as it has answers."""
    return sum(s.value * s.weight for s in scores) / sum(s.weight for s in scores)

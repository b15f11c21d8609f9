"""A comparison of scorers to look at: a table for the terminal, and curves of accuracy against the bytes of the cache.

Both read the records of `compare.run` and nothing else, so that those of several machines can be put together in one
file and drawn again. Use `table(records)` and `draw(records, path)`.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from duohead.evaluate.compare import FULL
from duohead.evaluate.methods import share_name
from duohead.evaluate.tables import percent, text_table
from duohead.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Records = Sequence[Mapping[str, Any]]
# Colours alone do not tell lines apart on paper, nor for every reader.
MARKERS = "osD^vPX*"


def table(records: Records, *, metric: str = "exact_match") -> str:
    """A line per scorer: mean over tasks at each share of heads, with the range over seeds, and what it cost.

    The last line has the bytes of the cache against full attention, a mean over the same cells.
    """
    ratios = sorted({e["shape"]["retrieval_ratio"] for e in _ranked(records)}, reverse=True)
    head = ["scorer", *(f"{share_name(ratio)} %" for ratio in ratios), "s", "tokens", "backward"]
    lines = []
    for scorer in _scorers(records):
        own = [e for e in records if e["shape"]["scorer"] == scorer]
        cells = [
            _range(_by_seed([e for e in own if e["shape"]["retrieval_ratio"] == r], metric))
            for r in ratios
        ]
        cost = [
            _mean([float(e["numbers"][f"identify_{name}"]) for e in own])
            for name in ("seconds", "forward_tokens", "backward_tokens")
        ]
        lines.append([scorer, *cells, f"{cost[0]:.1f}", f"{cost[1]:,.0f}", f"{cost[2]:,.0f}"])
    full = [e for e in records if e["shape"]["scorer"] == FULL]
    whole = percent(_mean(list(_by_task(full, metric).values())))
    lines.append(["full attention", *[whole] * len(ratios), "", "", ""])
    shares = [
        percent(
            footprint([e for e in _ranked(records) if e["shape"]["retrieval_ratio"] == r], full)
        )
        for r in ratios
    ]
    lines.append(["cache, of full", *shares, "", "", ""])
    return text_table(head, lines)


def footprint(some: Records, full: Records) -> float:
    """Cache bytes of some records over those of full attention in the same cells."""
    dense = {_cell(entry): entry["numbers"]["kv_bytes"] for entry in full}
    return sum(e["numbers"]["kv_bytes"] for e in some) / sum(dense[_cell(e)] for e in some)


def draw(records: Records, path: str | os.PathLike[str], *, metric: str = "exact_match") -> None:
    """Curves over the share of full attention's bytes as a PNG: the mean of all tasks first, then a panel per task.

    Lines are means over seeds, bands their range; the dashed line is full attention.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(entry["shape"]["task"] for entry in records))
    panels = [("mean of all tasks", tasks), *((task, [task]) for task in tasks)]
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.8 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for (title, chosen), one in zip(panels, axes, strict=False):
        _panel(one, [e for e in records if e["shape"]["task"] in chosen], title, metric)
    for one in axes[len(panels) :]:
        one.set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(9, len(labels)))
    figure.supxlabel("cache bytes, % of full attention", fontsize="medium")
    figure.supylabel(f"{metric.replace('_', ' ')}, %", fontsize="medium")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)


def _panel(axes: Axes, records: Records, title: str, metric: str) -> None:
    full = [e for e in records if e["shape"]["scorer"] == FULL]
    for number, scorer in enumerate(_scorers(records)):
        own = [e for e in records if e["shape"]["scorer"] == scorer]
        points = []
        for ratio in sorted({e["shape"]["retrieval_ratio"] for e in own}):
            some = [e for e in own if e["shape"]["retrieval_ratio"] == ratio]
            values = _by_seed(some, metric)
            points.append((footprint(some, full), _mean(values), min(values), max(values)))
        x, mean, low, high = ([100 * value for value in part] for part in zip(*points, strict=True))
        style = "--" if scorer == "random" else "-"
        (line,) = axes.plot(x, mean, style, label=scorer, **_look(number))
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.12, lw=0)
    axes.axhline(
        100 * _mean(list(_by_task(full, metric).values())), color="0.4", ls=":", label="full"
    )
    axes.set_title(title, fontsize="medium")
    axes.set_ylim(-3, 103)
    axes.grid(alpha=0.25)


def _look(number: int) -> dict[str, Any]:
    """Colour and mark of the scorer in that place."""
    return {"color": f"C{number}", "marker": MARKERS[number % len(MARKERS)], "ms": 4}


def _ranked(records: Records) -> list[Mapping[str, Any]]:
    return [entry for entry in records if entry["shape"]["scorer"] != FULL]


def _scorers(records: Records) -> list[str]:
    return list(dict.fromkeys(entry["shape"]["scorer"] for entry in _ranked(records)))


def _cell(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(entry["shape"].get(name) for name in ("model", "task", "length", "depth"))


def _by_seed(records: Records, metric: str) -> list[float]:
    """Per seed the mean over tasks, each the mean of its cells."""
    groups = defaultdict(list)
    for entry in records:
        groups[entry["shape"]["seed"]].append(entry)
    return [_mean(list(_by_task(own, metric).values())) for own in groups.values()]


def _by_task(records: Records, metric: str) -> dict[str, float]:
    groups = defaultdict(list)
    for entry in records:
        groups[entry["shape"]["task"]].append(float(entry["numbers"][metric]))
    return {task: _mean(values) for task, values in groups.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _range(values: Sequence[float]) -> str:
    """ "93.1 (90-95)": the mean of the seeds and their range, in %."""
    mean = f"{100 * _mean(values):.1f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({100 * min(values):.0f}-{100 * max(values):.0f})"

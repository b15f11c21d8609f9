"""The report's sections on the gates: where they stand, how they came there, and what finding them cost.

A pattern is a matrix, so it is shown as one; a log of the training is a strip, one column per step and one row per
head, in which a head's colour says when it was decided. `sections(patterns, logs, entries)` gives the sections.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from duohead.evaluate.collect import Entry
from duohead.evaluate.curves import Axis, Curve, curve_chart, legend
from duohead.evaluate.heatmap import HeatMap, colour_key
from duohead.evaluate.page import card, details_table, section

if TYPE_CHECKING:
    from duohead.pattern import HeadPattern

GATES = "gates"  # some lines of a log: the gates of all gated heads, layer by layer
COLUMNS, ROWS = 60, 96
SINGLE = 3  # patterns of a model that get a card each
SECONDS = ("identify_seconds", "scorer_seconds", "cost_seconds", "seconds")


def sections(
    patterns: Mapping[str, HeadPattern],
    logs: Mapping[str, Sequence[Mapping[str, Any]]],
    entries: Iterable[Entry],
) -> list[tuple[str, str, str]]:
    """(name, title, HTML) of every section that there is something for."""
    found = []
    if patterns:
        cards = _pattern_cards(patterns)
        text = "Gate of every KV head: 1 means that answers need the head's whole context."
        found.append(("heads", "Heads", section("heads", "Heads", text, cards)))
    if logs:
        cards = [
            part
            for path, steps in logs.items()
            for part in _log_cards(path, steps, patterns.get(os.path.dirname(path)))
        ]
        text = "How gates and losses moved while they were trained."
        found.append(("training", "Training", section("training", "Training", text, cards)))
    costs = _costs(patterns, entries)
    if costs:
        found.append(("cost", "Cost of finding heads", _cost_section(costs)))
    return found


def _pattern_cards(patterns: Mapping[str, HeadPattern]) -> list[str]:
    """A card per pattern, or one of small pictures for a model that has many."""
    models: dict[str, list[str]] = defaultdict(list)
    for folder, pattern in patterns.items():
        models[os.path.basename(pattern.base_model or folder) or folder].append(folder)
    cards = []
    for name, folders in models.items():
        if len(folders) <= SINGLE:
            cards += [_pattern_card(name, folder, patterns[folder]) for folder in folders]
            continue
        small = "".join(
            f"<div><h4>{escape(_scorer(patterns[f]) or name)}</h4><p>{escape(f)}</p>"
            f"{_gate_map(name, patterns[f])}</div>"
            for f in folders
        )
        body = f'<div class="many">{small}</div>{colour_key("streaming 0", "1 retrieval")}'
        cards.append(card(name, f"{len(folders)} patterns.", body, wide=True, level=3))
    return cards


def _pattern_card(name: str, folder: str, pattern: HeadPattern) -> str:
    alpha = pattern.alpha
    gated = alpha[pattern.gated]
    table = details_table(
        "Gate per layer and KV head; a hyphen means not gated",
        ["layer", *(f"head {h}" for h in range(alpha.shape[1]))],
        [[str(i), *("-" if v != v else f"{v:.3f}" for v in row)] for i, row in enumerate(alpha)],
    )
    caption = (
        f"{folder}. {_scorer(pattern) or 'Origin not recorded'}; {gated.size} heads, {int((gated > 0.5).sum())} above "
        f"one half. Window: {pattern.sink} sink tokens and {pattern.recent} recent ones."
    )
    body = _gate_map(name, pattern) + colour_key("streaming 0", "1 retrieval") + table
    return card(name, caption, body, level=3)


def _gate_map(name: str, pattern: HeadPattern) -> str:
    alpha = pattern.alpha
    layers, heads = alpha.shape
    gated = alpha[pattern.gated]
    kept = ", ".join(f"{i}.{h}" for i, h in np.argwhere(alpha > 0.5)[:64])
    return HeatMap(
        values=alpha.T.tolist(),
        rows=[str(h) for h in range(heads)],
        columns=[str(i) for i in range(layers)],
        x_label="layer",
        y_label="KV head",
        title=f"Gates of {name}",
        description=(
            f"{layers} layers by {heads} KV heads; {gated.size} gated, mean {gated.mean():.2f}. Above one half "
            f"(layer.head): {kept or 'none'}."
        ),
    ).svg()


def _scorer(pattern: HeadPattern) -> str | None:
    named = pattern.training.get("scorer") or pattern.training.get("method")
    return None if named is None else str(named)


def _log_cards(
    path: str, steps: Sequence[Mapping[str, Any]], pattern: HeadPattern | None
) -> list[str]:
    name = os.path.basename(os.path.dirname(path)) or path
    cards = []
    if any(GATES in step for step in steps):
        cards.append(_strip(name, path, [step for step in steps if GATES in step], pattern))
    lines = {
        key: tuple((float(step["step"]), float(step[key])) for step in steps if _real(step, key))
        for key in ("distill", "loss", "mean_gate", "share_above_half")
    }
    for title, keys, names in (
        ("losses", ("distill", "loss"), ("distillation", "with the regulariser")),
        ("gates", ("mean_gate", "share_above_half"), ("mean gate", "share above one half")),
    ):
        curves = [
            Curve(said, lines[key], style)
            for key, said, style in zip(keys, names, ("one", "two"), strict=True)
            if len(lines[key]) > 1
        ]
        if not curves:
            continue
        ends = ", ".join(f"{curve.name} ends at {curve.points[-1][1]:.4g}" for curve in curves)
        chart = curve_chart(
            curves,
            x=Axis("step"),
            y=Axis("loss") if title == "losses" else Axis("gate", top=1.0),
            title=f"{name}: {title}",
            description=f"{len(steps)} steps; {ends}.",
        )
        caption = f"{path}, {len(steps)} steps; {ends}."
        cards.append(card(f"{name}: {title}", caption, chart + legend(curves), level=3))
    return cards


def _real(step: Mapping[str, Any], key: str) -> bool:
    return isinstance(step.get(key), int | float) and float(step[key]) >= 0


def _strip(
    name: str, path: str, steps: Sequence[Mapping[str, Any]], pattern: HeadPattern | None
) -> str:
    """Gates over time: a column per step (as many as fit), a row per gate, or per group where gates are too many."""
    picked = sorted({round(i) for i in np.linspace(0, len(steps) - 1, min(COLUMNS, len(steps)))})
    gates = np.array([steps[i][GATES] for i in picked], dtype=float).T
    rows, values, what = _rows(gates, pattern)
    said = [str(steps[i]["step"]) for i in picked]
    chart = HeatMap(
        values=values.tolist(),
        rows=rows,
        columns=said,
        x_label="step",
        y_label=what,
        title=f"{name}: gates over time",
        description=f"One row per {what}, steps {said[0]} to {said[-1]}, values from 0 to 1.",
    ).svg()
    caption = f"{path}. All gates start alike; those that stay high are needed."
    body = chart + colour_key("streaming 0", "1 retrieval")
    return card(f"{name}: gates over time", caption, body, level=3)


def _rows(
    gates: NDArray[np.float64], pattern: HeadPattern | None
) -> tuple[list[str], NDArray[np.float64], str]:
    """Names and values [rows, steps] of a strip, and what a row is.

    A log has gated heads only, layer by layer; the pattern beside it, once there is one, says which these are.
    """
    places = [] if pattern is None else [(int(i), int(h)) for i, h in np.argwhere(pattern.gated)]
    if len(places) != len(gates):
        places = [(0, i) for i in range(len(gates))]
        names = [str(i) for i in range(len(gates))]
        what, groups = "gate, layer by layer", np.arange(len(gates)) * ROWS // len(gates)
        many = "gates, layer by layer"
    else:
        names = [f"{layer}.{head}" for layer, head in places]
        what, groups = "head (layer.head)", np.array([layer for layer, _ in places])
        many = "layer (mean of its heads)"
    if len(gates) <= ROWS:
        return names, gates, what
    firsts = [int(np.argmax(groups == group)) for group in np.unique(groups)]
    means = np.stack([gates[groups == group].mean(0) for group in np.unique(groups)])
    return [names[first].partition(".")[0] for first in firsts], means, many


def _costs(
    patterns: Mapping[str, HeadPattern], entries: Iterable[Entry]
) -> dict[tuple[str, str], _Cost]:
    """(model, scorer) -> what was measured, from patterns and records; each of both may be missing."""
    found: dict[tuple[str, str], _Cost] = defaultdict(_Cost)
    told: set[float] = set()
    for entry in entries:
        seconds = _seconds(entry.numbers)
        scorer = entry.shape.get("scorer")
        if scorer and seconds is not None:
            cost = found[str(entry.shape.get("model", "")), str(scorer)]
            cost.seconds.add(seconds)
            cost.machines[entry.machine] = None
            told.add(seconds)
    for pattern in patterns.values():
        scorer = _scorer(pattern)
        paid = pattern.training.get("cost")
        seconds = _seconds(paid if isinstance(paid, Mapping) else pattern.training)
        # Records of the same run know more: its options, and the machine.
        if scorer and seconds is not None and seconds not in told:
            found[pattern.base_model or "", scorer].seconds.add(seconds)
    return found


@dataclass
class _Cost:
    """Seconds of every run, of which a pattern and many records may tell the same, and where they were measured."""

    seconds: set[float] = field(default_factory=set)
    machines: dict[str, None] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        return sum(self.seconds) / len(self.seconds)


def _seconds(values: Mapping[str, Any]) -> float | None:
    named = (values.get(name) for name in SECONDS)
    return next((float(value) for value in named if isinstance(value, int | float)), None)


def _cost_section(costs: Mapping[tuple[str, str], _Cost]) -> str:
    order = sorted(costs.items(), key=lambda item: item[1].mean)
    longest = order[-1][1].mean
    bars = "".join(
        _bar(f"{scorer}, {model}" if model else scorer, cost.mean, longest)
        for (model, scorer), cost in order
    )
    rows = [
        [
            scorer,
            model,
            f"{cost.mean:,.1f} s",
            f"{min(cost.seconds):,.1f} to {max(cost.seconds):,.1f} s",
            str(len(cost.seconds)),
            ", ".join(cost.machines) or "not recorded",
        ]
        for (model, scorer), cost in order
    ]
    head = ["scorer", "model", "mean", "range", "runs", "machine"]
    body = f'<ul class="bars">{bars}</ul>{details_table("Time to rank all heads once", head, rows)}'
    text = "Seconds that ranking the heads takes, by scorer; the model is loaded and its text is at hand."
    caption = "Mean over runs."
    cards = [card("Time to rank all heads once", caption, body, wide=True, level=3)]
    return section("cost", "Cost of finding heads", text, cards)


def _bar(name: str, seconds: float, longest: float) -> str:
    width = max(0.5, 100 * seconds / longest)
    return (
        f'<li><span>{escape(name)}</span><span class="track" aria-hidden="true">'
        f'<span style="width:{width:.1f}%"></span></span><span>{seconds:,.1f} s</span></li>'
    )

"""The report's section on prose: perplexity and divergence by position in the context, a curve per method.

A mean over a text hides where a small cache hurts; records that carry a metric for equal parts of the context, in
numbers named ``..._by_position``, are drawn against position. `sections(entries)` gives the HTML of the section.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from duohead.evaluate.collect import Entry
from duohead.evaluate.curves import Axis, Curve, curve_chart, legend, styles_of, unstyled
from duohead.evaluate.footprint import STYLES, method_name
from duohead.evaluate.page import card, details_table, section
from duohead.evaluate.scores import method_of, several_windows
from duohead.evaluate.svg import short_count

SUFFIX = "_by_position"
Parts = Sequence[float]
# Evaluation, model, task, tokens of context, metric, parts of the context.
Chart = tuple[str, str, str, int, str, int]


def sections(entries: Sequence[Entry]) -> list[tuple[str, str, str]]:
    """(name, title, HTML) of the section, if some record has a metric by position."""
    charts: dict[Chart, dict[str, list[Parts]]] = defaultdict(lambda: defaultdict(list))
    apart = several_windows(entries)
    for entry in entries:
        method = method_name(*method_of(entry, apart))
        for name, parts in entry.numbers.items():
            if name.endswith(SUFFIX) and isinstance(parts, list) and parts:
                charts[_chart(entry, name, len(parts))][method].append(
                    [float(part) for part in parts]
                )
    if not charts:
        return []
    styles = styles_of(
        [method for methods in charts.values() for method in methods],
        fixed={method_name(name, 1.0): style for name, style in STYLES.items() if name == "full"},
    )
    cards = [_card(chart, methods, styles) for chart, methods in sorted(charts.items())]
    text = "Means over equal parts of the context, first to last, drawn at the middle of each; draws are averaged."
    return [("position", "By position", section("position", "By position", text, cards))]


def _chart(entry: Entry, name: str, parts: int) -> Chart:
    shape = entry.shape
    task, length = str(shape.get("task", "")), int(shape.get("length", 0))
    return entry.op, str(shape.get("model", "")), task, length, name.removesuffix(SUFFIX), parts


def _card(chart: Chart, methods: Mapping[str, Sequence[Parts]], styles: Mapping[str, str]) -> str:
    op, model, task, length, metric, count = chart
    means = {
        method: [sum(values) / len(values) for values in zip(*runs, strict=True)]
        for method, runs in methods.items()
    }
    places = _places(count, length)
    curves = [
        Curve(method, tuple(zip(places, parts, strict=True)), styles[method])
        for method, parts in means.items()
        if method in styles
    ]
    name = metric.replace("_", " ")
    title = ", ".join(word for word in (f"{task}: {name}", model) if word)
    ends = "; ".join(
        f"{method} {parts[0]:.4g} to {parts[-1]:.4g}" for method, parts in means.items()
    )
    svg = curve_chart(
        curves,
        x=Axis("position in the context", "tokens"),
        y=Axis(name, zero=False),
        title=title,
        description=f"First part to last part: {ends}. All values are in the table that follows.",
    )
    head = ["tokens up to", *means]
    rows = [
        [
            f"{length * (i + 1) // count:,}",
            *(f"{parts[i]:.4g}" for parts in means.values()),
        ]
        for i in range(count)
    ]
    caption = f"{op}, {short_count(length)} tokens in {count} parts.{unstyled(list(means), styles)}"
    return card(title, caption, svg + legend(curves) + details_table(name, head, rows), level=3)


def _places(parts: int, length: int) -> list[float]:
    return [length * (i + 0.5) / parts for i in range(parts)]

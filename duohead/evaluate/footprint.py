"""The report's sections on what accuracy remains: a table of all, curves against cache bytes, grids of needles.

A choice of heads is judged at what it costs, so every curve runs over measured bytes relative to full attention in the
same texts, and every method of every record is on it. `sections(scores)` gives the HTML of the sections.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from duohead.evaluate.curves import REFERENCE, Axis, Curve, curve_chart, legend, styles_of, unstyled
from duohead.evaluate.heatmap import HeatMap, colour_key
from duohead.evaluate.methods import share_name
from duohead.evaluate.page import card, details_table, html_table, section
from duohead.evaluate.scores import METRICS, Mean, Score, average, by_grid, means, overall
from duohead.evaluate.svg import short_count
from duohead.evaluate.tables import mib, percent

NAMES = {
    "full": "full attention",
    "duo": "identified heads",
    "random": "random heads",
    "streaming": "streaming only",
}
MOST_CELLS = 6000  # of needle grids by task, beyond which a page gets too heavy
STYLES = {"full": REFERENCE, "duo": "one", "random": "two"}


def sections(scores: Sequence[Score]) -> list[tuple[str, str, str]]:
    """(name, title, HTML) of every section that the scores have something for."""
    scores = by_grid(scores)
    found = []
    if shares := [own for own in _by_chart(scores).values() if all(s.is_share for s in own)]:
        found.append(("glance", "At a glance", _glance(shares)))
    if scores:
        found.append(("accuracy", "Accuracy against footprint", _curves(scores)))
    grids = _grids(scores)
    if grids:
        text = "Answers exactly right by context length and depth of the needle; random draws are averaged."
        found.append(("needles", "Needle grids", section("needles", "Needle grids", text, grids)))
    return found


def method_name(method: str, share: float) -> str:
    """What a method is called in a table: "random heads, 25 %"."""
    name = plain_name(method)
    return name if method in ("full", "streaming") else f"{name}, {share_name(share)} %"


def plain_name(method: str) -> str:
    """What a method is called at any share: "random heads", or "identified heads 16+64" for a window of its own."""
    name, _, window = method.partition("@")
    return f"{NAMES.get(name, name)} {window}".rstrip()


def _by_chart(scores: Sequence[Score]) -> dict[tuple[str, str, str, str], list[Score]]:
    groups: dict[tuple[str, str, str, str], list[Score]] = defaultdict(list)
    for score in scores:
        groups[score.chart].append(score)
    return groups


def _glance(charts: Sequence[Sequence[Score]]) -> str:
    """Per evaluation and model a table: methods down, shares of retrieval heads across, mean over tasks."""
    groups: dict[tuple[str, str], dict[str, list[Mean]]] = defaultdict(dict)
    for own in sorted(charts, key=lambda own: own[0].chart):
        op, model, task, metric = own[0].chart
        named = task if metric in METRICS else f"{task} ({metric.replace('_', ' ')})"
        groups[op, model][named] = means(own)
    cards = [_glance_card(op, model, tasks) for (op, model), tasks in groups.items()]
    text = (
        "Mean score over tasks in %, the lowest task in brackets; methods down, shares of retrieval heads across. The "
        "last row says what a share costs: bytes of the filled cache against full attention."
    )
    return section("glance", "At a glance", text, cards)


def _glance_card(op: str, model: str, tasks: Mapping[str, Sequence[Mean]]) -> str:
    ways: dict[str, dict[float, list[Mean]]] = defaultdict(lambda: defaultdict(list))
    for found in tasks.values():
        for mean in found:
            ways[mean.method][mean.share].append(mean)
    # Two methods have one share each, so they take a sentence and no column.
    ends = {method: ways.pop(method) for method in ("full", "streaming") if method in ways}
    said = [
        f"{NAMES[method].capitalize()}: {_glance_cell(found, len(tasks))}"
        + ("." if method == "full" else f" at {_cost(found)} of the bytes.")
        for method, own in ends.items()
        for found in own.values()
    ]
    shares = sorted({share for own in ways.values() for share in own}, reverse=True)
    rows = [
        [plain_name(method), *(_glance_cell(own.get(s, ()), len(tasks)) for s in shares)]
        for method, own in ways.items()
    ]
    kinds = [STYLES.get(method, "") for method in ways]
    costs = (_cost([mean for own in ways.values() for mean in own.get(s, ())]) for s in shares)
    rows.append(["bytes", *costs])
    head = ["heads by", *(f"{share_name(share)} %" for share in shares)]
    table = html_table("", head, rows, kinds=[*kinds, "sum"]) if ways else ""
    caption = f"Tasks: {', '.join(tasks)}. {' '.join(said)}"
    return card(f"{model}, {op}" if model else op, caption, table, wide=True, level=3)


def _cost(found: Sequence[Mean]) -> str:
    known = [mean.footprint for mean in found if mean.footprint is not None]
    return percent(sum(known) / len(known)) if known else "an unknown share"


def _glance_cell(found: Sequence[Mean], tasks: int) -> str:
    if not found:
        return ""
    mean = f"{100 * sum(m.value for m in found) / len(found):.1f}"
    if len(found) < tasks:
        return f"{mean} ({len(found)} of {tasks} tasks)"
    return mean if tasks == 1 else f"{mean} ({100 * min(m.value for m in found):.1f})"


def _curves(scores: Sequence[Score]) -> str:
    """One card per evaluation, model and task."""
    charts = _by_chart(scores)
    styles = styles_of([score.method for score in scores], fixed=STYLES)
    cards = []
    for op, model in sorted({key[:2] for key in charts}):
        ours = [_Chart.of(own) for key, own in sorted(charts.items()) if key[:2] == (op, model)]
        shares = [chart for chart in ours if chart.shares]
        if len(shares) > 1:
            found = overall([chart.means for chart in shares])
            lengths = sorted({length for chart in shares for length in chart.lengths})
            ours.insert(0, _Chart("All tasks", "mean score", found, lengths, shares=True))
        cards += [_curve_card(op, model, chart, styles) for chart in ours]
    text = (
        "Scores against measured bytes of the filled cache, relative to full attention in the same texts. Lines join a "
        "method's shares of retrieval heads; small circles are single draws or seeds, marks their mean."
    )
    return section("accuracy", "Accuracy against footprint", text, cards)


@dataclass(frozen=True)
class _Chart:
    """What one chart shows; `shares` if its values are fractions of what could be had."""

    task: str
    metric: str
    means: Sequence[Mean]
    lengths: Sequence[int]
    shares: bool
    falling: bool = False

    @classmethod
    def of(cls, own: Sequence[Score]) -> _Chart:
        lengths = sorted({score.length for score in own if score.length is not None})
        _, _, task, metric = own[0].chart
        shares = all(score.is_share for score in own)
        if metric not in METRICS:
            task = f"{task}: {metric.replace('_', ' ')}"
        return cls(task, metric, means(own), lengths, shares, own[0].falling)


def _curve_card(op: str, model: str, of: _Chart, styles: Mapping[str, str]) -> str:
    found, shares, lengths = of.means, of.shares, of.lengths
    title = f"{of.task}, {model}" if model else of.task
    name = of.metric.replace("_", " ") + (" (less is better)" if of.falling else "")
    curves = _drawn(found, styles)
    chart = note = ""
    if curves:
        level = next((mean.value for mean in found if mean.method == "full"), None)
        chart = curve_chart(
            curves,
            x=Axis("cache bytes, % of full attention", "%"),
            y=Axis(f"{name}, %", "%", top=1.0) if shares else Axis(name, zero=False),
            title=title,
            description=_said(found, shares),
            level=level,
        ) + legend(curves)
    else:
        note = " No full attention among these records, so bytes stand in the table only."
    note += unstyled([mean.method for mean in found], styles)
    if len({mean.cells for mean in found}) > 1:
        note += " Not every method was run on the same cells."
    at = " to ".join(short_count(n) for n in dict.fromkeys([*lengths[:1], *lengths[-1:]]))
    count = max(mean.weight for mean in found)
    most = f"; up to {count:,.0f} answers a point" if shares and count > 1 else ""
    caption = f"{op}{f', {at} tokens' if at else ''}{most}.{note}"
    return card(title, caption, chart + _table(found, name, shares), level=3)


def _drawn(found: Sequence[Mean], styles: Mapping[str, str]) -> list[Curve]:
    """A curve per method, over the share of full attention's bytes; without those there is nothing to draw."""
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    dots: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for mean in found:
        if mean.footprint is not None and mean.method in styles:
            points[mean.method].append((mean.footprint, mean.value))
            if len(mean.draws) > 1:
                dots[mean.method] += [(mean.footprint, value) for value in mean.draws.values()]
    return [
        Curve(plain_name(method), tuple(own), styles[method], tuple(dots[method]))
        for method, own in points.items()
    ]


def _table(found: Sequence[Mean], name: str, shares: bool) -> str:
    times = list(dict.fromkeys(time for mean in found for time in mean.times))
    rows = [
        [
            method_name(mean.method, mean.share),
            _written(mean.value, shares),
            f"{_written(min(mean.draws.values()), shares)} to {_written(max(mean.draws.values()), shares)}"
            if len(mean.draws) > 1
            else "",
            mib(round(mean.kv_bytes)),
            "" if mean.footprint is None else percent(mean.footprint),
            f"{mean.weight:,.0f}",
            *(f"{mean.times[time]:.4g}" if time in mean.times else "" for time in times),
        ]
        for mean in found
    ]
    head = ["method", name, "draws", "cache, mean", "of full", "answers", *map(_spoken, times)]
    return details_table("Means over lengths, depths and draws", head, rows)


def _spoken(name: str) -> str:
    name = {"ttft_ms": "time_to_first_token_ms", "tpot_ms": "time_per_token_ms"}.get(name, name)
    words, _, unit = name.rpartition("_")
    return f"{words.replace('_', ' ')}, {'s' if unit == 'seconds' else unit}"


def _said(found: Sequence[Mean], shares: bool) -> str:
    parts = [
        f"{method_name(m.method, m.share)}: {_written(m.value, shares)}"
        + ("" if m.footprint is None else f" at {percent(m.footprint)} of the bytes")
        for m in found
    ]
    return f"{'; '.join(parts)}. All values are in the table that follows."


def _written(value: float, shares: bool) -> str:
    return percent(value) if shares else f"{value:.4g}"


def _grids(scores: Sequence[Score]) -> list[str]:
    """One wide card per evaluation and model: a small grid per method over all tasks."""
    groups: dict[tuple[str, str], list[Score]] = defaultdict(list)
    for score in scores:
        if score.length is not None and score.depth is not None and score.is_share:
            groups[score.op, score.model].append(score)
    cards = []
    for (op, model), own in groups.items():
        lengths = sorted({s.length for s in own if s.length is not None})
        depths = sorted({s.depth for s in own if s.depth is not None})
        if len(lengths) * len(depths) < 4:
            continue
        tasks = list(dict.fromkeys(s.task for s in own))
        body = _maps(own, lengths, depths) + colour_key("0 %", "100 % right")
        ways = len({(s.method, s.share) for s in own})
        if len(tasks) > 1 and ways * len(tasks) * len(lengths) * len(depths) <= MOST_CELLS:
            for task in tasks:
                part = [s for s in own if s.task == task]
                body += f"<details><summary>{escape(task)} alone</summary>{_maps(part, lengths, depths)}</details>"
        named = tasks[0] if len(tasks) == 1 else f"mean over {', '.join(tasks)}"
        caption = f"{op}; {named}. Tokens of context across, depth down."
        cards.append(card(model or op, caption, body, wide=True, level=3))
    return cards


def _maps(own: Sequence[Score], lengths: Sequence[int], depths: Sequence[float]) -> str:
    ways: dict[tuple[str, float], list[Score]] = defaultdict(list)
    for score in own:
        ways[score.method, score.share].append(score)
    parts = []
    for found in ways.values():
        tasks = [
            [s for s in found if s.task == task] for task in dict.fromkeys(s.task for s in found)
        ]
        mean = overall([means(own_task) for own_task in tasks])[0]
        values = [[_cell(tasks, length, depth) for length in lengths] for depth in depths]
        name = method_name(mean.method, mean.share)
        lowest = min(v for row in values for v in row if v == v)
        chart = HeatMap(
            values=values,
            rows=[f"{100 * d:.0f} %" for d in depths],
            columns=[short_count(n) for n in lengths],
            x_label="context length, tokens",
            y_label="depth",
            title=name,
            description=f"{len(depths)} depths by {len(lengths)} lengths, mean {percent(mean.value)}, lowest cell "
            f"{percent(lowest)}.",
            cell="{:.0f}",
            percent=True,
        ).svg()
        parts.append(f"<div><h4>{escape(name)}</h4><p>mean {percent(mean.value)}</p>{chart}</div>")
    return f'<div class="many">{"".join(parts)}</div>'


def _cell(tasks: Sequence[Sequence[Score]], length: int, depth: float) -> float:
    """Mean over tasks, each counting the same; NaN for a cell that was not run."""
    cells = [[s for s in own if (s.length, s.depth) == (length, depth)] for own in tasks]
    values = [average(own) for own in cells if own]
    return sum(values) / len(values) if values else float("nan")

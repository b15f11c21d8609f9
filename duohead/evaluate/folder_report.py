"""The report of a folder: one HTML page of everything its records, patterns and logs say, to be opened or mailed.

Numbers gathered over weeks lie in many files; a page that shows all of them side by side, with what each was measured
on, is what people look at. `render(collection)` gives the page, and nothing it found is left out: what no picture knows
stands in a table. It needs no network and no script, as the demo's page, whose style it shares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape

from duohead.evaluate import ablations, footprint, gate_history, positions
from duohead.evaluate.collect import Collection, Entry
from duohead.evaluate.conditions import told_apart
from duohead.evaluate.curves import REFERENCE, Axis, Curve, curve_chart, legend, styles_of, unstyled
from duohead.evaluate.page import card, details_table, document, facts, section
from duohead.evaluate.scores import scored, scores_of
from duohead.evaluate.summaries import by_answers, by_task
from duohead.evaluate.svg import short_count

Sections = list[tuple[str, str, str]]
"""Of each section its name (for links), its title and its HTML."""


def render(
    collection: Collection,
    *,
    speed: Callable[[Sequence[Entry]], Sections] | None = None,
) -> str:
    """The whole page.

    Args:
        collection: what to draw.
        speed: makes sections of records of speed, which `evaluate` does not know; they stand in tables as well.
    """
    made = by_task(collection.entries)
    entries = told_apart(by_answers(made))
    parts: Sections = [
        *footprint.sections(scored(entries)),
        *positions.sections(entries),
        *gate_history.sections(collection.patterns, collection.logs, made),
        *(speed(collection.entries) if speed is not None else ()),
        *ablations.sections([entry for entry in entries if not scores_of(entry)]),
    ]
    body = "\n".join(html for _, _, html in parts)
    links = [*((name, title) for name, title, _ in parts), ("sources", "Sources")]
    return document(
        "duohead report",
        f"{_header(collection)}\n{_contents(links)}\n{body}\n{_sources(collection)}",
    )


def _header(collection: Collection) -> str:
    models = {str(e.shape["model"]) for e in collection.entries if e.shape.get("model")}
    models |= {p.base_model for p in collection.patterns.values() if p.base_model}
    times = sorted(entry.time for entry in collection.entries if entry.time)
    machines = {entry.machine for entry in collection.entries if entry.hardware}
    tiles = [
        ("Records", f"{len(collection.entries):,}", _files(collection)),
        ("Models", str(len(models)), _listed(sorted(models))),
        ("Patterns", str(len(collection.patterns)), "heads that were found"),
        ("Machines", str(len(machines)), _listed(sorted(machines))),
    ]
    body = "".join(
        f'<div><dt>{name}</dt><dd class="big">{value}</dd><dd class="soft">{escape(note)}</dd></div>'
        for name, value, note in tiles
        if value != "0"
    )
    days = list(dict.fromkeys(time[:10] for time in (times[:1] + times[-1:])))
    spans = " to ".join(f'<span class="whole">{escape(day)}</span>' for day in days)
    when = f" Measured {spans} (UTC)." if days else ""
    return (
        '<header>\n<p class="over">duohead report</p>\n<h1>What do the heads keep, and what is it worth?</h1>\n'
        "<p>Retrieval heads keep every token; streaming heads keep the first and the last ones. Everything on this "
        f'page comes from the records named at its end.{when}</p>\n<dl class="tiles">{body}</dl>\n</header>'
    )


def _files(collection: Collection) -> str:
    count = len(collection.files)
    older = (
        f", {collection.replaced:,} older or restated ones left out" if collection.replaced else ""
    )
    return f"in {count} file{'' if count == 1 else 's'}{older}"


def _listed(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _contents(links: Sequence[tuple[str, str]]) -> str:
    items = "".join(f'<li><a href="#{name}">{escape(title)}</a></li>' for name, title in links)
    return f'<nav aria-label="Contents"><ul>{items}</ul></nav>'


def _sources(collection: Collection) -> str:
    """Which file says what, on which machine, with which software."""
    rows = []
    for file in collection.files:
        own = [entry for entry in collection.entries if entry.file == file]
        log = collection.logs.get(file)
        kinds = "training log" if log else ", ".join(dict.fromkeys(e.op for e in own))
        rows.append(
            [
                file,
                f"{len(log) if log else len(own):,}",
                kinds,
                _listed(list(dict.fromkeys(e.machine for e in own if e.hardware))),
                _listed(list(dict.fromkeys((e.commit or "")[:12] for e in own if e.commit))),
            ]
        )
    head = ["file", "lines shown", "operations", "machine", "commit"]
    table = details_table("Files in the order they were read", head, rows)
    software: dict[str, dict[str, None]] = {}
    for entry in collection.entries:
        for name, version in entry.versions.items():
            if version:
                software.setdefault(name, {})[str(version)] = None
    told = {
        "records": f"{len(collection.entries):,} in {len(collection.files)} files",
        "operations": ", ".join(f"{op} ({n})" for op, n in sorted(collection.ops().items())),
        **{name: ", ".join(versions) for name, versions in software.items()},
    }
    caption = (
        "Of several records of the same thing the newest counts. What differs in dtype, text, chunk, machine or grid "
        "is not the same thing: it stands apart, with that in the name of its model."
    )
    body = facts({name: value for name, value in told.items() if value}) + table
    return section(
        "sources",
        "Sources",
        "What a number needs to be believed.",
        [card("Records", caption, body, wide=True, level=3)],
    )


def lines_card(
    *,
    title: str,
    caption: str,
    series: Mapping[str, Mapping[int, float]],
    x_label: str,
    y_label: str,
    unit: str,
    doubling: bool,
    missing: Sequence[str],
) -> str:
    """A card of measured lines, {name: {x: y}}; what could not be measured stands in the caption."""
    reference = next((name for name in ("full", "HF SDPA", "flex") if name in series), None)
    styles = styles_of(list(series), fixed={} if reference is None else {reference: REFERENCE})
    curves = [
        Curve(name, tuple((float(x), y) for x, y in sorted(points.items())), styles[name])
        for name, points in series.items()
        if points and name in styles
    ]
    told = (f" {'; '.join(missing)}." if missing else "") + unstyled(list(series), styles)
    ends = "; ".join(
        f"{c.name} {c.points[-1][1]:.4g} {unit} at {short_count(int(c.points[-1][0]))}"
        for c in curves
    )
    chart = curve_chart(
        curves,
        x=Axis(x_label, "tokens", doubling=doubling),
        y=Axis(y_label),
        title=title,
        description=f"{ends}. All values are in the table that follows.",
    )
    marks = sorted({x for points in series.values() for x in points})
    rows = [
        [name, *(f"{points[x]:.4g}" if x in points else "" for x in marks)]
        for name, points in series.items()
    ]
    table = details_table(f"{title}, {unit}", [x_label, *(short_count(x) for x in marks)], rows)
    return card(title, caption + told, chart + legend(curves) + table, level=3)

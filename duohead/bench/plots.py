"""Benchmark records as pictures: PNG files with matplotlib, and one HTML page in the style of the demo's report.

The page needs nothing but itself; PNGs need the extra `report`. Both come from `duohead.bench.figures`, so they show
the same points. Run `duohead bench report results/model-h100.jsonl --out bench.html --png pictures`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from duohead.bench.figures import Figure, Record, figures, machine, stored_as
from duohead.evaluate.charts import line_chart
from duohead.evaluate.page import card, details_table, document, html_table
from duohead.evaluate.plots import require_matplotlib
from duohead.evaluate.svg import short_count
from duohead.files import replacing, write_text
from duohead.record import read_records

COLOURS = ("#5a6066", "#0b5c9e", "#3a86b8", "#b8500a", "#2f7d4f", "#7a4fa0")
# Line styles of the page's charts.
PAGE_LINES = 4
# What a shape usually is; the table tells what differs.
USUAL = {
    "heads": 32,
    "kv_heads": 8,
    "head_dim": 128,
    "batch": 1,
    "sink": 64,
    "recent": 256,
    "queries": 1,
    "past": 0,
    "chunk": None,
    "weights": "bf16",
}


def write_page(path: str | os.PathLike[str], files: Sequence[str | os.PathLike[str]]) -> None:
    """Write one HTML page of every picture and number in the records of ``files``.

    Raises:
        ValueError: no records, or a malformed file.
    """
    records = _read(files)
    cards = [_card(figure) for figure in figures(records)]
    grid = "\n".join([*cards, _table(records), _provenance(records)])
    gpu = machine(records[-1])
    header = (
        '<header><p class="over">duohead bench</p><h1>Speed and memory, measured</h1>'
        f"<p>{escape(gpu)}. Every result was held against a reference in the process that timed it.</p></header>"
    )
    write_text(
        path, document("duohead: benchmarks", f'{header}\n<div class="grid">\n{grid}\n</div>')
    )


def draw(folder: str | os.PathLike[str], files: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Draw every picture of the records of ``files`` as a PNG into ``folder``; the paths written.

    Raises:
        ValueError: matplotlib is missing, no records, or nothing to draw.
    """
    require_matplotlib()
    found = figures(_read(files))
    if not found:
        raise ValueError(
            f"{', '.join(map(str, files))}: no two points of one line; measure at several lengths, chunks or ratios"
        )
    written = []
    for figure in found:
        path = Path(folder) / f"{figure.name}.png"
        _png(figure, path)
        written.append(path)
    return written


def _read(files: Sequence[str | os.PathLike[str]]) -> list[Record]:
    records: list[Record] = [entry for path in files for entry in read_records(path)]
    if not records:
        raise ValueError(f"{', '.join(map(str, files))}: no records; make some with --json")
    return records


def _png(picture: Figure, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.add_subplot()
    for index, (name, points) in enumerate(picture.series.items()):
        places = sorted(points)
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(places, [points[x] for x in places], marker="o", label=name, color=colour)
    marks = sorted({x for points in picture.series.values() for x in points})
    if picture.doubling:
        axes.set_xscale("log", base=2)
        if picture.unit != "x":
            axes.set_yscale("log")
    if not picture.doubling or picture.unit == "x":
        axes.set_ylim(bottom=0)
    axes.set_xticks(marks, [short_count(x) for x in marks], rotation=0 if len(marks) < 7 else 45)
    axes.minorticks_off()
    axes.set(title=picture.title, xlabel=picture.x_label, ylabel=picture.y_label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    if picture.missing:
        canvas.supxlabel("; ".join(picture.missing), fontsize="x-small", wrap=True)
    with replacing(path) as temporary:
        canvas.savefig(temporary, dpi=150)


def _card(picture: Figure) -> str:
    lines = dict(list(picture.series.items())[:PAGE_LINES])
    told = f" {'; '.join(picture.missing)}." if picture.missing else ""
    chart = line_chart(
        lines,
        title=picture.title,
        description=picture.caption,
        x_label=picture.x_label,
        y_label=picture.y_label,
        unit=picture.unit,
    )
    marks = sorted({x for points in picture.series.values() for x in points})
    rows = [
        [name, *(f"{points[x]:.4g}" if x in points else "" for x in marks)]
        for name, points in picture.series.items()
    ]
    head = [picture.x_label, *(short_count(x) for x in marks)]
    table = details_table(f"{picture.title}, {picture.unit}", head, rows)
    return card(picture.title, picture.caption + told, chart + table)


def _table(records: Sequence[Record]) -> str:
    rows = [
        [
            f"{entry['op']} {entry['impl']}",
            str(entry["shape"].get("model", "")),
            f"{entry['shape'].get('length', 0):,}",
            _share(entry["shape"].get("retrieval_ratio")),
            _special(entry["shape"]),
            _time(entry),
        ]
        for entry in records
    ]
    head = ["operation", "model", "tokens", "retrieval heads", "special", "median"]
    return card("All records", "In the order of the files.", html_table("", head, rows), wide=True)


def _special(shape: Mapping[str, Any]) -> str:
    words = [f"{k} {shape[k]}" for k, usual in USUAL.items() if k in shape and shape[k] != usual]
    stored = stored_as(shape)
    return ", ".join([*words, stored] if stored != "bf16" else words)


def _time(entry: Record) -> str:
    numbers = entry["numbers"]
    name = entry["op"].rpartition(".")[2]
    value = numbers.get(f"{name}_median_ms", numbers.get("decode_median_ms"))
    if value is None and "streaming_share" in numbers:
        share = numbers["streaming_share"]
        return share if isinstance(share, str) else f"{100 * share:.1f} %"
    if value is None or isinstance(value, str):
        return str(value or "")
    return f"{value:.4g} ms" if value < 1000 else f"{value / 1000:.2f} s"


def _share(ratio: Any) -> str:
    return "" if ratio is None else f"{100 * ratio:g} %"


def _provenance(records: Sequence[Record]) -> str:
    last = records[-1]
    versions: Mapping[str, Any] = last["versions"]
    facts = {
        "machine": machine(last),
        "software": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "commit": str(last["commit"] or "not recorded"),
        "time": f"{records[0]['time']} to {last['time']}",
    }
    for name in ("read_ceiling_gb_per_s", "matmul_ceiling_tflop_per_s"):
        if name in last["numbers"]:
            facts[name.replace("_per_", "/").replace("_", " ")] = f"{last['numbers'][name]:.0f}"
    shown = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    return card(
        "How it was measured",
        "Machine, software and what the machine was measured to do at most.",
        f'<dl class="facts">{shown}</dl>',
        wide=True,
    )

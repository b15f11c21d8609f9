"""`duohead report`: one HTML page of all records, patterns and logs in the folders named.

Evaluations, benchmarks and identification write their records at different times; this puts them on one page that needs
nothing else. Run `duohead report results runs/llama --out report.html`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from duohead.evaluate.collect import Entry
    from duohead.evaluate.folder_report import Sections

FLAGS = ("--out",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb (flags are listed in FLAGS)."""
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="FOLDER",
        help="folders to search for *.jsonl and patterns, or files",
    )
    parser.add_argument(
        "--out", default="report.html", metavar="FILE", help="the page (%(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Gather, draw, write."""
    from duohead.evaluate.collect import collect
    from duohead.evaluate.folder_report import render
    from duohead.files import check_writable, write_text

    check_writable(args.out)
    collection = collect(args.paths)
    write_text(args.out, render(collection, speed=_speed))
    print(
        f"{len(collection.entries):,} records in {len(collection.files)} files, {len(collection.patterns)} patterns, "
        f"{len(collection.logs)} training logs"
    )
    print(f"wrote {Path(args.out).resolve()}")
    return 0


def _speed(entries: Sequence[Entry]) -> Sections:
    """The pictures of `duohead bench report`, as a section."""
    from duohead.bench.figures import figures
    from duohead.evaluate.folder_report import lines_card
    from duohead.evaluate.page import section

    whole = [entry.raw() for entry in entries if entry.hardware]
    cards = [
        lines_card(
            title=figure.title,
            caption=figure.caption,
            series=figure.series,
            x_label=figure.x_label,
            y_label=figure.y_label,
            unit=figure.unit,
            doubling=figure.doubling,
            missing=figure.missing,
        )
        for figure in figures(whole)
    ]
    if not cards:
        return []
    text = "Every speed was held against a reference in the process that timed it. All records are in tables below."
    return [("speed", "Speed and memory", section("speed", "Speed and memory", text, cards))]

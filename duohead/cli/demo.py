"""`duohead demo`: find the retrieval heads of a small real model here and now, and write a report of what they do.

It is the shortest way from a fresh clone to seeing the idea work, so it needs no download, no GPU and no argument. Run
`duohead demo`, or `duohead demo --text book.txt --out report.html --json figures.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path

from duohead.cli.common import MODELS

FLAGS = ("--text", "--out", "--json", "--model", "--seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this verb (listed in FLAGS)."""
    parser.add_argument(
        "--text",
        nargs="+",
        default=[],
        metavar="FILE",
        help="prose to hide needles in: plain, .gz or .xz (the documentation inside CPython)",
    )
    parser.add_argument(
        "--out", default="report.html", metavar="FILE", help="the report (%(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the main figures as JSON")
    parser.add_argument(
        "--model",
        default="pocket",
        metavar="MODEL",
        help=f"{MODELS} (%(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of everything random (%(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo, write the report and print the main table."""
    started = time.perf_counter()
    # Threads that spin while they wait starve each other on a machine with anything else to do; torch reads this once.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from duohead.files import check_writable, write_text
    from duohead.identify import haystack
    from duohead.pocket import NAMES
    from duohead.pocket.loading import load_model

    outputs = [path for path in (args.out, args.json) if path is not None]
    for path in outputs:
        check_writable(path)
    if len({Path(path).absolute() for path in outputs}) < len(outputs):
        raise ValueError(f"--out and --json must be different files, got {args.out!r} for both")
    text = haystack.read_text(args.text) if args.text else haystack.default_text()
    print(f"loading {args.model}", file=sys.stderr)
    model, tokenizer = load_model(args.model, device="cpu" if args.model in NAMES else None)

    from duohead.evaluate.demo import run_demo
    from duohead.evaluate.report import write_report
    from duohead.evaluate.tables import HEAD, summary, text_table

    report = run_demo(
        model,
        tokenizer,
        text,
        name=args.model,
        seed=args.seed,
        provenance={
            "command": shlex.join(["duohead", *sys.argv[1:]]),
            "text": ", ".join(args.text) or "documentation inside CPython (pydoc_data.topics)",
        },
        started=started,
        progress=True,
    )
    write_report(args.out, report)
    if args.json is not None:
        write_text(args.json, json.dumps(report.figures, indent=1) + "\n")
    print(text_table(HEAD, summary(report.methods, report.accuracy)))
    print(f"\n{report.figures['seconds']:.0f} s in all; report: {Path(args.out).resolve()}")
    return 0

"""`python -m tools.findings QUESTION...`: run experiments on a pocket model and append their records."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from tools.findings.lab import SMALL, Effort, Lab
from tools.findings.questions import QUESTIONS

# Flags that not every question takes.
TAKEN_BY = {
    "--ratios": {"errors", "extras", "gates", "precision"},
    "--part": {"gates", "precision", "steps"},
}


def main() -> int:
    """Answer the questions asked for, one after the other."""
    parser = argparse.ArgumentParser(prog="python -m tools.findings", description=__doc__)
    parser.add_argument("questions", nargs="+", choices=[*QUESTIONS, "all"], metavar="QUESTION")
    parser.add_argument("--model", default="pocket", help="a bundled model, a folder, a hub id")
    parser.add_argument("--pattern", metavar="FOLDER", help="of a model that is not bundled")
    parser.add_argument(
        "--held-out", nargs="+", required=True, metavar="FILE", help="text to score on"
    )
    parser.add_argument("--json", required=True, metavar="FILE", help="records are appended here")
    parser.add_argument("--device", help="cpu, cuda (default: cuda if there is one)")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16 (default: float32)")
    parser.add_argument(
        "--ratios", type=float, nargs="+", metavar="R", help="errors, extras, gates, precision"
    )
    parser.add_argument(
        "--part", default="1/1", metavar="K/N", help="gates, precision, steps: only the K-th of N"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--small", action="store_true", help="a rehearsal that means nothing")
    effort = parser.add_argument_group("effort")
    effort.add_argument("--lengths", type=int, nargs="+", metavar="N", help="of needles (4096)")
    effort.add_argument("--samples", type=int, metavar="N", help="for each task and depth (10)")
    effort.add_argument("--batch", type=int, metavar="N", help="samples in one forward (25)")
    effort.add_argument("--prose", type=int, nargs="+", metavar="N", help="lengths of prose")
    effort.add_argument("--windows", type=int, metavar="N", help="texts of each length (8)")
    effort.add_argument("--tuning-tokens", type=int, metavar="N", help="of fine-tuning (2 M)")
    effort.add_argument("--rate", type=float, metavar="X", help="its learning rate's peak (3e-4)")
    args = parser.parse_args()
    names = list(QUESTIONS) if "all" in args.questions else args.questions
    part = _part(parser, args.part)
    for flag, asked_for in (("--ratios", args.ratios is not None), ("--part", part != (1, 1))):
        if asked_for and not set(names) <= TAKEN_BY[flag]:
            parser.error(f"{flag} is for {' and '.join(sorted(TAKEN_BY[flag]))} only")
    spent = ("lengths", "samples", "batch", "prose", "windows", "tuning_tokens", "rate")
    asked = {name: getattr(args, name) for name in spent if getattr(args, name) is not None}
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in asked.items()}
    lab = Lab.open(
        args.model,
        out=Path(args.json),
        held_out=args.held_out,
        device=args.device,
        dtype=args.dtype,
        effort=replace(SMALL if args.small else Effort(), **given),
        seeds=(0,) if args.small else tuple(args.seeds),
        pattern=args.pattern,
        part=part,
        ratios=tuple(args.ratios or ()),
    )
    for name in names:
        print(f"{args.model}: {name}", file=sys.stderr, flush=True)
        QUESTIONS[name](lab)
    return 0


def _part(parser: argparse.ArgumentParser, given: str) -> tuple[int, int]:
    """ "2/4" as (2, 4)."""
    part, _, parts = given.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        parser.error(f"--part must be K/N with K from 1 to N, got {given!r}")
    return int(part), int(parts)


if __name__ == "__main__":
    sys.exit(main())

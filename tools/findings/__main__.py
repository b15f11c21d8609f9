"""`python -m tools.findings QUESTION...`: run experiments on a pocket model and append their records."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tools.findings.lab import SMALL, Effort, Lab
from tools.findings.questions import QUESTIONS


def main() -> int:
    """Answer the questions asked for, one after the other."""
    parser = argparse.ArgumentParser(prog="python -m tools.findings", description=__doc__)
    parser.add_argument("questions", nargs="+", choices=[*QUESTIONS, "all"], metavar="QUESTION")
    parser.add_argument("--model", default="pocket", help="pocket or pocket-mha")
    parser.add_argument(
        "--held-out", nargs="+", required=True, metavar="FILE", help="text to score on"
    )
    parser.add_argument("--json", required=True, metavar="FILE", help="records are appended here")
    parser.add_argument("--device", help="cpu, cuda (default: cuda if there is one)")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16 (default: float32)")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="N", help="tokens (4096)")
    parser.add_argument("--samples", type=int, metavar="N", help="for each task and depth (10)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--small", action="store_true", help="a rehearsal that means nothing")
    args = parser.parse_args()
    chosen = {"lengths": args.lengths and tuple(args.lengths), "samples": args.samples}
    given = {name: value for name, value in chosen.items() if value}
    lab = Lab.open(
        args.model,
        out=Path(args.json),
        held_out=args.held_out,
        device=args.device,
        dtype=args.dtype,
        effort=SMALL if args.small else Effort(**given),
        seeds=(0,) if args.small else tuple(args.seeds),
    )
    names = list(QUESTIONS) if "all" in args.questions else args.questions
    for name in names:
        print(f"{args.model}: {name}", file=sys.stderr, flush=True)
        QUESTIONS[name](lab)
    return 0


if __name__ == "__main__":
    sys.exit(main())

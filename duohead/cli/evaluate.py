"""`duohead evaluate needle`: what a pattern's heads are worth, against full attention, random heads and streaming.

One command gives the table for a reader, the records for a machine and the picture for a slide, all from one run. Run
`duohead evaluate needle --model pocket --pattern FOLDER --lengths 2048 4096 --json needle.jsonl --png needle.png`.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from duohead.evaluate.results import NeedleResult
    from duohead.policy import HeadPolicy

FLAGS = (
    "--model",
    "--pattern",
    "--retrieval-ratio",
    "--sink",
    "--recent",
    "--random-draws",
    "--tasks",
    "--lengths",
    "--depths",
    "--samples",
    "--text",
    "--chunk",
    "--json",
    "--png",
    "--seed",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this verb (listed in FLAGS)."""
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    text = "exact match over context lengths and needle depths"
    needle = kinds.add_parser("needle", help=text, description=text, allow_abbrev=False)
    add = needle.add_argument
    add("--model", required=True, metavar="MODEL", help="pocket, pocket-mha, a folder or a hub id")
    add("--pattern", required=True, metavar="FOLDER", help="folder or hub id of its pattern")
    add(
        "--retrieval-ratio",
        type=float,
        nargs="+",
        default=[0.5, 0.25],
        metavar="R",
        help="shares of heads that keep all (0.5 0.25)",
    )
    add(
        "--sink", type=int, metavar="N", help="first tokens kept by streaming heads (pattern's own)"
    )
    add(
        "--recent",
        type=int,
        metavar="N",
        help="last tokens kept by streaming heads (pattern's own)",
    )
    add(
        "--random-draws",
        type=int,
        default=3,
        metavar="N",
        help="random choices per ratio (%(default)s)",
    )
    add("--tasks", nargs="+", default=["needle"], metavar="TASK", help="needle formats (needle)")
    add(
        "--lengths",
        type=int,
        nargs="+",
        default=[2048, 4096],
        metavar="N",
        help="tokens (2048 4096)",
    )
    add("--depths", type=int, default=5, metavar="N", help="evenly spaced depths (%(default)s)")
    add("--samples", type=int, default=4, metavar="N", help="per length and depth (%(default)s)")
    add(
        "--text",
        nargs="+",
        default=[],
        metavar="FILE",
        help="haystack (the documentation inside CPython)",
    )
    add("--chunk", type=int, metavar="N", help="run contexts in pieces of N tokens, to save memory")
    add("--json", metavar="FILE", help="write records, one JSON line per method and cell")
    add("--png", metavar="FILE", help="write a heat map per method")
    add("--seed", type=int, default=0, metavar="N", help="of everything random (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the table, write what was asked for."""
    _check(args)
    from duohead.evaluate.methods import comparison
    from duohead.evaluate.needle import check_positions
    from duohead.evaluate.tables import HEAD, label, summary, text_table
    from duohead.identify import haystack
    from duohead.pattern import HeadPattern
    from duohead.pocket.loading import load_model

    pattern = HeadPattern.load(args.pattern)
    methods = comparison(
        pattern,
        ratios=args.retrieval_ratio,
        draws=args.random_draws,
        seed=args.seed,
        sink=args.sink,
        recent=args.recent,
    )
    text = haystack.read_text(args.text) if args.text else haystack.default_text()
    model, tokenizer = load_model(args.model)
    pattern.validate(model)
    check_positions(model, max(args.lengths))
    text_ids = haystack.tokens(text, tokenizer, at_least=max(args.lengths))
    result = _evaluate(
        args, model, tokenizer, text_ids, {name: m.policy for name, m in methods.items()}
    )
    if args.json is not None:
        result.write(args.json, model=args.model, dtype=model.dtype)
    if args.png is not None:
        from duohead.evaluate.plots import draw_needles

        draw_needles(result, {name: label(method) for name, method in methods.items()}, args.png)
    for task in args.tasks:
        print(
            f"{task}, version {result.select(task=task).rows[0].task_version}; cache at {max(args.lengths):,} tokens"
        )
        print(text_table(HEAD, summary(methods, result.select(task=task))))
        print()
    for path in (args.json, args.png):
        if path is not None:
            print(f"wrote {path}")
    return 0


def _check(args: argparse.Namespace) -> None:
    from duohead.evaluate.plots import require_matplotlib
    from duohead.evaluate.tasks import TASKS
    from duohead.files import check_writable

    limits = [
        ("--depths", args.depths, 1),
        ("--samples", args.samples, 1),
        ("--random-draws", args.random_draws, 0),
    ]
    limits += [("--lengths", length, 1) for length in args.lengths]
    if args.chunk is not None:
        limits.append(("--chunk", args.chunk, 1))
    for flag, value, lowest in limits:
        if value < lowest:
            raise ValueError(f"{flag} must be at least {lowest}, got {value}")
    if unknown := [task for task in args.tasks if task not in TASKS]:
        raise ValueError(f"--tasks must be among {', '.join(TASKS)}, got {', '.join(unknown)}")
    if args.json is not None:
        check_writable(args.json)
    if args.png is not None:
        check_writable(args.png, suffix=".png")
        require_matplotlib()


def _evaluate(
    args: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text_ids: torch.Tensor,
    policies: Mapping[str, HeadPolicy | None],
) -> NeedleResult:
    from duohead.evaluate.needle import evaluate_needle
    from duohead.evaluate.progress import bar

    depths = [0.5] if args.depths == 1 else [i / (args.depths - 1) for i in range(args.depths)]
    total = len(policies) * len(args.tasks) * len(args.lengths) * len(depths) * args.samples
    with bar("needle", total, shown=True) as advance:
        return evaluate_needle(
            model,
            tokenizer,
            text_ids,
            policies=policies,
            tasks=args.tasks,
            lengths=args.lengths,
            depths=depths,
            samples=args.samples,
            seed=args.seed,
            chunk=args.chunk,
            progress=advance,
        )

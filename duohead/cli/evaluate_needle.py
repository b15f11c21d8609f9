"""`duohead evaluate needle`: what a pattern's heads are worth, against full attention, random heads and streaming.

One command gives the table for a reader, the records for a machine and the picture for a slide, all from one run. Run
`duohead evaluate needle --model pocket --pattern pocket --lengths 2048 4096 --json needle.jsonl --png needle.png`.
"""

from __future__ import annotations

import argparse
import textwrap
from typing import TYPE_CHECKING, Any

from duohead.cli.common import (
    MODEL_FLAGS,
    MODELS,
    STORAGE_FLAGS,
    WINDOW_FLAGS,
    add_model_flags,
    add_sample_flags,
    add_storage_flags,
    add_window_flags,
    at_least,
    load_pattern,
    needle_depths,
    read_haystack,
    storage_fields,
    window,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from duohead.evaluate.methods import Method
    from duohead.evaluate.results import NeedleResult
    from duohead.pattern import HeadPattern

POLICY_FLAGS = (
    "--model",
    "--pattern",
    "--retrieval-ratio",
    *WINDOW_FLAGS,
    "--windows",
    "--random-draws",
    *STORAGE_FLAGS,
)
TITLE = 30  # letters in a line over a panel
FLAGS = (
    *POLICY_FLAGS,
    *MODEL_FLAGS,
    "--tasks",
    "--grid",
    "--lengths",
    "--depths",
    "--samples",
    "--text",
    "--chunk",
    "--batch",
    "--speed-tokens",
    "--json",
    "--png",
    "--seed",
)


def add_arguments(kinds: Any) -> None:
    """Add the kind `needle` and its flags (listed in FLAGS) to the subparsers of `duohead evaluate`."""
    text = "exact match over context lengths and needle depths"
    parser = kinds.add_parser("needle", help=text, description=text, allow_abbrev=False)
    add_policy_flags(parser, draws=3)
    add_model_flags(parser)
    _add_samples(parser)
    add = parser.add_argument
    add(
        "--speed-tokens",
        type=int,
        default=16,
        metavar="N",
        help="tokens to generate for the times, 0 to take none (%(default)s)",
    )
    add("--json", metavar="FILE", help="write records, one JSON line per method and cell")
    add("--png", metavar="FILE", help="write a heat map per method")
    add("--seed", type=int, default=0, metavar="N", help="of everything random (%(default)s)")


def add_policy_flags(parser: argparse.ArgumentParser, *, draws: int) -> None:
    """Add the flags that say which methods are compared (POLICY_FLAGS)."""
    add = parser.add_argument
    add("--model", required=True, metavar="MODEL", help=MODELS)
    add(
        "--pattern",
        required=True,
        metavar="FOLDER",
        help="folder or hub id of its pattern; a bundled model names its own",
    )
    add(
        "--retrieval-ratio",
        type=float,
        nargs="+",
        default=[0.5, 0.25],
        metavar="R",
        help="shares of heads that keep all (0.5 0.25)",
    )
    add_window_flags(parser)
    add(
        "--windows",
        type=window,
        nargs="+",
        default=[],
        metavar="S+R",
        help="sinks and recent tokens to try as well, such as 16+64 320+1 0+320",
    )
    add(
        "--random-draws",
        type=int,
        default=draws,
        metavar="N",
        help="random choices per ratio (%(default)s)",
    )
    add_storage_flags(parser)


def _add_samples(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--tasks",
        nargs="+",
        default=["needle"],
        metavar="TASK",
        help="needle formats, or all (needle)",
    )
    add(
        "--grid",
        choices=("paper",),
        help="the paper's 13 lengths up to the longest of --lengths, and 10 depths",
    )
    add_sample_flags(parser, depths=5)
    add(
        "--text",
        nargs="+",
        default=[],
        metavar="FILE",
        help="haystack (the documentation inside CPython)",
    )


def methods_of(args: argparse.Namespace, pattern: HeadPattern) -> Mapping[str, Method]:
    """The methods that the policy flags ask for."""
    from duohead.evaluate.methods import comparison

    return comparison(
        pattern,
        ratios=args.retrieval_ratio,
        draws=args.random_draws,
        seed=args.seed,
        sink=args.sink,
        recent=args.recent,
        prefill_recent=args.prefill_recent,
        windows=args.windows,
        **storage_fields(args),
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the table, write what was asked for."""
    tasks = _check(args)
    from duohead.evaluate.needle import check_positions
    from duohead.evaluate.tables import label
    from duohead.identify import haystack
    from duohead.pocket.loading import load_model

    pattern = load_pattern(args.pattern)
    methods = methods_of(args, pattern)
    name, texts = read_haystack(args.text)
    model, tokenizer = load_model(args.model, dtype=args.dtype, device=args.device)
    pattern.validate(model)
    check_positions(model, max(args.lengths))
    text_ids = haystack.tokens(texts, tokenizer, at_least=max(args.lengths))
    result = _evaluate(args, model, tokenizer, text_ids, methods, tasks, name)
    if args.png is not None:
        from duohead.evaluate.plots import draw_needles

        titles = {name: textwrap.fill(label(way), TITLE) for name, way in methods.items()}
        draw_needles(result, titles, args.png)
    _print(tasks, methods, result)
    for path in (args.json, args.png):
        if path is not None:
            print(f"wrote {path}")
    return 0


def _check(args: argparse.Namespace) -> list[str]:
    """The tasks asked for, once nothing is wrong with the flags."""
    from duohead.evaluate.plots import require_matplotlib
    from duohead.evaluate.tasks import TASKS
    from duohead.files import check_writable

    needle_depths(args.depths)
    at_least(
        [
            ("--samples", args.samples, 1),
            ("--random-draws", args.random_draws, 0),
            *(("--lengths", length, 1) for length in args.lengths),
            ("--chunk", args.chunk, 1),
            ("--batch", args.batch, 1),
        ]
    )
    if args.speed_tokens != 0 and args.speed_tokens < 2:
        raise ValueError(f"--speed-tokens must be 0, or 2 and more, got {args.speed_tokens}")
    unknown = [task for task in args.tasks if task not in TASKS]
    if unknown and args.tasks != ["all"]:
        raise ValueError(f"--tasks must be among {', '.join(TASKS)}, all, got {', '.join(unknown)}")
    if args.json is not None:
        check_writable(args.json)
    if args.png is not None:
        check_writable(args.png, suffix=".png")
        require_matplotlib()
    return list(TASKS) if unknown else list(dict.fromkeys(args.tasks))


def _evaluate(
    args: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text_ids: torch.Tensor,
    methods: Mapping[str, Method],
    tasks: list[str],
    text: str,
) -> NeedleResult:
    from duohead.evaluate.needle import evaluate_needle, paper_grid
    from duohead.evaluate.progress import bar
    from duohead.evaluate.recording import recording
    from duohead.evaluate.results import needle_recorder

    depths = needle_depths(args.depths)
    lengths = list(dict.fromkeys(args.lengths))
    if args.grid == "paper":
        lengths, depths = paper_grid(max(args.lengths))
    total = len(methods) * len(tasks) * len(lengths) * len(depths) * args.samples
    with (
        recording(args.json, needle_recorder(model=args.model, dtype=model.dtype)) as keep,
        bar("needle", total, shown=True) as advance,
    ):
        return evaluate_needle(
            model,
            tokenizer,
            text_ids,
            policies={name: method.policy for name, method in methods.items()},
            tasks=tasks,
            lengths=lengths,
            depths=depths,
            samples=args.samples,
            seed=args.seed,
            chunk=args.chunk,
            batch=args.batch,
            speed_tokens=args.speed_tokens or None,
            text=text,
            progress=advance,
            on_row=keep,
        )


def _print(tasks: list[str], methods: Mapping[str, Method], result: NeedleResult) -> None:
    from duohead.evaluate.tables import HEAD, TIMES, summary, text_table, times

    for task in tasks:
        own = result.select(task=task)
        print(
            f"{task}, version {own.rows[0].task_version}; cache and times at {own.lengths[-1]:,} tokens"
        )
        rows = [
            [*row, *timed]
            for row, timed in zip(summary(methods, own), times(methods, own), strict=True)
        ]
        print(text_table((*HEAD, *TIMES), rows))
        print()

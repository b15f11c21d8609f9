"""`duohead evaluate prose`: perplexity and divergence from the full model on held-out text, by position.

Needle scores say nothing of the words in between; this does, for the same methods. Run
`duohead evaluate prose --model pocket --pattern pocket --lengths 4096 --text book.txt --json prose.jsonl`.
"""

from __future__ import annotations

import argparse
from typing import Any

from duohead.cli.common import (
    MODEL_FLAGS,
    add_model_flags,
    at_least,
    load_pattern,
    read_haystack,
)
from duohead.cli.evaluate_needle import POLICY_FLAGS, add_policy_flags, methods_of

FLAGS = (
    *POLICY_FLAGS,
    *MODEL_FLAGS,
    "--lengths",
    "--samples",
    "--bins",
    "--text",
    "--chunk",
    "--json",
    "--png",
    "--seed",
)


def add_arguments(kinds: Any) -> None:
    """Add the kind `prose` and its flags (listed in FLAGS) to the subparsers of `duohead evaluate`."""
    text = "perplexity and divergence from the full model, by position"
    parser = kinds.add_parser("prose", help=text, description=text, allow_abbrev=False)
    add_policy_flags(parser, draws=1)
    add_model_flags(parser)
    add = parser.add_argument
    add("--lengths", type=int, nargs="+", default=[4096], metavar="N", help="tokens (4096)")
    add("--samples", type=int, default=8, metavar="N", help="windows per length (%(default)s)")
    add("--bins", type=int, default=16, metavar="N", help="parts of the context (%(default)s)")
    add(
        "--text",
        nargs="+",
        default=[],
        metavar="FILE",
        help="prose that the model has not seen (the documentation inside CPython)",
    )
    add("--chunk", type=int, default=512, metavar="N", help="tokens per forward (%(default)s)")
    add("--json", metavar="FILE", help="write records, one JSON line per method and length")
    add("--png", metavar="FILE", help="draw divergence and perplexity against position")
    add("--seed", type=int, default=0, metavar="N", help="of random heads (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the table, write what was asked for."""
    _check(args)
    lengths = list(dict.fromkeys(args.lengths))
    from duohead.evaluate.needle import check_positions
    from duohead.evaluate.progress import bar
    from duohead.evaluate.prose import evaluate_prose
    from duohead.evaluate.prose_results import prose_recorder
    from duohead.evaluate.recording import recording
    from duohead.evaluate.tables import PROSE_HEAD, prose_rows, text_table
    from duohead.identify import haystack
    from duohead.pocket.loading import load_model

    pattern = load_pattern(args.pattern)
    methods = methods_of(args, pattern)
    name, texts = read_haystack(args.text)
    model, tokenizer = load_model(args.model, dtype=args.dtype, device=args.device)
    pattern.validate(model)
    check_positions(model, max(args.lengths))
    text_ids = haystack.tokens(texts, tokenizer, at_least=max(args.lengths))
    total = len(methods) * len(lengths) * args.samples
    with (
        recording(args.json, prose_recorder(model=args.model, dtype=model.dtype)) as keep,
        bar("prose", total, shown=True) as advance,
    ):
        result = evaluate_prose(
            model,
            tokenizer,
            text_ids,
            policies={name: method.policy for name, method in methods.items()},
            lengths=lengths,
            windows=args.samples,
            bins=args.bins,
            chunk=args.chunk,
            text=name,
            progress=advance,
            on_row=keep,
        )
    if args.png is not None:
        from duohead.evaluate.plots import draw_prose
        from duohead.evaluate.tables import label

        draw_prose(result, {name: label(method) for name, method in methods.items()}, args.png)
    for length in lengths:
        print(f"{name}, {length:,} tokens of context, {args.samples} windows")
        print(text_table(PROSE_HEAD, prose_rows(methods, result, length)))
        print()
    for path in (args.json, args.png):
        if path is not None:
            print(f"wrote {path}")
    return 0


def _check(args: argparse.Namespace) -> None:
    from duohead.evaluate.plots import require_matplotlib
    from duohead.files import check_writable

    at_least(
        [
            ("--samples", args.samples, 1),
            ("--bins", args.bins, 1),
            ("--chunk", args.chunk, 1),
            ("--random-draws", args.random_draws, 0),
            *(("--lengths", length, args.bins + 1) for length in args.lengths),
        ]
    )
    if args.json is not None:
        check_writable(args.json)
    if args.png is not None:
        check_writable(args.png, suffix=".png")
        require_matplotlib()

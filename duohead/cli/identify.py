"""`duohead identify MODEL --text FILE... --out FOLDER`: find the retrieval heads of a model, and write its pattern.

Every constant of the training is a flag with the paper's value as default, made from the fields of `IdentifyOptions`,
and the run continues where it stopped when the same command is given again. Run `duohead identify pocket --out heads`.
"""

from __future__ import annotations

import argparse
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

FLAGS = (
    "--text",
    "--out",
    "--restart",
    "--dtype",
    "--device",
    "--revision",
    "--steps",
    "--learning-rate",
    "--learning-rate-floor",
    "--warmup",
    "--reg-weight",
    "--initial",
    "--sink",
    "--recent",
    "--context-min",
    "--context-max",
    "--context-lengths",
    "--num-passkeys",
    "--passkey-words",
    "--depth-min",
    "--depth-max",
    "--depth-steps",
    "--teacher-full",
    "--gradient-checkpointing",
    "--save-every",
    "--seed",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this verb (listed in FLAGS)."""
    from duohead import pocket
    from duohead.identify import IdentifyOptions
    from duohead.pocket.loading import DTYPES

    names = ", ".join(pocket.NAMES)
    parser.add_argument("model", metavar="MODEL", help=f"a folder, a hub id, or one of: {names}")
    parser.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="prose to hide passkeys in: UTF-8, also .gz or .xz (default: the documentation of Python)",
    )
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="where the pattern, checkpoint and log go"
    )
    parser.add_argument(
        "--restart", action="store_true", help="discard a run in FOLDER instead of continuing it"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="what the model computes in (default: as stored; float32 for the bundled models)",
    )
    parser.add_argument(
        "--device", metavar="D", help="cpu, cuda, cuda:1 (default: cuda if there is one)"
    )
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a hub id")
    group = parser.add_argument_group("training")
    for field in fields(IdentifyOptions):
        _add_option(group, field)


def run(args: argparse.Namespace) -> int:
    """Identify the heads, showing progress, and say where the pattern is."""
    from duohead.identify import IdentifyOptions, haystack, identify
    from duohead.pocket.loading import load_model

    options = IdentifyOptions(
        **{field.name: getattr(args, field.name) for field in fields(IdentifyOptions)}
    )
    text = haystack.default_text() if args.text is None else haystack.read_text(args.text)
    model, tokenizer = load_model(
        args.model, dtype=args.dtype, device=args.device, revision=args.revision
    )
    try:
        pattern = identify(
            model, tokenizer, text, out=args.out, options=options, restart=args.restart
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_go_on(args.out, args.restart)) from None
    alphas = pattern.alpha[pattern.gated]
    print(
        f"{alphas.size} gates, mean {alphas.mean():.2f}, {(alphas > 0.5).mean():.0%} above 0.5; wrote {args.out}\n"
        f"Look at it with: duohead inspect {args.out}"
    )
    return 0


def _add_option(group: Any, field: Field[Any]) -> None:
    flag, text = f"--{field.name.replace('_', '-')}", field.metadata["help"]
    if field.default is False:
        group.add_argument(flag, action="store_true", help=text)
        return
    kind = int if field.default is None else type(field.default)
    suffix = "" if field.default is None else " (%(default)s)"
    metavar = "N" if kind is int else "X"
    group.add_argument(
        flag, type=kind, default=field.default, metavar=metavar, help=f"{text}{suffix}"
    )


def _how_to_go_on(out: str, restarted: bool) -> str:
    from duohead.identify.checkpoint import CHECKPOINT

    if (Path(out) / CHECKPOINT).exists():
        again = "the same command without --restart" if restarted else "the same command"
        return f"{out} holds the last checkpoint; {again} continues from it"
    return "no checkpoint was written yet; run the same command again to begin anew"

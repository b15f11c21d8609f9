"""`duohead evaluate compare`: ways to find retrieval heads against one another, at the same number of heads.

One command identifies heads with every scorer and seed, evaluates each choice on the same samples, and goes on where
it was interrupted. Run `duohead evaluate compare --model pocket --scorers optimise kvzip random --seeds 0 1 2 --out
FOLDER`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from typing import Any

from duohead.cli.common import MODELS, add_sample_flags, needle_depths

FLAGS = (
    "--model",
    "--scorers",
    "--set",
    "--seeds",
    "--retrieval-ratio",
    "--sink",
    "--recent",
    "--tasks",
    "--lengths",
    "--depths",
    "--samples",
    "--text",
    "--haystack",
    "--chunk",
    "--batch",
    "--out",
    "--workers",
    "--dtype",
    "--device",
    "--json",
    "--png",
    "--seed",
)
RATIOS = (0.5, 0.25, 0.125, 0.0625)
# Options of every scorer that a comparison sets itself, and by which flag.
_SHARED = {"seed": "--seeds", "sink": "--sink", "recent": "--recent"}


def add_arguments(kinds: Any) -> None:
    """Add the subcommand `compare` with its flags (listed in FLAGS)."""
    text = "ways to find retrieval heads against one another, at the same cache bytes"
    parser = kinds.add_parser("compare", help=text, description=text, allow_abbrev=False)
    _add_scorers(parser)
    _add_samples(parser)
    add = parser.add_argument
    add(
        "--out",
        required=True,
        metavar="FOLDER",
        help="patterns and scores go here, and the same command continues from them",
    )
    add("--workers", type=int, default=1, metavar="N", help="processes to share the work (1)")
    add("--dtype", default="auto", metavar="D", help="what the model computes in (as stored)")
    add("--device", metavar="D", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    add("--json", metavar="FILE", help="write records, one JSON line per method and cell")
    add("--png", metavar="FILE", help="draw accuracy against cache bytes")


def _add_scorers(parser: argparse.ArgumentParser) -> None:
    from duohead.identify.scorers import NAMES

    add = parser.add_argument
    add("--model", required=True, metavar="MODEL", help=MODELS)
    add(
        "--scorers",
        nargs="+",
        default=list(NAMES),
        choices=NAMES,
        metavar="NAME",
        help=f"ways to rank heads (all: {', '.join(NAMES)})",
    )
    add(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME.OPTION=VALUE",
        help="options of scorers, such as optimise.steps=400; their names are the flags of `duohead identify`",
    )
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="of scorers (0 1 2)")
    add(
        "--retrieval-ratio",
        type=float,
        nargs="+",
        default=list(RATIOS),
        metavar="R",
        help=f"shares of heads that keep all ({' '.join(map(str, RATIOS))})",
    )
    add("--sink", type=int, default=128, metavar="N", help="first tokens kept (%(default)s)")
    add("--recent", type=int, default=256, metavar="N", help="last tokens kept (%(default)s)")


def _add_samples(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--tasks", nargs="+", default=["all"], metavar="TASK", help="what is asked (all)")
    add_sample_flags(parser, depths=3)
    add(
        "--text",
        nargs="+",
        metavar="FILE",
        help="prose that scorers read (the documentation inside CPython)",
    )
    add(
        "--haystack",
        nargs="+",
        metavar="FILE",
        help="prose that questions hide in (that of --text)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of the samples (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Compare, print the table, write what was asked for."""
    _check(args)
    from duohead.evaluate.compare import Comparison
    from duohead.evaluate.compare import run as compare
    from duohead.evaluate.compare_view import draw, table
    from duohead.evaluate.progress import bar
    from duohead.evaluate.tasks import TASKS
    from duohead.files import write_text

    comparison = Comparison(
        model=args.model,
        scorers={name: _options(name, args.set) for name in dict.fromkeys(args.scorers)},
        seeds=tuple(dict.fromkeys(args.seeds)),
        ratios=tuple(args.retrieval_ratio),
        tasks=tuple(TASKS) if args.tasks == ["all"] else tuple(args.tasks),
        lengths=tuple(args.lengths),
        depths=needle_depths(args.depths),
        samples=args.samples,
        sink=args.sink,
        recent=args.recent,
        text=args.text,
        haystack=args.haystack,
        dtype=args.dtype,
        device=args.device,
        seed=args.seed,
        evaluation={"chunk": args.chunk, "batch": args.batch},
    )
    with bar("compare", len(comparison.units), shown=True) as advance:
        records = compare(comparison, folder=args.out, workers=args.workers, progress=advance)
    if args.json is not None:
        write_text(args.json, "".join(json.dumps(entry) + "\n" for entry in records))
    if args.png is not None:
        draw(records, args.png)
    print(f"{args.model}, {', '.join(comparison.tasks)}: answers exactly right, % (range of seeds)")
    print(table(records))
    for path in (args.json, args.png):
        if path is not None:
            print(f"wrote {path}")
    return 0


def _check(args: argparse.Namespace) -> None:
    from duohead.evaluate.plots import require_matplotlib
    from duohead.evaluate.tasks import TASKS
    from duohead.files import check_writable
    from duohead.identify.scorers import NAMES

    needle_depths(args.depths)
    limits = [(f"--{name}", getattr(args, name), 1) for name in ("samples", "workers", "batch")]
    limits += [("--lengths", length, 1) for length in args.lengths]
    if args.chunk is not None:
        limits.append(("--chunk", args.chunk, 1))
    for flag, value, lowest in limits:
        if value < lowest:
            raise ValueError(f"{flag} must be at least {lowest}, got {value}")
    unknown = [task for task in args.tasks if task not in TASKS]
    if unknown and args.tasks != ["all"]:
        raise ValueError(
            f"--tasks must be all or among {', '.join(TASKS)}, got {', '.join(unknown)}"
        )
    for ratio in args.retrieval_ratio:
        if not 0 < ratio <= 1:
            raise ValueError(f"--retrieval-ratio must be above 0 and at most 1, got {ratio}")
    for setting in args.set:
        name = setting.partition(".")[0]
        if name in NAMES and name not in args.scorers:
            raise ValueError(
                f"--set {setting}: {name} must be among --scorers, got {' '.join(args.scorers)}; "
                "name it there, or leave this out"
            )
    if args.json is not None:
        check_writable(args.json)
    if args.png is not None:
        check_writable(args.png, suffix=".png")
        require_matplotlib()


def _options(name: str, settings: list[str]) -> Any:
    """The options of a scorer with what ``--set`` says of it; a setting of a scorer that is none is refused, too."""
    from duohead.identify.scorers import NAMES, load

    known = {field.name: field for field in fields(load(name).options)}
    values: dict[str, Any] = {}
    for setting in settings:
        path, found, value = setting.partition("=")
        scorer, _, option = path.partition(".")
        if not found or scorer not in NAMES:
            raise ValueError(
                f"--set must be NAME.OPTION=VALUE with a name among {', '.join(NAMES)}, got {setting!r}"
            )
        if scorer != name:
            continue
        option = option.replace("-", "_")
        if option in _SHARED:
            raise ValueError(
                f"--set {setting}: {option} must be the same for all scorers, got one of {name} alone; "
                f"use {_SHARED[option]}"
            )
        if option not in known:
            raise ValueError(
                f"--set {setting}: options of {name} are {', '.join(known)}, got {option!r}"
            )
        values[option] = _value(setting, value, known[option].default)
    return load(name).options(**values)


def _value(setting: str, text: str, default: Any) -> Any:
    """``text`` as what the option's default is."""
    if hasattr(default, "load"):
        return default.load(text)
    truths = {"true": True, "false": False}
    try:
        if isinstance(default, bool):
            return truths[text.lower()]
        if isinstance(default, tuple):
            return tuple(type(default[0])(part) for part in text.split(","))
        return int(text) if default is None else type(default)(text)
    except (ValueError, KeyError, TypeError) as error:
        kind = "int" if default is None else type(default).__name__
        raise ValueError(
            f"--set {setting}: expected a value of type {kind}, got {text!r}"
        ) from error

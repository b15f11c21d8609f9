"""`duohead identify MODEL --text FILE... --out FOLDER`: find the retrieval heads of a model, and write its pattern.

Every constant of the chosen scorer is a flag with its source's value as default, made from the fields of its options,
and gate training continues where it stopped when the same command is given again. Run `duohead identify pocket --out
heads`, or `duohead identify pocket --scorer kvzip --out heads`; `--scorer NAME --help` has the flags of that scorer.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import Field, fields
from typing import TYPE_CHECKING, Any

from duohead.cli.common import add_model_flags

if TYPE_CHECKING:
    from duohead.identify.parallel import Ranks
    from duohead.pattern import HeadPattern

FLAGS = (
    "--scorer",
    "--text",
    "--dataset",
    "--out",
    "--restart",
    "--log",
    "--dtype",
    "--device",
    "--revision",
    "--steps",
    "--learning-rate",
    "--learning-rate-floor",
    "--warmup",
    "--reg-weight",
    "--target",
    "--initial",
    "--sink",
    "--recent",
    "--context-min",
    "--context-max",
    "--context-lengths",
    "--tasks",
    "--num-passkeys",
    "--passkey-words",
    "--depth-min",
    "--depth-max",
    "--depth-steps",
    "--teacher-full",
    "--gradient-checkpointing",
    "--no-deterministic",
    "--patience",
    "--patience-ratios",
    "--patience-slack",
    "--wording",
    "--chat",
    "--sequence-parallel",
    "--shard",
    "--save-every",
    "--seed",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this verb with its default scorer (listed in FLAGS); parsing goes by the scorer that is named."""
    from duohead.identify.scorers import DEFAULT

    _fill(parser, DEFAULT)

    def parse(
        words: Sequence[str], namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        # Scorers share names of flags but not their defaults, so each has a parser of its own.
        name = _named(words)
        own = type(parser)(prog=parser.prog, description=parser.description, allow_abbrev=False)
        _fill(own, name)
        _refuse_flags_of_others(own, name, words)
        return own.parse_known_args(words, namespace)

    parser.parse_known_args = parse  # type: ignore[method-assign, assignment]


def run(args: argparse.Namespace) -> int:
    """Identify the heads, showing progress, and say where the pattern is."""
    from duohead.identify.checkpoint import written_at
    from duohead.identify.parallel import joined
    from duohead.identify.scorers import load

    scorer = load(args.scorer)
    given = {field.name: getattr(args, field.name) for field in fields(scorer.options)}
    options = scorer.options(
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in given.items()
        }
    )
    before = written_at(args.out)
    try:
        with joined(args.device) as ranks:
            pattern = _score(args, options, ranks)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_go_on(args, scorer.trains, before)) from None
    if not ranks.first:
        return 0
    alphas = pattern.alpha[pattern.gated]
    summary = (
        f"{alphas.size} gates, mean {alphas.mean():.2f}, {(alphas > 0.5).mean():.0%} above 0.5"
        if scorer.scale == "alpha"
        else f"{alphas.size} heads ranked"
    )
    cost = pattern.training["cost"]
    print(
        f"{summary}; wrote {args.out}\n"
        f"{cost['forward_tokens']:,} tokens forward and {cost['backward_tokens']:,} backward in "
        f"{cost['seconds']:.1f} s\n"
        f"Look at it with: duohead inspect {args.out}"
    )
    return 0


def _score(args: argparse.Namespace, options: Any, ranks: Ranks) -> HeadPattern:
    from duohead.identify import haystack
    from duohead.identify.loggers import check
    from duohead.identify.scorers import score
    from duohead.pocket.loading import load_model

    # A model that is to be spread over several GPUs need not fit into one.
    device = "cpu" if ranks.world > 1 and getattr(options, "shard", False) else args.device
    log = getattr(args, "log", ())
    with ranks.together():  # before anybody reads a large model
        check(log, args.out)
    with ranks.together():
        text = haystack.texts(args.text, dataset=args.dataset)
        model, tokenizer = load_model(
            args.model, dtype=args.dtype, device=device, revision=args.revision
        )
    return score(
        args.scorer,
        model,
        tokenizer,
        text,
        out=args.out,
        options=options,
        restart=args.restart,
        log=log,
    )


def _fill(parser: argparse.ArgumentParser, name: str) -> None:
    """The arguments of the verb with the scorer of that name."""
    from duohead import pocket
    from duohead.identify.scorers import NAMES, load

    scorer = load(name)
    models = ", ".join(pocket.NAMES)
    parser.add_argument("model", metavar="MODEL", help=f"a folder, a hub id, or one of: {models}")
    parser.add_argument(
        "--scorer",
        choices=NAMES,
        default=name,
        help="how heads are ranked (%(default)s); each has flags of its own",
    )
    parser.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="prose to look for heads with: UTF-8, also .gz or .xz (default: the documentation of Python)",
    )
    parser.add_argument(
        "--dataset", metavar="NAME[:SPLIT[:COLUMN]]", help="instead of --text: a data set's texts"
    )
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="where the pattern, checkpoint and log go"
    )
    parser.add_argument(
        "--restart", action="store_true", help="discard a run in FOLDER instead of continuing it"
    )
    add_model_flags(parser)
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a hub id")
    if scorer.trains:
        parser.add_argument(
            "--log",
            nargs="+",
            default=[],
            choices=("wandb", "tensorboard"),
            help="log there, too, besides FOLDER (torchrun takes this for its own unless given -m -- duohead)",
        )
    group = parser.add_argument_group(f"{name}: {scorer.summary} ({scorer.source})")
    for field in fields(scorer.options):
        _add_option(group, field)


def _named(words: Sequence[str]) -> str:
    """The scorer that a command line names, which decides what its other flags may be."""
    from duohead.identify.scorers import DEFAULT, NAMES

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--scorer", default=DEFAULT)
    try:
        name: str = first.parse_known_args(list(words))[0].scorer
    except argparse.ArgumentError:
        return DEFAULT  # the real parser has the words for it
    return name if name in NAMES else DEFAULT


def _refuse_flags_of_others(
    parser: argparse.ArgumentParser, name: str, words: Sequence[str]
) -> None:
    from duohead.identify.scorers import NAMES, load

    known = {flag for action in parser._actions for flag in action.option_strings}
    for word in words:
        flag = word.partition("=")[0]
        owners = [
            other
            for other in NAMES
            if flag not in known and flag in map(_flag, fields(load(other).options))
        ]
        if owners:
            parser.error(f"{flag} is a flag of scorer {' and '.join(owners)}, not of {name}")


def _flag(field: Field[Any]) -> str:
    return f"--{'no-' if field.default is True else ''}{field.name.replace('_', '-')}"


def _add_option(group: Any, field: Field[Any]) -> None:
    """A flag from a field: its type from the default, its choices and its words from the metadata."""
    flag, text = _flag(field), field.metadata["help"]
    default: Any = field.default
    if isinstance(default, bool):
        action = "store_false" if default else "store_true"
        text = field.metadata["off"] if default else text
        group.add_argument(flag, dest=field.name, action=action, help=text)
        return
    more: dict[str, Any] = {"type": int if default is None else type(default), "metavar": "N"}
    if isinstance(default, tuple):
        more = {"type": type(default[0]), "nargs": "+", "metavar": "X"}
        text += f" ({' '.join(map(str, default))})"
    elif hasattr(default, "load"):
        more = {"type": default.load, "metavar": "FILE"}
    elif default is not None:
        text += " (%(default)s)"
        more["metavar"] = "N" if isinstance(default, int) else "X"
    if "choices" in field.metadata:
        del more["metavar"]
        more["choices"] = field.metadata["choices"]
    group.add_argument(flag, default=default, help=text, **more)


def _how_to_go_on(args: argparse.Namespace, trains: bool, before: int | None) -> str:
    from duohead.identify.checkpoint import written_at

    now = written_at(args.out)
    if not trains or now is None:
        return "there is no checkpoint yet; run the same command again to begin anew"
    if args.restart and now == before:
        return f"{args.out} is as it was; run the same command again to begin anew"
    again = "the same command without --restart" if args.restart else "the same command"
    return f"{args.out} holds the last checkpoint; {again} continues from it"

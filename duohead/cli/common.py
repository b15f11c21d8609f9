"""Flags and look-ups that several verbs share, so that the same thing is called the same and fails in the same words.

`add_model_flags(parser)` gives MODEL_FLAGS, `load_pattern("pocket")` knows the bundled patterns by their model's name,
`read_haystack(files)` names the text that a record should name.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duohead import pocket

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from duohead.pattern import HeadPattern

MODEL_FLAGS = ("--dtype", "--device")
SELECTOR_FLAGS = ("--retrieval-ratio", "--kv-budget", "--threshold")
WINDOW_FLAGS = ("--sink", "--recent", "--prefill-recent")
STORAGE_FLAGS = ("--retrieval-dtype", "--streaming-dtype", "--window-dtype", "--keep-all")
MODELS = f"{', '.join(pocket.NAMES)}, a folder or a hub id"
DEFAULT_TEXT = "CPython documentation"


def add_model_flags(parser: Any) -> None:
    """Add --dtype and --device, as `load_model` takes them."""
    from duohead.pocket.loading import DTYPES

    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="what the model computes in (as stored; float32 for the bundled models)",
    )
    parser.add_argument(
        "--device", metavar="D", help="cpu, cuda, cuda:1 (default: cuda if there is one)"
    )


def add_sample_flags(parser: Any, *, depths: int) -> None:
    """Add --lengths, --depths, --samples, --chunk and --batch, as `evaluate_needle` takes them."""
    add = parser.add_argument
    add(
        "--lengths",
        type=int,
        nargs="+",
        default=[2048, 4096],
        metavar="N",
        help="tokens (2048 4096)",
    )
    add(
        "--depths",
        type=_number,
        nargs="+",
        default=[depths],
        metavar="D",
        help=f"so many evenly spaced depths from 0 to 1 ({depths}), or the depths themselves (0.1 0.5 0.9)",
    )
    add("--samples", type=int, default=4, metavar="N", help="per length and depth (%(default)s)")
    add("--chunk", type=int, metavar="N", help="run contexts in pieces of N tokens, to save memory")
    add("--batch", type=int, default=1, metavar="N", help="samples in one forward (%(default)s)")


def needle_depths(given: Sequence[int | float]) -> list[float]:
    """What --depths means: one integer is a number of evenly spaced depths from 0 to 1 (one lies in the middle).

    Raises:
        ValueError: a number of depths below 1, or a depth outside 0 to 1.
    """
    if len(given) == 1 and isinstance(given[0], int):
        count = given[0]
        at_least([("--depths", count, 1)])
        return [0.5] if count == 1 else [place / (count - 1) for place in range(count)]
    for depth in given:
        if not 0 <= depth <= 1:
            raise ValueError(
                f"--depths must be one number of depths or depths from 0 to 1, got {depth} among "
                f"{' '.join(map(str, given))}"
            )
    return list(dict.fromkeys(float(depth) for depth in given))


def _number(text: str) -> int | float:
    """An integer as one, any other number as a float, for argparse."""
    return int(text) if text.isdecimal() else float(text)


def add_selector_flags(parser: Any, *, default: str = "", text: str = "--tokens tokens") -> None:
    """Add SELECTOR_FLAGS, of which one may be given: which heads keep all; None where they are not given.

    Args:
        parser: what they are added to.
        default: what holds without them, in words.
        text: what --kv-budget counts the bytes of, in words.
    """
    add = parser.add_mutually_exclusive_group().add_argument
    told = f" ({default})" if default else ""
    helps = (
        ("R", f"share of gated heads that keep all{told}"),
        ("B", f"share of the dense cache's bytes to spend on {text}"),
        ("T", "heads with alpha >= T keep all"),
    )
    for flag, (metavar, what) in zip(SELECTOR_FLAGS, helps, strict=True):
        add(flag, type=float, metavar=metavar, help=what)


def selector(args: argparse.Namespace) -> dict[str, Any]:
    """The one of SELECTOR_FLAGS that was given, as `HeadPattern.policy` takes it; empty if none was."""
    names = ("retrieval_ratio", "kv_budget", "threshold")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def add_window_flags(parser: Any, flags: Sequence[str] = WINDOW_FLAGS) -> None:
    """Add some of WINDOW_FLAGS: which tokens streaming heads keep and see; None where they are not given."""
    helps = (
        "first tokens kept by streaming heads (pattern's own)",
        "last tokens kept by streaming heads (pattern's own)",
        "last tokens seen by streaming heads in a prompt (as --recent)",
    )
    for flag, what in zip(WINDOW_FLAGS, helps, strict=True):
        if flag in flags:
            parser.add_argument(flag, type=int, metavar="N", help=what)


def add_storage_flags(parser: Any) -> None:
    """Add STORAGE_FLAGS: in which precision heads are stored, and whether streaming heads forget."""
    for kind, heads in (
        ("retrieval", "retrieval heads"),
        ("streaming", "streaming heads"),
        ("window", "natively windowed layers"),
    ):
        parser.add_argument(
            f"--{kind}-dtype",
            default="auto",
            metavar="D",
            help=f"storage of {heads}: bf16, fp8, int8, int4, int4-hadamard, or KEYS/VALUES such as fp8/int4 "
            "(the model's dtype)",
        )
    parser.add_argument(
        "--keep-all",
        action="store_true",
        help="streaming heads keep every token too, as --streaming-dtype says",
    )


def storage_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `HeadPolicy` that STORAGE_FLAGS stand for.

    Raises:
        ValueError: --keep-all beside flags that say what streaming heads keep (None or empty where they are not given).
    """
    names = ("sink", "recent", "prefill_recent", "windows")
    spare = [name for name in names if getattr(args, name, None) not in (None, [])]
    if args.keep_all and spare:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in spare)
        raise ValueError(
            f"{flags}: of no use with --keep-all, by which streaming heads keep every token; leave one of the two out"
        )
    kinds = ("retrieval_dtype", "streaming_dtype", "window_dtype")
    return {name: getattr(args, name) for name in kinds} | {"evict": not args.keep_all}


def load_pattern(name: str) -> HeadPattern:
    """The pattern of a folder or hub id; the name of a bundled model stands for the pattern beside it."""
    from duohead.pattern import HeadPattern

    return HeadPattern.load(pattern_place(name))


def pattern_place(name: str) -> str:
    """Where a pattern is loaded from: beside the bundled model of that name, else the name itself."""
    return str(pocket.pattern(name)) if pocket.bundled(name) else name


def read_haystack(paths: Sequence[str]) -> tuple[str, list[str]]:
    """A name for the text of the files and the texts, one a file; without files the documentation inside CPython."""
    from duohead.identify import haystack

    if not paths:
        return DEFAULT_TEXT, haystack.texts()
    return " ".join(Path(path).name for path in paths), haystack.texts(paths)


def at_least(limits: Iterable[tuple[str, int | None, int]]) -> None:
    """Raise ValueError for the first (flag, value, lowest) whose value is given and too small."""
    for flag, value, lowest in limits:
        if value is not None and value < lowest:
            raise ValueError(f"{flag} must be at least {lowest}, got {value}")


def window(text: str) -> tuple[int, int]:
    """Sink and recent tokens out of "64+256", for argparse."""
    sink, found, recent = text.partition("+")
    if not found or not sink.isdigit() or not recent.isdigit():
        raise argparse.ArgumentTypeError(f"must be SINK+RECENT, such as 64+256, got {text!r}")
    return int(sink), int(recent)

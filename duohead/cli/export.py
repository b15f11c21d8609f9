"""`duohead export FOLDER --base MODEL --out ADAPTER`: an adapter repository, heads and settings without weights.

Whoever has it loads the base model with these heads by `AutoModelForCausalLM.from_pretrained(ADAPTER)`. Base and heads
are checked against one another first, and the card says only what was computed, recorded or measured.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duohead.cli.common import (
    SELECTOR_FLAGS,
    STORAGE_FLAGS,
    WINDOW_FLAGS,
    add_selector_flags,
    add_storage_flags,
    add_window_flags,
    pattern_place,
    selector,
    storage_fields,
)

if TYPE_CHECKING:
    from duohead.adapter.load import Adapter
    from duohead.evaluate.collect import Entry

FLAGS = (
    "--base",
    "--base-revision",
    "--out",
    "--name",
    *SELECTOR_FLAGS,
    "--tokens",
    *WINDOW_FLAGS,
    *STORAGE_FLAGS,
    "--results",
)
PICTURE = "heads.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb (flags are listed in FLAGS)."""
    add = parser.add_argument
    add(
        "folder",
        metavar="FOLDER",
        help="pattern that `duohead identify` wrote, a Laguna adapter, a hub id, or a bundled model",
    )
    add("--base", metavar="MODEL", help="base model, a hub id to share it (the pattern's own)")
    add(
        "--base-revision",
        metavar="R",
        help="branch, tag or commit of the base (the commit that the hub has now)",
    )
    add(
        "--out",
        required=True,
        metavar="ADAPTER",
        help="folder to write: new, empty, or an earlier export of these heads to refresh",
    )
    add("--name", metavar="ID", help="hub id that the card shows for it (the folder's name)")
    add_selector_flags(parser, default="as the pattern recommends, else 0.5")
    add("--tokens", type=int, metavar="N", help="length at which --kv-budget counts (32768)")
    add_window_flags(parser)
    add_storage_flags(parser)
    add(
        "--results",
        nargs="+",
        metavar="FILE",
        help="records of `duohead evaluate` for the card's tables (*.jsonl in FOLDER)",
    )


def run(args: argparse.Namespace) -> int:
    """Check, write, and say what was written."""
    from duohead.adapter.load import open_adapter
    from duohead.adapter.save import CARD, write
    from duohead.cli.export_card import card

    notes: list[str] = []
    adapter = _portable(
        open_adapter(
            pattern_place(args.folder),
            settings=_settings(args),
            base_model=args.base,
            base_revision=args.base_revision,
        ),
        notes,
    )
    entries = _results(args, adapter, notes)
    picture = _picture(adapter, notes)
    name = args.name or Path(args.out).resolve().name
    text = card(adapter, name, picture=PICTURE if picture else None, entries=entries)
    more = {CARD: text.encode(), **({PICTURE: picture} if picture else {})}
    names = write(args.out, adapter.pattern, more=more)
    print(f"{args.out}: {', '.join(sorted(names))}")
    print(f"share it: hf upload {args.name or 'OWNER/' + name} {args.out}")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return 0


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Settings that were asked for; what was not stays as the pattern's maker recommends."""
    if args.tokens is not None and args.kv_budget is None:
        raise ValueError(
            "--tokens says where --kv-budget counts; give a --kv-budget, or leave it out"
        )
    names = ("tokens", "sink", "recent", "prefill_recent")
    storage = storage_fields(args)
    default = {"evict": True}
    return {
        **selector(args),
        **{name: getattr(args, name) for name in names if getattr(args, name) is not None},
        **{name: value for name, value in storage.items() if value != default.get(name, "auto")},
    }


def _portable(adapter: Adapter, notes: list[str]) -> Adapter:
    """The adapter with its base pinned: to a commit on the hub, or to a place on this machine, with a word about it."""
    from duohead import pocket
    from duohead.shapes import text_config

    pattern = adapter.pattern
    base = str(pattern.base_model)
    if Path(base).is_dir():
        notes.append(
            f"the base {base} is a folder of this machine; to share the adapter, give --base a hub id"
        )
        pattern = replace(pattern, base_model=str(Path(base).resolve()), base_revision=None)
    elif base not in pocket.NAMES:
        pattern = replace(pattern, base_revision=_commit(base, pattern.base_revision))
    kind = getattr(text_config(adapter.config), "model_type", None)
    return replace(adapter, pattern=replace(pattern, base_type=kind))


def _commit(base: str, revision: str | None) -> str:
    """The commit that a branch or tag of a hub repository is at now; the folder of its cached files is named so."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(base, revision=revision, allow_patterns=["config.json"])).name


def _results(args: argparse.Namespace, adapter: Adapter, notes: list[str]) -> Sequence[Entry]:
    """Records about the base model: those of --results, or those that lie in the pattern's folder."""
    from duohead.cli.export_card import of_these_heads
    from duohead.evaluate.collect import collect
    from duohead.pattern import HeadPattern

    paths = args.results or sorted(map(str, Path(args.folder).glob("*.jsonl")))
    if not paths:
        return ()
    models = {args.base, adapter.pattern.base_model, HeadPattern.load(adapter.name).base_model}
    found = collect(paths).entries
    kept = [
        entry
        for entry in found
        if entry.shape.get("model") in models and of_these_heads(adapter, entry)
    ]
    if args.results and not kept:
        raise ValueError(
            f"--results: none of the {len(found)} records there is about {adapter.pattern.base_model} and these heads; "
            f"name records of `duohead evaluate --model {adapter.pattern.base_model} --pattern {args.folder}`"
        )
    if len(kept) < len(found):
        notes.append(f"left out {len(found) - len(kept)} records about other models or heads")
    return kept


def _picture(adapter: Adapter, notes: list[str]) -> bytes | None:
    """The heat map as a PNG; None, and a word about it, without matplotlib: the card then has it in letters."""
    from importlib.util import find_spec

    from duohead.cli.inspect_map import draw

    if find_spec("matplotlib") is None:
        notes.append(
            "without matplotlib the card has its heat map in letters; for a picture: pip install 'duohead[report]'"
        )
        return None
    with tempfile.TemporaryDirectory(prefix="duohead.") as folder:
        path = Path(folder) / PICTURE
        draw(adapter.pattern, adapter.policy, str(path))
        return path.read_bytes()

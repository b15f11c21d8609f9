"""Head patterns on disk: our folder, the reference code's TSV, the Laguna adapter, and a repository of the hub.

A pattern decides what a model forgets, so a damaged or foreign file must end in an error that says what was expected,
what was found and what to do, and never in a guess; nothing is ever unpickled into live objects. `read` returns the
fields of a `HeadPattern`, `contents` the files of one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from duohead.formats import own
from duohead.formats.others import ADAPTER, PICKLE, read_adapter, read_upstream
from duohead.formats.own import ARRAYS, FORMAT_VERSION, MODEL_TYPE, PRECISIONS, contents
from duohead.formats.parts import CONFIG, TENSORS, TSV, first_line, read_json

__all__ = [
    "ARRAYS",
    "CONFIG",
    "FORMAT_VERSION",
    "MODEL_TYPE",
    "PRECISIONS",
    "TENSORS",
    "TSV",
    "contents",
    "fetch",
    "read",
]


def read(folder: Path) -> dict[str, Any]:
    """The `HeadPattern` fields that a folder holds, whichever of the three formats it has.

    Raises:
        ValueError: the folder is missing, of no known format, or damaged.
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file; name the folder that holds {CONFIG} and {TSV}")
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; name a folder that holds {CONFIG} and {TSV}")
    config = read_json(folder / CONFIG) if (folder / CONFIG).exists() else None
    if (config or {}).get("model_type") == MODEL_TYPE or (folder / TENSORS).exists():
        return own.read(folder, config)
    if (folder / ADAPTER).is_dir() or ADAPTER in (config or {}):
        return read_adapter(folder, config or {})
    if (folder / TSV).exists():
        return read_upstream(folder, config)
    found = sorted(path.name for path in folder.iterdir())
    raise ValueError(
        f"{folder} holds no head pattern: expected {CONFIG} with {TSV}, or {ADAPTER}/{PICKLE}, "
        f"found {', '.join(found[:8]) or 'nothing'}; `duohead identify` writes one"
    )


def fetch(name: str, revision: str | None, **options: Any) -> Path:
    """Folder of a hub repository's pattern files, downloaded if need be; `options` are snapshot_download's own."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise ValueError(
            f"{name}: no such folder, and not a hub id either; name a pattern's folder or owner/name (bundled ones lie "
            f"at duohead.pocket.pattern(model); on the command line the model's name will do, such as pocket)"
        )
    from huggingface_hub import snapshot_download

    patterns = [CONFIG, TSV, TENSORS, f"{ADAPTER}/*"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, **options))
    except (OSError, ValueError) as error:  # as huggingface_hub documents, being offline included
        raise ValueError(
            f"{name}: no such folder, and it cannot be had from the hub ({first_line(error)}); "
            f"check the name and the connection, or name a local folder"
        ) from error

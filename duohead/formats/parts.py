"""What the readers of pattern folders share: names of files, and values that are checked as they are read.

Every check says which file, what was expected, what was found and what to do. Used by `duohead.formats.own` and
`duohead.formats.others`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from duohead.shapes import check_window
from duohead.storage import is_int

CONFIG, TSV, TENSORS = "config.json", "full_attention_heads.tsv", "duohead.safetensors"


def read_tsv(path: Path) -> NDArray[np.float64]:
    """A table of numbers as fp64 [rows, columns]; a ragged or truncated one is refused."""
    if not path.exists():
        raise ValueError(f"{path} is missing; copy the folder whole, or identify again")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected tab-separated numbers, found binary data; is it the right file?"
        ) from error
    if text.strip() and not text.endswith("\n"):
        raise ValueError(
            f"{path}: expected a line end after the last row, found none; the file may be truncated, copy it again "
            f"(or add the line end if it is whole)"
        )
    rows: list[list[float]] = []
    for number, line in enumerate(text.rstrip().splitlines(), start=1):
        try:
            rows.append([float(cell) for cell in line.split()])
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: expected tab-separated numbers, {first_line(error)}"
            ) from error
        if len(rows[-1]) != len(rows[0]):
            raise ValueError(
                f"{path}, line {number}: expected {len(rows[0])} values as in line 1, found {len(rows[-1])}; "
                f"the file may be truncated, copy it again"
            )
    if not rows or not rows[0]:
        raise ValueError(f"{path}: expected one row of alphas per layer, found none; copy it again")
    return np.array(rows, dtype=np.float64)


def check_range(values: NDArray[Any], path: Path, low: float, high: float) -> None:
    """Refuse alphas [layers, KV heads] outside of [low, high]; NaN passes."""
    outside = np.argwhere(~np.isnan(values) & ~((values >= low) & (values <= high)))
    if len(outside):
        layer, head = outside[0]
        raise ValueError(
            f"{path}: alphas must lie in [{low:g}, {high:g}], got {values[layer, head]:g} in layer {layer}, "
            f"KV head {head}; the file is damaged or not a table of gates"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # includes UnicodeDecodeError
        raise ValueError(
            f"{path}: expected JSON, got something else ({first_line(error)}); copy it again"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{path}: expected a JSON object, got {type(value).__name__}; copy it again"
        )
    return value


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """What a file holds that `read_json` reads as this."""
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def integer(config: Mapping[str, Any], key: str, path: Path, *, minimum: int) -> int:
    """An integer of a config."""
    value = config.get(key)
    # Some writers turn 128 into 128.0.
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)
    if not is_int(value) or value < minimum:
        found = "nothing" if key not in config else repr(value)
        raise ValueError(
            f"{path}: {key} must be an integer >= {minimum}, got {found}; correct it there"
        )
    return value


def window(config: Mapping[str, Any], path: Path) -> dict[str, int]:
    """The fields ``sink`` and ``recent``, which every format has under the same keys."""
    read = {}
    for field, minimum in (("sink", 0), ("recent", 1)):
        key = f"{field}_size"
        read[field] = integer(config, key, path, minimum=minimum)
        check_window(f"{path}: {key}", read[field])
    return read


def optional(config: Mapping[str, Any], key: str, path: Path, kind: type) -> Any:
    """A value of a config that may be missing or null."""
    value = config.get(key)
    if value is not None and not isinstance(value, kind):
        raise ValueError(
            f"{path}: {key} must be of type {kind.__name__} or null, got {value!r}; correct it there"
        )
    return value


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__

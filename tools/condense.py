"""Make the records of `duohead evaluate compare --json` few enough to keep: one per scorer, seed, share and length.

Depths are averaged, tasks stand side by side; the costs of a scorer stay. Run
`python tools/condense.py compare-pocket.jsonl results/compare-pocket.jsonl`.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from duohead.files import write_text
from duohead.record import read_records

OP = "evaluate.compare"
_CELL = ("scorer", "seed", "retrieval_ratio", "length")
_VARIES = ("task", "task_version", "depth", "samples")


def condensed(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records whose numbers are the exact match of each task in percent, with `kv_bytes` and the scorer's costs."""
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for entry in entries:
        if entry["op"] == OP:
            cells[tuple(entry["shape"][name] for name in _CELL)].append(entry)
    return [_merged(own) for own in cells.values()]


def _merged(own: list[dict[str, Any]]) -> dict[str, Any]:
    first = own[0]
    shape = {name: value for name, value in first["shape"].items() if name not in _VARIES}
    versions = {entry["shape"]["task"]: entry["shape"]["task_version"] for entry in own}
    numbers: dict[str, Any] = {"kv_bytes": first["numbers"]["kv_bytes"]}
    numbers |= {
        name: value for name, value in first["numbers"].items() if name.startswith("identify_")
    }
    for task in versions:
        rows = [entry for entry in own if entry["shape"]["task"] == task]
        samples = sum(entry["shape"]["samples"] for entry in rows)
        right = sum(e["shape"]["samples"] * e["numbers"]["exact_match"] for e in rows)
        numbers[task] = 100 * right / samples
        shape["samples"] = samples
    shape["task_versions"] = versions
    return {**first, "op": f"{OP}.summary", "shape": shape, "numbers": numbers}


def main() -> None:
    """Read the first file, write the second."""
    source, target = sys.argv[1:]
    lines = (
        json.dumps(entry, ensure_ascii=False) + "\n" for entry in condensed(read_records(source))
    )
    write_text(target, "".join(lines))


if __name__ == "__main__":
    main()

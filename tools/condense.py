"""Make the records of `duohead evaluate compare --json` few enough to keep: one per way, seed, share and length.

Tasks stand side by side as means over depths, with the depths beside them, from which the spread of a difference can be
told; the costs of a scorer stay. Run `python tools/condense.py compare-pocket.jsonl ... results/compare-pocket.jsonl`,
with one file or several to be joined: of what they share, such as full attention, the first counts.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from duohead.record import read_records
from tools.finding_records import rewrite

OP = "evaluate.compare"
# One scorer with other options is another way to find heads; full attention has none.
_WAY = ("scorer", "seed", "retrieval_ratio", "length", "options")
_PLACE = ("task", "depth")
_VARIES = ("task", "task_version", "depth", "samples")


def condensed(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records whose numbers are the exact match of each task in percent, with ``by_depth``, ``kv_bytes`` and costs."""
    cells: dict[tuple[Any, ...], dict[tuple[Any, ...], dict[str, Any]]] = defaultdict(dict)
    for entry in entries:
        if entry["op"] == OP:
            way = tuple(entry["shape"].get(name) for name in _WAY)
            cells[way].setdefault(tuple(entry["shape"][name] for name in _PLACE), entry)
    return [_merged(list(own.values())) for own in cells.values()]


def _merged(own: list[dict[str, Any]]) -> dict[str, Any]:
    first = own[0]
    shape = {name: value for name, value in first["shape"].items() if name not in _VARIES}
    versions = {entry["shape"]["task"]: entry["shape"]["task_version"] for entry in own}
    numbers: dict[str, Any] = {"kv_bytes": first["numbers"]["kv_bytes"]}
    numbers |= {
        name: value for name, value in first["numbers"].items() if name.startswith("identify_")
    }
    by_depth: dict[str, dict[str, float]] = {}
    for task in versions:
        rows = [entry for entry in own if entry["shape"]["task"] == task]
        samples = sum(entry["shape"]["samples"] for entry in rows)
        right = sum(e["shape"]["samples"] * e["numbers"]["exact_match"] for e in rows)
        numbers[task] = 100 * right / samples
        by_depth[task] = {
            str(e["shape"]["depth"]): round(100 * e["numbers"]["exact_match"], 4) for e in rows
        }
        shape["samples"] = samples
    numbers["by_depth"] = by_depth
    shape["task_versions"] = versions
    return {**first, "op": f"{OP}.summary", "shape": shape, "numbers": numbers}


def main() -> None:
    """Read all files but the last, write the last."""
    *sources, target = sys.argv[1:]
    entries = [entry for source in sources for entry in read_records(source)]
    rewrite(target, condensed(entries))


if __name__ == "__main__":
    main()

"""Picking records of experiments: those of one question, those of one setting, and their means over tasks.

Tables (`finding_tables.py`) and figures (`finding_figures.py`) of docs/findings.md read the same records through these
few functions, so that they show the same numbers. Where a setting was measured twice, the newest record counts, and of
heads that several patterns chose only those of the newest; `python -m tools.finding_records FILE ...` leaves out of the
files what no longer counts.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any

from duohead import pocket
from duohead.files import write_text
from duohead.record import read_records

Records = Sequence[dict[str, Any]]
MODELS = pocket.NAMES
TASKS = ("passkeys", "needle", "number", "keyvalue")
# How much was spent on a measurement, which a later one may do differently.
_EFFORT = ("steps", "samples", "lengths")
# Digest of the pattern that chose the heads. Records of gates trained for the question, and early ones, have none.
_PATTERN = "pattern"
_PREFIX = "findings."
# Settings that the first records do not name, because there was one value.
_ONCE = {"tuning": {"rate": 3e-4}}


def of(records: Records, question: str) -> list[dict[str, Any]]:
    """The records of one question, of each setting the newest, in the order in which settings first came.

    Of each model only those stay that have the newest pattern named for the question, or name none.
    """
    own = _newest([e for e in records if e["op"] == f"{_PREFIX}{question}"])
    return [{**entry, "shape": _shape(entry)} for entry in own]


def current(records: Records) -> list[dict[str, Any]]:
    """All records but those of experiments that `of` passes over."""
    asked = {e["op"] for e in records if e["op"].startswith(_PREFIX)}
    kept = {id(e) for op in asked for e in _newest([e for e in records if e["op"] == op])}
    return [e for e in records if e["op"] not in asked or id(e) in kept]


def of_one_pattern(entries: Records) -> list[dict[str, Any]]:
    """Those of the records that name the pattern which the newest of them names, or none if it names none."""
    newest = max(entries, key=itemgetter("time"))["shape"].get(_PATTERN)
    return [entry for entry in entries if entry["shape"].get(_PATTERN) == newest]


def is_of(entry: Mapping[str, Any], **wanted: Any) -> bool:
    """Whether the record's shape has these values."""
    return all(entry["shape"].get(name) == value for name, value in wanted.items())


def models(records: Records) -> list[str]:
    """Models that occur, the bundled ones first and in their order."""
    present = dict.fromkeys(entry["shape"]["model"] for entry in records)
    return [model for model in MODELS if model in present] + [
        model for model in present if model not in MODELS
    ]


def values(records: Records, name: str) -> list[Any]:
    """What a setting was varied over, in the order of the records."""
    return list(dict.fromkeys(entry["shape"][name] for entry in records))


def by_model(records: Records, *names: str) -> list[dict[str, Any]]:
    """Records model by model, then by the settings named: numbers from large to small, texts in the order they came."""
    among = {name: values(records, name) for name in names}
    order = models(records)

    def place(entry: Mapping[str, Any]) -> list[float]:
        own = ((name, entry["shape"][name]) for name in names)
        return [order.index(entry["shape"]["model"])] + [
            among[name].index(value) if isinstance(value, str) else -value for name, value in own
        ]

    return sorted(records, key=place)


def four(entry: Mapping[str, Any]) -> float:
    """Mean over the four retrieval tasks, in percent."""
    return mean(entry["numbers"][task] for task in TASKS)


def scores(records: Records, **wanted: Any) -> list[float]:
    """Means over the four tasks of the records with these settings: one for each seed."""
    return [four(entry) for entry in records if is_of(entry, **wanted)]


def tuned_name(shape: Mapping[str, Any]) -> str:
    """What a model was tuned on, and how hard."""
    return f"{shape['tuned_on']}, peak {shape['rate']:.0e}".replace("e-0", "e-")


def mean(given: Iterable[float]) -> float:
    """Their mean; of none it is NaN."""
    numbers = list(given)
    return sum(numbers) / len(numbers) if numbers else float("nan")


def _newest(own: Records) -> list[dict[str, Any]]:
    """What counts of the records of one question."""
    by_time = sorted(own, key=itemgetter("time"))
    ranked = {e["shape"]["model"]: e["shape"][_PATTERN] for e in by_time if _PATTERN in e["shape"]}
    newest: dict[str, dict[str, Any]] = {}
    for entry in own:
        shape = _shape(entry)
        chosen = ranked.get(shape["model"])
        if shape.get(_PATTERN, chosen) != chosen:
            continue
        varied = {
            name: value
            for name, value in shape.items()
            if value is not None and name not in (*_EFFORT, _PATTERN)
        }
        key = json.dumps(varied, sort_keys=True)
        if key not in newest or entry["time"] >= newest[key]["time"]:
            newest[key] = entry
    return list(newest.values())


def _shape(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {**_ONCE.get(entry["op"].removeprefix(_PREFIX), {}), **entry["shape"]}


def rewrite(path: str | os.PathLike[str], records: Records) -> None:
    """Put these records in place of all that the file holds."""
    write_text(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in records))


def main() -> None:
    """Rewrite the files."""
    for path in sys.argv[1:]:
        rewrite(path, current(read_records(path)))


if __name__ == "__main__":
    main()

"""Picking records of experiments: those of one question, those of one setting, and their means over tasks.

Tables (`finding_tables.py`) and figures (`finding_figures.py`) of docs/findings.md read the same records through these
few functions, so that they show the same numbers. Where a setting was measured twice, the newest record counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Records = Sequence[dict[str, Any]]
MODELS = ("pocket", "pocket-mha", "pocket-laguna")
TASKS = ("passkeys", "needle", "number", "keyvalue")
# How much was spent on a measurement, which a later one may do differently.
_EFFORT = ("steps", "samples", "lengths")
# Settings that the first records do not name, because there was one value.
_ONCE = {"tuning": {"rate": 3e-4}}


def of(records: Records, question: str) -> list[dict[str, Any]]:
    """The records of one question, of each setting the newest, in the order in which settings first came."""
    newest: dict[str, dict[str, Any]] = {}
    for entry in records:
        if entry["op"] == f"findings.{question}":
            shape = {**_ONCE.get(question, {}), **entry["shape"]}
            varied = {k: v for k, v in shape.items() if k not in _EFFORT}
            key = json.dumps(varied, sort_keys=True)
            if key not in newest or entry["time"] >= newest[key]["time"]:
                newest[key] = {**entry, "shape": shape}
    return list(newest.values())


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

"""Needle results: rows of scores and cache bytes, their means and grids, and their file of JSON lines.

A row is everything that is known of one method in one cell, so that tables, charts and records all read the same
numbers. Scores of different task versions are never mixed: putting them together is an error.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from duohead.files import write_text
from duohead.record import read_records, record

Metric = Literal["exact_match", "first_token", "token_accuracy"]
OP = "evaluate.needle"
_NUMBERS = ("answers", "exact_match", "first_token", "token_accuracy", "kv_bytes")


@dataclass(frozen=True)
class NeedleRow:
    """What one method scored in one cell of the grid; scores are fractions, bytes those of an allocated cache.

    `length` counts tokens (question and answers included), `depth` is the needle's place in the text from 0 to 1,
    `answers` are the scored ones of all `samples`. `sink`, `recent`, `policy` (a digest) are None for full attention.
    """

    task: str
    task_version: int
    method: str
    retrieval_ratio: float
    sink: int | None
    recent: int | None
    policy: str | None
    length: int
    depth: float
    samples: int
    answers: int
    exact_match: float
    first_token: float
    token_accuracy: float
    kv_bytes: int


@dataclass(frozen=True)
class NeedleResult:
    """Rows of one evaluation, or of several with the same task versions; other versions cannot be compared."""

    rows: tuple[NeedleRow, ...]

    def __post_init__(self) -> None:
        versions: dict[str, int] = {}
        for row in self.rows:
            known = versions.setdefault(row.task, row.task_version)
            if known != row.task_version:
                raise ValueError(
                    f"rows mix versions {known} and {row.task_version} of task {row.task!r}, whose scores cannot be "
                    "compared; keep one version, or run the other again"
                )

    def select(self, **wanted: object) -> NeedleResult:
        """Rows whose fields equal the given ones; ValueError if there are none."""
        names = {field.name for field in fields(NeedleRow)}
        if unknown := set(wanted) - names:
            raise ValueError(f"rows have no field {sorted(unknown)}; fields are {sorted(names)}")
        rows = tuple(
            row for row in self.rows if all(getattr(row, k) == v for k, v in wanted.items())
        )
        if not rows:
            raise ValueError(f"no row has {wanted}; methods are {self.methods}")
        return NeedleResult(rows)

    @property
    def methods(self) -> list[str]:
        """Methods in the order they were run."""
        return list(dict.fromkeys(row.method for row in self.rows))

    @property
    def lengths(self) -> list[int]:
        """Context lengths in tokens, ascending."""
        return sorted({row.length for row in self.rows})

    @property
    def depths(self) -> list[float]:
        """Depths, ascending."""
        return sorted({row.depth for row in self.rows})

    def mean(self, metric: Metric = "exact_match", **wanted: object) -> float:
        """Mean score over all samples of the rows with the given fields."""
        rows = self.select(**wanted).rows
        return sum(getattr(row, metric) * row.samples for row in rows) / sum(
            row.samples for row in rows
        )

    def kv_bytes(self, **wanted: object) -> int:
        """Cache bytes of the rows with the given fields, which must agree."""
        found = {row.kv_bytes for row in self.select(**wanted).rows}
        if len(found) != 1:
            raise ValueError(
                f"cache bytes differ between the rows with {wanted}: {sorted(found)}; name one length"
            )
        return found.pop()

    def grid(self, method: str, metric: Metric = "exact_match") -> list[list[float]]:
        """Mean scores of a method, one row per depth and one column per length, both ascending."""
        return [
            [self.mean(metric, method=method, length=n, depth=d) for n in self.lengths]
            for d in self.depths
        ]

    def write(self, path: str | os.PathLike[str], *, model: str, dtype: Any) -> None:
        """Write the rows to `path`, replacing it: one record per line, with `model` among what it depends on."""
        made = record(op=OP, impl="", numbers={}, dtype=dtype)
        lines = []
        for row in self.rows:
            values = asdict(row)
            numbers = {name: values.pop(name) for name in _NUMBERS}
            impl, policy = values.pop("method"), values.pop("policy")
            shape = {"model": model, **values}
            lines.append(
                replace(made, impl=impl, shape=shape, policy=policy, numbers=numbers).to_json()
                + "\n"
            )
        write_text(path, "".join(lines))

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> NeedleResult:
        """Rows from a file of records that `write` made; records of other operations are passed over."""
        return cls(tuple(_row(entry) for entry in read_records(path) if entry.get("op") == OP))


def _row(entry: Mapping[str, Any]) -> NeedleRow:
    values = {
        **entry["shape"],
        **entry["numbers"],
        "method": entry["impl"],
        "policy": entry["policy"],
    }
    return NeedleRow(**{field.name: values[field.name] for field in fields(NeedleRow)})

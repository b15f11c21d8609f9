"""Needle results: rows of scores and cache bytes, their means and grids, and their file of JSON lines.

A row is everything that is known of one method in one cell, so that tables, charts and records all read the same
numbers. Scores of different task versions are never mixed: putting them together is an error.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, Protocol, TypeVar

from duohead.evaluate.recording import AsRecord, recorder, write_rows
from duohead.record import read_records

Metric = Literal["exact_match", "first_token", "token_accuracy"]
Row = TypeVar("Row")
OP = "evaluate.needle"
_NUMBERS = (
    "answers",
    "exact_match",
    "first_token",
    "token_accuracy",
    "kv_bytes",
    "ttft_ms",
    "tpot_ms",
    "engine",
)


@dataclass(frozen=True)
class NeedleRow:
    """What one method scored in one cell of the grid; scores are fractions, bytes those of an allocated cache.

    `length` counts tokens (question and answers included), `depth` is the needle's place in the text from 0 to 1,
    `answers` are the scored ones of all `samples`. `retrieval_ratio` counts heads of gated layers. What the policy says
    of windows and storage, and `policy` (its digest), are None for full attention; windows are None where streaming
    heads keep every token (`evict` False). What follows `kv_bytes` says how the score was made (`attention` names what
    attended, `sample_seed` made needles and places) and what a real generation of one sequence took: milliseconds to
    the first token and per token after it, and what decoded. It is None where it was not measured or noted, as in
    records of earlier versions.
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
    prefill_recent: int | None = None
    retrieval_dtype: str | None = None
    streaming_dtype: str | None = None
    window_dtype: str | None = None
    evict: bool | None = None
    text: str | None = None
    text_digest: str | None = None
    sample_seed: int | None = None
    chunk: int | None = None
    batch: int | None = None
    attention: str | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    engine: str | None = None


class Versioned(Protocol):
    """A row of some version of a task."""

    @property
    def task(self) -> str:
        """The task's name."""
        ...

    @property
    def task_version(self) -> int:
        """Raised with every change of its wording or scoring."""
        ...


def check_versions(rows: Sequence[Versioned]) -> None:
    """Raise ValueError if there are rows of two versions of one task."""
    versions: dict[str, int] = {}
    for row in rows:
        known = versions.setdefault(row.task, row.task_version)
        if known != row.task_version:
            raise ValueError(
                f"rows mix versions {known} and {row.task_version} of task {row.task!r}, whose scores cannot be "
                "compared; keep one version, or run the other again"
            )


@dataclass(frozen=True)
class NeedleResult:
    """Rows of one evaluation, or of several with the same task versions; other versions cannot be compared."""

    rows: tuple[NeedleRow, ...]

    def __post_init__(self) -> None:
        check_versions(self.rows)

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
        """Write the rows to `path`, replacing it: one record per line, as `needle_recorder` makes them."""
        write_rows(path, self.rows, needle_recorder(model=model, dtype=dtype))

    @classmethod
    def read(cls, *paths: str | os.PathLike[str]) -> NeedleResult:
        """Rows from files of records that `write` made; records of other operations are passed over."""
        return cls(read_rows(paths, op=OP, kind=NeedleRow))


def needle_recorder(*, model: str, dtype: Any) -> AsRecord:
    """Makes records of rows; `impl` is the method (what attended is their `attention`), `model` what they depend on."""
    return recorder(op=OP, numbers=_NUMBERS, model=model, dtype=dtype)


def read_rows(
    paths: Sequence[str | os.PathLike[str]], *, op: str, kind: type[Row]
) -> tuple[Row, ...]:
    """Rows of dataclass `kind` from the records of `op`; ValueError if one lacks a field that has no default."""
    entries = (entry for path in paths for entry in read_records(path))
    return tuple(_row(entry, kind) for entry in entries if entry.get("op") == op)


def _row(entry: Mapping[str, Any], kind: type[Row]) -> Row:
    values = {
        **entry["shape"],
        **entry["numbers"],
        "method": entry["impl"],
        "policy": entry["policy"],
    }
    known = fields(kind)  # type: ignore[arg-type]
    needed = {field.name for field in known if field.default is MISSING}
    if missing := sorted(needed - values.keys()):
        raise ValueError(
            f"record {entry['op']!r} must say {', '.join(missing)}, got only {', '.join(sorted(values))}; it is "
            "damaged, or made by something else"
        )
    names = [field.name for field in known if field.name in values]
    return kind(
        **{n: tuple(values[n]) if isinstance(values[n], list) else values[n] for n in names}
    )

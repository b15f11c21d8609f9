"""Prose results: one row per method and length, with the figures of every part of the context, and their file.

The parts lie in the row because they belong together: a curve is read whole. Scores of different versions, like those
of needles, are never mixed. Use `ProseResult.write` and `ProseResult.read`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from duohead.evaluate.recording import AsRecord, recorder, write_rows
from duohead.evaluate.results import check_versions, read_rows

OP = "evaluate.prose"
VERSION = 1
_NUMBERS = (
    "perplexity",
    "kl_nats",
    "top1_agreement",
    "kv_bytes",
    "perplexity_by_position",
    "kl_nats_by_position",
)


@dataclass(frozen=True)
class ProseRow:
    """What one method made of prose at one context length; `tokens` predicted ones in `windows` windows.

    `perplexity` is per token, `kl_nats` the mean divergence of the method's next-token distribution from the full
    model's, KL(full || method), `top1_agreement` the share of places where both prefer the same token. The tuples hold
    the same for equal parts of the context, first to last. `kv_bytes` is the filled cache of one window. The rest is as
    in `NeedleRow`.
    """

    method: str
    retrieval_ratio: float
    sink: int | None
    recent: int | None
    prefill_recent: int | None
    policy: str | None
    length: int
    windows: int
    tokens: int
    perplexity: float
    kl_nats: float
    top1_agreement: float
    kv_bytes: int
    perplexity_by_position: tuple[float, ...]
    kl_nats_by_position: tuple[float, ...]
    text: str | None
    text_digest: str
    chunk: int
    attention: str
    task: str = "prose"
    task_version: int = VERSION
    retrieval_dtype: str | None = None
    streaming_dtype: str | None = None
    window_dtype: str | None = None
    evict: bool | None = None


@dataclass(frozen=True)
class ProseResult:
    """Rows of one evaluation, or of several of the same version."""

    rows: tuple[ProseRow, ...]

    def __post_init__(self) -> None:
        check_versions(self.rows)

    def row(self, method: str, length: int) -> ProseRow:
        """The row of a method at a length; ValueError if there is not exactly one."""
        found = [row for row in self.rows if (row.method, row.length) == (method, length)]
        if len(found) != 1:
            raise ValueError(
                f"{len(found)} rows are of method {method!r} at {length} tokens, one is needed"
            )
        return found[0]

    def write(self, path: str | os.PathLike[str], *, model: str, dtype: Any) -> None:
        """Write the rows to `path`, replacing it: one record per line, as `prose_recorder` makes them."""
        write_rows(path, self.rows, prose_recorder(model=model, dtype=dtype))

    @classmethod
    def read(cls, *paths: str | os.PathLike[str]) -> ProseResult:
        """Rows from files of records that `write` made; records of other operations are passed over."""
        return cls(read_rows(paths, op=OP, kind=ProseRow))


def prose_recorder(*, model: str, dtype: Any) -> AsRecord:
    """Makes records of rows; `impl` is the method, `model` among what they depend on."""
    return recorder(op=OP, numbers=_NUMBERS, model=model, dtype=dtype)

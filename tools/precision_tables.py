"""Precision of the cache against accuracy, read from the records of `python -m tools.findings precision`.

A way to store the heads is one row: its bytes per token at several lengths, its scores and its distance from the full
model. `tools/readme.py` puts the tables into docs/precision.md, and `finding_figures.py` draws the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from duohead.evaluate.methods import share_name
from duohead.evaluate.svg import short_count
from tools.finding_records import TASKS, Records, four, mean, models, of
from tools.speed_tables import NOTHING, machine_line, table

_CASE = ("ratio", "retrieval", "streaming", "evict", "rotation")


@dataclass(frozen=True)
class Row:
    """One way to store the heads of one model.

    ``per_token`` are allocated bytes by length, ``exact`` means over the four tasks in percent by length, ``kl``
    (nats) and ``perplexity`` are on held-out prose by length. ``answers`` is how many answers of a task there were at
    the length that has fewest. ``retrieval`` None is the model as it is.
    """

    model: str
    ratio: float
    retrieval: str | None
    streaming: str | None
    evict: bool
    rotation: str | None
    answers: int
    per_token: dict[int, float]
    exact: dict[int, float]
    kl: dict[int, float]
    perplexity: dict[int, float]

    @property
    def family(self) -> str:
        """Which heads are treated alike."""
        if self.retrieval is None:
            return "model as it is"
        if self.ratio == 1:
            return "all heads alike"
        return f"{share_name(self.ratio)} %, {'others evict' if self.evict else 'others keep all'}"

    @property
    def storage(self) -> str:
        """Formats of retrieval and streaming heads."""
        if self.retrieval is None:
            return "its own"
        turned = "" if self.rotation is None else f", {self.rotation}"
        both = (self.retrieval, self.streaming)
        return " + ".join(str(name) for name in dict.fromkeys(both)) + turned

    @property
    def longest(self) -> int:
        """The longest length at which prose was measured, and needles too if there is one of both."""
        return max(set(self.exact) & set(self.kl) or self.kl)


def rows(records: Records, *, model: str | None = None) -> list[Row]:
    """A row for each way that was measured on a model (of every model by default), in the order of the records."""
    own = [e for e in of(records, "precision") if model in (None, e["shape"]["model"])]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for entry in own:
        shape = entry["shape"]
        groups.setdefault((shape["model"], *(shape[name] for name in _CASE)), []).append(entry)
    made = []
    for key, found in sorted(groups.items(), key=lambda group: _order(group[0])):
        numbers = {
            e["shape"]["length"]: e for e in sorted(found, key=lambda e: e["shape"]["length"])
        }
        made.append(
            Row(
                **dict(zip(("model", *_CASE), key, strict=True)),
                answers=min(e["shape"]["samples"] for e in found),
                per_token={n: e["numbers"]["kv_bytes"] / n for n, e in numbers.items()},
                exact={n: four(e) for n, e in numbers.items() if TASKS[0] in e["numbers"]},
                kl=_by_length(numbers, "kl_nats"),
                perplexity=_by_length(numbers, "perplexity"),
            )
        )
    return made


def front(found: Iterable[Row], *, at: int) -> list[Row]:
    """The rows that no other one beats in both bytes and divergence at a length, smallest first."""
    best: list[Row] = []
    for row in sorted(found, key=lambda row: (row.per_token[at], row.kl[at])):
        if not best or row.kl[at] < best[-1].kl[at]:
            best.append(row)
    return best


def precision(model: str) -> Callable[[Records], str]:
    """A table maker: every way to store the heads of one model, the front in bold."""

    def make(records: Records) -> str:
        found = rows(records, model=model)
        if not found:
            return NOTHING
        at = min(row.longest for row in found)
        best = front((row for row in found if row.retrieval and not row.rotation), at=at)
        sizes = [n for n in (1024, 8192, 16384) if all(n in row.per_token for row in found)]
        scored = sorted(found[0].exact)
        most = max(row.answers for row in found)
        apart = [n for n in (2048, 8192, 16384) if all(n in row.kl for row in found)]
        lines = [
            [
                row.family,
                f"**{row.storage}**" if row in best else row.storage,
                *(f"{row.per_token[n]:,.0f}" for n in sizes),
                *(f"{row.exact[n]:.1f}" + "\\*" * (row.answers < most) for n in scored),
                f"{row.perplexity[at]:.2f}",
                *(f"{row.kl[n]:.4f}" for n in apart),
            ]
            for row in found
        ]
        head = [
            "heads",
            "storage",
            *(f"B/token, {short_count(n)}" for n in sizes),
            *(f"exact, {short_count(n)}" for n in scored),
            f"perplexity, {short_count(at)}",
            *(f"KL, {short_count(n)}" for n in apart),
        ]
        fewer = sorted({row.answers for row in found if row.answers < most})
        note = f" \\*: {', '.join(map(str, fewer))} answers of a task, not {most}." if fewer else ""
        return table(head, lines) + f"\n{machine_line(of(records, 'precision')[-1])}{note}\n"

    return make


def lengths(records: Records) -> str:
    """Divergence by length, all at int8: every head, and shares of heads with eviction of the others."""
    found = [
        row
        for row in rows(records)
        if row.retrieval == row.streaming == "int8" and row.evict and not row.rotation
    ]
    if not found:
        return NOTHING
    known = sorted(set.intersection(*(set(row.kl) for row in found)))
    lines = [
        [f"{row.model}, {row.family}", *(f"{row.kl[n]:.4f}" for n in known)]
        for model in models(of(records, "precision"))
        for row in found
        if row.model == model
    ]
    return table(["", *map(short_count, known)], lines) + _place(records)


def pairs(records: Records) -> str:
    """Bytes (share of all heads in bf16) and divergence of pairs of formats with eviction, at the longest text."""
    formats = (("int8", "int8"), ("fp8", "int4"), ("int4", "int8"))
    own = [row for row in rows(records) if row.evict and not row.rotation]
    if not own:
        return NOTHING
    at = max(own[0].kl)
    full = {
        row.model: row.per_token[at]
        for row in own
        if row.ratio == 1 and row.retrieval == row.streaming == "bf16"
    }
    cells: dict[str, dict[tuple[str | None, str | None], str]] = {}
    for model in models(of(records, "precision")):
        for row in own:
            if row.model == model and row.ratio < 1:
                share = 100 * row.per_token[at] / full[model]
                name = f"{model}, {row.family}"
                formatted = f"{share:.1f} %, {row.kl[at]:.4f}"
                cells.setdefault(name, {})[row.retrieval, row.streaming] = formatted
    lines = [[name, *(found.get(pair, "") for pair in formats)] for name, found in cells.items()]
    return table(["", *(" + ".join(pair) for pair in formats)], lines) + _place(records)


def _place(records: Records) -> str:
    return f"\n{machine_line(of(records, 'precision')[-1])}\n"


def remaining(records: Records, since: Records) -> str:
    """Ways that only the first records have, every model: what the others have not measured yet, at one length."""
    known = {_case(row) for row in rows(since)}
    found = (row for model in models(records) for row in rows(records, model=model))
    left = [row for row in found if _case(row) not in known]
    if not left:
        return "Every way has been measured there.\n"
    lines = [
        [
            f"{row.model}, {row.family}",
            row.storage,
            f"{row.per_token[row.longest]:,.0f}",
            f"{row.kl[row.longest]:.4f}",
        ]
        for row in left
    ]
    at = short_count(left[0].longest)
    head = ["heads", "storage", f"B/token, {at}", f"KL, {at}"]
    return table(head, lines) + _place(records)


def rotation(records: Records) -> str:
    """Divergence and exact match of the same storage with and without a rotation."""
    found = rows(records)
    plain = {_twin(row): row for row in found if row.rotation is None}
    pairs = [(plain[_twin(row)], row) for row in found if row.rotation and _twin(row) in plain]
    if not pairs:
        return NOTHING
    lines = []
    for before, after in pairs:
        at = before.longest
        lines.append(
            [
                f"{after.model}, {after.family}, {after.storage}",
                f"{before.kl[at]:.4f}",
                f"{after.kl[at]:.4f}",
                f"{100 * (after.kl[at] / before.kl[at] - 1):+.0f} %",
                *(f"{mean(row.exact.values()):.1f}" for row in (before, after)),
            ]
        )
    head = ["", "KL plain", "KL rotated", "", "exact plain", "exact rotated"]
    return table(head, lines) + _place(records)


def _by_length(numbers: dict[int, dict[str, Any]], name: str) -> dict[int, float]:
    return {n: e["numbers"][name] for n, e in numbers.items() if name in e["numbers"]}


def _case(row: Row) -> tuple[Any, ...]:
    return *_twin(row), row.rotation


def _twin(row: Row) -> tuple[Any, ...]:
    return row.model, row.ratio, row.retrieval, row.streaming, row.evict


def _order(key: Sequence[Any]) -> tuple[Any, ...]:
    """The model as it is first, then many retrieval heads before few, eviction before low precision, rotations last."""
    _, ratio, retrieval, _, evict, turned = key
    return retrieval is not None, -ratio, not evict, turned is not None

"""Precision of the cache against accuracy, read from the records of `python -m tools.findings precision`.

A way to store the heads is one row: its bytes per token at several lengths, its scores and its distance from the full
model. `tools/readme.py` puts the tables into docs/precision.md, and `finding_figures.py` draws the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from duohead.evaluate.methods import share_name
from duohead.evaluate.svg import short_count
from tools.finding_records import TASKS, Records, four, mean, models, of, of_one_pattern
from tools.speed_tables import NOTHING, machine_line, table

# What follows the name of a format whose vectors are rotated.
_ROTATED = "-hadamard"
_CASE = ("ratio", "retrieval", "streaming", "evict")


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
        """What is written of the formats."""
        if self.retrieval is None:
            return "its own"
        return " + ".join(dict.fromkeys(self.formats))

    @property
    def formats(self) -> tuple[str, str]:
        """Formats of retrieval heads and of the others."""
        return str(self.retrieval), str(self.streaming)

    @property
    def plain(self) -> tuple[str, ...]:
        """The same formats without a rotation, in their shortest spelling."""
        parts = (name.replace(_ROTATED, "").split("/") for name in self.formats)
        return tuple("/".join(dict.fromkeys(names)) for names in parts)

    @property
    def longest(self) -> int:
        """The longest length at which prose was measured, and needles too if there is one of both."""
        return max(set(self.exact) & set(self.kl) or self.kl)


def rows(records: Records, *, model: str | None = None) -> list[Row]:
    """A row for each way that was measured on a model (of every model by default), model by model.

    A way that lacks a length, because its run was cut short, has none.
    """
    own = [e for e in of(records, "precision") if model in (None, e["shape"]["model"])]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for entry in own:
        shape = entry["shape"]
        formats = (_format(shape, kind) for kind in ("retrieval", "streaming"))
        case = (shape["model"], shape["ratio"], *formats, shape["evict"])
        groups.setdefault(case, []).append(entry)
    made = []
    for key, every in groups.items():
        found = of_one_pattern(every)
        by_length = sorted(found, key=lambda e: (e["shape"]["length"], e["time"]))
        numbers = {e["shape"]["length"]: e for e in by_length}
        made.append(
            Row(
                **dict(zip(("model", *_CASE), key, strict=True)),
                answers=min(e["shape"]["samples"] for e in numbers.values()),
                per_token={n: e["numbers"]["kv_bytes"] / n for n, e in numbers.items()},
                exact={n: four(e) for n, e in numbers.items() if TASKS[0] in e["numbers"]},
                kl=_by_length(numbers, "kl_nats"),
                perplexity=_by_length(numbers, "perplexity"),
            )
        )
    among = {row.model: max(len(r.per_token) for r in made if r.model == row.model) for row in made}
    whole = [row for row in made if len(row.per_token) == among[row.model]]
    order = models(own)
    return sorted(whole, key=lambda row: (order.index(row.model), *_order(row)))


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
        best = front((row for row in found if row.retrieval), at=at)
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
    found = [row for row in rows(records) if row.retrieval == row.streaming == "int8" and row.evict]
    if not found:
        return NOTHING
    known = sorted(set.intersection(*(set(row.kl) for row in found)))
    lines = [[f"{row.model}, {row.family}", *(f"{row.kl[n]:.4f}" for n in known)] for row in found]
    return table(["", *map(short_count, known)], lines) + _place(records)


def pairs(records: Records) -> str:
    """Bytes (share of all heads in bf16) and divergence of pairs of formats with eviction, at the longest text."""
    formats = (("int8", "int8"), ("fp8", "int4"), ("int4", "int8"))
    own = [row for row in rows(records) if row.evict]
    if not own:
        return NOTHING
    at = max(own[0].kl)
    full = {
        row.model: row.per_token[at]
        for row in own
        if row.ratio == 1 and row.retrieval == row.streaming == "bf16"
    }
    cells: dict[str, dict[tuple[str | None, str | None], str]] = {}
    for row in own:
        if row.ratio < 1:
            share = 100 * row.per_token[at] / full[row.model]
            formatted = f"{share:.1f} %, {row.kl[at]:.4f}"
            named = cells.setdefault(f"{row.model}, {row.family}", {})
            named[row.retrieval, row.streaming] = formatted
    lines = [[name, *(found.get(pair, "") for pair in formats)] for name, found in cells.items()]
    return table(["", *(" + ".join(pair) for pair in formats)], lines) + _place(records)


def _place(records: Records) -> str:
    return f"\n{machine_line(of(records, 'precision')[-1])}\n"


def rotation(records: Records) -> str:
    """Divergence and exact match of the same storage with and without a rotation."""
    found = rows(records)
    plain = {_twin(row): row for row in found if row.plain == row.formats}
    turned = (row for row in found if row.plain != row.formats)
    pairs = [(plain[_twin(row)], row) for row in turned if _twin(row) in plain]
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


def _twin(row: Row) -> tuple[Any, ...]:
    return row.model, row.family, row.plain


def _format(shape: Mapping[str, Any], kind: str) -> str | None:
    """Name of the format of a kind of head; records from before int4-hadamard was one state the rotation apart."""
    name = shape[kind]
    return name.replace("int4", f"int4{_ROTATED}") if shape.get("rotation") else name


def _order(row: Row) -> tuple[Any, ...]:
    """The model as it is first, then many retrieval heads before few, those that evict, and many bytes before few."""
    longest = max(row.per_token)
    taken, kl = row.per_token[longest], row.kl.get(longest, 0.0)
    return row.retrieval is not None, -row.ratio, not row.evict, -taken, kl

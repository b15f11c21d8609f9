"""The tables of docs/laguna.md on accuracy: what pocket-laguna finds with few heads, and what its windows are worth.

Made from the records of `duohead evaluate needle` and `prose`, and of `tools/laguna_heads.py`; of several records of
one thing the newest counts. Needles at the very start and end of a text are left out: every head sees them there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from duohead.evaluate.prose_results import ProseResult
from duohead.evaluate.results import NeedleResult
from duohead.evaluate.svg import short_count
from duohead.record import read_records
from tools.finding_records import TASKS, Records
from tools.laguna_heads import WINDOWS
from tools.needle_tables import HEADS, named, span, weight
from tools.speed_tables import NOTHING, machine_line, table

SHARE = 0.4  # of all heads that the adapter keeps whole
_SAID = {"native": "as they are", "ignored": "ignored, as the adapter trained"}


def accuracy(path: Path) -> str:
    """Each choice of heads: exact match per task over all lengths, first tokens, prose, and bytes at the longest."""
    given = NeedleResult.read(path)
    result = NeedleResult(tuple(row for row in given.rows if 0 < row.depth < 1))
    prose = {row.method: row for row in ProseResult.read(path).rows}
    longest = result.lengths[-1]
    rows = []
    for name, methods in named(result).items():
        exact = [span([100 * result.mean(method=m, task=task) for m in methods]) for task in TASKS]
        first = [100 * result.mean("first_token", method=m) for m in methods]
        told = [prose[m] for m in methods if m in prose]
        rows.append(
            [
                name,
                *exact,
                span(first),
                f"{told[0].perplexity:.2f}" if told else "",
                f"{told[0].kl_nats:.3f}" if told else "",
                weight(result, methods[0]),
            ]
        )
    length = short_count(next(iter(prose.values())).length)
    head = [HEADS, *TASKS, "first token", f"perplexity, {length}"]
    head += [f"KL, {length}", f"cache, {short_count(longest)}"]
    return table(head, rows) + f"\n{machine_line(read_records(path)[-1])}\n"


def windows(records: Records) -> str:
    """The model with its windows and without: what full attention finds, and where echo sees heads to keep."""
    found = {entry["shape"]["windows"]: entry for entry in of_op(records, WINDOWS, "windows")}
    if len(found) < len(_SAID):
        return NOTHING
    prose = ["perplexity"] if all("perplexity" in e["numbers"] for e in found.values()) else []
    rows = [
        [
            said,
            *(f"{found[name]['numbers'][task]:.0f} %" for task in TASKS),
            *(f"{found[name]['numbers'][told]:.1f}" for told in prose),
            _layers(found[name]["numbers"]["alpha"], found["native"]["numbers"]["alpha"]),
        ]
        for name, said in _SAID.items()
    ]
    head = ["windows", *TASKS, *prose, f"the {100 * SHARE:.0f} % that `echo` would keep"]
    return table(head, rows) + f"\n{machine_line(found['native'])}\n"


def of_op(records: Records, op: str, *names: str) -> list[dict[str, Any]]:
    """The records of an operation, of each combination of these settings the newest."""
    newest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for entry in (entry for entry in records if entry["op"] == op):
        key = tuple(entry["shape"][name] for name in names)
        if entry["time"] >= newest.get(key, entry)["time"]:
            newest[key] = entry
    return list(newest.values())


def _layers(alpha: Sequence[Sequence[float | None]], native: Sequence[Sequence[Any]]) -> str:
    """How many of the heads with the highest alphas lie in global layers, and how many in windowed ones."""
    scored = [(a, layer) for layer, row in enumerate(alpha) for a in row if a is not None]
    best = sorted(scored, reverse=True)[: round(SHARE * len(scored))]
    inside = sum(native[layer][0] is None for _, layer in best)
    return f"{len(best) - inside} in global layers, {inside} in windowed ones"

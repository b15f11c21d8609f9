"""The tables on training gates: ways to train them against one another, and how few steps do.

`tools.findings.gates` and `tools.findings.steps` leave the records; `tools/readme.py` puts the tables into the pages.
Heads that two trainings share are counted here, from the heads in their records, since processes that make the records
do not wait for one another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from duohead.evaluate.methods import share_name
from tools.finding_compare import Cells, cost, difference, over_tasks
from tools.finding_records import Records, is_of, mean, models, of, values
from tools.finding_tables import line_of, spread
from tools.findings.gates import FULL
from tools.findings.lab import RATIOS
from tools.findings.steps import REFERENCE
from tools.speed_tables import NOTHING, table


def gates(model: str) -> Callable[[Records], str]:
    """A table maker: of every way the mean over all tasks at each share, its difference to full attention, the cost."""

    def make(records: Records) -> str:
        own = [e for e in of(records, "gates") if is_of(e, model=model)]
        ranked = [e for e in own if not is_of(e, way=FULL)]
        if not ranked:
            return NOTHING
        full = _cells([e for e in own if is_of(e, way=FULL)])
        shares = sorted(values(ranked, "ratio"), reverse=True)
        rows = []
        for way in sorted(values(ranked, "way")):
            cells = []
            for share in shares:
                found = [e for e in ranked if is_of(e, way=way, ratio=share)]
                seeds = spread([e["numbers"]["mean"] for e in found])
                cells.append(f"{seeds}; {difference(_cells(found), full)}" if found else "")
            mine = [e for e in ranked if is_of(e, way=way)]
            ties = mean(e["numbers"]["ties_at_one"] for e in mine)
            rows.append([way, *cells, f"{ties:.1f}", *cost(mine)])
        rows.append(["*full attention*", *[f"{over_tasks(full):.1f}"] * len(shares), *[""] * 4])
        head = [
            "trained on", *(f"{share_name(s)} %" for s in shares),
            "gates at 1", "time", "forward", "backward",
        ]  # fmt: skip
        return table(head, rows) + line_of(own)

    return make


def saved(records: Records) -> str:
    """Shorter trainings against the longest one: heads shared, and exact match over three tasks."""
    own = with_overlaps([e for e in records if e["op"] == "identify.steps_saved"])
    if not own:
        return NOTHING
    rows = [
        [
            f"{e['shape']['model']}, {e['impl']}",
            str(e["numbers"]["steps_done"]),
            *(
                f"{100 * e['numbers'][f'overlap_{r}']:.0f} %, {100 * e['numbers'][f'exact_match_{r}']:.0f}"
                for r in RATIOS
            ),
        ]
        for model in models(own)
        for e in sorted((e for e in own if is_of(e, model=model)), key=_place)
    ]
    head = ["", "steps", *(f"{share_name(r)} %: shared, exact match" for r in RATIOS)]
    return table(head, rows) + line_of(own)


def with_overlaps(records: Records) -> list[dict[str, Any]]:
    """Records of `steps` with ``overlap_R`` in their numbers: how many of the longest training's heads they select.

    Those of a model whose longest training has no record are left out: there is nothing to compare them with.
    """
    longest = {e["shape"]["model"]: e["numbers"] for e in records if e["impl"] == REFERENCE}
    found = []
    for entry in records:
        theirs = longest.get(entry["shape"]["model"])
        if theirs is not None:
            mine = {
                f"overlap_{r}": _overlap(entry["numbers"], theirs, f"heads_{r}") for r in RATIOS
            }
            found.append({**entry, "numbers": {**entry["numbers"], **mine}})
    return found


def _overlap(mine: dict[str, Any], theirs: dict[str, Any], name: str) -> float:
    return len({*mine[name]} & {*theirs[name]}) / len(theirs[name])


def _place(entry: dict[str, Any]) -> tuple[bool, bool, float, float, int, int]:
    """Where a setting stands in the table: plain ones first, then patience, then targets; the longest first."""
    shape = entry["shape"]
    patience, target = shape["patience"], shape["target"]
    longest = -shape["context_max"]
    return bool(target), bool(patience), longest, -shape["steps"], patience, shape["seed"]


def _cells(entries: Records) -> Cells:
    """By task and place of a cell its exact match, seeds averaged."""
    tasks = entries[0]["numbers"]["cells"]
    return {
        task: {
            (place, ""): mean(e["numbers"]["cells"][task][place] for e in entries)
            for place in range(len(tasks[task]))
        }
        for task in tasks
    }

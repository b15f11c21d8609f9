"""The table of docs/findings.md on wide windows: what each costs and which tasks it leaves more than a point behind.

Differences to full attention stand with standard errors as in `finding_compare.py`, over cells of task, length and
depth; seeds are averaged first. `tools/readme.py` puts the table into the page.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from duohead.evaluate.svg import short_count
from tools.finding_compare import by_cell, difference
from tools.finding_records import Records, is_of, mean, models, of, values
from tools.finding_tables import line_of
from tools.speed_tables import NOTHING, table

# Percentage points that a task may lose, and what rounding adds to them.
NEAR, _ROUNDING = 1.0, 1e-6


def reach(records: Records) -> str:
    """A row for each model, window, and window that the heads were identified with."""
    own = of(records, "reach")
    if not own:
        return NOTHING
    lengths = sorted(values(own, "length"))
    rows = []
    for model in models(own):
        mine = [e for e in own if is_of(e, model=model)]
        full = [e for e in mine if is_of(e, recent=None)]
        cases: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
        for e in mine:
            if e not in full:
                cases[e["shape"]["recent"], e["shape"]["identified"]].append(e)
        rows += [
            [model, *map(str, case), *_shares(entries, full, lengths), *_lost(entries, full)]
            for case, entries in sorted(cases.items())
        ]
    sizes = [f"bytes at {name}" for name in (*map(short_count, lengths), "128K")]
    head = ["", "recent", "identified with", *sizes, "mean less full", "within a point", "others"]
    return table(head, rows) + line_of(own)


def _shares(entries: Records, full: Records, lengths: list[int]) -> list[str]:
    """Bytes of the cache, of a full one: measured at the lengths, and what follows from the policy at 128K."""
    measured = [
        100 * mean(_bytes(entries, length)) / mean(_bytes(full, length)) for length in lengths
    ]
    far = mean(e["numbers"]["share_128k"] for e in entries)
    return [f"{share:.1f} %" for share in (*measured, far)]


def _bytes(entries: Records, length: int) -> list[int]:
    return [e["numbers"]["kv_bytes"] for e in entries if is_of(e, length=length)]


def _lost(entries: Records, full: Records) -> list[str]:
    """The mean over tasks less that of full attention, how many tasks are near it, and what the others lose."""
    ours, whole = by_cell(entries), by_cell(full)
    alone = {task: ({task: ours[task]}, {task: whole[task]}) for task in whole}
    far = [
        task
        for task in whole
        if mean(whole[task].values()) - mean(ours[task].values()) > NEAR + _ROUNDING
    ]
    named = ", ".join(f"{task} {difference(*alone[task])}" for task in far)
    return [difference(ours, whole), f"{len(whole) - len(far)} of {len(whole)}", named]

"""The tables that compare ways to find heads, from what `tools/condense.py` leaves of `duohead evaluate compare`.

A difference between two ways stands with its standard error: both answered the same samples, so it is taken in every
cell (task, length and depth; seeds averaged first), and the spread among the cells of a task says how well the task's
mean is known. Within two standard errors nothing is told apart.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import variance
from typing import Any

from duohead.evaluate.methods import share_name
from tools.finding_records import Records, is_of, mean
from tools.finding_tables import count, line_of, spread
from tools.speed_tables import NOTHING, table

SUMMARY = "evaluate.compare.summary"
FULL, OURS = "full", "eliminate"
# By task: by (length, depth) the exact match in percent.
Cells = Mapping[str, Mapping[tuple[int, str], float]]


def compare(records: Records) -> str:
    """A line per scorer: mean over all tasks and lengths at each share of heads, and what it cost."""
    ranked = _ranked(records)
    if not ranked:
        return NOTHING
    shares = _shares(ranked)
    rows = []
    for way in dict.fromkeys(map(_way, ranked)):
        own = [e for e in ranked if _way(e) == way]
        cells = [
            spread(
                [
                    mean(_all_tasks(e) for e in own if is_of(e, retrieval_ratio=share, seed=seed))
                    for seed in sorted({e["shape"]["seed"] for e in own})
                ]
            )
            for share in shares
        ]
        rows.append([way, *cells, *cost(own, prefix="identify_")])
    full = [e for e in records if e["op"] == SUMMARY and e["shape"]["scorer"] == FULL]
    rows.append(
        ["*full attention*", *[f"{mean(map(_all_tasks, full)):.1f}"] * len(shares), *[""] * 3]
    )
    return table(["scorer", *_named(shares), "time", "forward", "backward"], rows) + line_of(ranked)


def close(records: Records) -> str:
    """A line per way: mean over all tasks, its difference to full attention with standard error, and what it cost."""
    ranked = _ranked(records)
    if not ranked:
        return NOTHING
    shares = _shares(ranked)
    full = _cells(records, FULL)
    rows = []
    for way in dict.fromkeys(map(_way, ranked)):
        found = [_cells(records, way, share) for share in shares]
        cells = [f"{over_tasks(one):.1f} ({difference(one, full)})" for one in found]
        own = [e for e in ranked if _way(e) == way]
        rows.append([way, *cells, *cost(own, prefix="identify_")])
    rows.append(["*full attention*", *[f"{over_tasks(full):.1f}"] * len(shares), *[""] * 3])
    return table(["scorer", *_named(shares), "time", "forward", "backward"], rows) + line_of(ranked)


def rivals(records: Records) -> str:
    """How far our own scorer is ahead of every other one at each share, with the standard error."""
    ranked = _ranked(records)
    if not ranked:
        return NOTHING
    shares = _shares(ranked)
    rows = [
        [
            f"{OURS} less {way}",
            *(
                difference(_cells(records, OURS, share), _cells(records, way, share))
                for share in shares
            ),
        ]
        for way in dict.fromkeys(map(_way, ranked))
        if way != OURS
    ]
    return table(["", *_named(shares)], rows) + line_of(ranked)


def close_tasks(records: Records) -> str:
    """Every task at an eighth of the heads, and how far our own scorer is from full attention there."""
    ranked = [e for e in _ranked(records) if is_of(e, retrieval_ratio=0.125)]
    if not ranked:
        return NOTHING
    full, ours = _cells(records, FULL), _cells(records, OURS, 0.125)
    ways = list(dict.fromkeys(map(_way, ranked)))
    found = [_cells(records, way, 0.125) for way in ways]
    rows = [
        [
            task,
            *(f"{mean(one[task].values()):.1f}" for one in (full, *found)),
            difference({task: ours[task]}, {task: full[task]}),
        ]
        for task in full
    ]
    return table(["task", FULL, *ways, f"{OURS} less full"], rows) + line_of(ranked)


def difference(one: Cells, other: Cells) -> str:
    """Mean over tasks of ``one`` less ``other``, and its standard error; both have the same cells."""
    pairs = [[one[task][cell] - other[task][cell] for cell in other[task]] for task in other]
    gap = mean(map(mean, pairs))
    error = sum(variance(pair) / len(pair) for pair in pairs) ** 0.5 / len(pairs)
    return f"{gap:+.1f} ± {error:.1f}".replace("-0.0 ", "0.0 ").replace("+0.0 ", "0.0 ")


def by_cell(entries: Records) -> Cells:
    """By task, then length and depth, the exact match of records that have it ``by_depth``; seeds averaged."""
    found: dict[str, dict[tuple[int, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    for entry in entries:
        for task, depths in entry["numbers"]["by_depth"].items():
            for depth, right in depths.items():
                found[task][entry["shape"]["length"], depth].append(right)
    return {
        task: {cell: mean(seeds) for cell, seeds in cells.items()} for task, cells in found.items()
    }


def over_tasks(cells: Cells) -> float:
    """The mean over tasks of their means over cells."""
    return mean(mean(task.values()) for task in cells.values())


def cost(own: Records, *, prefix: str = "") -> list[str]:
    """Seconds and tokens that a ranking took, means over seeds, from the numbers called so after ``prefix``."""
    seconds, *tokens = (
        mean(e["numbers"][f"{prefix}{name}"] for e in own)
        for name in ("seconds", "forward_tokens", "backward_tokens")
    )
    return [f"{seconds:.0f} s", *map(count, tokens)]


def _cells(records: Records, way: str, share: float | None = None) -> Cells:
    wanted = {} if share is None else {"retrieval_ratio": share}
    return by_cell(
        [e for e in records if e["op"] == SUMMARY and _way(e) == way and is_of(e, **wanted)]
    )


def _ranked(records: Records) -> list[dict[str, Any]]:
    return [e for e in records if e["op"] == SUMMARY and e["shape"]["scorer"] != FULL]


def _way(entry: Mapping[str, Any]) -> str:
    """The scorer, and the option of it that makes another way of the same one."""
    scorer: str = entry["shape"]["scorer"]
    target = json.loads(entry["shape"].get("options", "{}")).get("target")
    return f"{scorer}, target {target:g}" if scorer == "optimise" and target else scorer


def _shares(ranked: Records) -> list[float]:
    return sorted({e["shape"]["retrieval_ratio"] for e in ranked}, reverse=True)


def _named(shares: Sequence[float]) -> list[str]:
    return [f"{share_name(share)} %" for share in shares]


def _all_tasks(entry: Mapping[str, Any]) -> float:
    return mean(entry["numbers"][task] for task in entry["shape"]["task_versions"])

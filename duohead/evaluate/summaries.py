"""Summaries of comparisons as the scores that they sum up: a record for each task, as an evaluation would have written.

A comparison of scorers has thousands of records, and what is kept of them has all tasks of one way to find heads side
by side, in percent; pictures of accuracy against footprint know tasks alone. `by_task(entries)` takes summaries apart
and leaves everything else as it is; `by_answers` keeps comparisons apart that asked more or less.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from duohead.evaluate.collect import Entry

COMPARISON = "evaluate.compare"
_SUMMARY = f"{COMPARISON}.summary"


def by_task(entries: Sequence[Entry]) -> list[Entry]:
    """The entries, every summary replaced by an entry for each of its tasks.

    A scorer that summaries of a model ran with several options has what differs in its name, since it is another way to
    find heads then.
    """
    options: dict[tuple[object, ...], dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for entry in filter(_tasks, entries):
        options[_way(entry)][str(entry.shape.get("options"))] = _options(entry)
    found = []
    for entry in entries:
        if not _tasks(entry):
            found.append(entry)
            continue
        shape = dict(entry.shape)
        if "scorer" in shape:
            shape["scorer"] += _differing(_options(entry), list(options[_way(entry)].values()))
        found += _apart(replace(entry, shape=shape))
    return found


def by_answers(entries: Sequence[Entry]) -> list[Entry]:
    """The entries, comparisons that gave a task's methods different numbers of answers named by theirs.

    They were made apart, so their methods are not to be held against one another in one table.
    """
    samples: dict[tuple[object, ...], set[object]] = defaultdict(set)
    for entry in (entry for entry in entries if entry.op == COMPARISON):
        samples[_cell(entry)].add(entry.shape.get("samples"))
    several = {cell[0] for cell, found in samples.items() if len(found) > 1}
    return [
        replace(entry, shape={**entry.shape, "model": _with_answers(entry)})
        if entry.op == COMPARISON and entry.shape.get("model") in several
        else entry
        for entry in entries
    ]


def _cell(entry: Entry) -> tuple[object, ...]:
    return tuple(entry.shape.get(name) for name in ("model", "task", "length", "depth"))


def _with_answers(entry: Entry) -> str:
    return f"{entry.shape.get('model')}, {entry.shape.get('samples')} answers"


def _tasks(entry: Entry) -> Mapping[str, Any]:
    """The versions of the tasks that an entry sums up; empty if it is no summary."""
    versions = entry.shape.get("task_versions")
    return versions if entry.op == _SUMMARY and isinstance(versions, Mapping) else {}


def _way(entry: Entry) -> tuple[object, ...]:
    shape = entry.shape
    return shape.get("model"), shape.get("scorer")


def _options(entry: Entry) -> Mapping[str, Any]:
    """A scorer's options but the seed, which makes a draw and no other way."""
    found = json.loads(entry.shape.get("options") or "{}")
    return {name: value for name, value in found.items() if name != "seed"}


def _differing(own: Mapping[str, Any], every: Sequence[Mapping[str, Any]]) -> str:
    """ " (target 0.04)": the options that are not the same in all, but for those that are off."""
    names = [name for name in own if any(other.get(name) != own[name] for other in every)]
    said = ", ".join(f"{name.replace('_', ' ')} {own[name]}" for name in names if own[name])
    return f" ({said})" if said else ""


def _apart(entry: Entry) -> list[Entry]:
    versions = _tasks(entry)
    shape = {name: value for name, value in entry.shape.items() if name != "task_versions"}
    costs = {n: v for n, v in entry.numbers.items() if n not in versions and n != "by_depth"}
    return [
        replace(
            entry,
            op=COMPARISON,
            shape={**shape, "task": task, "task_version": version},
            numbers={**costs, "exact_match": entry.numbers[task] / 100},
        )
        for task, version in versions.items()
    ]

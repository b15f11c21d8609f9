"""The report's sections on experiments: whatever a set of records varies, as matrices and as a table.

An experiment is a set of records of one operation that differ in some settings. Which settings those are is read off
the records, so a new question needs nothing new here: two of them make a matrix, one of them a matrix over what was
measured, and every number stands in a table. `sections(entries)` takes what no other section knows.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import islice
from typing import Any

from duohead.evaluate.collect import Entry
from duohead.evaluate.heatmap import HeatMap
from duohead.evaluate.page import card, html_table, section
from duohead.evaluate.tasks import TASKS

EXPERIMENT = "findings."
# Averaged over, and never an axis.
_REPEATS = ("seed", "draw")
_RATIOS = ("ratio", "retrieval_ratio")
_MATRICES, _NUMBERS, _ROWS = 4, 64, 400


def sections(entries: Sequence[Entry]) -> list[tuple[str, str, str]]:
    """(name, title, HTML): experiments with their matrices, and everything else as tables."""
    known: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    other: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    for entry in entries:
        place = known if entry.op.startswith(EXPERIMENT) else other
        place[entry.op, str(entry.shape.get("model", ""))].append(entry)
    found = []
    if known:
        text = "Each experiment varies what its axes name; cells are means over seeds. All numbers are in the tables."
        cards = [_experiment(op, model, own) for (op, model), own in known.items()]
        html = section("ablations", "Ablations", text, cards)
        found.append(("ablations", "Ablations", html))
    if other:
        text = "Records that no picture above is made of, as they are."
        cards = [_plain(op, model, own) for (op, model), own in other.items()]
        found.append(("other", "Other records", section("other", "Other records", text, cards)))
    return found


def varied(entries: Sequence[Entry]) -> list[str]:
    """Names of settings that differ between the records, in the order they are written."""
    names = dict.fromkeys(name for entry in entries for name in entry.shape)
    return [name for name in names if len({repr(entry.shape.get(name)) for entry in entries}) > 1]


def flat(numbers: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Numbers of inner mappings under all their names: "by_depth, 0.25"."""
    found: dict[str, Any] = {}
    for name, value in numbers.items():
        if isinstance(value, Mapping):
            found.update(flat(value, f"{prefix}{name}, "))
        else:
            found[f"{prefix}{name}"] = value
    return found


def _experiment(op: str, model: str, own: Sequence[Entry]) -> str:
    title = op.removeprefix(EXPERIMENT).replace("_", " ").capitalize()
    title += f", {model}" if model else ""
    maps = list(islice(_matrices(own), _MATRICES))
    body = f'<div class="many">{"".join(maps)}</div>' if maps else ""
    fixed = {
        name: value
        for name, value in own[0].shape.items()
        if name not in varied(own) and name != "model" and value is not None
    }
    said = ", ".join(f"{name.replace('_', ' ')} {_written(value)}" for name, value in fixed.items())
    caption = f"{len(own)} records. {said}"
    return card(title, caption, body + _table(own, opened=not maps), wide=True, level=3)


def _matrices(own: Sequence[Entry]) -> Iterator[str]:
    """Small matrices: one per share of retrieval heads, or one per number that is no score of a task."""
    axes = [name for name in varied(own) if name not in _REPEATS]
    ratio = next((name for name in _RATIOS if name in axes), None)
    axes = [name for name in axes if name != ratio]
    numbers = {name for entry in own for name in flat(entry.numbers)}
    scores = [name for name in TASKS if name in numbers]
    if len(axes) not in (1, 2):
        return
    if not scores:
        if len(axes) == 2:
            for name in sorted(numbers):
                yield _matrix(own, axes[0], axes[1], [name], name.replace("_", " "))
        return
    across = axes[1] if len(axes) == 2 else None
    asks_which_task = all(entry.shape.get(axes[0]) in TASKS for entry in own)
    if ratio is not None and across is None and not asks_which_task:
        yield _matrix(own, axes[0], ratio, scores, "mean over tasks")
        return
    parts: dict[str, list[Entry]] = defaultdict(list)
    for entry in own:
        parts[_label(entry, ratio) if ratio is not None else ""].append(entry)
    for share, part in parts.items():
        said = f"{share} retrieval heads" if share else "mean over tasks" if across else ""
        yield _matrix(part, axes[0], across, scores, said)


def _matrix(
    own: Sequence[Entry], down: str, across: str | None, numbers: Sequence[str], said: str
) -> str:
    """The mean of `numbers` by two settings, or, if `across` is None, each number by one setting."""
    cells: dict[tuple[str, str], list[float]] = defaultdict(list)
    for entry in own:
        measured = flat(entry.numbers)
        for name in numbers:
            column = name if across is None else _label(entry, across)
            cells[_label(entry, down), column].append(_number(measured.get(name)))
    rows, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    values = [[_mean(cells.get((row, column), [])) for column in columns] for row in rows]
    percents = all(name in TASKS for name in numbers)
    top = 100.0 if percents else max([1.0, *(v for line in values for v in line if v == v)])
    what = "exact match, %" if percents else said
    told = "; ".join(
        f"{row} {', '.join(f'{v:.3g}' for v in line)}"
        for row, line in zip(rows, values, strict=True)
    )
    x_label = "scored on" if across is None else "retrieval heads" if across in _RATIOS else across
    chart = HeatMap(
        values=[[v / top for v in line] for line in values],
        rows=rows,
        columns=columns,
        x_label=x_label.replace("_", " "),
        y_label=down.replace("_", " "),
        title=said or what,
        description=f"{what} by {down} and {x_label}: {told}.",
        cell="{:.0f}" if percents else "{:.2f}",
        percent=percents,
        scale=1.0 if percents else top,
    ).svg()
    note = f"<p>{escape(what)}</p>" if said and said != what else ""
    return f"<div><h4>{escape(said or what)}</h4>{note}{chart}</div>"


def _label(entry: Entry, axis: str) -> str:
    value = entry.shape.get(axis)
    if axis in _RATIOS and isinstance(value, int | float):
        return f"{100 * value:g} %"
    return _written(value) or "none"


def _number(value: Any) -> float:
    usable = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if usable else math.nan


def _mean(values: Sequence[float]) -> float:
    real = [value for value in values if value == value]
    return sum(real) / len(real) if real else math.nan


def _plain(op: str, model: str, own: Sequence[Entry]) -> str:
    files = ", ".join(dict.fromkeys(entry.file for entry in own))
    title = f"{op}, {model}" if model else op
    caption = f"{len(own)} records of {files}."
    return card(title, caption, _table(own, opened=False), wide=True, level=3)


def _table(own: Sequence[Entry], *, opened: bool) -> str:
    """Every record: what differs between them, and what was measured; what is a table by itself has one of its own."""
    axes = varied(own)
    inner = _tables_within(own)
    measured = [
        flat({name: value for name, value in entry.numbers.items() if name not in inner})
        for entry in own
    ]
    names = list(dict.fromkeys(name for numbers in measured for name in numbers))
    shown = names[:_NUMBERS]
    several = len({entry.impl for entry in own}) > 1
    head = [*(["method"] if several else []), *axes, *shown]
    rows = [
        [
            *([entry.impl] if several else []),
            *(_written(entry.shape.get(axis)) for axis in axes),
            *(_written(numbers.get(name)) for name in shown),
        ]
        for entry, numbers in zip(own[:_ROWS], measured, strict=False)
    ]
    left = []
    if len(names) > len(shown):
        left.append(f"{len(names) - len(shown)} more numbers are in the records")
    if len(own) > _ROWS:
        left.append(f"{len(own) - _ROWS} more records are in the files")
    tables = [_inner_table(own, axes, name) for name in inner]
    if head:
        tables.insert(0, html_table("; ".join(left), [n.replace("_", " ") for n in head], rows))
    if opened:
        return "".join(tables)
    return f"<details><summary>The records as a table</summary>{''.join(tables)}</details>"


def _tables_within(own: Sequence[Entry]) -> list[str]:
    """Names of numbers that have rows and columns themselves: mappings of mappings of plain values."""
    found: dict[str, bool] = {}
    for entry in own:
        for name, value in entry.numbers.items():
            table = isinstance(value, Mapping) and all(
                isinstance(row, Mapping) and not any(isinstance(v, Mapping) for v in row.values())
                for row in value.values()
            )
            found[name] = table and found.get(name, True)
    return [name for name, table in found.items() if table]


def _inner_table(own: Sequence[Entry], axes: Sequence[str], name: str) -> str:
    """A number that is a table in every record: its rows one record after the other."""
    grids = [(entry, entry.numbers.get(name) or {}) for entry in own[:_ROWS]]
    columns = list(dict.fromkeys(key for _, grid in grids for row in grid.values() for key in row))
    rows = [
        [
            *(_written(entry.shape.get(axis)) for axis in axes),
            str(key),
            *(_written(row.get(column)) for column in columns),
        ]
        for entry, grid in grids
        for key, row in grid.items()
    ]
    head = [*axes, "", *map(str, columns)]
    return html_table(name.replace("_", " "), [word.replace("_", " ") for word in head], rows)


def _written(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list):
        return " / ".join(_written(part) for part in value)
    return str(value)

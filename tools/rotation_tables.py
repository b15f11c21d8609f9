"""What a rotation before INT4 costs in time, as a table: `tools/readme.py` puts it into docs/numbers.md.

Both formats take the same bytes, so a pair of records of the same case, of which one is rotated, tells the price.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from duohead import codec
from duohead.bench.figures import Record, newest, time_of
from duohead.evaluate.svg import short_count
from duohead.record import read_records
from tools.speed_tables import MODELS, NOTHING, machine_line, table

PLAIN = "int4"
ROTATED = codec.HADAMARD
OPERATIONS = {
    "decode": "decode attention of a layer",
    "append": "storing a token in a layer",
    "model.decode": "a decode step of {model}",
}
Pair = dict[str, Record]


def rotation_cost(kernels: Path) -> str:
    """Times of both where they were measured in the same way, in ``kernels`` and the file of models beside it."""
    records = [*read_records(kernels), *read_records(kernels.with_name("model-h100.jsonl"))]
    rows, last = [], None
    for op, title in OPERATIONS.items():
        for pair in _pairs(newest(records, op)):
            plain, rotated = (
                time_of(pair[name], op.rpartition(".")[2]) for name in (PLAIN, ROTATED)
            )
            if not isinstance(plain, float) or not isinstance(rotated, float):
                continue
            last, shape = pair[ROTATED], pair[ROTATED]["shape"]
            name = title.format(model=MODELS.get(shape.get("model"), shape.get("model")))
            change = f"{100 * (rotated / plain - 1):+.0f} %"
            rows.append(
                [f"{name}, {short_count(shape['length'])}", _time(plain), _time(rotated), change]
            )
    if last is None:
        return NOTHING
    return table(["", PLAIN, ROTATED, "slower"], rows) + f"\n{machine_line(last)}\n"


def _pairs(entries: list[Record]) -> Iterator[Pair]:
    """Records that are alike but for the rotation of every head, shortest caches first."""
    found: dict[str, Pair] = {}
    for entry in entries:
        shape = dict(entry["shape"])
        stored = {shape.pop(f"{kind}_dtype") for kind in ("retrieval", "streaming")}
        if len(stored) == 1:
            key = repr((entry["impl"], entry["dtype"], sorted(shape.items(), key=repr)))
            found.setdefault(key, {})[stored.pop()] = entry
    both = [pair for pair in found.values() if {PLAIN, ROTATED} <= pair.keys()]
    yield from sorted(both, key=lambda pair: pair[ROTATED]["shape"]["length"])


def _time(milliseconds: float) -> str:
    if milliseconds < 1:
        return f"{1000 * milliseconds:#.3g} µs"
    return f"{milliseconds:#.3g} ms"

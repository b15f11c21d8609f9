"""Records of a run that takes hours, each in its file as soon as it is made.

A crash or Ctrl-C should cost the cell that was being measured and nothing before it, so a file is never written at the
end alone. Use `with recording(path, as_record) as add:` and `add(row)` after every cell; `recorder(...)` makes the
function from a row to its record, and `write_rows` writes rows that are all there already.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

from duohead.files import write_text
from duohead.record import Record, append_record, record

AsRecord = Callable[[Any], Record]


def recorder(*, op: str, numbers: Sequence[str], model: str, dtype: Any) -> AsRecord:
    """A function that makes a record of a dataclass row; machine and versions are looked up once, here.

    ``numbers`` are the fields that were measured. The others, and ``model``, are what they depend on; the fields
    ``method`` and ``policy`` have a place of their own.
    """
    made = record(op=op, impl="", numbers={}, dtype=dtype)

    def as_record(row: Any) -> Record:
        values = asdict(row)
        measured = {name: values.pop(name) for name in numbers}
        impl, policy = values.pop("method"), values.pop("policy")
        shape = {"model": model, **values}
        return replace(made, impl=impl, policy=policy, shape=shape, numbers=measured)

    return as_record


def write_rows(path: str | os.PathLike[str], rows: Sequence[Any], as_record: AsRecord) -> None:
    """Write rows to ``path``, replacing it, as one record per line; the file is whole or what it was."""
    write_text(path, "".join(as_record(row).to_json() + "\n" for row in rows))


@contextmanager
def recording(
    path: str | os.PathLike[str] | None, as_record: AsRecord
) -> Iterator[Callable[[Any], None]]:
    """A function that puts a row into the file at once, stamped with the time; without a path it does nothing.

    The first row replaces what the file held before, so that a run which fails before its first result costs nothing;
    each further one is appended as a whole line. KeyboardInterrupt comes out saying what the file holds.
    """
    count = 0

    def add(row: Any) -> None:
        nonlocal count
        if path is None:
            return
        now = datetime.now(UTC).isoformat(timespec="seconds")
        entry = replace(as_record(row), time=now)
        if count:
            append_record(path, entry)
        else:
            write_text(path, entry.to_json() + "\n")
        count += 1

    try:
        yield add
    except KeyboardInterrupt:
        if count:
            raise KeyboardInterrupt(
                f"{path} holds the {count} record{'' if count == 1 else 's'} finished so far"
            ) from None
        raise

"""What lies in a set of folders: records, patterns and the logs of identification, each with the file it came from.

A report is only as good as its gathering: nothing is left out in silence, a damaged line names its file and number, and
results of different versions of a task are refused, since a reader would compare them. `collect(paths)` gives a
`Collection`, which `folder_report` draws.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duohead.record import read_records

if TYPE_CHECKING:
    from duohead.pattern import HeadPattern

PATTERN_FILE = "full_attention_heads.tsv"
_PLAIN = ("op", "impl", "shape", "dtype", "policy", "numbers", "hardware", "versions", "commit")


@dataclass(frozen=True)
class Entry:
    """One record of a file. Lines that are flat (without `numbers`) have everything in `numbers` but the names.

    ``shape`` is what a number depends on, ``numbers`` what was measured; ``hardware``, ``versions`` and ``time`` may be
    empty for lines that other tools wrote.
    """

    op: str
    impl: str
    shape: Mapping[str, Any]
    numbers: Mapping[str, Any]
    dtype: str
    policy: str | None
    hardware: Mapping[str, Any]
    versions: Mapping[str, Any]
    commit: str | None
    time: str
    file: str

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for two measurements of the same thing on the same kind of machine."""
        shape = repr(sorted(self.shape.items()))
        return self.op, self.impl, self.dtype, self.policy, self.machine, shape

    @property
    def machine(self) -> str:
        """The GPU, or the processor if there is none."""
        gpus = self.hardware.get("gpus")
        return str(gpus[0]) if gpus else str(self.hardware.get("cpu", "machine not recorded"))

    def raw(self) -> dict[str, Any]:
        """The record as `read_records` gives it."""
        return {name: getattr(self, name) for name in (*_PLAIN, "time")}


@dataclass(frozen=True)
class Collection:
    """Everything found; ``entries`` hold the newest measurement of each thing, once, ``replaced`` counts the others.

    ``patterns`` and ``logs`` are by folder and file, as the reader named them. A log has one mapping per step.
    """

    entries: tuple[Entry, ...]
    patterns: Mapping[str, HeadPattern] = field(default_factory=dict)
    logs: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    replaced: int = 0

    def ops(self) -> Counter[str]:
        """How many entries there are of each operation."""
        return Counter(entry.op for entry in self.entries)


def collect(paths: Sequence[str | os.PathLike[str]]) -> Collection:
    """Read every ``*.jsonl`` and every pattern folder in ``paths`` (folders, searched through, or files).

    Raises:
        ValueError: a path does not exist, nothing was found, a line or a pattern is damaged, or versions of a task mix.
    """
    from duohead.pattern import HeadPattern

    records, patterns = _found(paths)
    entries: dict[tuple[object, ...], Entry] = {}
    logs: dict[str, Sequence[Mapping[str, Any]]] = {}
    count = 0
    for path in records:
        lines = read_records(path)
        if lines and all("op" not in line and "step" in line for line in lines):
            logs[str(path)] = _log(lines, path)
            continue
        for number, line in enumerate(lines, start=1):
            entry = _entry(line, path, number)
            count += 1
            before = entries.get(entry.key)
            if before is None or entry.time >= before.time:
                entries[entry.key] = entry
    if not entries and not patterns and not logs:
        names = ", ".join(str(path) for path in paths)
        raise ValueError(
            f"{names}: no records (*.jsonl) and no pattern folders; make some with --json of evaluate or bench, or "
            "with duohead identify"
        )
    shown = _without_restated(list(entries.values()))
    _check_versions(shown)
    return Collection(
        entries=shown,
        patterns={str(folder): HeadPattern.load(folder) for folder in patterns},
        logs=logs,
        files=tuple(str(path) for path in records),
        replaced=count - len(shown),
    )


def _log(lines: Sequence[Mapping[str, Any]], path: Path) -> Sequence[Mapping[str, Any]]:
    """A log of training as it is, if every line has a step and all gates are as many numbers."""
    count = None
    for number, line in enumerate(lines, start=1):
        gates = line.get("gates", [])
        numbers = [line["step"], *gates] if isinstance(gates, list) else [None]
        if not all(isinstance(value, int | float) for value in numbers):
            raise ValueError(
                f"{path}, record {number}: expected a training log with numbers in step and gates; move it away or "
                "repair it"
            )
        if gates and len(gates) != (count := count or len(gates)):
            raise ValueError(
                f"{path}, record {number}: expected {count} gates as in the lines before, got {len(gates)}; logs of "
                "two runs do not belong into one file"
            )
    return lines


def _found(paths: Sequence[str | os.PathLike[str]]) -> tuple[list[Path], list[Path]]:
    """Record files and pattern folders, without repetition, in the order of names."""
    files: dict[Path, None] = {}
    folders: dict[Path, None] = {}
    for given in map(Path, paths):
        if given.is_file():
            files[given] = None
            continue
        if not given.is_dir():
            raise ValueError(f"{given} does not exist; name folders or .jsonl files")
        for path in _walk(given):
            if path.suffix == ".jsonl":
                files[path] = None
            elif path.name == PATTERN_FILE:
                folders[path.parent] = None
    return list(files), list(folders)


def _walk(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and path.is_file():
            yield path


def _entry(line: Mapping[str, Any], path: Path, number: int) -> Entry:
    op = line.get("op")
    if not isinstance(op, str):
        raise ValueError(
            f"{path}, record {number}: expected a record with its operation in 'op', got the keys "
            f"{', '.join(list(line)[:6])}; name the files to draw one by one to leave it out"
        )
    for name in ("hardware", "versions"):
        if not isinstance(line.get(name) or {}, Mapping):
            raise ValueError(
                f"{path}, record {number}: expected names and values in {name!r}, got {line[name]!r}; move the file "
                "away or repair it"
            )
    numbers = line.get("numbers")
    shape = line.get("shape") or {}
    if not isinstance(numbers, Mapping) or not isinstance(shape, Mapping):
        known = {*_PLAIN, "time"}
        numbers = {name: value for name, value in line.items() if name not in known}
        # Flat lines do not say what depends on what: text and versions are taken to be settings.
        names = ("task_version", "length", "n", "seed")
        shape = {k: v for k, v in numbers.items() if isinstance(v, str) or k in names}
        numbers = {k: v for k, v in numbers.items() if k not in shape}
    return Entry(
        op=op,
        impl=str(line.get("impl") or ""),
        shape=shape,
        numbers=numbers,
        dtype=str(line.get("dtype") or ""),
        policy=line.get("policy"),
        hardware=line.get("hardware") or {},
        versions=line.get("versions") or {},
        commit=line.get("commit"),
        time=str(line.get("time") or ""),
        file=str(path),
    )


def _without_restated(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """Leave out what another record says as well, with more settings: a comparison restates its units' records."""
    alike: dict[tuple[object, ...], list[Entry]] = defaultdict(list)
    for entry in entries:
        cell = (entry.shape.get(name) for name in ("task", "length", "depth"))
        made = (entry.time, entry.impl, entry.policy, entry.dtype, entry.machine)
        alike[*made, *map(repr, cell)].append(entry)
    restated = {
        id(entry)
        for group in alike.values()
        for entry in group
        if any(other is not entry and _says(other, entry) for other in group)
    }
    return tuple(entry for entry in entries if id(entry) not in restated)


def _says(more: Entry, less: Entry) -> bool:
    """Whether one record has all settings and numbers of another, and further settings."""
    return len(more.shape) > len(less.shape) and all(
        value == theirs.get(name)
        for own, theirs in ((less.shape, more.shape), (less.numbers, more.numbers))
        for name, value in own.items()
    )


def _check_versions(entries: Iterable[Entry]) -> None:
    """One version per operation and task, since a page puts all of them side by side."""
    seen: dict[tuple[str, str], Entry] = {}
    for entry in entries:
        if "task" not in entry.shape or "task_version" not in entry.shape:
            continue
        first = seen.setdefault((entry.op, str(entry.shape["task"])), entry)
        known, found = first.shape["task_version"], entry.shape["task_version"]
        if known != found:
            raise ValueError(
                f"records mix versions {known} ({first.file}) and {found} ({entry.file}) of task "
                f"{entry.shape['task']!r}, whose scores cannot be compared; name the files of one version"
            )

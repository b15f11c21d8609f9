"""What a number needs to be believed: what was measured, on which machine, with which versions, from which commit.

A measurement without its circumstances cannot be compared with another, so every one becomes one line of JSON that
carries them, and tables and pictures are made from such lines. Use `write_record(path, op=..., numbers=...)` to append
one and `read_records(path)` to get them back.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from duohead import __version__

PACKAGES = ("torch", "transformers", "triton", "numpy")


class _Digestible(Protocol):
    def digest(self) -> str: ...


@dataclass(frozen=True)
class Record:
    """One measurement.

    ``numbers`` holds what was measured, with the unit in each name (``decode_ms``, ``kv_bytes``); text is allowed
    there, since an out-of-memory result is written as such. Everything after it is filled in by `record`.
    """

    op: str
    impl: str
    shape: Mapping[str, Any]
    dtype: str
    policy: str | None
    numbers: Mapping[str, Any]
    hardware: Mapping[str, Any]
    versions: Mapping[str, str | None]
    commit: str | None
    time: str

    def to_json(self) -> str:
        """The record as one line of JSON, without a line end.

        Raises:
            ValueError: a value that JSON cannot carry exactly (NaN, infinity, an array).
        """
        try:
            return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"the numbers of record {self.op!r} must be finite numbers, text, None, lists or mappings of them: "
                f"{error}; write what happened as text, such as 'out of memory'"
            ) from error


def record(
    *,
    op: str,
    impl: str,
    numbers: Mapping[str, Any],
    shape: Mapping[str, Any] | None = None,
    dtype: Any = "",
    policy: _Digestible | str | None = None,
) -> Record:
    """A measurement made here and now.

    Args:
        op: what was measured, such as "decode" or "evaluate.needle".
        impl: what did it, such as "reference" or "sdpa".
        numbers: results, units in their names.
        shape: sizes that the result depends on, by name.
        dtype: dtype computed in (a name or a torch dtype).
        policy: a `HeadPolicy` or its digest; None where none took part.
    """
    return Record(
        op=op,
        impl=impl,
        shape=dict(shape or {}),
        dtype=str(dtype).removeprefix("torch."),
        policy=policy if policy is None or isinstance(policy, str) else policy.digest(),
        numbers=dict(numbers),
        hardware=hardware(),
        versions=dict(_versions()),
        commit=_commit(),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def write_record(path: str | os.PathLike[str], **fields: Any) -> Record:
    """Append one line to the file at `path` (made with its folders if missing); `fields` are those of `record`."""
    entry = record(**fields)
    append_record(path, entry)
    return entry


def append_record(path: str | os.PathLike[str], entry: Record) -> None:
    """Append a record as one line to the file at `path` (made with its folders if missing).

    The line goes out in a single write, so that programs may append to one file at the same time; a line that the disk
    had no room for is taken back.
    """
    line = (entry.to_json() + "\n").encode()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        written = os.write(handle, line)
        if written < len(line):
            os.ftruncate(handle, os.fstat(handle).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))
    finally:
        os.close(handle)


def read_records(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Every record of a file, oldest first; blank lines are skipped.

    Raises:
        ValueError: a line is not a JSON object; the message names the file and the line number.
    """
    records: list[dict[str, Any]] = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: expected one JSON object, got {_cut(line)} ({error})"
            ) from error
        if not isinstance(entry, dict):
            raise ValueError(f"{path}, line {number}: expected one JSON object, got {_cut(line)}")
        records.append(entry)
    return records


def hardware() -> dict[str, Any]:
    """The machine: processor, cores and threads in use, memory, and every visible NVIDIA GPU with clocks and limits."""
    machine: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
    }
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        machine["memory_gib"] = round(
            os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1
        )
    # Asking torch must not load it: a record about files alone should not cost seconds.
    torch = sys.modules.get("torch")
    if torch is not None:
        machine["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            machine["gpus"] = [
                torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
            ]
            machine["cuda"] = torch.version.cuda
            machine["gpu_state"] = _gpu_state()
    return machine


def _cut(line: bytes, limit: int = 60) -> str:
    text = line.decode(errors="replace")
    return repr(text if len(text) <= limit else text[:limit] + "...")


@cache
def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor()
    return platform.processor() or platform.machine()


def _gpu_state() -> list[dict[str, str]] | None:
    names = (
        "driver_version",
        "clocks.sm",
        "clocks.max.sm",
        "clocks.mem",
        "power.limit",
        "temperature.gpu",
    )
    text = _output("nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader")
    if text is None:
        return None
    return [
        dict(zip(names, (cell.strip() for cell in row.split(",")), strict=False))
        for row in text.splitlines()
    ]


@cache
def _versions() -> tuple[tuple[str, str | None], ...]:
    found: list[tuple[str, str | None]] = [
        ("duohead", __version__),
        ("python", platform.python_version()),
    ]
    for package in PACKAGES:
        try:
            found.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            found.append((package, None))
    return tuple(found)


@cache  # the code that runs was loaded once, too
def _commit() -> str | None:
    """Commit of the checkout this package lies in, "-dirty" after it if tracked files differ; None when installed.

    The environment variable DUOHEAD_COMMIT comes first, for checkouts that were copied without their history.
    """
    stated = os.environ.get("DUOHEAD_COMMIT")
    if stated:
        return stated
    root = Path(__file__).resolve().parent.parent
    top = _output("git", "-C", str(root), "rev-parse", "--show-toplevel")
    # An installed package may lie inside somebody else's repository, whose commit says nothing about it.
    if top is None or Path(top).resolve() != root:
        return None
    commit = _output("git", "-C", str(root), "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if changed else commit


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()

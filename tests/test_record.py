"""A record carries what its number needs to be believed."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from duohead import __version__
from duohead import record as records


def write(path: Path, **changes):
    fields = {"op": "decode", "impl": "reference", "numbers": {"decode_ms": 1.5}}
    return records.write_record(path, **{**fields, **changes})


def test_a_record_is_one_line_with_its_circumstances(tmp_path: Path) -> None:
    write(
        tmp_path / "deep" / "r.jsonl", shape={"B": 1}, dtype=torch.bfloat16, policy="0123456789ab"
    )
    lines = (tmp_path / "deep" / "r.jsonl").read_text().splitlines()
    assert len(lines) == 1
    entry = json.loads(lines[0])
    assert {key: entry[key] for key in ("op", "impl", "shape", "dtype", "policy", "numbers")} == {
        "op": "decode",
        "impl": "reference",
        "shape": {"B": 1},
        "dtype": "bfloat16",
        "policy": "0123456789ab",
        "numbers": {"decode_ms": 1.5},
    }
    assert entry["versions"]["duohead"] == __version__
    assert entry["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert {"python", "transformers", "triton", "numpy"} <= entry["versions"].keys()
    assert entry["hardware"]["cores"] >= 1
    assert entry["hardware"]["cpu"]
    assert entry["hardware"]["threads"] == torch.get_num_threads()
    age = datetime.now(UTC) - datetime.fromisoformat(entry["time"])
    assert abs(age.total_seconds()) < 60


def test_records_are_appended_and_read_back_in_order(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / "r.jsonl", numbers={"n": number, "note": "größer"})
    entries = records.read_records(tmp_path / "r.jsonl")
    assert [entry["numbers"]["n"] for entry in entries] == [0, 1, 2]
    assert entries[0]["numbers"]["note"] == "größer"


def test_a_policy_is_named_by_its_digest(tmp_path: Path) -> None:
    class Policy:
        def digest(self) -> str:
            return "feedfeedfeed"

    assert write(tmp_path / "r.jsonl", policy=Policy()).policy == "feedfeedfeed"


def test_the_commit_is_that_of_the_checkout(root: Path) -> None:
    if not (root / ".git").exists():
        pytest.skip("needs a git checkout")
    head = records._output("git", "-C", str(root), "rev-parse", "--verify", "--quiet", "HEAD")
    commit = records._commit()
    assert (commit is None) == (head is None)
    assert head is None or commit.removesuffix("-dirty") == head


def test_the_state_of_every_gpu_is_read(monkeypatch) -> None:
    rows = "590.1, 1980 MHz, 1980 MHz, 2619 MHz, 700.00 W, 40\n" * 2
    monkeypatch.setattr(records, "_output", lambda *_: rows.strip())
    first, second = records._gpu_state() or []
    assert first == second
    assert (first["driver_version"], first["clocks.sm"], first["power.limit"]) == (
        "590.1",
        "1980 MHz",
        "700.00 W",
    )
    monkeypatch.setattr(records, "_output", lambda *_: None)
    assert records._gpu_state() is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.zeros(2)])
def test_a_number_that_json_cannot_carry_is_refused_and_nothing_is_written(tmp_path, value) -> None:
    with pytest.raises(ValueError, match="numbers of record 'decode' must be finite"):
        write(tmp_path / "r.jsonl", numbers={"x": value})
    assert not (tmp_path / "r.jsonl").exists()


def test_an_unknown_field_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="speed"):
        write(tmp_path / "r.jsonl", speed=3)


@pytest.mark.parametrize("line", ["{", "[1]", '{"op": "x"', "\xff"])
def test_a_malformed_line_is_reported_with_its_number(tmp_path: Path, line: str) -> None:
    write(tmp_path / "r.jsonl")
    with (tmp_path / "r.jsonl").open("a") as file:
        file.write(f"\n{line}\n")
    with pytest.raises(ValueError, match=r"r\.jsonl, line 3: expected one JSON object"):
        records.read_records(tmp_path / "r.jsonl")


def test_a_line_that_did_not_fit_on_the_disk_is_taken_back(tmp_path, monkeypatch) -> None:
    write(tmp_path / "r.jsonl")
    before = (tmp_path / "r.jsonl").read_bytes()
    whole = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: whole(handle, data[:10]))
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "r.jsonl")
    assert (tmp_path / "r.jsonl").read_bytes() == before


def test_programs_may_append_at_the_same_time(tmp_path: Path) -> None:
    code = (
        "import sys; from duohead.record import write_record\n"
        "for _ in range(20): write_record(sys.argv[1], op='a', impl='b', numbers={'x': 'y' * 3000})"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "r.jsonl")]
    writers = [subprocess.Popen(command) for _ in range(4)]
    assert [writer.wait(timeout=60) for writer in writers] == [0] * 4
    assert len(records.read_records(tmp_path / "r.jsonl")) == 80

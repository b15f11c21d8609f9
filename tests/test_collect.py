"""What `duohead report` gathers: the newest of each measurement, once; damage is refused with its place."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny_evaluation as tiny
from pages import Page
from tiny_records import answer, line

from duohead.cli import main
from duohead.evaluate.collect import collect
from duohead.evaluate.folder_report import render
from duohead.evaluate.scores import scored


def test_of_several_measurements_the_newest_counts(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text(answer("full", 1, 0.1, 5) + answer("full", 1, 0.2, 5))
    found = collect([tmp_path])
    assert [entry.numbers["exact_match"] for entry in found.entries] == [0.2]
    assert found.replaced == 1
    assert "1 older or restated ones left out" in Page(render(found)).text


def test_parts_of_a_group_stand_in_a_table_and_not_in_the_mean(tmp_path) -> None:
    whole = answer("full", 1.0, 0.5, 5, task="mmlu")
    part = answer("full", 1.0, 0.25, 5, task="mmlu_law", part_of="mmlu")
    (tmp_path / "a.jsonl").write_text(whole + part)
    found = collect([tmp_path])
    assert [score.task for score in scored(found.entries)] == ["mmlu"]
    assert "0.25" in Page(render(found)).text


def test_newest_means_by_time_and_not_by_name_of_the_file(tmp_path) -> None:
    new, old = (json.loads(answer("full", 1, score, 5)) for score in (0.75, 0.25))
    new["time"] = "2026-11-22T00:00:00+00:00"
    (tmp_path / "a.jsonl").write_text(json.dumps(new))
    (tmp_path / "b.jsonl").write_text(json.dumps(old))
    assert [entry.numbers["exact_match"] for entry in collect([tmp_path]).entries] == [0.75]


def test_a_comparisons_own_records_are_not_shown_twice(tmp_path) -> None:
    unit = answer("echo_50", 0.5, 0.5, 5, length=10, depth=0.0)
    full = json.loads(unit)
    full["op"] = "evaluate.compare"
    full["shape"]["scorer"] = "echo"
    other = answer("echo_50", 0.5, 0.75, 5, length=10, depth=0.0, model="n")
    (tmp_path / "a.jsonl").write_text(unit + json.dumps(full) + "\n" + other)
    assert [entry.op for entry in collect([tmp_path]).entries] == [
        "evaluate.compare",
        "evaluate.suite",
    ]


def refused(capsys, *words: str) -> str:
    assert main(["report", *words]) == 2
    out = capsys.readouterr().err
    assert out.count("\n") == 1
    return out


def test_a_folder_without_records_is_refused(tmp_path, capsys) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    out = str(tmp_path / "r.html")
    message = refused(capsys, str(tmp_path), "--out", out)
    assert "no records (*.jsonl) and no pattern folders; make some with --json" in message
    assert not Path(out).exists()
    assert "nowhere does not exist; name folders" in refused(capsys, "nowhere", "--out", out)


def test_a_damaged_line_is_named_with_its_file_and_number(tmp_path, capsys) -> None:
    (tmp_path / "a.jsonl").write_text(answer("full", 1, 0.1, 5) + '{"op": "eval')
    message = refused(capsys, str(tmp_path), "--out", str(tmp_path / "r.html"))
    assert "a.jsonl, line 2: expected one JSON object" in message
    (tmp_path / "a.jsonl").write_text(answer("full", 1, 0.1, 5) + '{"speed": 3}\n')
    message = refused(capsys, str(tmp_path), "--out", str(tmp_path / "r.html"))
    assert "a.jsonl, record 2: expected a record with its operation in 'op'" in message
    (tmp_path / "a.jsonl").write_text(line("evaluate", hardware="H100"))
    message = refused(capsys, str(tmp_path), "--out", str(tmp_path / "r.html"))
    assert "a.jsonl, record 1: expected names and values in 'hardware', got 'H100'" in message


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ([[1.0], [1.0, 0.5]], "record 2: expected 1 gates as in the lines before, got 2"),
        ([[1.0], ["high"]], "record 2: expected a training log with numbers in step and gates"),
        ([3.0], "record 1: expected a training log with numbers"),
    ],
)
def test_a_damaged_training_log_is_named(tmp_path, gates, message) -> None:
    lines = [json.dumps({"step": i, "gates": part}) + "\n" for i, part in enumerate(gates)]
    (tmp_path / "identify.jsonl").write_text("".join(lines))
    with pytest.raises(ValueError, match=message):
        collect([tmp_path])


def test_a_damaged_pattern_is_named(tmp_path, capsys) -> None:
    tiny.pattern().save(tmp_path / "pattern")
    (tmp_path / "pattern" / "full_attention_heads.tsv").write_text("0.5\tnonsense\n")
    (tmp_path / "pattern" / "duohead.safetensors").unlink()
    assert "pattern" in refused(capsys, str(tmp_path), "--out", str(tmp_path / "r.html"))


def test_versions_of_a_task_are_not_mixed(tmp_path, capsys) -> None:
    (tmp_path / "a.jsonl").write_text(answer("full", 1, 0.1, 5))
    (tmp_path / "b.jsonl").write_text(answer("full", 1, 0.1, 5, task_version=2))
    message = refused(capsys, str(tmp_path), "--out", str(tmp_path / "r.html"))
    assert re.search(r"mix versions 1 \(.*a.jsonl\) and 2 \(.*b.jsonl\) of task 'find'", message)


def test_hidden_files_are_left_alone(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text(answer("full", 1, 0.1, 5))
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "b.jsonl").write_text("damaged")
    assert len(collect([tmp_path]).files) == 1

"""Summaries of comparisons are drawn as what they sum up."""

import json
from pathlib import Path
from typing import Any

import pytest

from duohead.evaluate.collect import collect
from duohead.evaluate.folder_report import render
from duohead.evaluate.scores import scored
from duohead.evaluate.summaries import by_answers, by_task
from duohead.files import write_text


def summary(scorer: str, needle: float, *, samples: int = 12, seed: int = 0, **options: Any) -> str:
    """A record as `tools/condense.py` leaves it."""
    shape = {
        "model": "pocket", "scorer": scorer, "seed": seed, "retrieval_ratio": 0.5, "length": 2048,
        "samples": samples, "task_versions": {"needle": 1, "copy": 2},
    }  # fmt: skip
    if options:
        shape["options"] = json.dumps({"seed": seed, **options})
    numbers = {"kv_bytes": 100, "needle": needle, "copy": 50.0, "by_depth": {"needle": {"0.5": 1}}}
    entry = {"op": "evaluate.compare.summary", "impl": f"{scorer}_50", "shape": shape}
    return json.dumps({**entry, "numbers": {**numbers, "identify_seconds": 2.0}}) + "\n"


def entries(folder: Path, *lines: str) -> Any:
    write_text(folder / "some.jsonl", "".join(lines))
    return collect([folder])


def test_each_task_of_a_summary_is_a_record_of_its_own(tmp_path: Path) -> None:
    other = json.dumps({"op": "prefill", "impl": "triton", "shape": {}, "numbers": {"ms": 1.0}})
    found = by_task(entries(tmp_path, summary("echo", 75.0), other + "\n").entries)
    assert [entry.op for entry in found] == ["evaluate.compare", "evaluate.compare", "prefill"]
    needle = found[0]
    assert (needle.shape["task"], needle.shape["task_version"]) == ("needle", 1)
    assert needle.numbers == {"kv_bytes": 100, "identify_seconds": 2.0, "exact_match": 0.75}
    scores = scored(found)
    assert [(s.task, s.method, s.value) for s in scores] == [
        ("needle", "echo", 0.75),
        ("copy", "echo", 0.5),
    ]


def test_other_numbers_of_answers_and_other_options_are_no_second_measurement(
    tmp_path: Path,
) -> None:
    lines = [
        summary("optimise", 90.0, samples=50, target=0.0, steps=200),
        summary("optimise", 80.0, samples=50, target=0.04, steps=200),
        summary("optimise", 70.0, samples=50, target=0.04, steps=200, seed=1),
        summary("optimise", 60.0, target=0.0, steps=200),
        summary("full", 100.0),
    ]
    found = by_task(entries(tmp_path, *lines).entries)
    assert {entry.shape["model"] for entry in found} == {"pocket"}
    scores = [s for s in scored(by_answers(found)) if s.task == "needle"]
    assert [(s.model, s.method, s.value) for s in scores] == [
        ("pocket, 50 answers", "optimise", 0.9),
        ("pocket, 50 answers", "optimise (target 0.04)", 0.8),
        ("pocket, 50 answers", "optimise (target 0.04)", pytest.approx(0.7)),
        ("pocket, 12 answers", "optimise", 0.6),
        ("pocket, 12 answers", "full", 1.0),
    ]


def test_a_page_draws_summaries_against_their_bytes(tmp_path: Path) -> None:
    page = render(entries(tmp_path, summary("echo", 75.0), summary("full", 100.0)))
    assert 'id="accuracy"' in page and 'id="cost"' in page
    assert page.count(">echo, pocket<") == 1
    assert "evaluate.compare.summary" not in page.partition('id="sources"')[0]

"""The experiments of docs/findings.md: their measures, one run, and the condensing of a comparison."""

import json
from pathlib import Path

import numpy as np
import pytest

from duohead import HeadPattern
from tools import condense
from tools.findings import questions
from tools.findings.lab import SMALL, Lab, digest, overlap, rank_correlation


def pattern(values: list[list[float]]) -> HeadPattern:
    return HeadPattern.from_alpha(np.array(values, dtype=np.float32), sink=4, recent=8)


def test_patterns_are_compared_by_their_best_heads_and_by_their_order() -> None:
    first = pattern([[0.9, 0.8], [0.2, 0.1]])
    other = pattern([[0.9, 0.1], [0.2, 0.8]])
    assert overlap(first, first, 0.5) == 1
    assert overlap(first, other, 0.5) == 0.5
    assert overlap(first, other, 0.25) == 1
    assert rank_correlation(first, first) == pytest.approx(1)
    backwards = pattern([[0.1, 0.2], [0.8, 0.9]])
    assert rank_correlation(first, backwards) == pytest.approx(-1)
    assert rank_correlation(first, other) == pytest.approx(0.2)


def test_a_pattern_is_known_by_its_alphas_and_by_nothing_else() -> None:
    nan = float("nan")
    first = pattern([[0.9, 0.8], [nan, nan]])
    again = HeadPattern.from_alpha(first.alpha, sink=1, recent=2, base_model="a name")
    assert digest(first) == digest(again)
    others = [[[0.9, 0.8]], [[0.9], [0.8]], [[0.9, 0.81], [nan, nan]]]
    assert len({digest(first), *(digest(pattern(values)) for values in others)}) == 4


def test_an_experiment_leaves_a_record_for_everything_it_varied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(questions, "RATIOS", (0.5,))
    text = tmp_path / "held-out.txt"
    text.write_text(" ".join(f"word{i} of a text" for i in range(9000)))
    out = tmp_path / "found.jsonl"
    lab = Lab.open("pocket", out=out, held_out=[str(text)], device="cpu", effort=SMALL, seeds=(0,))
    questions.QUESTIONS["sinks"](lab)
    entries = [json.loads(line) for line in out.read_text().splitlines()]
    varied = {(e["shape"]["window"], e["shape"]["ratio"]) for e in entries}
    assert len(entries) == len(varied) == 3
    assert {e["op"] for e in entries} == {"findings.sinks"}
    assert {e["shape"]["pattern"] for e in entries} == {digest(lab.bundled())}
    assert all(0 <= score <= 100 for e in entries for score in e["numbers"].values())
    # A streaming head that sees itself and the first tokens alone cannot read on.
    alone = [e["numbers"]["passkeys"] for e in entries if e["shape"]["window"] == "sink only"]
    assert max(alone) == 0


def entry(task: str, depth: float, right: float, samples: int, **shape: object) -> dict:
    return {
        "op": "evaluate.compare",
        "impl": "echo_50",
        "shape": {
            "scorer": "echo", "seed": 0, "retrieval_ratio": 0.5, "length": 2048, "task": task,
            "task_version": 1, "depth": depth, "samples": samples, **shape,
        },
        "numbers": {"exact_match": right, "kv_bytes": 100, "identify_seconds": 2.0},
    }  # fmt: skip


def test_a_comparison_is_condensed_to_one_record_for_each_scorer_seed_share_and_length() -> None:
    entries = [
        entry("needle", 0.0, 1.0, 3),
        entry("needle", 1.0, 0.0, 1),
        entry("number", 0.0, 0.5, 4),
        entry("number", 0.0, 1.0, 4, length=4096),
        entry("number", 0.0, 1.0, 4, seed=1),
    ]
    made = condense.condensed(entries)
    assert len(made) == 3
    assert made[0]["numbers"] == {
        "kv_bytes": 100,
        "identify_seconds": 2.0,
        "needle": 75.0,
        "number": 50.0,
        "by_depth": {"needle": {"0.0": 100.0, "1.0": 0.0}, "number": {"0.0": 50.0}},
    }
    assert made[0]["shape"]["task_versions"] == {"needle": 1, "number": 1}
    assert "depth" not in made[0]["shape"]


def test_a_scorer_with_other_options_is_another_way_and_what_two_files_share_counts_once() -> None:
    entries = [
        entry("needle", 0.0, 1.0, 4, options="{}"),
        entry("needle", 0.0, 0.5, 4, options='{"tokens": 400}'),
        entry("needle", 0.0, 0.0, 4, options="{}"),
    ]
    assert [e["numbers"]["needle"] for e in condense.condensed(entries)] == [100, 50]

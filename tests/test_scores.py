"""Scores of records: what is averaged, and what stays apart."""

from __future__ import annotations

import pytest
from tiny_records import answer

from duohead.evaluate.collect import collect
from duohead.evaluate.scores import means, metrics_of, scored


def test_means_weigh_cells_and_relate_bytes_to_the_same_cells(tmp_path) -> None:
    lines = [
        answer("full", 1.0, 1.0, 1000, length=10, depth=0.0),
        answer("full", 1.0, 0.5, 3000, length=30, depth=0.0),
        answer("duo_50", 0.5, 0.5, 900, length=30, depth=0.0),
        answer("random_50_0", 0.5, 0.2, 600, length=10, depth=0.0),
        answer("random_50_1", 0.5, 0.4, 600, length=10, depth=0.0),
    ]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    found = {mean.method: mean for mean in means(scored(collect([tmp_path]).entries))}
    assert found["full"].value == 0.75
    assert found["full"].footprint == 1.0
    assert found["duo"].footprint == pytest.approx(0.3)
    assert sorted(found["random"].draws.values()) == [0.2, 0.4]
    assert found["random"].value == pytest.approx(0.3)
    assert found["random"].footprint == pytest.approx(0.6)
    assert found["random"].times == {"token_seconds": 0.25}


@pytest.mark.parametrize(
    ("numbers", "metrics"),
    [
        ({"answers": 3, "token_accuracy": 0.5, "exact_match": 0.25}, ["exact_match"]),
        ({"exact_match,strict": 0.5, "exact_match_stderr,strict": 0.1}, ["exact_match,strict"]),
        ({"acc": 0.5, "acc_norm": 0.6, "acc_stderr": 0.1, "kv_bytes": 5}, ["acc"]),
        ({"kv_bytes": 5, "ttft_ms": 1.0, "perplexity": 12.5, "kl_nats": 0.1}, ["perplexity", "kl_nats"]),
        ({"4096": 0.5, "8192": 0.25, "kv_bytes": 5}, ["4096", "8192"]),
        ({"kv_bytes": 5, "note": "out of memory"}, []),
        ({"qa_f1_score": 0.5, "qa_f1_score_stderr": 0.1, "prompt_tokens": 5}, ["qa_f1_score"]),
    ],
)  # fmt: skip
def test_the_metrics_of_a_record_are_no_costs(numbers, metrics) -> None:
    assert metrics_of(numbers) == metrics


def test_windows_of_one_method_are_not_averaged(tmp_path) -> None:
    lines = [
        answer("full", 1.0, 1.0, 1000),
        answer("duo_50", 0.5, 1.0, 600, sink=16, recent=64, prefill_recent=64),
        answer("duo_50", 0.5, 0.0, 500, sink=4, recent=16, prefill_recent=16),
        answer("random_50_0", 0.5, 0.5, 600, sink=16, recent=64, prefill_recent=128),
        answer("random_50_0", 0.5, 0.25, 600, sink=16, recent=64, prefill_recent=64),
        answer("echo_50", 0.5, 0.5, 600, sink=16, recent=64),
    ]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    entries = collect([tmp_path]).entries
    assert {mean.method: (mean.value, mean.kv_bytes) for mean in means(scored(entries))} == {
        "full": (1.0, 1000),
        "duo@16+64": (1.0, 600),
        "duo@4+16": (0.0, 500),
        "random@16+64 (128 in prompts)": (0.5, 600),
        "random@16+64": (0.25, 600),
        "echo": (0.5, 600),
    }

"""Windows at an eighth of the heads: the records of the experiment, and the table that is made from them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from duohead import HeadPattern, pocket
from duohead.evaluate.tasks import TASKS
from tools import reach_tables
from tools.findings import reach as module
from tools.findings.lab import RECENT, SMALL, Lab
from tools.speed_tables import NOTHING


def test_the_experiment_leaves_a_record_for_each_window_and_way_to_identify(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    def ranked(*args: Any, out: Path, options: Any, **others: Any) -> HeadPattern:
        asked.append((options.recent, options.context_min))
        pattern = HeadPattern.load(pocket.pattern("pocket"))
        pattern.save(out)
        return pattern

    monkeypatch.setattr(module, "score", ranked)
    monkeypatch.setattr(module, "TASKS", {"needle": TASKS["needle"]})
    monkeypatch.setattr(module, "RECENTS", (RECENT, 2048))
    monkeypatch.setattr(module, "DEPTHS", (0.2, 0.8))
    text, out = tmp_path / "held-out.txt", tmp_path / "found.jsonl"
    text.write_text(" ".join(f"word{i} of a text" for i in range(9000)))
    effort = replace(SMALL, lengths=(512,), batch=2)
    lab = Lab.open("pocket", out=out, held_out=[str(text)], device="cpu", effort=effort)
    for _ in range(2):
        module.reach(replace(lab, seeds=(0, 1)))
    # The second time patterns are there; texts are at least twice the window.
    assert asked == [(RECENT, 2048), (RECENT, 2048), (2048, 4096)]
    entries = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(entries) == 2 * 6
    full, narrow, _, *wide = entries[:6]
    cases = [[e["shape"][name] for name in ("recent", "identified", "seed")] for e in wide]
    assert cases == [[2048, 2048, 0], [2048, RECENT, 0], [2048, RECENT, 1]]
    heads, tokens = 24, 512
    slots = 3 * tokens + (heads - 3) * (64 + RECENT)
    numbers = narrow["numbers"]
    assert numbers["kv_bytes"] / full["numbers"]["kv_bytes"] == slots / (heads * tokens)
    assert 12.5 < numbers["share_128k"] < 12.5 + 100 * 320 / 2**17 + 0.1
    # A window longer than the text sees all of it.
    for entry in wide:
        assert entry["numbers"]["needle"] == full["numbers"]["needle"]
    assert set(narrow["numbers"]["by_depth"]["needle"]) == {"0.2", "0.8"}


def entry(right: list[float], *, size: int, recent: int | None, **shape: Any) -> dict[str, Any]:
    """Scores of two tasks at depths 0.1 and 0.9; the second task is answered in full."""
    depths = dict(zip(("0.1", "0.9"), right, strict=True))
    by_depth = {"needle": depths, "copy": {"0.1": 100.0, "0.9": 100.0}}
    return {
        "op": "findings.reach",
        "shape": {"model": "pocket", "recent": recent, "length": 2048, **shape},
        "numbers": {"kv_bytes": size, "share_128k": 13.0, "by_depth": by_depth},
        "hardware": {"gpus": ["a GPU"], "cpu": "", "system": ""},
        "versions": {"torch": "2", "transformers": "5"},
        "time": "2026-11-21T00:00:00+00:00",
    }


def test_the_table_names_the_tasks_that_lose_more_than_a_point() -> None:
    given = [
        entry([100, 100], size=1000, recent=None, identified=None, seed=0),
        entry([90, 94], size=250, recent=256, identified=256, seed=0),
        entry([94, 98], size=250, recent=256, identified=256, seed=1),
        entry([99, 99], size=500, recent=1024, identified=256, seed=0),
    ]
    lines = reach_tables.reach(given).splitlines()
    assert lines[2] == (
        "| pocket | 256 | 256 | 25.0 % | 13.0 % | -3.0 ± 1.0 | 1 of 2 | needle -6.0 ± 2.0 |"
    )
    assert lines[3] == "| pocket | 1024 | 256 | 50.0 % | 13.0 % | -0.5 ± 0.0 | 2 of 2 |  |"


def test_without_records_the_table_says_so() -> None:
    assert reach_tables.reach([]) == NOTHING

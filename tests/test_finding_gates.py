"""Experiments on training gates: what presses on them, how processes share the work, and the tables of the records."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_identification import OPTIONS, TEXT, run, tiny, tokenizer
from tiny_records import line

from duohead import HeadPattern
from duohead.evaluate.needle import evaluate_needle
from duohead.evaluate.tasks import TASKS
from duohead.identify import IdentifyOptions, haystack
from duohead.identify.descent import follow
from tools import gate_tables
from tools.findings import gates, steps
from tools.findings.gates import WAYS
from tools.findings.lab import SMALL, Lab
from tools.speed_tables import NOTHING

FEW = replace(OPTIONS, steps=3)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """One that never scores: what a test trains is tiny, or comes from a table."""
    ids = haystack.tokens(TEXT, tokenizer(), at_least=400)
    out = tmp_path / "found.jsonl"
    return Lab("tiny", tiny(), tokenizer(), ids, ids, "text", out, SMALL, seeds=(0, 1))


def records(lab: Lab) -> list[dict[str, Any]]:
    return [json.loads(entry) for entry in lab.out.read_text().splitlines()]


def test_ways_are_options_of_identify_and_each_moves_one_thing() -> None:
    paper, *others = [(way, IdentifyOptions(**way.options)) for way in WAYS]
    assert paper[1] == IdentifyOptions() and paper[0].course is None
    assert len({way.name for way in WAYS}) == len(WAYS)
    for way, options in others:
        assert (options == paper[1]) == (way.course is not None), way.name


def test_moving_weights_are_the_papers_in_the_mean() -> None:
    courses = [way.course for way in WAYS if way.course is not None]
    assert len(courses) == 2
    for course in courses:
        weights = [course(step / 199) for step in range(200)]
        assert sum(weights) / 200 == pytest.approx(IdentifyOptions().reg_weight)
        assert sorted({weights[0], weights[-1]}) == pytest.approx([0, 0.1])


def test_a_course_presses_on_the_gates_of_identify_step_by_step() -> None:
    asked: list[float] = []

    def course(share: float) -> float:
        asked.append(share)
        return 2.0 * share

    plain = run(options=FEW)
    with gates._pressed(lambda share: FEW.reg_weight):
        assert run(options=FEW).alpha.tobytes() == plain.alpha.tobytes()
    with gates._pressed(None):
        assert run(options=FEW).alpha.tobytes() == plain.alpha.tobytes()
    with pytest.raises(ZeroDivisionError), gates._pressed(lambda share: 1 / 0):
        run(options=FEW)
    assert follow(FEW).penalty(torch.tensor(0.5), step=0) == 0.5 * FEW.reg_weight
    assert run(options=FEW).alpha.tobytes() == plain.alpha.tobytes()
    with gates._pressed(course):
        run(options=FEW)
    assert asked == pytest.approx([0, 0.5, 1])


def stand_in(way: gates.Way, seed: int) -> HeadPattern:
    """All ways choose the same heads but one; the second seed ties at one."""
    first = 0.2 if way == WAYS[2] else 0.9
    alpha = [[first, 0.5], [0.6, 1.0 if seed else 0.8]]
    cost = {"seconds": 3.0, "forward_tokens": 20, "backward_tokens": 10}
    return HeadPattern.from_alpha(alpha, sink=64, recent=256, training={"cost": cost})


@pytest.fixture
def shared(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Lab, list[int]]]:
    """A lab whose parts have all been done, and how many policies each evaluation was asked for."""
    asked: list[int] = []

    def counted(*given: Any, **more: Any) -> Any:
        asked.append(len(more["policies"]))
        return evaluate_needle(*given, **{**more, "tasks": ["number"]})

    monkeypatch.setattr(gates, "TASKS", {"number": TASKS["number"]})
    monkeypatch.setattr(gates, "DEPTHS", (0.3, 0.7))
    monkeypatch.setattr("tools.findings.lab.evaluate_needle", counted)
    monkeypatch.setattr(gates, "trained", lambda lab, way, seed: stand_in(way, seed))
    small = replace(lab, effort=replace(SMALL, lengths=(300,)), ratios=(0.5,))
    for part in (1, 2, 3):
        gates.gates(replace(small, part=(part, 3)))
    yield small, asked


def test_parts_make_every_record_once_and_score_a_choice_of_heads_once_each(
    shared: tuple[Lab, list[int]],
) -> None:
    lab, asked = shared
    found = records(lab)
    made = [(e["shape"]["way"], e["shape"]["seed"]) for e in found]
    assert sorted(made) == sorted([("full", 0), *((way.name, n) for way in WAYS for n in (0, 1))])
    # Full attention in the first part, and in each part the heads of most ways and those of one.
    assert sum(asked) <= 1 + 2 * 3
    ways = {e["shape"]["way"]: e for e in found if e["shape"]["seed"] == 1}
    assert ways[WAYS[0].name]["numbers"]["heads"] == ["0.0", "1.1"]
    assert ways[WAYS[2].name]["numbers"]["heads"] == ["1.0", "1.1"]
    assert ways[WAYS[0].name]["numbers"]["ties_at_one"] == 1
    assert ways[WAYS[0].name]["numbers"]["seconds"] == 3.0
    assert len(ways[WAYS[0].name]["numbers"]["cells"]["number"]) == 2


def way(name: str, cells: list[float], *, seed: int = 0, ratio: float = 0.5) -> dict[str, Any]:
    numbers: dict[str, Any] = {"mean": sum(cells) / len(cells), "cells": {"number": cells}}
    if name != gates.FULL:
        numbers |= {"ties_at_one": seed, "seconds": 30.0}
        numbers |= {"forward_tokens": 2_000_000, "backward_tokens": 1_000_000}
    shape = {"model": "pocket", "way": name, "seed": seed, "ratio": ratio}
    versions = {"torch": "2", "transformers": "5"}
    made = line("findings.gates", shape=shape, numbers=numbers, versions=versions)
    entry: dict[str, Any] = json.loads(made)
    return entry


def test_a_way_stands_with_its_difference_to_full_attention_and_its_cost() -> None:
    given = [
        way("full", [100.0, 80.0], ratio=1.0),
        way("paper", [90.0, 80.0]),
        way("paper", [70.0, 80.0], seed=1),
    ]
    lines = gate_tables.gates("pocket")(given).splitlines()
    # Cells differ by -20 and 0: a mean of -10 with an error of sqrt(200 / 2).
    assert lines[2] == "| paper | 80.0 (75 – 85); -10.0 ± 10.0 | 0.5 | 30 s | 2.0 M | 1.0 M |"
    assert lines[3] == "| *full attention* | 90.0 |  |  |  |  |"
    assert gate_tables.gates("pocket-mha")(given) == NOTHING


def test_settings_of_steps_are_shared_and_leave_their_heads(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    def identify(*given: Any, options: IdentifyOptions, on_step: Any, **more: Any) -> HeadPattern:
        for step in range(options.steps):
            on_step(step)
        last = 0.1 if options.target else 0.7
        return HeadPattern.from_alpha([[0.9, 0.5], [0.6, last]], sink=64, recent=256)

    monkeypatch.setattr(steps, "identify", identify)
    monkeypatch.setattr(
        Lab, "accuracy", lambda lab, policies, **more: {p: {"number": 50.0} for p in policies}
    )
    for part in (1, 2):
        steps.steps(replace(lab, part=(part, 2)))
    found = records(lab)
    assert sorted(e["impl"] for e in found) == sorted(name for name, _ in steps.settings())
    assert all(options.patience == 0 or not options.target for _, options in steps.settings())
    (longest,) = (e for e in found if e["impl"] == steps.REFERENCE)
    assert longest["numbers"]["heads_0.5"] == ["0.0", "1.1"]
    assert longest["numbers"]["steps_done"] == 400
    compared = {e["impl"]: e["numbers"] for e in gate_tables.with_overlaps(found)}
    assert compared["50 steps, 2K-8K"]["overlap_0.5"] == 1
    assert compared["50 steps, target 0.04"]["overlap_0.5"] == 0.5
    rows = [row.split("|")[1].strip() for row in gate_tables.saved(found).splitlines()[2:-2]]
    assert rows[:3] == [
        "tiny, 400 steps, 2K-8K, seed 0", "tiny, 400 steps, 2K-8K, seed 1", "tiny, 200 steps, 2K-8K",
    ]  # fmt: skip
    assert rows[-5:-3] == ["tiny, 400 steps, patience 40", "tiny, 400 steps, target 0.04"]
    others = [entry for entry in found if entry["impl"] != steps.REFERENCE]
    assert gate_tables.with_overlaps(others) == []
    assert gate_tables.saved(others) == NOTHING

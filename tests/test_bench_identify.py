"""What a step of gate training costs: counted as by hand, timed whole, projected along a curve, written as records."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from duohead.bench import identify as bench_identify
from duohead.bench.identify import PHASES, IdentifyBench, StepCost, projected, step_flops
from duohead.bench.identify_lines import FLAGS, add_flags, run
from duohead.identify.options import IdentifyOptions
from duohead.record import read_records
from duohead.shapes import LayerShape

OPTIONS = IdentifyOptions(sink=16, recent=32, context_min=2000)


def tiny(**changes: Any) -> IdentifyBench:
    given: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
    return IdentifyBench("tiny", options=OPTIONS, **given | changes)


def words(*more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_flags(parser.add_argument)
    return parser.parse_args(["--sink", "16", "--recent", "32", "--runs", "1", *more])


def test_the_flags_are_those_listed() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    add_flags(parser.add_argument)
    assert tuple(action.option_strings[0] for action in parser._actions) == FLAGS


def test_operations_are_counted_as_by_hand() -> None:
    options = IdentifyOptions(sink=10, recent=90, gradient_checkpointing=True)
    layer = LayerShape(2, 64, 64)
    found = step_flops([layer] * 3, heads=8, linear=1000, length=2000, options=options)
    linear = 4 * 2 * 1000 * 2000
    pair = 4 * 8 * 64  # a query and a key: two products of 64 numbers for each of 8 heads
    full = 2000 * 2000 / 2 * pair * (2 + 2.5)
    streaming = 2000 * 100 * pair * (1 + 1 + 2.5)
    assert found == linear + 3 * (full + streaming)
    kept = IdentifyOptions(sink=10, recent=90)
    less = step_flops([layer] * 3, heads=8, linear=1000, length=2000, options=kept)
    assert found - less == 2 * 1000 * 2000 + 3 * 2000 * 100 * pair


def test_a_step_is_timed_in_its_phases() -> None:
    bench = tiny()
    bench.verify(300)
    cost = bench.measure(300, runs=2)
    assert cost.outcome is None
    assert set(cost.seconds) == set(PHASES)
    assert cost.step_seconds > 0
    numbers = cost.numbers(0.001)
    assert numbers["floor_seconds"] == pytest.approx(cost.flops / 1e9)
    assert cost.numbers(0.001, world=2)["floor_seconds"] == numbers["floor_seconds"] / 2


def test_a_machine_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = tiny()
    monkeypatch.setattr(
        bench_identify, "distillation", lambda *_: bench.gates.values.sum() + torch.tensor(1.0)
    )
    with pytest.raises(ValueError, match="gates of one must leave the model as it is"):
        bench.verify(300)


def test_too_little_memory_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = tiny()

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(bench, "_step", full)
    cost = bench.measure(300)
    assert cost.numbers(1.0)["outcome"] == "out of memory"
    assert projected([cost], OPTIONS) is None


def test_a_run_is_projected_along_a_curve_and_not_beyond_it() -> None:
    options = IdentifyOptions(steps=10, context_min=1000, context_max=3000, context_lengths=3)
    costs = [
        StepCost(length, None, {}, 2e-3 * length + 1e-6 * length**2, 0, 0.0)
        for length in (1000, 2000, 3000)
    ]
    run_of = projected(costs, options)
    assert run_of is not None
    mean = 2e-3 * 2000 + 1e-6 * (1 + 4 + 9) / 3 * 1e6
    assert run_of["mean_step_seconds"] == pytest.approx(mean)
    assert run_of["run_hours"] == pytest.approx(10 * mean / 3600)
    assert run_of["curve_error"] < 1e-9
    assert projected(costs[:2], options) is None
    assert projected(costs[2:], options) is None


def test_lines_and_records_say_the_same(tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    both = ("--kernels", "deterministic", "fastest")
    lines = list(run(words("--lengths", "200", "400", "--json", str(out), *both)))
    records = read_records(out)
    assert len(lines) == len(records) == 4
    assert [record["shape"]["length"] for record in records] == [200, 400] * 2
    assert [record["shape"]["kernels"] for record in records][1:3] == ["deterministic", "fastest"]
    for line, record in zip(lines, records, strict=True):
        assert record["op"] == "identify.step"
        assert f"{record['numbers']['step_seconds']:.3f} s a step" in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--runs", "0"), "--runs must be at least 1, got 0"),
        (("--steps", "0"), "--steps must be at least 1, got 0"),
        (("--lengths", "1"), "--lengths must be at least 2, got 1"),
        (("--model", "none"), "--model must be one of"),
    ],
)
def test_bad_numbers_are_refused(flags: tuple[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(run(words(*flags)))

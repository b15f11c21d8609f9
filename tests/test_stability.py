"""Patience: the run ends when the selection has stood long enough, and never because of ties or noise in the rise."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from duohead.identify import IdentifyOptions
from duohead.identify.stability import Stability


def watching(**changes: Any) -> Stability:
    given: dict[str, Any] = {"steps": 100, "warmup": 0.1, "patience": 5, "patience_slack": 0.0}
    return Stability(IdentifyOptions(**{**given, "patience_ratios": (0.5,), **changes}))


def settled(flips: dict[int, list[float]] | None = None, **changes: Any) -> int | None:
    """After how many steps a run ends whose gates are 0.8, 0.7, 0.2, 0.1 but for ``flips``; None if never early."""
    stability = watching(**changes)
    for step in range(100):
        stability.watch(step, torch.tensor((flips or {}).get(step, [0.8, 0.7, 0.2, 0.1])))
        if stability.ends is not None:
            return stability.ends
    return None


def test_a_selection_that_stands_ends_the_run_after_patience_and_the_decline() -> None:
    # The rise is 10 steps; selected at step 9, it has stood 5 steps after step 14, and 5 steps of decline follow.
    assert settled() == 20
    assert settled(patience=7) == 24
    assert settled(patience=30) == 50  # the decline is never longer than it would have been


def test_patience_starts_anew_when_a_selected_head_changes() -> None:
    assert settled({12: [0.8, 0.1, 0.7, 0.2]}) == 24
    assert settled({12: [0.7, 0.8, 0.1, 0.2]}) == 20  # the same heads in another order


def test_slack_allows_some_heads_to_change_but_not_to_drift() -> None:
    assert settled({12: [0.8, 0.1, 0.7, 0.2]}, patience_slack=0.5) == 20
    drift = {step: [0.1, 0.2, 0.8, 0.7] for step in range(12, 100)}
    drift[11] = [0.8, 0.1, 0.7, 0.2]
    assert settled(drift, patience_slack=0.5) == 23


def test_ties_are_no_selection() -> None:
    stability = watching()
    for step in range(100):
        stability.watch(step, torch.ones(4))
    assert stability.ends is None
    single = watching()
    for step in range(100):
        single.watch(step, torch.ones(1))
    assert single.ends is None


def test_every_ratio_must_stand() -> None:
    inner = {step: [0.7, 0.8, 0.2, 0.1] for step in range(0, 100, 2)}
    assert settled(inner) == 20
    assert settled(inner, patience_ratios=(0.5, 0.25)) is None


def test_without_patience_nothing_ends_early_and_no_run_gets_longer() -> None:
    assert settled(patience=0) is None
    late = {step: [1.0] * 4 for step in range(93)}
    assert settled(late) == 100


def test_the_learning_rate_falls_to_its_floor_by_the_early_end() -> None:
    options = IdentifyOptions(steps=100, warmup=0.1, patience=5)
    rates = [options.learning_rate_at(step, ends=20) for step in range(20)]
    assert rates[10:15] == pytest.approx([0.02] * 5)
    assert rates[14] > rates[15] > rates[18] > rates[19] == pytest.approx(0.002)
    assert rates[:15] == [options.learning_rate_at(step) for step in range(15)]


def test_the_state_is_json_and_continues() -> None:
    whole, first = watching(), watching()
    values = torch.tensor([0.8, 0.7, 0.2, 0.1])
    for step in range(12):
        whole.watch(step, values)
        first.watch(step, values)
    second = watching()
    second.restore(json.loads(json.dumps(first.state())))
    for step in range(12, 20):
        whole.watch(step, values)
        second.watch(step, values)
    assert whole.ends == second.ends == whole.steps == 20

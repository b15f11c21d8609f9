"""Ways to train gates against one another: more tasks in the training, a target, and other courses of the regulariser.

Every way is `duohead identify` with other options, or with a regulariser whose weight moves, and keeps its seeds, steps
and texts; its heads answer every task with the needle off sinks and window, and a record holds one share of heads with
what the training cost.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest import mock

from torch import Tensor

from duohead.evaluate.tasks import TASKS
from duohead.identify import IdentifyOptions, haystack, train
from duohead.identify.options import TASKS as TRAINING_TASKS
from duohead.identify.scorers import score
from duohead.identify.stability import Stability
from tools.findings.lab import RATIOS, RECENT, SINK, chosen

if TYPE_CHECKING:
    from duohead import HeadPattern, HeadPolicy
    from tools.findings.lab import Lab

FULL = "full"
STEPS = 200
LONGEST = 8192
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
# What a course gives the regulariser as its weight, at a share of the steps from 0 to 1.
Course = Callable[[float], float]


@dataclass(frozen=True)
class Way:
    """Options that differ from the paper's, and the ``course`` of the regulariser's weight if it has one."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    course: Course | None = None


# Rising and falling, the weight is the paper's in the mean.
WAYS = (
    Way("passkeys, weight 0.05 (paper)"),
    Way("passkeys, target 0.04", {"target": 0.04}),
    Way("mix, weight 0.05", {"tasks": TRAINING_TASKS}),
    Way("mix, target 0.04", {"tasks": TRAINING_TASKS, "target": 0.04}),
    Way("passkeys, weight 0.02", {"reg_weight": 0.02}),
    Way("passkeys, weight 0.01", {"reg_weight": 0.01}),
    Way("passkeys, weight 0 to 0.1", course=lambda share: 0.1 * share),
    Way("passkeys, weight 0.1 to 0", course=lambda share: 0.1 * (1 - share)),
)


class _Course(Stability):
    """A run whose regulariser has a weight for each step."""

    def __init__(self, options: IdentifyOptions, course: Course) -> None:
        super().__init__(options)
        self._course = course

    def penalty(self, mean: Tensor, *, step: int) -> Tensor:
        return self._course(step / max(1, self._options.steps - 1)) * mean


def _pressed(course: Course | None) -> AbstractContextManager[Any]:
    """While inside, gates are trained under a regulariser with that course; None leaves it to the options."""
    if course is None:
        return nullcontext()
    return mock.patch.object(train, "follow", lambda options: _Course(options, course))


def gates(lab: Lab) -> None:
    """Train and score the lab's part of all ways and seeds; full attention is scored as one of them."""
    units = [(None, 0), *itertools.product(WAYS, lab.seeds)]
    scored: dict[HeadPolicy | None, dict[str, Any]] = {}
    for way, seed in lab.share(units):
        if way is None:
            _score(lab, [None], scored)
            _note(lab, scored[None], way=FULL, seed=seed, ratio=1.0)
            continue
        pattern = trained(lab, way, seed)
        policies = {
            ratio: pattern.policy(retrieval_ratio=ratio, sink=SINK, recent=RECENT)
            for ratio in lab.ratios or RATIOS
        }
        _score(lab, policies.values(), scored)
        for ratio, policy in policies.items():
            numbers = {**scored[policy], **_cost(pattern), "heads": chosen(policy)}
            _note(lab, numbers, policy=policy, way=way.name, seed=seed, ratio=ratio)


def trained(lab: Lab, way: Way, seed: int) -> HeadPattern:
    """The pattern of a way, made as `duohead identify` does; its training facts have the cost."""
    options = IdentifyOptions(
        steps=STEPS, sink=SINK, recent=RECENT, context_max=LONGEST, seed=seed, **way.options
    )
    with _pressed(way.course):
        return score(
            "optimise",
            lab.model,
            lab.tokenizer,
            haystack.default_text(),
            options=options,
            progress=False,
        )


def _score(
    lab: Lab,
    policies: Iterable[HeadPolicy | None],
    scored: dict[HeadPolicy | None, dict[str, Any]],
) -> None:
    """Put into ``scored`` what policies answer that are not in it yet: ways often choose the same heads."""
    new = {str(n): x for n, x in enumerate(dict.fromkeys(policies)) if x not in scored}
    if not new:
        return
    result = lab.answers(new, tasks=list(TASKS), depths=DEPTHS)
    for name, policy in new.items():
        own = result.select(method=name)
        cells = {
            task: [100 * row.exact_match for row in own.select(task=task).rows] for task in TASKS
        }
        right = {task: sum(found) / len(found) for task, found in cells.items()}
        scored[policy] = {
            "mean": sum(right.values()) / len(right),
            "exact_match": right,
            "cells": cells,
        }


def _cost(pattern: HeadPattern) -> dict[str, Any]:
    """What the training took, and how many gates ended where nothing tells them apart."""
    cost, alpha = pattern.training["cost"], pattern.alpha[pattern.gated]
    return {
        **{name: cost[name] for name in ("seconds", "forward_tokens", "backward_tokens")},
        "ties_at_one": int((alpha == 1).sum()),
        "ties_at_zero": int((alpha == 0).sum()),
    }


def _note(lab: Lab, numbers: Mapping[str, Any], **variant: Any) -> None:
    """A record of one way, seed and share; ``cells`` are by length and then depth."""
    lab.note(
        "gates",
        numbers,
        steps=STEPS,
        context_max=LONGEST,
        depths=list(DEPTHS),
        task_versions={name: task.version for name, task in TASKS.items()},
        **variant,
    )

"""Gates pressed down to a target share of heads, and how long each of them stood: a ranking for every budget at once.

A fixed regulariser stops somewhere: gates above it end at 1 and those below at 0, and among equals a small budget
takes heads by their place. Here the mean gate is led from 1 down to the target, so that gates give way one after
another, and a head's alpha is the mean of its gate on the way. Use `follow(options)` where a `Stability` is wanted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from duohead.identify.options import IdentifyOptions
from duohead.identify.stability import Stability

# Of the squared excess: the pull on the mean gate grows until it meets what the answers resist with, whatever their
# scale, and 10 keeps the excess below a twentieth for resistances up to 1.
PRESSURE = 10.0


class Descent(Stability):
    """Leads the mean gate from 1 to ``options.target`` and remembers each gate's mean over the steps so far."""

    def __init__(self, options: IdentifyOptions) -> None:
        super().__init__(options)
        self._sums: list[float] = []
        self._count = 0

    @property
    def means(self) -> list[float]:
        """Each gate's mean over the steps that were watched."""
        return [total / self._count for total in self._sums]

    def penalty(self, mean: Tensor, *, step: int) -> Tensor:
        """The pressure on what the ``mean`` gate is above its share of the way; nothing below."""
        return PRESSURE * torch.relu(mean - self._options.share_at(step)) ** 2

    def watch(self, step: int, values: Tensor) -> None:
        """Look at the gates [N] as they are after ``step`` (from 0)."""
        super().watch(step, values)
        now = values.tolist()
        self._sums = [a + b for a, b in zip(self._sums or [0.0] * len(now), now, strict=True)]
        self._count += 1

    def state(self) -> dict[str, Any]:
        """What a run needs to continue, as JSON, which keeps every bit of a number."""
        return {**super().state(), "sums": self._sums, "count": self._count}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state`."""
        super().restore(state)
        self._sums, self._count = list(state["sums"]), state["count"]


def follow(options: IdentifyOptions) -> Stability:
    """What watches a run of these options: a `Descent` if they have a target."""
    return Descent(options) if options.target else Stability(options)

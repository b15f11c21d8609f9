"""The course of a run: what presses on its gates, and when their ranking has settled so that it may end.

Selection needs the order of gates, not their final values, and the order is often there long before the paper's 2000
steps are done. Use `Stability(options)`, `penalty(mean, step=step)` in the loss, `watch(step, values)` after the step,
and `ends` for the length of the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from duohead.identify.options import IdentifyOptions


class Stability:
    """Watches gates and decides how many steps a run has.

    A selection stands as long as no more than ``patience_slack`` of its heads have changed since it was first seen; a
    tie at its edge is no selection, since in the beginning all gates are equal. When every selection has stood for
    ``patience`` steps after the rise of the learning rate, the run ends with the decline of the learning rate.
    """

    def __init__(self, options: IdentifyOptions) -> None:
        self._options = options
        self._selected: list[list[int]] | None = None
        self._since = 0
        self._ends: int | None = None

    @property
    def ends(self) -> int | None:
        """Steps of a run that patience has cut short, or None."""
        return self._ends

    @property
    def steps(self) -> int:
        """Steps of the run, as far as one can tell now."""
        return self._options.steps if self._ends is None else self._ends

    def penalty(self, mean: Tensor, *, step: int) -> Tensor:
        """What the loss adds at ``step`` (from 0) for a ``mean`` gate: the paper's constant share of it."""
        return self._options.reg_weight * mean

    def watch(self, step: int, values: Tensor) -> None:
        """Look at the gates [N] as they are after ``step`` (from 0)."""
        options = self._options
        if not options.patience or self._ends is not None:
            return
        now = self._selections(values)
        if step < options.rise or now is None or not self._stands(now):
            self._selected, self._since = now, step
        elif step - self._since >= options.patience:
            self._ends = min(options.steps, step + 1 + options.decline)

    def state(self) -> dict[str, Any]:
        """What a run needs to continue, as JSON."""
        return {"selected": self._selected, "since": self._since, "ends": self._ends}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state`."""
        self._selected, self._since = state["selected"], state["since"]
        self._ends = state["ends"]

    def _selections(self, values: Tensor) -> list[list[int]] | None:
        """The gates chosen at each ratio, ascending; None if one of the choices is a tie."""
        ordered, places = values.detach().cpu().sort(descending=True, stable=True)
        found = []
        for ratio in self._options.patience_ratios:
            count = max(1, min(len(values) - 1, round(ratio * len(values))))
            if len(values) == 1 or ordered[count - 1] == ordered[count]:
                return None
            found.append(sorted(places[:count].tolist()))
        return found

    def _stands(self, now: list[list[int]]) -> bool:
        if self._selected is None:
            return False
        slack = self._options.patience_slack
        return all(
            len(set(then) - set(here)) <= slack * len(then)
            for then, here in zip(self._selected, now, strict=True)
        )

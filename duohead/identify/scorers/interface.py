"""What a scorer is: a way to rank the KV heads of a model, with its source and its options.

Ways to find retrieval heads differ in everything but this, so selection, evaluation and the command line know only
this. A module of this package offers one as `SCORER = Scorer(name=..., source=..., summary=..., options=...,
measure=...)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from duohead.identify.options import option, require

Scale = Literal["rank", "alpha"]


@dataclass(frozen=True)
class ScorerOptions:
    """What every scorer has; the fields of a scorer's own class are its flags on the command line.

    ``sink`` and ``recent`` become the window of the pattern. Raises ValueError for a value out of range.
    """

    sink: int = option(128, "first tokens that a streaming head keeps")
    recent: int = option(256, "last tokens that a streaming head keeps")
    seed: int = option(0, "of everything random")

    def __post_init__(self) -> None:
        require(self, "sink", self.sink >= 0, "must not be negative")
        require(self, "recent", self.recent > 0, "must be above 0")
        require(self, "seed", self.seed >= 0, "must not be negative")


@dataclass(frozen=True)
class Scorer:
    """One way to rank KV heads.

    Attributes:
        name: what it is called, on the command line too.
        source: paper and section.
        summary: one line: what it looks at.
        options: its frozen options class; every field has a default and ``metadata["help"]``, and there are ``sink``,
            ``recent`` and ``seed``.
        measure: ``measure(model, tokenizer, text, *, options, progress)``: raw scores, fp32 [layers, most KV heads of
            a layer], finite where a head is gated and NaN elsewhere, higher for heads that need the context more. It
            leaves the model as it found it, depends on nothing but its arguments, and shows a bar if ``progress``. With
            facts for ``pattern.training`` (JSON) it returns both.
        scale: how raw scores become alphas. "rank": by the share of heads that a head beats, see
            `duohead.identify.scorers.alphas`. "alpha": they are alphas already.
        trains: whether ``measure`` also takes ``out`` (folder or None), ``restart`` and ``log``, as `identify` does:
            it continues an interrupted run in that folder, and may run in several processes.
    """

    name: str
    source: str
    summary: str
    options: type[Any]
    measure: Callable[..., Tensor | tuple[Tensor, Mapping[str, Any]]]
    scale: Scale = "rank"
    trains: bool = False

    def __call__(
        self,
        model: Any,
        tokenizer: Any,
        text: str | Sequence[str],
        *,
        options: Any,
        progress: bool,
        **run: Any,
    ) -> tuple[Tensor, Mapping[str, Any]]:
        """Raw scores and facts, see ``measure``; ``run`` is for a scorer that trains."""
        found = self.measure(model, tokenizer, text, options=options, progress=progress, **run)
        return (found, {}) if isinstance(found, Tensor) else found

"""`profile`: how much of its attention a head spends where a streaming head cannot look, on ordinary long text.

It is the obvious measure, cheap and blind to values: mass that changes nothing counts as much as mass that decides,
which is why the paper trains gates instead. It is here as their rival. Use `score("profile", model, tokenizer, text)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duohead.identify.banded import Scores
from duohead.identify.options import option, require
from duohead.identify.scorers.attention import (
    by_kv_head,
    context_length,
    excerpts,
    first_token,
    observe,
    out_of_window,
    score_matrix,
    weights,
)
from duohead.identify.scorers.interface import Scorer, ScorerOptions

DEFAULT_CONTEXT = 8192


@dataclass(frozen=True)
class ProfileOptions(ScorerOptions):
    """Where attention is looked at; lengths are in tokens."""

    context: int | None = option(
        None, f"tokens of a passage (default: the model's positions, at most {DEFAULT_CONTEXT})"
    )
    samples: int = option(4, "passages")
    queries: int = option(1024, "tokens whose attention is looked at, evenly spaced in a passage")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("samples", "queries"):
            require(self, name, getattr(self, name) > 0, "must be above 0")


def measure(
    model: Any,
    tokenizer: Any,
    text: str | Sequence[str],
    *,
    options: ProfileOptions,
    progress: bool,
) -> Tensor:
    """Share of attention mass out of the window, a mean over queries and passages; of a group, its largest."""
    sink, recent = options.sink, options.recent
    first = sink + recent
    length = context_length(model, options.context, default=DEFAULT_CONTEXT, window=first)
    start, generator = first_token(tokenizer), torch.Generator().manual_seed(options.seed)
    passages = excerpts(
        tokenizer, text, length=length - len(start), count=options.samples, generator=generator
    )
    samples = [torch.cat([start, ids])[None] for ids in passages]
    # The first queries out of whose window anything lies see next to nothing there; they count like all others.
    count = min(options.queries, length - first)
    rows = torch.linspace(first, length - 1, count, dtype=torch.float64).long()

    def outside(q: Tensor, k: Tensor, scores: Scores) -> Tensor:
        keys = torch.arange(length, device=q.device)
        parts = []
        for part, block in weights(q, k, rows, scores=scores):
            far = out_of_window(part, keys[: block.shape[-1]], sink=sink, recent=recent)
            parts.append(block.mul_(far).sum((-1, -2)))
        return torch.stack(parts).sum(0) / len(rows)

    shares = observe(model, samples, outside, progress=progress)
    return score_matrix(model, {layer: by_kv_head(share) for layer, share in shares.items()})


SCORER = Scorer(
    name="profile",
    source="attention profiling, the rival in arXiv 2410.10819, section 3.5",
    summary="share of attention beyond the window, on ordinary text",
    options=ProfileOptions,
    measure=measure,
)

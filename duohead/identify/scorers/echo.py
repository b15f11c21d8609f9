"""`echo`: attention of repeated random tokens to where the same token stood before, and to the token that followed
there.

Random tokens have no meaning, so only a head that looks things up in its context finds its way back to them; echo
heads find the token itself and induction heads the next one (RazorAttention, arXiv 2407.15891, section 3.2). No text
is needed. Use `score("echo", model, tokenizer, text)`.
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
    first_token,
    observe,
    score_matrix,
    weights,
)
from duohead.identify.scorers.interface import Scorer, ScorerOptions
from duohead.shapes import text_config

DEFAULT_TOKENS = 2500


@dataclass(frozen=True)
class EchoOptions(ScorerOptions):
    """What is repeated; the defaults are the paper's."""

    tokens: int | None = option(
        None, f"random tokens (default: what fits the model's positions, at most {DEFAULT_TOKENS})"
    )
    copies: int = option(4, "times that they stand in a sample")
    samples: int = option(1, "samples")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "samples", self.samples > 0, "must be above 0")
        require(self, "copies", self.copies > 1, "must be above 1")


def measure(
    model: Any, tokenizer: Any, text: str | Sequence[str], *, options: EchoOptions, progress: bool
) -> Tensor:
    """Mean attention from every copy but the first to the same token, and the one after it, in all copies before.

    The paper counts echo and induction heads apart and keeps some of each; here one number per head is wanted, and a
    token of either place has to be kept, so both count. Of a group of query heads the largest counts.
    """
    start, generator = first_token(tokenizer), torch.Generator().manual_seed(options.seed)
    count = context_length(
        model,
        options.tokens,
        default=DEFAULT_TOKENS,
        window=options.sink + options.recent,
        passes=options.copies,
        more=len(start),
        name="tokens",
    )
    drawn = _vocabulary(model, tokenizer)
    samples = []
    for _ in range(options.samples):
        ids = drawn[torch.randint(len(drawn), (count,), generator=generator)]
        samples.append(torch.cat([start, ids.repeat(options.copies)])[None])
    # The first tokens of a copy find their like among the sinks, which every head keeps.
    places = torch.arange(options.sink, count)
    rows = (len(start) + count * torch.arange(1, options.copies)[:, None] + places).flatten()

    def found(q: Tensor, k: Tensor, scores: Scores) -> Tensor:
        parts = []
        for part, block in weights(q, k, rows, scores=scores):
            keys = torch.arange(block.shape[-1], device=part.device)
            back = part[:, None] - keys
            # A whole number of copies back, or one token less: the token itself, or the one after it.
            like = (back >= count - 1) & ((back % count == 0) | (back % count == count - 1))
            parts.append(block.mul_(like).sum((-1, -2)))
        return by_kv_head(torch.stack(parts).sum(0) / len(rows))

    return score_matrix(model, observe(model, samples, found, progress=progress))


def _vocabulary(model: Any, tokenizer: Any) -> Tensor:
    """Ids of all tokens that the model knows and that are not special."""
    special = set(tokenizer.all_special_ids)
    size = min(len(tokenizer), text_config(model).vocab_size)
    return torch.tensor([token for token in range(size) if token not in special])


SCORER = Scorer(
    name="echo",
    source="RazorAttention, arXiv 2407.15891, section 3.2",
    summary="attention of repeated random tokens to their like",
    options=EchoOptions,
    measure=measure,
)

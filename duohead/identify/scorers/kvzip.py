"""`kvzip`: the most attention that a KV head pays to the far context while the model repeats that context word for
word.

What a model must read to write its context again is what any later question could ask for, so a head that reads nothing
far away then may forget it. KVzip scores single tokens so; the largest score of a head ranks the heads (its section 3).
Use `score("kvzip", model, tokenizer, text)`.
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

DEFAULT_CONTEXT = 4096
PROMPT = "\n\nRepeat the previous context:\n\n"
POOLS = ("max", "mean")


@dataclass(frozen=True)
class KVzipOptions(ScorerOptions):
    """What is repeated; lengths are in tokens."""

    context: int | None = option(
        None,
        f"tokens of a passage (default: half of the model's positions, at most {DEFAULT_CONTEXT})",
    )
    samples: int = option(4, "passages; each is gone through twice")
    pool: str = option(
        "max", "score of a head from those of its tokens; the paper takes max", choices=POOLS
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "samples", self.samples > 0, "must be above 0")
        require(self, "pool", self.pool in POOLS, f"must be {' or '.join(POOLS)}")


def measure(
    model: Any, tokenizer: Any, text: str | Sequence[str], *, options: KVzipOptions, progress: bool
) -> Tensor:
    """Of each context token the most attention that a token of the repetition pays it; of a head, the largest (or
    mean).

    Unlike the paper, attention to what a streaming head keeps counts as none (sinks would decide otherwise), weights
    are those of the whole softmax instead of one over the context alone, and the whole context is repeated in one
    pass. Of a group of query heads the largest counts, as there. With several passages, their mean.
    """
    prompt = torch.tensor(tokenizer(PROMPT, add_special_tokens=False)["input_ids"])
    start, generator = first_token(tokenizer), torch.Generator().manual_seed(options.seed)
    sink, recent = options.sink, options.recent
    length = context_length(
        model,
        options.context,
        default=DEFAULT_CONTEXT,
        window=sink + recent,
        passes=2,
        more=len(prompt),
    )
    passages = excerpts(
        tokenizer, text, length=length - len(start), count=options.samples, generator=generator
    )
    samples = [torch.cat([start, ids, prompt, ids])[None] for ids in passages]
    rows = torch.arange(length + len(prompt), samples[0].shape[1])

    def importance(q: Tensor, k: Tensor, scores: Scores) -> Tensor:
        keys = torch.arange(length, device=q.device)
        best = q.new_zeros(())
        for part, block in weights(q, k, rows, scores=scores):
            far = out_of_window(part, keys, sink=sink, recent=recent)
            best = torch.maximum(block[..., :length].mul_(far).amax(-2), best)
        tokens = by_kv_head(best)
        return tokens.amax(-1) if options.pool == "max" else tokens.mean(-1)

    return score_matrix(model, observe(model, samples, importance, progress=progress))


SCORER = Scorer(
    name="kvzip",
    source="KVzip, arXiv 2505.23416, section 3",
    summary="most attention to the far context while repeating it",
    options=KVzipOptions,
    measure=measure,
)

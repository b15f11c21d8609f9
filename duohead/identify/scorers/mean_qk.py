"""`mean-qk`: what a head's average query makes of average keys at every distance, without regard to what they say.

Queries and keys gather around centres, and positions turn these into a preference for distances (TriAttention, arXiv
2604.04921, section 3). Queries are paired with keys of another passage: contents then average out, and what remains is
mean query times mean key under the model's own positions, whatever those are. Use `score("mean-qk", model, tokenizer,
text)`.

Shape letters as in `attention`, and N distances.
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
    score_matrix,
)
from duohead.identify.scorers.interface import Scorer, ScorerOptions

DEFAULT_CONTEXT = 8192


@dataclass(frozen=True)
class MeanQKOptions(ScorerOptions):
    """Where queries and keys are taken from; lengths are in tokens."""

    context: int | None = option(
        None, f"tokens of a passage (default: the model's positions, at most {DEFAULT_CONTEXT})"
    )
    samples: int = option(4, "passages; queries of each meet keys of the others")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "samples", self.samples > 1, "must be above 1")


def measure(
    model: Any, tokenizer: Any, text: str | Sequence[str], *, options: MeanQKOptions, progress: bool
) -> Tensor:
    """Share of the expected attention that goes out of the window, of a query with half a passage before it.

    The softmax is taken over the mean products with keys at each distance and with the first ``sink`` keys, whose
    products are nothing like the others'. Of a group of query heads the largest counts.
    """
    window = options.sink + options.recent
    # Distances up to half of a passage have as many pairs as that half has tokens; half must be more than the window.
    length = context_length(model, options.context, default=DEFAULT_CONTEXT, window=2 * window + 1)
    start, generator = first_token(tokenizer), torch.Generator().manual_seed(options.seed)
    passages = excerpts(
        tokenizer, text, length=length - len(start), count=options.samples, generator=generator
    )
    batch = torch.stack([torch.cat([start, ids]) for ids in passages])
    distances = length // 2 - options.sink

    def beyond(q: Tensor, k: Tensor, scores: Scores) -> Tensor:
        logits, first = mean_products(q, k, sink=options.sink, distances=distances)
        scaling = q.shape[-1] ** -0.5 if scores.scaling is None else scores.scaling
        logits = torch.cat([first, logits], -1) * scaling
        if scores.softcap is not None:
            logits = torch.tanh(logits / scores.softcap) * scores.softcap
        if scores.sinks is not None:
            extra = scores.sinks.to(logits).reshape(*logits.shape[:2], 1)
            logits = torch.cat([extra, logits], -1)
        far = logits.softmax(-1)[..., -(distances - options.recent) :]
        return by_kv_head(far.sum(-1))

    return score_matrix(model, observe(model, [batch], beyond, progress=progress))


def mean_products(q: Tensor, k: Tensor, *, sink: int, distances: int) -> tuple[Tensor, Tensor]:
    """Mean products of queries and keys of different passages: with keys at each distance, and with each sink key.

    ``q`` [B, G * P, T, D], ``k`` [B, G, T, D]; returns [G, P, distances] from distance 0, and [G, P, sink], in at
    least fp32. The first ``sink`` tokens are left out of the former. Correlations go through a Fourier transform, so
    that time and memory are linear in T but for a logarithm.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    kv_heads = k.shape[1]
    pairs = q.shape[0] * (q.shape[0] - 1)
    groups = q.unflatten(1, (kv_heads, -1))
    near, first = [], []
    for head in range(kv_heads):
        queries, keys = groups[:, head, :, sink:].to(dtype), k[:, head].to(dtype)
        count = queries.shape[2]
        # Padded to twice the length, the circular correlation is the plain one.
        spectrum = torch.fft.rfft(queries, n=2 * count, dim=2)
        other = torch.fft.rfft(keys[:, None, sink:], n=2 * count, dim=2).conj()
        # All pairs of passages but those of one with itself.
        crossed = spectrum.sum(0) * other.sum(0) - (spectrum * other).sum(0)
        sums = torch.fft.irfft(crossed.sum(-1), n=2 * count, dim=1)[:, :distances]
        near.append(sums / (pairs * (count - torch.arange(distances, device=q.device))))
        means = queries.mean(2)
        begin = keys[:, :sink]
        all_pairs = torch.einsum("bpd,csd->ps", means, begin)
        first.append((all_pairs - torch.einsum("bpd,bsd->ps", means, begin)) / pairs)
    return torch.stack(near), torch.stack(first)


SCORER = Scorer(
    name="mean-qk",
    source="the centres of TriAttention, arXiv 2604.04921, section 3",
    summary="expected attention beyond the window from mean queries and keys",
    options=MeanQKOptions,
    measure=measure,
)

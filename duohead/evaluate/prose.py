"""What a policy does to plain prose: perplexity and divergence from the full model, by position in the context.

Needles show whether a far fact is found, prose whether everything else stayed as it was; a policy that hurts does so
more the further back its window ends. `evaluate_prose(model, tokenizer, text_ids, policies=..., length=4096, ...)` runs
every method on the same windows of held-out text and compares each next-token distribution with the full model's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from duohead.evaluate.needle import check_text, policy_facts, text_digest
from duohead.evaluate.prose_results import ProseResult, ProseRow
from duohead.evaluate.scoring import attention_of, cache_bytes, new_cache, pieces, using
from duohead.identify.assembly import Encoder
from duohead.policy import HeadPolicy

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

# Positions go through the language model head so many at a time.
CHUNK = 512


def evaluate_prose(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text_ids: torch.Tensor,
    *,
    policies: Mapping[str, HeadPolicy | None],
    lengths: Sequence[int],
    windows: int = 8,
    bins: int = 16,
    chunk: int = CHUNK,
    text: str | None = None,
    progress: Callable[[str], None] | None = None,
    on_row: Callable[[ProseRow], None] | None = None,
) -> ProseResult:
    """Perplexity, KL divergence from the full model and agreement with it, for every method and length.

    The full model's logits of one window are kept in its dtype while the methods are compared with it: length x
    vocabulary values.

    Args:
        model: a causal language model in evaluation mode; left as it was found.
        tokenizer: the model's; its start token, if it has one, comes before each window.
        text_ids: int64 [tokens], held-out prose, no shorter than the longest length.
        policies: method name -> policy; None stands for the model as it is (full attention).
        lengths: context lengths in tokens.
        windows: evenly spaced windows of the text per length.
        bins: parts of equal size that positions are averaged over.
        chunk: tokens per forward.
        text: name of the text, for the rows.
        progress: called with the method's name after each window.
        on_row: called with each row as soon as its length is finished.

    Raises:
        ValueError: an argument out of range, a length beyond the model's positions, or too short a text.
    """
    _check(model, text_ids, policies, lengths, windows, bins, chunk)
    made: dict[str, Any] = {"text": text, "text_digest": text_digest(text_ids), "chunk": chunk}
    rows: list[ProseRow] = []
    for length in lengths:
        runs = {name: _Run(model, policy, chunk, bins) for name, policy in policies.items()}
        for ids in _windows(tokenizer, text_ids, length, windows):
            placed = ids.to(model.device)
            full = list(_logits(model, placed, new_cache(model, None), chunk))
            for name, run in runs.items():
                run.compare(placed, full)
                if progress is not None:
                    progress(name)
        shared: dict[str, Any] = {"length": length, "windows": windows, **made}
        for name, run in runs.items():
            rows.append(ProseRow(method=name, **run.fields(), **shared))
            if on_row is not None:
                on_row(rows[-1])
    return ProseResult(tuple(rows))


class _Run:
    """One method over the windows of one length: sums of loss, divergence and agreement, [3, bins] in fp64."""

    def __init__(
        self, model: PreTrainedModel, policy: HeadPolicy | None, chunk: int, bins: int
    ) -> None:
        self._model, self._policy, self._chunk = model, policy, chunk
        self._sums = torch.zeros(3, bins, dtype=torch.float64, device=model.device)
        self._tokens = torch.zeros(bins, dtype=torch.float64, device=model.device)
        self._facts: dict[str, Any] = {}

    @torch.inference_mode()
    def compare(self, ids: torch.Tensor, full: Sequence[torch.Tensor]) -> None:
        """Add a window, int64 [tokens], of which `full` are the full model's logits, piece by piece."""
        bins = self._tokens.shape[0]
        with using(self._model, self._policy) as bound:
            cache = new_cache(self._model, bound)
            start = 0
            for own, theirs in zip(
                _logits(self._model, ids, cache, self._chunk), full, strict=True
            ):
                place = torch.arange(start, start + len(own), device=ids.device)
                numbers = _numbers(own, theirs, ids[place + 1])
                which = place * bins // (len(ids) - 1)
                self._sums.index_add_(1, which, numbers)
                self._tokens.index_add_(0, which, torch.ones_like(numbers[0]))
                start += len(own)
            facts = {**policy_facts(bound), "attention": attention_of(self._model, bound)}
            self._facts = {**facts, "kv_bytes": cache_bytes(cache)}

    def fields(self) -> dict[str, Any]:
        """Fields of the row."""
        loss, divergence, agreed = (self._sums.sum(1) / self._tokens.sum()).tolist()
        losses, divergences, _ = self._sums / self._tokens
        return {
            **self._facts,
            "tokens": int(self._tokens.sum()),
            "perplexity": math.exp(loss),
            "kl_nats": divergence,
            "top1_agreement": agreed,
            "perplexity_by_position": tuple(losses.exp().tolist()),
            "kl_nats_by_position": tuple(divergences.tolist()),
        }


def _numbers(own: torch.Tensor, full: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """Loss, KL(full || own), agreement on the likeliest token; of logits [tokens, vocabulary], fp64 [3, tokens]."""
    # In single precision the divergence of equals comes out below zero.
    mine, theirs = F.log_softmax(own.double(), -1), F.log_softmax(full.double(), -1)
    loss = -mine.gather(-1, following[:, None])[:, 0]
    divergence = F.kl_div(mine, theirs, log_target=True, reduction="none").sum(-1)
    agreed = own.argmax(-1) == full.argmax(-1)
    return torch.stack([loss, divergence, agreed.double()])


@torch.inference_mode()
def _logits(
    model: PreTrainedModel, ids: torch.Tensor, cache: Cache, chunk: int
) -> Iterator[torch.Tensor]:
    """Logits that predict the second token and those after it, a piece at a time: [tokens, vocabulary]."""
    last = len(ids) - 1
    for start, stop in pieces(len(ids), chunk):
        out = model(ids[None, start:stop], past_key_values=cache, use_cache=True).logits[0]
        yield out[: last - start] if stop > last else out


def _windows(
    tokenizer: PreTrainedTokenizerBase, text_ids: torch.Tensor, length: int, count: int
) -> Iterator[torch.Tensor]:
    """`count` evenly spaced windows of `length` tokens, the start token included."""
    head = torch.tensor(Encoder(tokenizer).start(), dtype=torch.long)
    size = length - len(head)
    for index in range(count):
        start = (len(text_ids) - size) * index // max(count - 1, 1)
        yield torch.cat([head, text_ids[start : start + size]])


def _check(
    model: PreTrainedModel,
    text_ids: torch.Tensor,
    policies: Mapping[str, HeadPolicy | None],
    lengths: Sequence[int],
    windows: int,
    bins: int,
    chunk: int,
) -> None:
    for name, values in (("policies", policies), ("lengths", lengths)):
        if not values:
            raise ValueError(f"{name} must not be empty; give at least one")
    for name, value in (("windows", windows), ("bins", bins), ("chunk", chunk)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if min(lengths) < bins + 1:
        raise ValueError(
            f"lengths must have more tokens than bins={bins}, got {min(lengths)}; ask for fewer bins"
        )
    check_text(model, text_ids, lengths)

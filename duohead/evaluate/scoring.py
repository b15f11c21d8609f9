"""One pass over question and answer, and what it says: exact match, first token, token accuracy, and cache bytes.

Where the argmax is right on every answer token, greedy decoding would have written exactly that answer, and where it
is wrong on one, something else; so one forward replaces a generation of any length. (Where prompts have a window of
their own, answers are fed token by token.) `score_samples(model, samples, cache=new_cache(model, policy))` scores
several samples of one length together, under `using(model, policy)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from duohead.identify.gates import answer_positions
from duohead.policy import HeadPolicy
from duohead.shapes import text_config

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

    from duohead.identify.assembly import Sample


@dataclass(frozen=True)
class Score:
    """Of one sample: means over its answers, and their number."""

    exact_match: float
    first_token: float
    token_accuracy: float
    answers: int


def using(
    model: PreTrainedModel, policy: HeadPolicy | None
) -> AbstractContextManager[HeadPolicy | None]:
    """`duo(model, policy)`, or for None a context that changes nothing; yields the policy bound to the model."""
    if policy is None:
        return nullcontext()
    from duohead.models import duo

    return duo(model, policy)


def attention_of(model: PreTrainedModel, policy: HeadPolicy | None) -> str:
    """Name of what attends: the model's own function for full attention, else what "auto" takes on its device."""
    if policy is None:
        return str(model.config._attn_implementation)
    from duohead.attention.choice import choose

    device = model.device
    return f"duo:{choose('auto', device.type, index=device.index)}"


def new_cache(model: PreTrainedModel, policy: HeadPolicy | None) -> Cache:
    """An empty cache: transformers' own (native windows respected) for full attention, else a `DuoCache`."""
    if policy is None:
        from transformers import DynamicCache

        return DynamicCache(config=text_config(model))
    from duohead.cache import DuoCache

    return DuoCache(policy, model)


def cache_bytes(cache: Cache) -> int:
    """Bytes that the keys and values of a filled cache hold in memory, read off its tensors."""
    if hasattr(cache, "kv_bytes"):
        return int(cache.kv_bytes())
    # Layers without KV heads (linear attention, convolution) have neither.
    stores = [
        store
        for layer in cache.layers
        for store in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if store is not None
    ]
    return sum(store.nbytes for store in stores)


def prompts_differ(policy: HeadPolicy | None) -> bool:
    """Whether a streaming head sees further in a prompt than while it generates, so that an answer is no prompt."""
    return policy is not None and policy.window_tokens != policy.recent


def score_sample(
    model: PreTrainedModel, sample: Sample, *, cache: Cache, chunk: int | None = None
) -> Score:
    """`score_samples` of a single one."""
    return score_samples(model, [sample], cache=cache, chunk=chunk)[0]


@torch.inference_mode()
def score_samples(
    model: PreTrainedModel, samples: Sequence[Sample], *, cache: Cache, chunk: int | None = None
) -> list[Score]:
    """Run samples of one length, a row each, through an empty `cache`; scores do not depend on the rows beside.

    Logits are computed where some row has an answer token next and nowhere else: [rows, places, vocabulary].

    Args:
        model: in evaluation mode, under the policy that `cache` was made for.
        samples: of equal length.
        cache: empty; it is left filled.
        chunk: tokens per forward, to bound memory; all at once by default.

    Raises:
        ValueError: samples of several lengths, or with answers in several places where `prompts_differ`, or a model
            that ignores `logits_to_keep`.
    """
    lengths = sorted({len(sample.input_ids) for sample in samples})
    if len(lengths) != 1:
        raise ValueError(
            f"samples must be of one length to share a forward pass, got {lengths} tokens"
        )
    ids = torch.stack([sample.input_ids for sample in samples])
    own = [answer_positions(sample) for sample in samples]
    places = torch.cat(own).unique()
    generated: Sequence[tuple[int, int]] = ()
    if prompts_differ(getattr(cache, "policy", None)):
        generated = samples[0].answers
        if any(sample.answers != generated for sample in samples):
            raise ValueError(
                "samples must have their answers in the same places where prefill_recent differs from recent; score "
                "them one by one"
            )
    calls = _calls(ids.shape[1], chunk, generated)
    made = _argmax(model, ids.to(model.device), places, cache, calls).cpu()
    hits = made == ids[:, places + 1]
    return [
        _score(row[torch.searchsorted(places, mine)].tolist(), [b - a for a, b in sample.answers])
        for row, mine, sample in zip(hits, own, samples, strict=True)
    ]


def _argmax(
    model: PreTrainedModel,
    ids: torch.Tensor,
    places: torch.Tensor,
    cache: Cache,
    calls: Iterator[tuple[int, int]],
) -> torch.Tensor:
    """Likeliest tokens after the ascending `places`: int64 [rows, places]."""
    found = []
    for start, stop in calls:
        inside = places[(places >= start) & (places < stop)]
        # Some logits must be kept; those of a piece without an answer are one row, unused.
        kept = inside - start if len(inside) else torch.tensor([stop - start - 1])
        logits = model(
            ids[:, start:stop],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=kept.to(ids.device),
        ).logits
        if logits.shape[1] != len(kept):
            raise ValueError(
                f"model must honour logits_to_keep, got logits for {logits.shape[1]} positions instead of "
                f"{len(kept)}; use a causal language model of transformers"
            )
        if len(inside):
            found.append(logits.argmax(-1))
    return torch.cat(found, 1)


def _calls(
    length: int, chunk: int | None, generated: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    """[start, end) of the forwards: given tokens in pieces, those of `generated` answers one by one."""
    start = 0
    for first, last in (*generated, (length, length + 1)):
        for begin, end in pieces(first - start, chunk):
            yield start + begin, start + end
        # Nobody feeds the last token of an answer before there is something to follow it.
        for place in range(first, last - 1):
            yield place, place + 1
        start = last - 1


def pieces(length: int, chunk: int | None) -> Iterator[tuple[int, int]]:
    """[start, end) of a prompt's chunks; none is a single token, which would count as decoded, if chunks are longer."""
    step = length if chunk is None else chunk
    start = 0
    while start < length:
        stop = min(start + step, length)
        if step > 1 and length - stop == 1:
            stop = length
        yield start, stop
        start = stop


def _score(right: Sequence[bool], widths: Sequence[int]) -> Score:
    parts, start = [], 0
    for width in widths:
        parts.append(right[start : start + width])
        start += width
    count = len(parts)
    return Score(
        exact_match=sum(all(part) for part in parts) / count,
        first_token=sum(part[0] for part in parts) / count,
        token_accuracy=sum(sum(part) / len(part) for part in parts) / count,
        answers=count,
    )

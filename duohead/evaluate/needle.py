"""Needle retrieval: how often a model still finds what its context holds, with the full cache and with a small one.

The figure that counts is exact match under greedy generation. One forward pass over question and answer gives it: where
the argmax is right on every answer token, greedy decoding would have written exactly that answer, and where it is wrong
on one, something else. `evaluate_needle(model, tokenizer, text_ids, policies=..., ...)` scores every method on the same
samples, and each pass fills a real cache, whose bytes go into the same row.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from duohead.evaluate.results import NeedleResult, NeedleRow
from duohead.evaluate.tasks import TASKS
from duohead.identify.gates import answer_positions
from duohead.policy import HeadPolicy
from duohead.shapes import text_config

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

    from duohead.identify.passkeys import Sample


@dataclass(frozen=True)
class Score:
    """Of one sample: means over its answers, and their number."""

    exact_match: float
    first_token: float
    token_accuracy: float
    answers: int


@dataclass(frozen=True)
class _Cell:
    task: str
    length: int
    depth: float
    samples: list[Sample]


def evaluate_needle(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text_ids: torch.Tensor,
    *,
    policies: Mapping[str, HeadPolicy | None],
    tasks: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    seed: int = 0,
    chunk: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> NeedleResult:
    """Score every method of `policies` on the same samples, over `tasks` x `lengths` x `depths`.

    Args:
        model: a causal language model in evaluation mode; left as it was found.
        tokenizer: the model's.
        text_ids: int64 [tokens], the text that needles are hidden in; no shorter than the longest length.
        policies: method name -> policy; None stands for the model as it is (full attention).
        tasks: names in `duohead.evaluate.tasks.TASKS`.
        lengths: context lengths in tokens, question and answers included.
        depths: places of the needle, 0 (start of the text) to 1 (its end).
        samples: per cell; a sample with several answers scores their mean.
        seed: of needles, and of the place in the text.
        chunk: run the context in pieces of this many tokens, to bound memory; all at once by default.
        progress: called with the method's name after each scored sample.

    Raises:
        ValueError: an argument out of range, a length beyond the model's positions, or too short a text.
    """
    _check(model, text_ids, policies, tasks, lengths, depths, samples)
    cells = list(_cells(tokenizer, text_ids, tasks, lengths, depths, samples, seed))
    rows = []
    for name, policy in policies.items():
        with using(model, policy) as bound:
            rows += [_score_cell(model, name, bound, cell, chunk, progress) for cell in cells]
    return NeedleResult(tuple(rows))


def _check(
    model: PreTrainedModel,
    text_ids: torch.Tensor,
    policies: Mapping[str, HeadPolicy | None],
    tasks: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
) -> None:
    for name, values in (
        ("policies", policies),
        ("tasks", tasks),
        ("lengths", lengths),
        ("depths", depths),
    ):
        if not values:
            raise ValueError(f"{name} must not be empty; give at least one")
    if unknown := [task for task in tasks if task not in TASKS]:
        raise ValueError(f"tasks must be among {', '.join(TASKS)}, got {', '.join(unknown)}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if model.training:
        raise ValueError(
            "model must be in evaluation mode, got one in training mode; call model.eval()"
        )
    check_positions(model, max(lengths))
    if len(text_ids) < max(lengths):
        raise ValueError(
            f"text is too short: a context of {max(lengths)} tokens is asked for and the text has {len(text_ids)}; "
            "give a longer text, or shorter lengths"
        )


def check_positions(model: PreTrainedModel, tokens: int) -> None:
    """ValueError if `tokens` are more than the model has positions for."""
    limit = getattr(text_config(model), "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise ValueError(
            f"lengths must not exceed the model's {limit} positions, got {tokens}; ask for a shorter context, or load "
            "the model with scaled positions"
        )


def _cells(
    tokenizer: PreTrainedTokenizerBase,
    text_ids: torch.Tensor,
    tasks: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    seed: int,
) -> Iterator[_Cell]:
    for task in tasks:
        for length in lengths:
            for depth in depths:
                # A cell's samples depend on what the cell is, not on which other cells are asked for.
                key = zlib.crc32(f"{seed} {task} {length} {depth:.6f}".encode())
                generator = torch.Generator().manual_seed(key)
                made = [
                    TASKS[task].make(
                        tokenizer, text_ids, context_length=length, depth=depth, generator=generator
                    )
                    for _ in range(samples)
                ]
                yield _Cell(task, length, depth, made)


def using(
    model: PreTrainedModel, policy: HeadPolicy | None
) -> AbstractContextManager[HeadPolicy | None]:
    """`duo(model, policy)`, or for None a context that changes nothing; yields the policy bound to the model."""
    if policy is None:
        return nullcontext()
    from duohead.models import duo

    return duo(model, policy)


def _score_cell(
    model: PreTrainedModel,
    name: str,
    policy: HeadPolicy | None,
    cell: _Cell,
    chunk: int | None,
    progress: Callable[[str], None] | None,
) -> NeedleRow:
    scores, taken = [], 0
    for sample in cell.samples:
        cache = new_cache(model, policy)
        scores.append(score_sample(model, sample, cache=cache, chunk=chunk))
        taken = cache_bytes(cache)
        if progress is not None:
            progress(name)
    count = len(scores)
    return NeedleRow(
        task=cell.task,
        task_version=TASKS[cell.task].version,
        method=name,
        retrieval_ratio=1.0 if policy is None else policy.retrieval_ratio,
        sink=None if policy is None else policy.sink,
        recent=None if policy is None else policy.recent,
        policy=None if policy is None else policy.digest(),
        length=cell.length,
        depth=cell.depth,
        samples=count,
        answers=sum(score.answers for score in scores),
        exact_match=sum(score.exact_match for score in scores) / count,
        first_token=sum(score.first_token for score in scores) / count,
        token_accuracy=sum(score.token_accuracy for score in scores) / count,
        kv_bytes=taken,
    )


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


@torch.inference_mode()
def score_sample(
    model: PreTrainedModel, sample: Sample, *, cache: Cache, chunk: int | None = None
) -> Score:
    """Run `sample` once through an empty `cache`; the argmax before each answer token is right or wrong.

    Logits are computed on the rows that predict answers and nowhere else: [answer tokens, vocabulary].
    """
    ids = sample.input_ids.to(model.device)
    rows = answer_positions(sample).to(model.device)
    begin = 0
    if chunk is not None:
        from duohead.models.generate import prefill

        # The pass that yields logits starts at the first answer's row; all before it needs none.
        begin = int(rows[0])
        prefill(model, ids[None, :begin], cache, chunk=chunk)
    out = model(
        ids[None, begin:], past_key_values=cache, use_cache=True, logits_to_keep=rows - begin
    )
    if out.logits.shape[1] != len(rows):
        raise ValueError(
            f"model must honour logits_to_keep, got logits for {out.logits.shape[1]} positions instead of {len(rows)}; "
            "use a causal language model of transformers"
        )
    right = (out.logits[0].argmax(-1) == ids[rows + 1]).tolist()
    return _score(right, [end - start for start, end in sample.answers])


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

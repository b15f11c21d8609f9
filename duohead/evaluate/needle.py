"""Needle retrieval: how often a model still finds what its context holds, with the full cache and with a small one.

The figure that counts is exact match under greedy generation, which one forward pass over question and answer gives
(`scoring.py`). `evaluate_needle(model, tokenizer, text_ids, policies=..., ...)` scores every method on the same
samples, several in one pass, and each pass fills a real cache, whose bytes go into the same row.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

import torch

from duohead.evaluate.results import NeedleResult, NeedleRow
from duohead.evaluate.scoring import (
    Score,
    attention_of,
    cache_bytes,
    new_cache,
    prompts_differ,
    score_sample,
    score_samples,
    using,
)
from duohead.evaluate.speed import Speed, measure
from duohead.evaluate.tasks import TASKS
from duohead.formats import PRECISIONS
from duohead.policy import HeadPolicy
from duohead.shapes import text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from duohead.identify.assembly import Sample

__all__ = [
    "Score",
    "cache_bytes",
    "check_positions",
    "evaluate_needle",
    "new_cache",
    "paper_grid",
    "policy_facts",
    "score_sample",
    "text_digest",
    "using",
]

_WINDOW = ("sink", "recent", "prefill_recent")
_STORAGE = (*PRECISIONS, "evict")


@dataclass(frozen=True)
class _Cell:
    task: str
    length: int
    depth: float
    samples: list[Sample]


def paper_grid(longest: int, *, shortest: int | None = None) -> tuple[list[int], list[float]]:
    """The paper's needle grid (arXiv 2410.10819, figure 6): 13 evenly spaced lengths and 10 depths, 0 to 1.

    Args:
        longest: tokens of the longest context; for a model's figure, all it has positions for.
        shortest: tokens of the shortest, by default a thirteenth of the longest.

    Raises:
        ValueError: fewer than 13 different lengths.
    """
    low = longest // 13 if shortest is None else shortest
    if not 0 < low <= longest - 12:
        raise ValueError(
            f"lengths of the grid must be 13 different ones, got {low} to {longest} tokens; ask for a longer one"
        )
    return [low + (longest - low) * i // 12 for i in range(13)], [i / 9 for i in range(10)]


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
    batch: int = 1,
    speed_tokens: int | None = None,
    text: str | None = None,
    progress: Callable[[str], None] | None = None,
    on_row: Callable[[NeedleRow], None] | None = None,
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
        batch: samples of one task and length in one forward; memory grows with it, scores stay the same.
        speed_tokens: also generate this many tokens per method and length and time them (`speed.py`), after a prompt
            that is shorter by as many; by default no times are taken.
        text: name of the text, for the rows.
        progress: called with the method's name after each scored sample.
        on_row: called with each row as soon as its cell is finished.

    Raises:
        ValueError: an argument out of range, a length beyond the model's positions, or too short a text.
    """
    _check(model, text_ids, policies, tasks, lengths, depths, samples)
    for name, value in (("batch", batch), ("chunk", chunk)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if speed_tokens is not None and not 2 <= speed_tokens <= min(lengths) - 3:
        raise ValueError(
            f"speed_tokens must leave at least 3 tokens of the shortest length for a prompt and be 2 or more, got "
            f"{speed_tokens} with lengths from {min(lengths)}"
        )
    cells = list(_cells(tokenizer, text_ids, tasks, lengths, depths, samples, seed))
    run = _Run(model, cells, chunk, batch, speed_tokens, progress)
    facts: dict[str, Any] = {
        "text": text,
        "text_digest": text_digest(text_ids),
        "sample_seed": seed,
        "chunk": chunk,
        "batch": batch,
    }
    rows: list[NeedleRow] = []
    for name, policy in policies.items():
        with closing(run.method(name, policy)) as found:
            for fields in found:
                rows.append(NeedleRow(**fields, **facts))
                if on_row is not None:
                    on_row(rows[-1])
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
    check_text(model, text_ids, lengths)


def check_text(model: PreTrainedModel, text_ids: torch.Tensor, lengths: Sequence[int]) -> None:
    """ValueError if the model is in training mode, or a length exceeds its positions or the text."""
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


def text_digest(text_ids: torch.Tensor) -> str:
    """Twelve digits that differ for different token ids."""
    return hashlib.sha256(text_ids.long().cpu().numpy().tobytes()).hexdigest()[:12]


def policy_facts(policy: HeadPolicy | None) -> dict[str, Any]:
    """What every row says of its method's policy; the ratio counts heads of gated layers only.

    Everything but the ratio is None for full attention, and so are the windows of a policy that does not evict.
    """
    if policy is None:
        return {"retrieval_ratio": 1.0, **dict.fromkeys((*_WINDOW, *_STORAGE, "policy"))}
    prompts = policy.recent if policy.prefill_recent is None else policy.prefill_recent
    windows = (policy.sink, policy.recent, prompts) if policy.evict else (None, None, None)
    return {
        "retrieval_ratio": policy.retrieval_ratio,
        **dict(zip(_WINDOW, windows, strict=True)),
        **{name: getattr(policy, name) for name in _STORAGE},
        "policy": policy.digest(),
    }


@dataclass(frozen=True)
class _Run:
    """What the passes of all methods share."""

    model: PreTrainedModel
    cells: list[_Cell]
    chunk: int | None
    batch: int
    speed_tokens: int | None
    progress: Callable[[str], None] | None

    def method(self, name: str, policy: HeadPolicy | None) -> Generator[dict[str, Any]]:
        """Fields of one method's rows, one for each cell in their order, as they are finished."""
        with using(self.model, policy) as bound:
            attention = attention_of(self.model, bound)
            facts = {"method": name, "attention": attention, **policy_facts(bound)}
            speeds: dict[int, dict[str, Any]] = {}
            for (_, length), group in groupby(
                self.cells, key=lambda cell: (cell.task, cell.length)
            ):
                alike = list(group)
                if length not in speeds:
                    speeds[length] = self._speed(bound, alike[0])
                scored = self._scored(name, bound, [s for cell in alike for s in cell.samples])
                for cell in alike:
                    made = list(islice(scored, len(cell.samples)))
                    scores, taken = [score for score, _ in made], made[-1][1]
                    yield facts | _cell_fields(cell, scores, taken) | speeds[length]

    def _scored(
        self, name: str, policy: HeadPolicy | None, samples: list[Sample]
    ) -> Iterator[tuple[Score, int]]:
        """Of each sample its score and the bytes of its cache; a batch is run when its first one is asked for."""
        # Answers that are fed token by token lie in places of their own.
        batch = 1 if prompts_differ(policy) else self.batch
        for start in range(0, len(samples), batch):
            part = samples[start : start + batch]
            cache = new_cache(self.model, policy)
            scores = score_samples(self.model, part, cache=cache, chunk=self.chunk)
            taken = cache_bytes(cache) // len(part)
            del cache  # nobody waits for the next sample with a cache in memory
            for score in scores:
                if self.progress is not None:
                    self.progress(name)
                yield score, taken

    def _speed(self, policy: HeadPolicy | None, cell: _Cell) -> dict[str, Any]:
        """Times at a cell's length, of its first sample; none if none are wanted."""
        if self.speed_tokens is None:
            return {}
        prompt = cell.samples[0].input_ids[: -self.speed_tokens]
        speed: Speed = measure(
            self.model, policy, prompt, new_tokens=self.speed_tokens, chunk=self.chunk
        )
        return {"ttft_ms": speed.ttft_ms, "tpot_ms": speed.tpot_ms, "engine": speed.engine}


def _cell_fields(cell: _Cell, scores: Sequence[Score], taken: int) -> dict[str, Any]:
    count = len(scores)
    return {
        "task": cell.task,
        "task_version": TASKS[cell.task].version,
        "length": cell.length,
        "depth": cell.depth,
        "samples": count,
        "answers": sum(score.answers for score in scores),
        "exact_match": sum(score.exact_match for score in scores) / count,
        "first_token": sum(score.first_token for score in scores) / count,
        "token_accuracy": sum(score.token_accuracy for score in scores) / count,
        "kv_bytes": taken,
    }

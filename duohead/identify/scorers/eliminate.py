"""`eliminate`: heads leave one by one, each time the one whose loss is least missed; the order is the ranking.

Trained gates belong to one budget that nobody asked for, saturate, and cannot say which three of many heads to keep.
Here every step is the model with real streaming heads, so the order is strict, nested, and right at each budget it
passes; forward passes are all it takes, most of them over a few short texts, which only propose what all texts judge.
Use `score("eliminate", model, tokenizer, text)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from duohead.identify import haystack
from duohead.identify.banded import Scores, full_attention, streaming_attention
from duohead.identify.gates import Gates, installed
from duohead.identify.options import option, require
from duohead.identify.scorers.attention import context_length
from duohead.identify.scorers.departures import Heads, eliminate, refine
from duohead.identify.scorers.interface import Scorer, ScorerOptions
from duohead.identify.scorers.quiz import KINDS, Quiz, quiz
from duohead.shapes import layer_shapes

DEFAULT_CONTEXT = 8192
MOST_QUESTIONS = 6

# What the kinds of `quiz.KINDS` count for: prose decides where answers are equally safe.
_WEIGHTS = (1.0, 1.0, 1.0, 1.0, 0.1)


@dataclass(frozen=True)
class EliminateOptions(ScorerOptions):
    """What a choice of heads is judged by, and how many choices are tried; lengths are in tokens.

    With these defaults 256 heads (an 8B model) take about 20 million tokens forward and 640 (a 70B model) 25 million,
    at 400 TFLOP/s a quarter of an hour and two and a half hours; ``batch_tokens`` sets the memory beside the weights.
    """

    context: int | None = option(
        None, f"longest text (default: the model's positions, at most {DEFAULT_CONTEXT})"
    )
    context_min: int = option(2048, "shortest text, or the longest if that is shorter")
    samples: int = option(8, "texts that choices are judged by, of evenly spaced lengths")
    screen: int = option(2, "shortest of these texts, by which all choices are sorted first")
    finalists: int = option(3, "choices, the best on those, that the other texts judge as well")
    questions: int | None = option(
        None,
        f"questions of each kind in a text (default: {MOST_QUESTIONS}, or what all texts hold)",
    )
    prose: int = option(64, "tokens of the text itself that are scored too")
    tries: int = option(16, "most choices tried for one departure, the promising first")
    one_by_one: int = option(
        64, "heads from which they leave one at a time; before, a 16th at once"
    )
    exhaustive: int = option(8, "last heads, ordered by trying all their subsets")
    batch_tokens: int = option(32_768, "tokens of one forward pass: more memory, less time")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "samples",
            "screen",
            "finalists",
            "tries",
            "one_by_one",
            "exhaustive",
            "batch_tokens",
        ):
            require(self, name, getattr(self, name) > 0, "must be above 0")
        require(self, "prose", self.prose >= 0, "must not be negative")
        asked = 1 if self.questions is None else self.questions
        require(self, "questions", 0 < asked <= 20, "must be from 1 to 20")
        require(self, "exhaustive", self.exhaustive <= 16, "must be at most 16 (65536 subsets)")
        window = self.sink + self.recent
        require(
            self,
            "context_min",
            self.context_min > window,
            f"must exceed sink + recent = {window}, or streaming heads see everything",
        )


class _Choices(Gates):
    """Every row of a batch keeps its own heads; the others stream."""

    kept: Tensor

    def choose(self, rows: Sequence[Heads]) -> None:
        """The heads that keep everything, one set for each row of the next forward pass."""
        self.kept = torch.zeros(len(rows), len(self.values), dtype=torch.bool)
        for row, heads in zip(self.kept, rows, strict=True):
            row[list(heads)] = True

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scores: Scores) -> Tensor:
        """Full attention for the heads that some row keeps, streaming for those that some row does not."""
        if not self.shapes[layer].gated or self._teaching:
            return super().attend(layer, q, k, v, scores=scores)
        kept = self.kept[:, self._slices[layer]]
        groups = q.shape[1] // k.shape[1]
        wide = kept.repeat_interleave(groups, 1).to(q.device)
        out = torch.empty_like(q[..., :1].expand(*q.shape[:3], v.shape[-1]))
        for wanted, stream in ((kept, False), (~kept, True)):
            heads = wanted.any(0).nonzero()[:, 0].to(q.device)
            if not len(heads):
                continue
            queries = (heads[:, None] * groups + torch.arange(groups, device=q.device)).flatten()
            sinks = scores.sinks
            mine = (
                scores if sinks is None else Scores(scores.scaling, scores.softcap, sinks[queries])
            )
            part = [x[:, index] for x, index in ((q, queries), (k, heads), (v, heads))]
            got = (
                streaming_attention(*part, sink=self.sink, recent=self.recent, scores=mine)
                if stream
                else _causal(*part, scores=mine)
            )
            where = (~wide if stream else wide)[:, queries, None, None]
            out[:, queries] = torch.where(where, got, out[:, queries])
        return out


def _causal(q: Tensor, k: Tensor, v: Tensor, *, scores: Scores) -> Tensor:
    """`full_attention` where no gradient is wanted, so that fp32 on a GPU need not write out its weights."""
    if not (q.is_cuda and q.dtype == torch.float32 and scores.plain):
        return full_attention(q, k, v, scores=scores)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scores.scaling)


class _Exam:
    """What choices of heads lose on some quizzes, measured on a model with `_Choices` installed.

    A rough loss is that on the last ``screen`` quizzes alone. What was asked before is remembered.
    """

    def __init__(
        self,
        model: Any,
        choices: _Choices,
        quizzes: Sequence[Quiz],
        *,
        screen: int,
        batch_tokens: int,
    ) -> None:
        self._model, self._choices, self._batch_tokens = model, choices, batch_tokens
        self._parts = (quizzes[-screen:], quizzes[:-screen])
        # Of every set, what was lost of the answers of each kind: on the last quizzes, and on the others.
        self._lost: tuple[dict[Heads, Tensor], dict[Heads, Tensor]] = ({}, {})
        self._taught = {}
        for given in quizzes:
            with choices.teaching():
                self._taught[given] = self._logits(given, rows=1)[0].float().log_softmax(-1)

    @property
    def choices(self) -> tuple[int, int]:
        """How many sets were measured at all, and how many on all quizzes."""
        return len(self._lost[0]), len(self._lost[1])

    def __call__(self, sets: Sequence[Heads], *, rough: bool = False) -> list[float]:
        """The loss of every set: mean over the answers of a kind, then weighted over kinds."""
        total = torch.zeros(len(sets), len(KINDS), dtype=torch.float64)
        count = torch.zeros(len(KINDS), dtype=torch.float64)
        for part, lost in list(zip(self._parts, self._lost, strict=True))[: 1 if rough else 2]:
            new = [heads for heads in dict.fromkeys(sets) if heads not in lost]
            lost.update(zip(new, self._measure(part, new), strict=True))
            total += torch.stack([lost[heads] for heads in sets])
            for given in part:
                count += torch.bincount(_kinds(given), minlength=len(KINDS))
        weights = torch.tensor(_WEIGHTS, dtype=torch.float64) * (count > 0)
        losses: list[float] = (total / count.clamp(min=1) @ weights / weights.sum()).tolist()
        return losses

    def _measure(self, quizzes: Sequence[Quiz], sets: Sequence[Heads]) -> Tensor:
        """How much is lost of the answers of each kind, summed over quizzes: fp64 [sets, kinds].

        An answer is lost by ``1 - exp(-divergence)`` of its worst token: of a sure token that is one less what
        probability is left to it, and one token that is no longer the likeliest spoils a greedy answer.
        """
        total = torch.zeros(len(sets), len(KINDS), dtype=torch.float64)
        for given in quizzes:
            step = max(1, self._batch_tokens // len(given.input_ids))
            for start in range(0, len(sets), step):
                rows = sets[start : start + step]
                lost = 1 - torch.exp(-self._worst(given, rows))
                total[start : start + step].index_add_(1, _kinds(given), lost)
        return total

    @torch.no_grad()
    def _worst(self, given: Quiz, rows: Sequence[Heads]) -> Tensor:
        """Divergence from the teacher at the worst token of each answer: fp64 [rows, answers]."""
        self._choices.choose(rows)
        taught = self._taught[given]
        # Row by row: a vocabulary can be large, and the terms of all rows at once many times the logits.
        divergence = [
            F.kl_div(row.float().log_softmax(-1), taught, reduction="none", log_target=True).sum(-1)
            for row in self._logits(given, rows=len(rows))
        ]
        of_token = torch.stack(divergence).double().cpu()
        widths = torch.tensor([end - start for start, end in given.answers])
        answer = torch.arange(len(widths)).repeat_interleave(widths).expand_as(of_token)
        # From 0 upwards: rounding can make a divergence a little less than that.
        worst = torch.zeros(len(rows), len(widths), dtype=torch.float64)
        return worst.scatter_reduce_(1, answer, of_token, "amax")

    @torch.no_grad()
    def _logits(self, given: Quiz, *, rows: int) -> Tensor:
        """Logits where answers are predicted: [rows, answer tokens, vocabulary]."""
        device = self._model.device
        ids = given.input_ids.to(device)
        before = torch.cat([torch.arange(start - 1, end - 1) for start, end in given.answers])
        out = self._model(
            input_ids=ids.expand(rows, -1), use_cache=False, logits_to_keep=before.to(device)
        )
        logits: Tensor = out.logits
        return logits


def _kinds(given: Quiz) -> Tensor:
    """The place of each answer's kind in `KINDS`: int64 [answers]."""
    return torch.tensor([KINDS.index(name) for name in given.kinds])


def measure(
    model: Any,
    tokenizer: Any,
    text: str | Sequence[str],
    *,
    options: EliminateOptions,
    progress: bool,
) -> tuple[Tensor, dict[str, Any]]:
    """When each head left: 0 for the first, one less than the number of gated heads for the last.

    The facts are ``losses``, what is lost with 0, 1, 2 ... retrieval heads, and ``choices`` and ``judged``, how many
    choices were tried and how many of them by all texts, and ``questions``, how many of each kind a text had.
    """
    from tqdm import tqdm

    choices = _Choices(
        layer_shapes(model), sink=options.sink, recent=options.recent, device=model.device
    )
    quizzes = _quizzes(model, tokenizer, text, options)
    count = len(choices.values)
    left = torch.empty(count)
    with installed(model, choices):
        exam = _Exam(
            model, choices, quizzes, screen=options.screen, batch_tokens=options.batch_tokens
        )
        leaving = eliminate(exam, count, options=options)
        bar = tqdm(leaving, total=count, desc="eliminate", unit="head", disable=not progress)
        order = refine(exam, list(bar), options=options)
        losses = exam([frozenset(order[place:]) for place in range(count, -1, -1)])
    left[order] = torch.arange(count, dtype=left.dtype)
    with torch.no_grad():
        choices.values.copy_(left)
    tried, judged = exam.choices
    facts = {"losses": losses, "choices": tried, "judged": judged, "questions": _each(quizzes)}
    return torch.from_numpy(choices.alpha), facts


def _each(quizzes: Sequence[Quiz]) -> int:
    """How many questions of each kind every one of the texts has."""
    return quizzes[0].kinds.count("list")


def _quizzes(
    model: Any, tokenizer: Any, text: str | Sequence[str], options: EliminateOptions
) -> list[Quiz]:
    window = options.sink + options.recent
    longest = context_length(model, options.context, default=DEFAULT_CONTEXT, window=window)
    shortest = min(options.context_min, longest)
    ids = haystack.tokens(text, tokenizer, at_least=longest, at_most=haystack.PER_CONTEXT * longest)

    def drawn(each: int) -> list[Quiz]:
        generator = torch.Generator().manual_seed(options.seed)
        return [
            quiz(
                tokenizer,
                ids,
                context_length=int(length),
                each=each,
                prose=options.prose,
                first=window,
                generator=generator,
            )
            for length in torch.linspace(longest, shortest, options.samples).tolist()
        ]

    if options.questions is not None:
        return drawn(options.questions)
    for each in range(MOST_QUESTIONS, 1, -1):
        # Tokenizers that cut words small leave room for fewer.
        with suppress(ValueError):
            return drawn(each)
    return drawn(1)


SCORER = Scorer(
    name="eliminate",
    source="ours: backward elimination with real streaming heads",
    summary="heads leave one by one, each time the one least missed in answers and prose",
    options=EliminateOptions,
    measure=measure,
)

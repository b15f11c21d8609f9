"""`eliminate`: heads leave one by one, each time the one whose loss is least missed; the order is the ranking.

Trained gates belong to one budget that nobody asked for, saturate, and cannot say which three of many heads to keep.
Here every step is the model with real streaming heads, so the order is strict, nested, and right at each budget it
passes; forward passes are all it takes. Use `score("eliminate", model, tokenizer, text)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from duohead.identify.scorers.interface import Scorer, ScorerOptions
from duohead.identify.scorers.quiz import KINDS, Quiz, quiz
from duohead.shapes import layer_shapes

DEFAULT_CONTEXT = 8192
# Enough text that quizzes differ, little enough that a library of books need not be tokenised whole.
_TEXT_PER_CONTEXT = 16

Heads = frozenset[int]
# What the kinds of `quiz.KINDS` count for: prose decides where answers are equally safe.
_WEIGHTS = (1.0, 1.0, 1.0, 0.1)
# Sets of heads that keep everything -> what each of them loses, in [0, 1].
Loss = Callable[[Sequence[Heads]], list[float]]


@dataclass(frozen=True)
class EliminateOptions(ScorerOptions):
    """What a choice of heads is judged by, and how many choices are tried; lengths are in tokens."""

    context: int | None = option(
        None, f"longest text (default: the model's positions, at most {DEFAULT_CONTEXT})"
    )
    context_min: int = option(2048, "shortest text, or the longest if that is shorter")
    samples: int = option(8, "texts that every choice is judged by, of evenly spaced lengths")
    questions: int = option(3, "questions of each kind in a text")
    prose: int = option(64, "tokens of the text itself that are scored too")
    tries: int = option(16, "most choices tried for one departure, the promising first")
    one_by_one: int = option(
        64, "heads from which they leave one at a time; before, a 16th at once"
    )
    exhaustive: int = option(8, "last heads, ordered by trying all their subsets")
    batch_tokens: int = option(32_768, "tokens of one forward pass: more memory, less time")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("samples", "questions", "tries", "one_by_one", "exhaustive", "batch_tokens"):
            require(self, name, getattr(self, name) > 0, "must be above 0")
        require(self, "prose", self.prose >= 0, "must not be negative")
        require(self, "questions", self.questions <= 20, "must be at most 20")
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
    """What choices of heads lose on some quizzes, measured on a model with `_Choices` installed."""

    def __init__(
        self, model: Any, choices: _Choices, quizzes: Sequence[Quiz], *, batch_tokens: int
    ) -> None:
        self._model, self._choices, self._quizzes = model, choices, quizzes
        self._batch_tokens = batch_tokens
        self._known: dict[Heads, float] = {}
        self._taught = []
        for given in quizzes:
            with choices.teaching():
                self._taught.append(self._log_probabilities(given, rows=1)[0])

    @property
    def choices(self) -> int:
        """How many sets were measured."""
        return len(self._known)

    def __call__(self, sets: Sequence[Heads]) -> list[float]:
        """The loss of every set; what was asked before is remembered."""
        new = [heads for heads in dict.fromkeys(sets) if heads not in self._known]
        self._known.update(zip(new, self._measure(new), strict=True))
        return [self._known[heads] for heads in sets]

    def _measure(self, sets: Sequence[Heads]) -> list[float]:
        """Per set: how much of its answers is lost, mean over the answers of a kind, then weighted over kinds.

        An answer is lost by ``1 - exp(-divergence)`` of its worst token: of a sure token that is one less what
        probability is left to it, and one token that is no longer the likeliest spoils a greedy answer.
        """
        total = torch.zeros(len(sets), len(KINDS), dtype=torch.float64)
        count = torch.zeros(len(KINDS), dtype=torch.float64)
        for given, taught in zip(self._quizzes, self._taught, strict=True):
            kind = torch.tensor([KINDS.index(name) for name in given.kinds])
            count += torch.bincount(kind, minlength=len(KINDS))
            step = max(1, self._batch_tokens // len(given.input_ids))
            for start in range(0, len(sets), step):
                rows = sets[start : start + step]
                lost = 1 - torch.exp(-self._worst(given, taught, rows))
                total[start : start + step].index_add_(1, kind, lost)
        weights = torch.tensor(_WEIGHTS, dtype=torch.float64) * (count > 0)
        losses: list[float] = (total / count.clamp(min=1) @ weights / weights.sum()).tolist()
        return losses

    @torch.no_grad()
    def _worst(self, given: Quiz, taught: Tensor, rows: Sequence[Heads]) -> Tensor:
        """Divergence from the teacher at the worst token of each answer: fp64 [rows, answers]."""
        self._choices.choose(rows)
        found = self._log_probabilities(given, rows=len(rows))
        divergence = F.kl_div(found, taught.expand_as(found), reduction="none", log_target=True)
        of_token = divergence.sum(-1).double().cpu()
        widths = torch.tensor([end - start for start, end in given.answers])
        answer = torch.arange(len(widths)).repeat_interleave(widths).expand_as(of_token)
        # From 0 upwards: rounding can make a divergence a little less than that.
        worst = torch.zeros(len(rows), len(widths), dtype=torch.float64)
        return worst.scatter_reduce_(1, answer, of_token, "amax")

    @torch.no_grad()
    def _log_probabilities(self, given: Quiz, *, rows: int) -> Tensor:
        """Log probabilities where answers are predicted: fp32 [rows, answer tokens, vocabulary]."""
        device = self._model.device
        ids = given.input_ids.to(device)
        before = torch.cat([torch.arange(start - 1, end - 1) for start, end in given.answers])
        out = self._model(
            input_ids=ids.expand(rows, -1), use_cache=False, logits_to_keep=before.to(device)
        )
        return out.logits.float().log_softmax(-1)


def eliminate(loss: Loss, heads: int, *, options: EliminateOptions) -> Iterator[int]:
    """Heads in the order in which they are given up, the most dispensable first.

    Each time that head leaves whose absence costs least. What an absence cost when more heads were there is a guess of
    what it costs now, and seldom too high, because heads stand in for one another: so heads are tried in the order of
    the guesses, and no further than the best found (lazy greedy selection, Minoux 1978). The last few are ordered by
    the path through all their subsets whose losses have the least sum.
    """
    kept = frozenset(range(heads))
    guess = _costs(loss, kept, sorted(kept))
    while len(kept) > options.exhaustive:
        leave = 1 if len(kept) <= options.one_by_one else max(1, len(kept) // 16)
        found = _try(loss, kept, guess, leave, options.tries)
        guess.update(found)
        gone = sorted(found, key=lambda head: (found[head], head))[:leave]
        yield from gone
        kept = kept - frozenset(gone)
    yield from _last(loss, kept)


def _costs(loss: Loss, kept: Heads, heads: Sequence[int]) -> dict[int, float]:
    """What the absence of each of ``heads`` adds to the loss of ``kept``."""
    now, *without = loss([kept, *(kept - {head} for head in heads)])
    return {head: cost - now for head, cost in zip(heads, without, strict=True)}


def _try(
    loss: Loss, kept: Heads, guess: dict[int, float], leave: int, tries: int
) -> dict[int, float]:
    """The costs of some heads' absence: those with the lowest guesses, until ``leave`` of them are clear."""
    order = sorted(kept, key=lambda head: (guess[head], head))
    step = max(leave, tries // 2)
    found: dict[int, float] = {}
    for start in range(0, min(max(tries, 2 * leave), len(order)), step):
        some = order[start : start + step]
        if found and sorted(found.values())[leave - 1] <= guess[some[0]]:
            break
        found |= _costs(loss, kept, some)
    return found


def _last(loss: Loss, kept: Heads) -> list[int]:
    """The best order in which all of ``kept`` can leave, of all orders."""
    members = sorted(kept)
    subsets = [
        frozenset(head for place, head in enumerate(members) if bits >> place & 1)
        for bits in range(2 ** len(members))
    ]
    cost = dict(zip(subsets, loss(subsets), strict=True))
    # Sum of the losses from a subset down to none, and the head that leaves it on the best way there.
    total: dict[Heads, float] = {frozenset(): 0.0}
    leaves: dict[Heads, int] = {}
    for subset in sorted(subsets, key=len)[1:]:
        head = min(subset, key=lambda h: (total[subset - {h}] + cost[subset - {h}], h))
        leaves[subset] = head
        total[subset] = total[subset - {head}] + cost[subset - {head}]
    order = []
    while kept:
        order.append(leaves[kept])
        kept = kept - {leaves[kept]}
    return order


def measure(
    model: Any,
    tokenizer: Any,
    text: str | Sequence[str],
    *,
    options: EliminateOptions,
    progress: bool,
) -> tuple[Tensor, dict[str, Any]]:
    """When each head left: 0 for the first, one less than the number of gated heads for the last.

    The facts are ``losses``, what is lost with 0, 1, 2 ... retrieval heads, and ``choices``, how many were tried.
    """
    from tqdm import tqdm

    choices = _Choices(
        layer_shapes(model), sink=options.sink, recent=options.recent, device=model.device
    )
    quizzes = _quizzes(model, tokenizer, text, options)
    count = len(choices.values)
    left = torch.empty(count)
    with installed(model, choices):
        exam = _Exam(model, choices, quizzes, batch_tokens=options.batch_tokens)
        order = eliminate(exam, count, options=options)
        bar = tqdm(order, total=count, desc="eliminate", unit="head", disable=not progress)
        kept = [frozenset(range(count))]
        for place, head in enumerate(bar):
            left[head] = place
            kept.append(kept[-1] - {head})
        losses = exam(kept[::-1])
    with torch.no_grad():
        choices.values.copy_(left)
    return torch.from_numpy(choices.alpha), {"losses": losses, "choices": exam.choices}


def _quizzes(
    model: Any, tokenizer: Any, text: str | Sequence[str], options: EliminateOptions
) -> list[Quiz]:
    window = options.sink + options.recent
    longest = context_length(model, options.context, default=DEFAULT_CONTEXT, window=window)
    shortest = min(options.context_min, longest)
    ids = haystack.tokens(text, tokenizer, at_least=longest, at_most=_TEXT_PER_CONTEXT * longest)
    generator = torch.Generator().manual_seed(options.seed)
    return [
        quiz(
            tokenizer,
            ids,
            context_length=int(length),
            each=options.questions,
            prose=options.prose,
            first=window,
            generator=generator,
        )
        for length in torch.linspace(longest, shortest, options.samples).tolist()
    ]


SCORER = Scorer(
    name="eliminate",
    source="ours: backward elimination with real streaming heads",
    summary="heads leave one by one, each time the one least missed in answers and prose",
    options=EliminateOptions,
    measure=measure,
)

"""Elimination: which head leaves when, what a choice of heads loses, and the texts that it is judged by."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_identification import TEXT, tiny, tokenizer

from duohead.identify import haystack
from duohead.identify.gates import Gates, installed
from duohead.identify.passkeys import WORDS
from duohead.identify.scorers import eliminate as module
from duohead.identify.scorers.departures import Heads, _together, eliminate, refine
from duohead.identify.scorers.eliminate import (
    DEFAULT_CONTEXT,
    MOST_QUESTIONS,
    SCORER,
    EliminateOptions,
    _Choices,
    _each,
    _Exam,
    _quizzes,
    measure,
)
from duohead.identify.scorers.quiz import KINDS, Quiz, quiz
from duohead.shapes import layer_shapes

OPTIONS = EliminateOptions(
    sink=4, recent=8, context=400, samples=2, questions=1, prose=8, exhaustive=2, batch_tokens=1200
)


def ranked(options: EliminateOptions, model: Any = None) -> tuple[torch.Tensor, dict[str, Any]]:
    model = tiny() if model is None else model
    return measure(model, tokenizer(), TEXT, options=options, progress=False)


class Counted:
    """A loss that knows what it was asked for, and how often; rough answers are a little wrong, by ``noise``."""

    def __init__(self, of: Any, *, noise: float = 0.0) -> None:
        self._of, self._noise = of, noise
        self.known, self.rough = dict[Heads, float](), dict[Heads, float]()

    def __call__(self, sets: Sequence[Heads], *, rough: bool = False) -> list[float]:
        known = self.rough if rough else self.known
        for heads in sets:
            if heads not in known:
                wrong = self._noise * random.Random(str(sorted(heads))).random() if rough else 0.0
                known[heads] = self._of(heads) + wrong
        return [known[heads] for heads in sets]


def facts(heads: int, *, seed: int, noise: float = 0.0) -> Counted:
    """Each of many facts is known to a few heads and lost when none of them is left: heads stand in for one another."""
    draw = random.Random(seed)
    known_to = [set(draw.sample(range(heads), draw.randint(1, min(4, heads)))) for _ in range(200)]
    return Counted(lambda kept: sum(not known & kept for known in known_to) / 200, noise=noise)


def path(loss: Counted, order: Sequence[int]) -> float:
    """Sum of the losses on the way from all heads to none."""
    return sum(loss([frozenset(order[place:]) for place in range(len(order) + 1)]))


def greedy(loss: Counted, heads: int, until: int) -> list[int]:
    kept, order = frozenset(range(heads)), []
    while len(kept) > until:
        gone = min(sorted(kept), key=lambda head: loss([kept - {head}])[0])
        order.append(gone)
        kept = kept - {gone}
    return order


@pytest.mark.parametrize("seed", range(5))
def test_lazy_elimination_takes_the_heads_that_greedy_elimination_takes_with_fewer_tries(
    seed: int,
) -> None:
    options = replace(OPTIONS, tries=24, exhaustive=1)
    ours, theirs = facts(24, seed=seed), facts(24, seed=seed)
    assert list(eliminate(ours, 24, options=options))[:-1] == greedy(theirs, 24, 1)
    assert len(ours.rough) < 0.8 * len(theirs.known)
    assert len(ours.known) < 0.4 * len(theirs.known)


@pytest.mark.parametrize("seed", range(5))
def test_all_texts_judge_between_choices_that_few_texts_take_for_equal(seed: int) -> None:
    made = {
        finalists: list(eliminate(facts(24, seed=seed, noise=0.02), 24, options=options))
        for finalists, options in (
            (n, replace(OPTIONS, exhaustive=6, finalists=n)) for n in (1, 4, 24)
        )
    }
    true = facts(24, seed=seed)
    lost = {finalists: path(true, order) for finalists, order in made.items()}
    assert lost[4] < lost[1]
    assert lost[4] < 1.05 * lost[24]


@pytest.mark.parametrize("seed", range(3))
def test_the_last_heads_leave_in_the_best_order_there_is(seed: int) -> None:
    loss = Counted(lambda kept: random.Random(f"{seed} {sorted(kept)}").random())
    order = list(eliminate(loss, 6, options=replace(OPTIONS, exhaustive=6)))
    best = min(path(loss, each) for each in itertools.permutations(range(6)))
    assert path(loss, order) == pytest.approx(best)


def test_heads_are_ordered_together_given_those_that_stay() -> None:
    loss = Counted(lambda kept: random.Random(str(sorted(kept))).random())
    base = frozenset({7, 9})

    def lost(order: Sequence[int]) -> float:
        return sum(loss([base | frozenset(order[place:]) for place in range(5)]))

    order = _together(loss, base, frozenset(range(4)), finalists=3)
    assert lost(order) == pytest.approx(min(map(lost, itertools.permutations(range(4)))))


@pytest.mark.parametrize("seed", range(5))
def test_neighbours_that_left_in_the_wrong_order_change_places(seed: int) -> None:
    options = replace(OPTIONS, exhaustive=4)
    loss = facts(24, seed=seed)
    order = list(eliminate(loss, 24, options=options))
    wrong = order[:14] + order[16:18] + order[14:16] + order[18:]
    mended = refine(loss, wrong, options=options)
    assert sorted(mended) == list(range(24))
    assert mended[:10] == wrong[:10]
    assert path(loss, mended) < path(loss, wrong)
    assert path(loss, mended) <= path(loss, order) + 1e-9


@pytest.mark.parametrize("heads", [1, 2, 5, 40])
def test_every_head_leaves_once_also_when_several_leave_at_a_time(heads: int) -> None:
    options = replace(OPTIONS, one_by_one=8, tries=2)
    order = list(eliminate(facts(heads, seed=0), heads, options=options))
    assert sorted(order) == list(range(heads))
    assert sorted(refine(facts(heads, seed=0), order, options=options)) == list(range(heads))


@pytest.mark.parametrize(("heads", "million"), [(256, 20), (640, 26)], ids=["8B", "70B"])
def test_large_models_take_fewer_tokens_than_the_training_of_their_gates(
    heads: int, million: int
) -> None:
    options, loss = EliminateOptions(), facts(heads, seed=0)
    order = refine(loss, list(eliminate(loss, heads, options=options)), options=options)
    assert len(order) == heads
    lengths = torch.linspace(DEFAULT_CONTEXT, options.context_min, options.samples)
    screened = float(lengths[-options.screen :].sum())
    tokens = len(loss.rough | loss.known) * screened
    tokens += len(loss.known) * (float(lengths.sum()) - screened)
    assert tokens < million * 1e6
    # 2000 steps of 2000 to 32000 tokens, each once through the teacher, forward and backward (arXiv 2410.10819, 3.1).
    assert tokens < 0.3 * 2000 * 17_000 * 3


def test_a_head_that_alone_acts_on_the_model_leaves_last() -> None:
    for planted in [(0, 1), (1, 0)]:
        scores, facts = ranked(OPTIONS, planted_model(*planted))
        assert scores[planted] == 3
        assert facts["losses"][0] > 0.01
        assert facts["losses"][1:] == pytest.approx([0] * 4, abs=1e-5)


def planted_model(layer: int, head: int) -> Any:
    """Two layers of two KV heads, of which one has an output."""
    model = tiny()
    with torch.no_grad():
        for index, block in enumerate(model.model.layers):
            columns = block.self_attn.o_proj.weight.unflatten(1, (2, -1))
            columns[:, [other for other in range(2) if (index, other) != (layer, head)]] = 0
    return model


def test_scores_are_a_strict_order_of_gated_heads_and_follow_from_the_seed() -> None:
    first, again, other = (ranked(replace(OPTIONS, seed=seed, samples=1))[0] for seed in (0, 0, 1))
    assert first.dtype == torch.float32
    assert torch.equal(first, again)
    assert sorted(first.flatten().tolist()) == sorted(other.flatten().tolist()) == [0, 1, 2, 3]


def test_a_layer_with_a_native_window_is_not_ranked() -> None:
    model = tiny(num_hidden_layers=3)
    shapes = layer_shapes(model)
    windowed = (shapes[0], replace(shapes[1], window=16), shapes[2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "layer_shapes", lambda _: windowed)
        scores, _ = ranked(OPTIONS, model)
    assert scores[1].isnan().all()
    assert sorted(scores[[0, 2]].flatten().tolist()) == [0, 1, 2, 3]


def test_the_loss_of_a_choice_is_that_of_gates_which_are_0_or_1() -> None:
    model, given = tiny(), a_quiz()
    choices = _Choices(layer_shapes(model), sink=4, recent=8)
    sets = [frozenset(c) for n in range(5) for c in itertools.combinations(range(4), n)]
    with installed(model, choices):
        together = _Exam(model, choices, [given], screen=1, batch_tokens=2000)(sets)
        alone = _Exam(model, choices, [given], screen=1, batch_tokens=1)(sets)
    assert together == pytest.approx(alone, abs=1e-5)
    gates = Gates.of(model, sink=4, recent=8)
    with installed(model, gates):
        expected = [by_gates(model, gates, given, kept) for kept in sets]
    assert together == pytest.approx(expected, abs=1e-5)
    assert together[-1] == pytest.approx(0, abs=1e-5)
    assert together[0] > 0.05


@torch.no_grad()
def by_gates(model: Any, gates: Gates, given: Quiz, kept: Heads) -> float:
    """Weighted mean over kinds of the mean over answers of 1 - exp(-divergence of the worst token)."""

    def probabilities() -> Any:
        return (
            model(input_ids=given.input_ids[None], use_cache=False).logits[0].double().softmax(-1)
        )

    gates.values.fill_(1)
    teacher = probabilities()
    gates.values.zero_()
    gates.values[list(kept)] = 1
    divergence = (teacher * (teacher / probabilities()).log()).sum(-1)
    lost = [1 - torch.exp(-divergence[a - 1 : b - 1].max()).item() for a, b in given.answers]
    of_kind = [
        [value for value, kind in zip(lost, given.kinds, strict=True) if kind == name]
        for name in KINDS
    ]
    # So short a text has no long list.
    *answers, prose = (sum(values) / len(values) for values in of_kind if values)
    return (sum(answers) + 0.1 * prose) / 3.1


def test_a_rough_loss_is_that_on_the_last_texts_and_is_not_measured_again() -> None:
    model, texts = tiny(), [a_quiz(seed=seed, length=500) for seed in range(3)]
    choices = _Choices(layer_shapes(model), sink=4, recent=8)
    sets = [frozenset({0}), frozenset({1, 2})]

    def losses(given: Sequence[Quiz], *, rough: bool) -> list[float]:
        exam = _Exam(model, choices, given, screen=1, batch_tokens=2000)
        return exam(sets, rough=rough)

    with installed(model, choices):
        exam = _Exam(model, choices, texts, screen=1, batch_tokens=2000)
        assert exam(sets, rough=True) == pytest.approx(losses(texts[2:], rough=False))
        assert exam.choices == (2, 0)
        known = exam(sets, rough=True)
        each = [losses([text], rough=False) for text in texts]
        assert exam(sets) == pytest.approx([sum(ours) / 3 for ours in zip(*each, strict=True)])
        assert exam.choices == (2, 2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(exam, "_worst", lambda *_: pytest.fail("measured again"))
            assert exam(sets, rough=True) == known


def test_grouped_heads_learned_sinks_and_soft_caps_reach_the_attention_of_each_head() -> None:
    from duohead.identify.banded import Scores

    shapes = layer_shapes(tiny(num_hidden_layers=1))
    choices, gates = _Choices(shapes, sink=4, recent=8), Gates(shapes, sink=4, recent=8)
    scores = Scores(softcap=3.0, sinks=torch.randn(4))
    q, k, v = (torch.randn(3, heads, 60, 8) for heads in (4, 2, 2))
    sets = [frozenset({0}), frozenset({1}), frozenset({0, 1})]
    choices.choose(sets)
    with torch.no_grad():
        got = choices.attend(0, q, k, v, scores=scores)
        for row, kept in enumerate(sets):
            gates.values.zero_()
            gates.values[list(kept)] = 1
            one = [x[row : row + 1] for x in (q, k, v)]
            assert torch.allclose(
                got[row], gates.attend(0, *one, scores=scores)[0], rtol=0, atol=1e-6
            )


def test_the_model_is_left_as_it_was() -> None:
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attention = model.config._attn_implementation
    ranked(replace(OPTIONS, samples=1), model)
    assert model.config._attn_implementation == attention
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_options_out_of_range_and_texts_without_words_are_refused() -> None:
    with pytest.raises(ValueError, match="tries must be above 0, got 0"):
        EliminateOptions(tries=0)
    with pytest.raises(ValueError, match="exhaustive must be at most 16"):
        EliminateOptions(exhaustive=17)
    with pytest.raises(ValueError, match="context_min must exceed sink [+] recent = 384"):
        EliminateOptions(context_min=384)
    for questions in (0, 21):
        with pytest.raises(ValueError, match=f"questions must be from 1 to 20, got {questions}"):
            EliminateOptions(questions=questions)
    with pytest.raises(ValueError, match="runs of (8|16) words"):
        measure(tiny(), tokenizer(), "1 2 3 4 " * 2000, options=OPTIONS, progress=False)
    crowded = "20 questions of each kind do not fit; raise context_min or, for eliminate, lower questions: context_len"
    with pytest.raises(ValueError, match=crowded):
        ranked(replace(OPTIONS, questions=20))
    with pytest.raises(ValueError, match="context must not exceed 512"):
        ranked(replace(OPTIONS, context=600))


def test_as_many_questions_are_asked_as_all_texts_have_room_for() -> None:
    """At most six: a tokenizer that cuts words small leaves room for fewer, and the facts say how many."""
    model = tiny(max_position_embeddings=4096)

    def quizzes(context: int, questions: int | None = None) -> list[Quiz]:
        options = replace(OPTIONS, context=context, context_min=context, questions=questions)
        return _quizzes(model, tokenizer(), TEXT, options)

    for context, most in ((400, 1), (1500, 2), (4000, 4)):
        found = quizzes(context)
        assert [given.kinds.count("list") for given in found] == [most] * OPTIONS.samples
        assert _each(found) == most < MOST_QUESTIONS
        with pytest.raises(ValueError, match=f"{most + 1} questions of each kind do not fit"):
            quizzes(context, most + 1)
    with pytest.raises(ValueError, match="1 questions of each kind do not fit; raise context_min"):
        quizzes(200)
    assert ranked(replace(OPTIONS, questions=None))[1]["questions"] == 1


def a_quiz(*, seed: int = 0, each: int = 1, length: int = 400) -> Quiz:
    ids = haystack.tokens(TEXT, tokenizer(), at_least=length)
    generator = torch.Generator().manual_seed(seed)
    return quiz(
        tokenizer(), ids, context_length=length, each=each, prose=8, first=12, generator=generator
    )


def test_texts_have_evenly_spaced_lengths() -> None:
    options = replace(OPTIONS, context=500, context_min=400, samples=3)
    lengths = [len(given.input_ids) for given in _quizzes(tiny(), tokenizer(), TEXT, options)]
    assert lengths == [500, 450, 400]


def test_a_quiz_asks_for_what_its_text_holds() -> None:
    given = a_quiz(each=2, length=1300)
    assert len(given.input_ids) == 1300
    assert sorted(given.kinds) == sorted(["list", "copy", "code", "quotation"] * 2 + ["prose"] * 8)
    words = [
        len(tokenizer().decode(given.input_ids[start:end]).split())
        for (start, end), kind in zip(given.answers, given.kinds, strict=True)
        if kind in ("list", "copy")
    ]
    assert sorted(words) == [8, 8, 20, 20]
    text = tokenizer().decode(given.input_ids)
    for (start, end), kind in zip(given.answers, given.kinds, strict=True):
        if kind == "prose":
            assert end == start + 1 and 12 <= start < given.answers[0][0]
            continue
        answer = tokenizer().decode(given.input_ids[start:end])
        lead = tokenizer().decode(given.input_ids[:start]).rsplit("\n\n", 1)[1]
        assert text.count(lead + answer) == 2
        assert len(lead) > 10 and len(answer) > 5


def test_lists_are_of_words_of_the_text_and_long_ones_of_passkeys() -> None:
    given = a_quiz(each=2, length=1300)
    known = set(TEXT.split())
    for (start, end), kind in zip(given.answers, given.kinds, strict=True):
        words = set(tokenizer().decode(given.input_ids[start:end]).split())
        if kind == "list":
            assert words <= known
            assert not words <= set(WORDS)
        if kind == "copy":
            assert words <= set(WORDS)


def test_a_quiz_hides_more_codes_than_it_asks_for() -> None:
    given = a_quiz(each=2, length=1300)
    text = tokenizer().decode(given.input_ids[: given.answers[0][0]])
    assert text.count("The code of ") == 8 + (given.kinds[0] == "code")


def test_a_quiz_follows_from_its_generator() -> None:
    assert torch.equal(a_quiz().input_ids, a_quiz().input_ids)
    assert not torch.equal(a_quiz().input_ids, a_quiz(seed=1).input_ids)


def test_the_scorer_says_what_it_is() -> None:
    assert SCORER.name == "eliminate"
    assert SCORER.options is EliminateOptions

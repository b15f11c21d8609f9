"""Needle formats for evaluation: exact lengths, needles at their depth, answers that can only be looked up."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from duohead import pocket
from duohead.evaluate.needle import paper_grid
from duohead.evaluate.tasks import TASKS
from duohead.identify.assembly import Sample
from duohead.identify.haystack import default_text, tokens


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(pocket.folder("pocket"))


@pytest.fixture(scope="module")
def haystack(tokenizer: Any) -> torch.Tensor:
    return tokens(default_text(), tokenizer, at_least=8000, at_most=8000)


def make(
    name: str, tokenizer: Any, haystack: torch.Tensor, *, depth: float = 0.5, seed: int = 0
) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    return TASKS[name].make(
        tokenizer, haystack, context_length=4001, depth=depth, generator=generator
    )


def test_the_formats_are_named_and_versioned() -> None:
    assert set(TASKS) == {
        *("passkeys", "needle", "number", "keyvalue"),
        *("multikey", "multivalue", "multiquery", "tracking", "pairs", "copy", "longcopy"),
        *("dialogue", "late"),
    }
    assert all(
        task.version >= 1 and task.name == name and task.description for name, task in TASKS.items()
    )


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
def test_a_sample_has_the_length_asked_for_and_its_answer_in_the_text(
    tokenizer: Any, haystack: torch.Tensor, name: str, depth: float
) -> None:
    sample = make(name, tokenizer, haystack, depth=depth)
    assert sample.input_ids.shape == (4001,)
    assert sample.answers[-1][1] == 4001
    first = sample.answers[0][0]
    before = tokenizer.decode(sample.input_ids[:first])
    for place, (start, end) in enumerate(sample.answers):
        answer = tokenizer.decode(sample.input_ids[start:end]).strip()
        # A variable is a key as well; the third question of a conversation was answered before.
        again = (name == "tracking" and answer[0].isalpha()) or (name, place) == ("dialogue", 1)
        assert answer and before.count(answer) == (2 if again else 1)
        assert tokenizer.decode(sample.input_ids[start : start + 1]).strip()


AT_THEIR_DEPTH = ["needle", "number", "keyvalue", "multikey", "multiquery", "copy", "dialogue"]


@pytest.mark.parametrize("name", AT_THEIR_DEPTH)
@pytest.mark.parametrize("depth", [0.1, 0.5, 0.9])
def test_the_needle_asked_for_lies_at_its_depth(
    tokenizer: Any, haystack: torch.Tensor, name: str, depth: float
) -> None:
    sample = make(name, tokenizer, haystack, depth=depth)
    start, end = sample.answers[0]
    answer = sample.input_ids[start:end].tolist()
    ids = sample.input_ids.tolist()
    place = next(i for i in range(len(ids)) if ids[i : i + len(answer)] == answer)
    # Depth counts the text, without the tail; a conversation's is an eighth of the sample.
    assert abs(place / start - depth) < 0.06 + 0.08 * (name == "dialogue")


def test_ten_passkeys_are_asked_for(tokenizer: Any, haystack: torch.Tensor) -> None:
    assert len(make("passkeys", tokenizer, haystack).answers) == 10


@pytest.mark.parametrize("name", TASKS)
def test_another_seed_hides_something_else(
    tokenizer: Any, haystack: torch.Tensor, name: str
) -> None:
    one, same, other = (make(name, tokenizer, haystack, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.input_ids, same.input_ids)
    assert not torch.equal(one.input_ids, other.input_ids)


def test_a_depth_outside_the_text_is_refused(tokenizer: Any, haystack: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="depth must be between 0 and 1, got 1.5"):
        make("needle", tokenizer, haystack, depth=1.5)


def test_pairs_fill_the_context_and_depth_is_the_place_among_them(
    tokenizer: Any, haystack: torch.Tensor
) -> None:
    for depth in (0.0, 0.5, 1.0):
        sample = make("pairs", tokenizer, haystack, depth=depth)
        lines = tokenizer.decode(sample.input_ids[: sample.answers[0][0]]).splitlines()
        keys = [line.partition('": "')[0] for line in lines if '": "' in line]
        assert len(keys) > 100 and len(set(keys[:-1])) == len(keys) - 1
        assert abs(keys.index(keys[-1]) - depth * (len(keys) - 2)) <= 1


def test_a_chain_leads_from_its_last_variable_to_a_number(
    tokenizer: Any, haystack: torch.Tensor
) -> None:
    sample = make("tracking", tokenizer, haystack)
    answers = [tokenizer.decode(sample.input_ids[a:b]).strip() for a, b in sample.answers]
    text = tokenizer.decode(sample.input_ids[: sample.answers[0][0]])
    assert answers[2].isdigit()
    assert f"VAR {answers[0]} = {answers[1]}\n" in text
    assert f"VAR {answers[1]} = {answers[2]}\n" in text


def test_talk_lies_between_the_questions_and_prose_between_late_answers(
    tokenizer: Any, haystack: torch.Tensor
) -> None:
    for name in ("dialogue", "late"):
        sample = make(name, tokenizer, haystack)
        for (_, end), (start, _) in zip(sample.answers, sample.answers[1:], strict=False):
            assert start - end > 4001 // 16


@pytest.mark.parametrize("name", ["pairs", "longcopy", "multikey"])
def test_a_context_too_short_for_the_task_is_refused(
    tokenizer: Any, haystack: torch.Tensor, name: str
) -> None:
    with pytest.raises(ValueError, match="context_length=40 is too small"):
        TASKS[name].make(
            tokenizer,
            haystack,
            context_length=40,
            depth=0.5,
            generator=torch.Generator().manual_seed(0),
        )


def test_too_little_text_is_refused(tokenizer: Any, haystack: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="haystack_ids is too short: context_length=4001"):
        make("late", tokenizer, haystack[:2000])


def test_the_paper_s_grid_has_thirteen_lengths_and_ten_depths() -> None:
    lengths, depths = paper_grid(32768, shortest=2048)
    assert (len(lengths), lengths[0], lengths[-1]) == (13, 2048, 32768)
    assert (len(depths), depths[0], depths[-1]) == (10, 0.0, 1.0)
    assert lengths == sorted(set(lengths))
    with pytest.raises(ValueError, match="must be 13 different ones, got 0 to 12 tokens"):
        paper_grid(12)

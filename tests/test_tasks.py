"""Needle formats for evaluation: exact lengths, needles at their depth, answers that can only be looked up."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from duohead import pocket
from duohead.evaluate.tasks import TASKS
from duohead.identify.haystack import default_text, tokens
from duohead.identify.passkeys import Sample


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
    assert set(TASKS) == {"passkeys", "needle", "number", "keyvalue"}
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
    first = sample.answers[0][0]
    before = tokenizer.decode(sample.input_ids[:first])
    for start, end in sample.answers:
        answer = tokenizer.decode(sample.input_ids[start:end])
        assert answer.strip() and before.count(answer.strip()) == 1
        assert tokenizer.decode(sample.input_ids[start : start + 1]).strip()


@pytest.mark.parametrize("name", ["needle", "number", "keyvalue"])
@pytest.mark.parametrize("depth", [0.1, 0.5, 0.9])
def test_the_needle_asked_for_lies_at_its_depth(
    tokenizer: Any, haystack: torch.Tensor, name: str, depth: float
) -> None:
    sample = make(name, tokenizer, haystack, depth=depth)
    start, end = sample.answers[0]
    answer = sample.input_ids[start:end].tolist()
    ids = sample.input_ids.tolist()
    place = next(i for i in range(len(ids)) if ids[i : i + len(answer)] == answer)
    assert abs(place / len(ids) - depth) < 0.06


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

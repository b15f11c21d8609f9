"""Gates trained on a mix of tasks: which answers count at which step, and that a run is still one run."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_identification import OPTIONS, TEXT, run, tiny

from duohead import pocket
from duohead.cli import build_parser
from duohead.identify import IdentifyOptions, Step, haystack
from duohead.identify.assembly import Sample
from duohead.identify.options import PASSKEYS, TASKS
from duohead.identify.passkeys import WORDS
from duohead.identify.samples import StepSamples, training_samples
from duohead.identify.scorers.quiz import KINDS
from duohead.pattern import HeadPattern

SHORTEST, LONGEST = 900, 1000
MIXED = replace(OPTIONS, context_min=SHORTEST, context_max=LONGEST, steps=10, tasks=TASKS)


@functools.cache
def tokenizer() -> Any:
    """One that knows words, so that three questions of each kind fit into a short text."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(pocket.folder("pocket"))


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return haystack.tokens(TEXT, tokenizer(), at_least=LONGEST)


@pytest.fixture(scope="module")
def mixed(ids: torch.Tensor) -> StepSamples:
    return training_samples(tokenizer(), ids, MIXED, LONGEST)


def answers(sample: Sample) -> list[str]:
    return [tokenizer().decode(sample.input_ids[slice(*place)]).strip() for place in sample.answers]


def mixed_run(out: Path | None = None, **given: Any) -> HeadPattern:
    model = tiny(vocab_size=len(tokenizer()), max_position_embeddings=LONGEST)
    options = replace(MIXED, steps=3, save_every=2)
    return run(out, model=model, tokenizer=tokenizer(), **{"options": options, **given})


def test_every_task_but_passkeys_is_a_kind_of_question() -> None:
    assert TASKS[0] == PASSKEYS
    assert set(TASKS[1:]) < set(KINDS)


def test_tasks_take_turns_and_each_counts_its_own_answers(mixed: StepSamples) -> None:
    for step in range(10):
        sample = mixed[step]
        found = [answer.split() for answer in answers(sample)]
        sizes = [len(words) for words in found]
        task = TASKS[step % 5]
        assert len(sample.input_ids) == mixed.context_length(step), task
        if task == "code":
            assert [len(code) for (code,) in found] == [6] * 3
            assert all(code.isdigit() for (code,) in found)
        else:
            long = len(sample.input_ids) // 64
            wanted = {"passkeys": [3] * 2, "list": [8] * 3, "copy": [long] * 3}
            assert sizes == wanted.get(task, [10] * 3), task
            assert task in ("list", "quotation") or all({*words} <= {*WORDS} for words in found)


def test_answers_lie_in_the_text_and_are_asked_for_at_its_end(mixed: StepSamples) -> None:
    for step in range(1, 5):
        sample = mixed[step]
        text = tokenizer().decode(sample.input_ids[: sample.answers[0][0]])
        assert all(answer in text for answer in answers(sample))
        assert sample.answers[0][0] > len(sample.input_ids) // 3


def test_a_step_has_the_same_sample_in_any_order_and_another_with_another_seed(
    mixed: StepSamples, ids: torch.Tensor
) -> None:
    again = training_samples(tokenizer(), ids, MIXED, LONGEST)
    other = training_samples(tokenizer(), ids, replace(MIXED, seed=1), LONGEST)
    for step in reversed(range(5)):
        assert torch.equal(again[step].input_ids, mixed[step].input_ids)
        assert again[step].answers == mixed[step].answers
        assert not torch.equal(other[step].input_ids, mixed[step].input_ids)


def test_lengths_are_evenly_spaced_and_each_comes_once_an_epoch(ids: torch.Tensor) -> None:
    options = replace(OPTIONS, context_min=600, context_max=1200, context_lengths=5)
    samples = training_samples(tokenizer(), ids, options, 1200)
    lengths = [len(samples[step].input_ids) for step in range(10)]
    assert samples.context_lengths == [600, 750, 900, 1050, 1200]
    assert sorted(lengths[:5]) == sorted(lengths[5:]) == samples.context_lengths
    with pytest.raises(IndexError, match="step must not be negative, got -1"):
        _ = samples[-1]


def test_a_mix_is_one_run_that_its_pattern_knows(tmp_path: Path) -> None:
    def interrupt(step: Step) -> None:
        if step.step == 2:
            raise KeyboardInterrupt

    expected = mixed_run()
    with pytest.raises(KeyboardInterrupt):
        mixed_run(tmp_path, on_step=interrupt)
    with pytest.raises(
        ValueError, match=r"different options \(.*tasks \['passkeys', 'list'.*, now"
    ):
        mixed_run(tmp_path, options=replace(MIXED, tasks=(PASSKEYS,)))
    assert mixed_run(tmp_path).alpha.tobytes() == expected.alpha.tobytes()
    assert expected.training["tasks"] == TASKS
    assert HeadPattern.load(tmp_path).training["tasks"] == list(TASKS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ()}, "tasks must be different ones of passkeys, list, .* got \\(\\)"),
        ({"tasks": ("passkeys", "riddles")}, "tasks must be different ones of .*'riddles'"),
        ({"tasks": ("code", "code")}, "tasks must be different ones of"),
        ({"tasks": ("passkeys", "code"), "chat": "yes"}, "chat must not be yes with tasks other"),
        ({"tasks": ("code",), "num_passkeys": 3}, "num_passkeys must be left alone without pass"),
    ],
)
def test_tasks_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IdentifyOptions(**change)


def test_questions_that_do_not_fit_are_found_before_the_run(ids: torch.Tensor) -> None:
    """The shortest contexts of every task are tried, whichever steps they come at."""
    short = replace(MIXED, context_min=300, context_lengths=4, steps=40)
    for tasks in (("passkeys", "list"), ("list", "passkeys")):
        with pytest.raises(ValueError, match="context_length=300 is too small: needles"):
            training_samples(tokenizer(), ids[:1000], replace(short, tasks=tasks), LONGEST)
    lookups = IdentifyOptions(context_min=600, sink=4, recent=8, steps=1, tasks=("code",))
    with pytest.raises(ValueError, match="3 questions of each kind do not fit; raise context_min"):
        training_samples(tokenizer(), ids, lookups, 600)
    # The second task comes in a run of one step only where that has several samples.
    pair = replace(short, tasks=("passkeys", "code"), steps=1, context_lengths=1)
    training_samples(tokenizer(), ids, pair, LONGEST)
    with pytest.raises(ValueError, match="context_length=300 is too small: needles"):
        training_samples(tokenizer(), ids, pair, LONGEST, samples_per_step=2)
    sparse = replace(MIXED, context_min=550, context_max=560, tasks=("passkeys", "copy"))
    with pytest.raises(ValueError, match="is too short for questions of task 'copy'; raise cont"):
        training_samples(tokenizer(), ids, sparse, 560)


def test_tasks_come_from_the_command_line() -> None:
    words = ["identify", "pocket", "--out", "x"]
    parser = build_parser("identify")
    assert parser.parse_args(words).tasks == (PASSKEYS,)
    assert parser.parse_args([*words, "--tasks", "code", "copy"]).tasks == ["code", "copy"]
    with pytest.raises(ValueError, match=r"--tasks: invalid choice: 'riddles' \(choose from"):
        parser.parse_args([*words, "--tasks", "riddles"])

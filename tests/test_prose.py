"""Prose figures are those of whole logits, part by part, and come back from their file as they were."""

from dataclasses import replace

import pytest
import tiny_evaluation as tiny
import torch

from duohead.evaluate.prose import evaluate_prose
from duohead.evaluate.prose_results import ProseResult
from duohead.evaluate.scoring import new_cache, using
from duohead.policy import HeadPolicy

LENGTH, BINS = 96, 5
SOME = HeadPolicy.from_heads(retrieval=[[0], [], [1]], num_kv_heads=2, sink=4, recent=16)
ALL = HeadPolicy.from_heads(retrieval=[[0, 1]] * 3, num_kv_heads=2, sink=4, recent=16)


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def text_ids(tokenizer):
    return torch.tensor(tokenizer(tiny.TEXT, add_special_tokens=False)["input_ids"][:400])


@pytest.fixture(scope="module")
def result(model, tokenizer, text_ids):
    policies = {"full": None, "all": ALL, "some": SOME}
    return evaluate_prose(
        model,
        tokenizer,
        text_ids,
        policies=policies,
        lengths=[LENGTH],
        windows=2,
        bins=BINS,
        chunk=40,
        text="story",
    )


@torch.inference_mode()
def log_probabilities(model, policy, ids):
    with using(model, policy) as bound:
        logits = model(ids[None], past_key_values=new_cache(model, bound)).logits[0, :-1]
    return logits.double().log_softmax(-1)


def test_figures_are_those_of_the_whole_logits_in_every_part(model, text_ids, result):
    losses, divergences, agreed = [], [], []
    for ids in (text_ids[:LENGTH], text_ids[-LENGTH:]):
        full, own = (log_probabilities(model, policy, ids) for policy in (None, SOME))
        losses.append(-own[torch.arange(LENGTH - 1), ids[1:]])
        divergences.append((full.exp() * (full - own)).sum(-1))
        agreed.append((full.argmax(-1) == own.argmax(-1)).double())
    loss, divergence = torch.stack(losses), torch.stack(divergences)
    row = result.row("some", LENGTH)
    assert row.tokens == 2 * (LENGTH - 1)
    assert row.perplexity == pytest.approx(float(loss.mean().exp()), rel=1e-4)
    assert row.kl_nats == pytest.approx(float(divergence.mean()), rel=1e-3)
    assert row.top1_agreement == pytest.approx(float(torch.stack(agreed).mean()))
    width = (LENGTH - 1) // BINS
    for part in range(BINS):
        own = slice(part * width, (part + 1) * width)
        assert row.perplexity_by_position[part] == pytest.approx(
            float(loss[:, own].mean().exp()), rel=1e-4
        )
        assert row.kl_nats_by_position[part] == pytest.approx(
            float(divergence[:, own].mean()), rel=1e-3, abs=1e-9
        )


def test_nothing_differs_before_the_window_ends_and_something_after(result):
    row = result.row("some", LENGTH)
    assert row.kl_nats_by_position[0] < 1e-9 < 1e-4 < row.kl_nats_by_position[-1]


def test_all_heads_kept_are_the_full_model(result):
    full, kept = (result.row(name, LENGTH) for name in ("full", "all"))
    assert full.kl_nats == 0 and full.top1_agreement == 1
    assert kept.kl_nats < 1e-9
    assert kept.perplexity == pytest.approx(full.perplexity, rel=1e-5)
    assert kept.kv_bytes == full.kv_bytes > result.row("some", LENGTH).kv_bytes


def test_rows_come_back_from_their_file_and_versions_do_not_mix(result, tmp_path):
    path = tmp_path / "prose.jsonl"
    result.write(path, model="tiny", dtype=torch.float32)
    assert ProseResult.read(path) == result
    newer = ProseResult((replace(result.rows[0], task_version=2),))
    newer.write(tmp_path / "newer.jsonl", model="tiny", dtype=torch.float32)
    with pytest.raises(ValueError, match="rows mix versions 1 and 2 of task 'prose'"):
        ProseResult.read(path, tmp_path / "newer.jsonl")


def test_a_row_that_is_not_there_is_named(result):
    with pytest.raises(ValueError, match="0 rows are of method 'none' at 96 tokens"):
        result.row("none", LENGTH)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": []}, "lengths must not be empty"),
        ({"windows": 0}, "windows must be at least 1, got 0"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"bins": 96}, "lengths must have more tokens than bins=96, got 96"),
        ({"lengths": [5000]}, "lengths must not exceed the model's 4096 positions"),
        ({"lengths": [500]}, "text is too short: .* 500 tokens .* has 400"),
    ],
)
def test_a_bad_argument_is_named_before_any_work(model, tokenizer, text_ids, changes, message):
    options = {"policies": {"full": None}, "lengths": [LENGTH], **changes}
    with pytest.raises(ValueError, match=message):
        evaluate_prose(model, tokenizer, text_ids, progress=pytest.fail, **options)

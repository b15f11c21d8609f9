"""lm-eval's requests through the small cache: equal to lm-eval's own, and to a masked reference where heads stream."""

from typing import Any

import pytest
import tiny
import torch

from duohead.models import duo
from duohead.models.generate import Generation

pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'duohead[eval]')")
pytest.importorskip("accelerate", reason="lm-eval's adapter needs accelerate")

import tiny_harness as shared
from tiny_harness import STORY, instances, ours, theirs

from duohead.evaluate.harness_model import PolicyLM

PAIRS = [
    (STORY * 2 + "they saw", " it."),
    (STORY * 2 + "they saw", " it!"),
    (STORY * 2 + "they saw", " a long boat"),
    ("why", "?"),
    (STORY, "and so on and on, " * 4),
]
PROMPTS = [STORY * 3 + "then", "so", STORY + "now", "x" * 40]
model, tokenizer, policy = shared.model, shared.tokenizer, shared.policy


def asked(lm: Any, *, last: int | None = None) -> tuple[Any, Any, Any]:
    """Likelihoods, rolling likelihoods (one text is longer than the model's context) and texts.

    ``last`` cuts every context to that many of its last tokens.
    """
    end = slice(None if last is None else -last, None)
    settings = {"until": ["e"], "max_gen_toks": 9, "do_sample": False}
    pairs = [(context[end], continuation) for context, continuation in PAIRS]
    rolled = [(text[end],) for text in (STORY * 2, STORY * 6, "a")]
    prompts = [(prompt[end], settings) for prompt in PROMPTS]
    return (
        lm.loglikelihood(instances("loglikelihood", pairs)),
        lm.loglikelihood_rolling(instances("loglikelihood_rolling", rolled)),
        lm.generate_until(instances("generate_until", prompts)),
    )


def assert_scores_equal(found: Any, expected: Any) -> None:
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    for (a, _), (b, _) in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-4)


def test_full_attention_answers_as_lm_evals_own_adapter_does(model, tokenizer) -> None:
    likelihoods, rolling, texts = asked(ours(model, tokenizer, None))
    expected = asked(theirs(model, tokenizer))
    assert_scores_equal(likelihoods, expected[0])
    assert rolling == pytest.approx(expected[1], rel=1e-4)
    assert texts == expected[2]
    assert len(set(texts)) > 1


def test_a_policys_likelihoods_are_those_of_the_masked_reference(model, tokenizer, policy) -> None:
    with duo(model, policy) as bound:
        likelihoods, rolling, _ = asked(ours(model, tokenizer, bound))
    full = theirs(model, tokenizer).loglikelihood(instances("loglikelihood", PAIRS))
    with tiny.masked(model, policy):
        lm = theirs(model, tokenizer)
        expected = lm.loglikelihood(instances("loglikelihood", PAIRS))
        long = lm.loglikelihood_rolling(
            instances("loglikelihood_rolling", [(STORY * 2,), (STORY * 6,), ("a",)])
        )
    assert_scores_equal(likelihoods, expected)
    assert rolling == pytest.approx(long, rel=1e-4)
    assert abs(full[0][0] - expected[0][0]) > 1e-2  # the policy makes a difference here


def test_a_policys_texts_are_those_of_the_masked_reference(model, tokenizer, policy) -> None:
    with duo(model, policy) as bound:
        _, _, texts = asked(ours(model, tokenizer, bound))
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = torch.tensor([tokenizer.encode(prompt)])
        made = tiny.expected_greedy(model, policy, ids, 9)[0]
        assert text == tokenizer.decode(made[-9:]).split("e")[0].split("~")[0]


def test_texts_are_cut_alike_where_decoding_does_not_stop(
    model, tokenizer, policy, monkeypatch
) -> None:
    with duo(model, policy) as bound:
        stopped = asked(ours(model, tokenizer, bound))[2]
        monkeypatch.setattr(PolicyLM, "looks_at_text", False)
        lm = ours(model, tokenizer, bound, batch_size=len(PROMPTS))
        assert asked(lm)[2] == stopped
    assert lm.use["t"].decode_steps == 9


@pytest.mark.parametrize(("batch", "chunk"), [(1, None), (2, 1), (5, 7), (8, 256)])
def test_batches_and_chunks_change_nothing(model, tokenizer, policy, batch, chunk) -> None:
    last = 24 if chunk == 1 else None  # token by token a long text takes long
    with duo(model, policy) as bound:
        expected = asked(ours(model, tokenizer, bound), last=last)
        found = asked(ours(model, tokenizer, bound, batch_size=batch, chunk=chunk), last=last)
    assert_scores_equal(found[0], expected[0])
    assert found[1] == pytest.approx(expected[1], rel=1e-4)
    assert found[2] == expected[2]


def test_answers_that_differ_in_their_last_token_share_one_pass(model, tokenizer) -> None:
    lm = ours(model, tokenizer, None)
    lm.loglikelihood(instances("loglikelihood", PAIRS))
    assert lm.use["t"].sequences == len(PAIRS) - 1


def test_bytes_are_those_of_the_allocated_cache(model, tokenizer, policy) -> None:
    with duo(model, policy) as bound:
        lm = ours(model, tokenizer, bound, batch_size=1)
        lm.loglikelihood(instances("loglikelihood", PAIRS[4:]))
        tokens = len("".join(PAIRS[4])) - 1
        assert lm.use["t"].bytes_of_all == bound.kv_bytes(tokens)
    full = ours(model, tokenizer, None, batch_size=1)
    full.loglikelihood(instances("loglikelihood", PAIRS[4:]))
    assert full.use["t"].bytes_of_all == bound.dense_kv_bytes(tokens)


def test_a_continuation_longer_than_the_context_is_refused(model, tokenizer) -> None:
    lm = ours(model, tokenizer, None, max_length=16)
    with pytest.raises(ValueError, match="continuations must fit max_length=16, got one of 17 tok"):
        lm.loglikelihood(instances("loglikelihood", [("a", "b" * 17)]))


def test_the_callers_tokenizer_stays_as_it_is(model, tokenizer) -> None:
    ours(model, tokenizer, None)
    assert tokenizer.pad_token is None


@pytest.mark.parametrize(
    ("prefilled", "steps", "first"), [(20, 4, 2000.0), (18, 5, 2000.0 + 4000 / 5)]
)
def test_a_token_that_the_prompt_gives_is_no_decode_step(
    model, tokenizer, policy, monkeypatch, prefilled, steps, first
) -> None:
    """An engine picks the first token where the prompt ends; transformers reads the prompt's end while decoding."""
    made = Generation(
        tokens=torch.zeros(1, 25, dtype=torch.long),
        prompt_tokens=20,
        prefilled_tokens=prefilled,
        new_tokens=5,
        prefill_seconds=2.0,
        decode_seconds=4.0,
        kv_bytes=1,
        dense_kv_bytes=2,
    )
    monkeypatch.setattr("duohead.evaluate.harness_model.generate", lambda *_, **__: made)
    lm = ours(model, tokenizer, policy, batch_size=1)
    settings = {"until": ["e"], "max_gen_toks": 5, "do_sample": False}
    lm.generate_until(instances("generate_until", [("a" * 20, settings)]))
    assert lm.use["t"].tpot_ms == pytest.approx(4000 / steps)
    assert lm.use["t"].ttft_ms == pytest.approx(first)

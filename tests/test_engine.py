"""The engine's loop without graphs: every family, padding, stop tokens, turns, sampling, and what it refuses."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import (
    FAMILIES,
    HYBRIDS,
    LENGTH,
    assert_close,
    expected_greedy,
    expected_logits,
    ids,
    left_padded,
    policy_for,
    refused,
    tiny,
)
from transformers import GenerationConfig

from duohead import duo
from duohead.models.engine import Engine
from duohead.models.generate import generate
from duohead.models.sampling import Sampler, requested

NEW = 9


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny("llama")


@pytest.fixture
def running(llama: Any) -> Iterator[Any]:
    """A model under a policy."""
    with duo(llama, policy_for(llama, "alternating")):
        yield llama


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_of_every_family_are_the_reference_s(family: str) -> None:
    model = tiny(family)
    policy = policy_for(model, "alternating")
    tokens, mask = left_padded([LENGTH, LENGTH - 9])
    expected = expected_greedy(model, policy, tokens, NEW, mask)
    with duo(model, policy):
        engine = Engine(model, batch=2, max_length=LENGTH + NEW, padded=True)
        result = generate(
            model, tokens, attention_mask=mask, max_new_tokens=NEW, chunk=7, engine=engine
        )
    assert result.tokens.tolist() == expected.tolist()
    assert result.engine == "steps"
    assert result.kv_bytes == engine.cache.kv_bytes()
    assert result.dense_kv_bytes == engine.policy.dense_kv_bytes(LENGTH + NEW, 2)
    assert engine.length == int(engine.cache.get_seq_length()) == LENGTH + NEW - 1


@pytest.mark.parametrize("chunk", [1, 2, 7, LENGTH - 1, None])
def test_prefill_gives_the_last_logits_whatever_the_chunk(running: Any, chunk: int | None) -> None:
    engine = Engine(running, max_length=LENGTH)
    done: list[int] = []
    found = engine.prefill(ids(), chunk=chunk, progress=done.append)
    assert_close(found, expected_logits(running, policy_for(running, "alternating"), ids())[:, -1])
    assert sum(done) == LENGTH


@pytest.mark.parametrize("family", ["llama", *HYBRIDS])
def test_a_text_after_a_reset_does_not_know_the_one_before(family: str) -> None:
    model = tiny(family)
    policy = policy_for(model, "random")
    with duo(model, policy):
        engine = Engine(model, max_length=LENGTH + NEW)
        engine.prepare()
        for seed in (1, 2):
            engine.reset()
            found = generate(model, ids(seed=seed), max_new_tokens=NEW, chunk=8, engine=engine)
            expected = expected_greedy(model, policy, ids(seed=seed), NEW)
            assert found.tokens.tolist() == expected.tolist()


@pytest.mark.parametrize("family", ["llama", "gemma3", *HYBRIDS])
def test_turns_on_one_cache_equal_one_long_text_although_steps_ran_past_the_stop_token(
    family: str,
) -> None:
    model = tiny(family)
    policy = policy_for(model, "alternating")
    text = plain = ids(1, 9, seed=2)
    with duo(model, policy):
        engine = Engine(model, max_length=64)
        for turn in range(3):
            question = ids(1, 4, seed=turn)
            plain = expected_greedy(model, policy, torch.cat([plain, question], 1), 6)
            # The first time that its fourth token comes, each answer ends.
            stop = int(plain[0, -3])
            new = plain[0, -6:].tolist()
            plain = plain[:, : plain.shape[1] - 6 + new.index(stop) + 1]
            text = torch.cat([text, question], 1)
            result = generate(
                model, text, max_new_tokens=20, engine=engine, eos_token_id=stop, chunk=3
            )
            text = result.tokens
            assert text.tolist() == plain.tolist()
            assert engine.length == int(engine.cache.get_seq_length()) == text.shape[1] - 1


def test_rows_that_have_stopped_are_padded_as_transformers_does(running: Any) -> None:
    tokens, mask = left_padded([LENGTH, LENGTH - 9, LENGTH - 3])
    plain = running.generate(tokens, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    stop = [int(plain[0, LENGTH + 2]), int(plain[1, LENGTH + 4])]
    options = {"eos_token_id": stop, "pad_token_id": 60, "do_sample": False}
    expected = running.generate(tokens, attention_mask=mask, max_new_tokens=40, **options)
    engine = Engine(running, batch=3, max_length=LENGTH + 40, padded=True)
    found = generate(
        running, tokens, attention_mask=mask, max_new_tokens=40, engine=engine, **options
    )
    assert found.tokens.tolist() == expected.tolist()
    assert 60 in expected[:, LENGTH:]


@pytest.mark.parametrize("check_every", [1, 3, 100])
def test_how_often_the_host_looks_changes_nothing(running: Any, check_every: int) -> None:
    plain = expected_greedy(running, policy_for(running, "alternating"), ids(), NEW)
    stop = int(plain[0, LENGTH + 5])
    wanted = plain[0, LENGTH:].tolist()
    wanted = wanted[: wanted.index(stop) + 1]
    engine = Engine(running, max_length=100)
    first = engine.pick(engine.prefill(ids()))
    seen: list[list[int]] = []
    found = engine.decode(
        first,
        50,
        stop=[stop],
        check_every=check_every,
        on_tokens=lambda new: seen.append(new[0].tolist()),
    )
    assert [int(first), *found[0].tolist()] == wanted
    assert [token for part in seen for token in part] == wanted[1:]


def test_a_first_token_that_stops_ends_the_text(running: Any) -> None:
    plain = expected_greedy(running, policy_for(running, "alternating"), ids(), 1)
    stop = int(plain[0, -1])
    engine = Engine(running, max_length=LENGTH + 20)
    found = generate(running, ids(), max_new_tokens=20, engine=engine, eos_token_id=stop)
    assert found.tokens.tolist() == plain.tolist()
    assert engine.length == LENGTH


def test_a_text_of_exactly_max_length_fits_and_no_token_more(running: Any) -> None:
    engine = Engine(running, max_length=LENGTH + 3)
    found = generate(running, ids(), max_new_tokens=4, engine=engine)
    expected = expected_greedy(running, policy_for(running, "alternating"), ids(), 4)
    assert found.tokens.tolist() == expected.tolist()
    message = rf"max_length of this engine is {LENGTH + 3} tokens but {LENGTH + 4} are needed"
    refused(message, engine.decode, found.tokens[:, -1], 1)
    refused(message, engine.prefill, ids(1, 1))
    engine.reset()
    refused(message, engine.prefill, ids(1, LENGTH + 4))
    assert engine.length == 0


def test_an_engine_longer_than_the_model_s_positions_rehearses_within_them(running: Any) -> None:
    engine = Engine(running, max_length=1024)
    engine.prepare()
    found = generate(running, ids(), max_new_tokens=NEW, engine=engine)
    expected = expected_greedy(running, policy_for(running, "alternating"), ids(), NEW)
    assert found.tokens.tolist() == expected.tolist()


def test_an_interrupted_run_leaves_a_length_that_is_true(running: Any) -> None:
    engine = Engine(running, max_length=100)
    first = engine.pick(engine.prefill(ids()))

    def interrupt(_: torch.Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.decode(first, 20, check_every=4, on_tokens=interrupt)
    assert engine.length == int(engine.cache.get_seq_length()) == LENGTH + 4


def test_streamed_tokens_are_those_returned(running: Any) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    streamer = Streamer()
    engine = Engine(running, max_length=100)
    result = generate(running, ids(), max_new_tokens=40, engine=engine, streamer=streamer)
    assert streamer.tokens == result.tokens[0].tolist()
    assert streamer.ended


def test_samples_follow_the_distribution_and_the_seed() -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0, -3.0]).expand(40000, -1)
    draw = torch.Generator().manual_seed(5)
    found = Sampler(temperature=0.7)(logits, draw)
    share = found.bincount(minlength=5) / len(found)
    assert torch.allclose(share, (logits[0] / 0.7).softmax(-1), atol=0.01)
    again = Sampler(temperature=0.7)(logits, torch.Generator().manual_seed(5))
    assert torch.equal(found, again)
    assert not torch.equal(found, Sampler(temperature=0.7)(logits, draw))


@pytest.mark.parametrize(
    ("filters", "kept"),
    [({"top_k": 2}, 2), ({"top_p": 0.6}, 1), ({"top_p": 0.9}, 3), ({"min_p": 0.2}, 3)],
)
def test_filters_keep_the_likeliest_tokens(filters: dict[str, Any], kept: int) -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0, -3.0]).expand(5000, -1)
    found = Sampler(temperature=1.0, **filters)(logits, torch.Generator().manual_seed(0))
    assert found.unique().tolist() == list(range(kept))


def test_the_global_seed_decides_what_is_sampled(running: Any) -> None:
    engine = Engine(running, max_length=LENGTH + 20)
    found = []
    for seed in (1, 1, 2):
        engine.reset()
        torch.manual_seed(seed)
        options = {"do_sample": True, "temperature": 1.5}
        result = generate(running, ids(), max_new_tokens=20, engine=engine, **options)
        found.append(result.tokens.tolist())
    assert found[0] == found[1] != found[2]


def test_the_models_own_generation_config_counts(llama: Any) -> None:
    model = copy.deepcopy(llama)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.5, top_k=7, eos_token_id=[3, 4], pad_token_id=9
    )
    request = requested(model, {"top_p": 0.8})
    assert request.sampler == Sampler(temperature=0.5, top_k=7, top_p=0.8)
    assert (request.stop, request.pad) == ((3, 4), 9)
    assert requested(model, {"do_sample": False}).sampler == Sampler()
    model.generation_config.repetition_penalty = 1.3
    refused("does not serve repetition_penalty; use model.generate", requested, model, {})


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"stop_strings": "x"},
        {"no_repeat_ngram_size": 2},
        {"logits_processor": [lambda ids, scores: scores]},
        {"assistant_model": object()},
        {"prompt_lookup_num_tokens": 3},
        {"return_dict_in_generate": True},
        {"use_cache": False},
        {"cache_implementation": "dynamic"},
        {"position_ids": ids()},
    ],
    ids=lambda options: next(reversed(options)),
)
def test_what_the_engine_cannot_do_it_says(running: Any, options: dict[str, Any]) -> None:
    engine = Engine(running, max_length=64)
    name = next(reversed(options))
    message = f"does not serve {name}; use model.generate, or engine='transformers'"
    refused(message, generate, running, ids(), engine=engine, max_new_tokens=3, **options)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_p": 0.9}, "top_p say how to sample, but temperature is 0"),
        ({"temperature": -1.0}, "temperature must be at least 0, got -1"),
        ({"temperature": 1.0, "top_k": 0}, "top_k must be at least 1 token, got 0"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0"),
        ({"temperature": 1.0, "min_p": 2.0}, r"min_p must lie in \[0, 1\], got 2"),
    ],
)
def test_a_sampler_says_what_is_wrong(fields: dict[str, Any], message: str) -> None:
    refused(message, Sampler, **fields)


def test_mistakes_are_named(running: Any, llama: Any) -> None:
    engine = Engine(running, max_length=64)
    refused(
        "the cache is empty; call prefill first",
        engine.decode,
        torch.zeros(1, dtype=torch.int64),
        3,
    )
    refused("must have the engine's 1 rows, got 2", engine.prefill, ids(2))
    tokens, mask = left_padded([9, 5])
    pair = Engine(running, batch=2, max_length=64)
    refused("made without; make Engine\\(padded=True\\)", pair.prefill, tokens, attention_mask=mask)
    gap = torch.ones(1, LENGTH).long()
    gap[0, 5] = 0
    refused(
        "attention_mask must cover the 29 tokens so far", engine.prefill, ids(), attention_mask=gap
    )
    engine.prefill(ids())
    short = {"attention_mask": torch.ones(1, 3)}
    refused("attention_mask must cover the 32 tokens", engine.prefill, ids(1, 3), **short)
    refused("prepare needs an empty engine, got 29 tokens", engine.prepare)
    refused(
        "holds 29 tokens already and got 29",
        generate,
        running,
        ids(),
        max_new_tokens=3,
        engine=engine,
    )
    refused(
        "steps and check_every must be at least 1, got 0",
        engine.decode,
        torch.zeros(1, dtype=torch.int64),
        0,
    )
    refused(
        "stop holds at most 32 tokens",
        engine.decode,
        torch.zeros(1, dtype=torch.int64),
        1,
        stop=range(33),
    )
    refused("batch must be at least 1 row, got 0", Engine, running, batch=0, max_length=8)
    refused("compile must be True, False or 'auto'", Engine, running, max_length=8, compile=1)
    refused(
        "graphs=True needs CUDA, but the model is on cpu",
        Engine,
        running,
        max_length=8,
        graphs=True,
    )
    refused(
        "one of auto, graph, compiled, transformers, got 'x'",
        generate,
        running,
        ids(),
        max_new_tokens=3,
        engine="x",
    )
    refused("engine='graph' needs CUDA", generate, running, ids(), max_new_tokens=3, engine="graph")
    refused(
        "max_length=64 is for an engine", generate, running, ids(), max_new_tokens=3, max_length=64
    )
    refused("max_new_tokens must be at least 1, got 0", generate, running, ids(), max_new_tokens=0)
    other = tiny("llama")
    with duo(other, policy_for(other, "all")):
        refused("made for another model", generate, other, ids(), max_new_tokens=3, engine=engine)


def test_a_model_without_a_policy_has_no_engine() -> None:
    refused("has no policy; use it inside duohead.duo", Engine, tiny("llama"), max_length=8)

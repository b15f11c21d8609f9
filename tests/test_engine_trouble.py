"""The engine after interruptions, with other weights, dropped, or handed something else than tokens."""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tiny import expected_greedy, ids, left_padded, policy_for, refused, tiny

from duohead import DuoCache, duo
from duohead.models.engine import Engine
from duohead.models.generate import generate
from duohead.models.prefill import prefill
from duohead.models.sampling import Sampler


@pytest.fixture
def llama() -> Iterator[Any]:
    """A model under a policy."""
    model = tiny("llama")
    with duo(model, policy_for(model, "alternating")):
        yield model


def test_an_interrupted_prefill_leaves_an_empty_engine(llama: Any) -> None:
    engine = Engine(llama, max_length=64)

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.prefill(ids(1), chunk=8, progress=interrupt)
    assert engine.length == 0
    assert int(engine.cache.get_seq_length()) == 0


def test_an_error_inside_a_forward_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    # The first layer has no KV heads, but a state that has seen the new tokens by then.
    model = tiny("lfm2")
    with duo(model, policy_for(model, "random")):
        engine = Engine(model, max_length=64)
        engine.prefill(ids(1)[:, :20])
        with monkeypatch.context() as patch:

            def refuse(*_: Any, **__: Any) -> None:
                raise ValueError("cannot do this here")

            patch.setattr("duohead.attention.prefill", refuse)
            refused("cannot do this here", engine.prefill, ids(1)[:, 20:25])
        assert engine.length == 0


def test_an_engine_that_is_dropped_gives_its_cache_back_at_once(llama: Any) -> None:
    engine = Engine(llama, max_length=64)
    engine.decode(engine.pick(engine.prefill(ids(1))), 3)
    cache = weakref.ref(engine.cache)
    gc.disable()
    try:
        del engine
        assert cache() is None
    finally:
        gc.enable()


def test_replaced_weights_are_not_run_with_old_graphs() -> None:
    model = tiny("llama")
    with duo(model, policy_for(model, "alternating")):
        engine = Engine(model, max_length=64)
        first = engine.pick(engine.prefill(ids(1)))
        model.lm_head.weight.data = model.lm_head.weight.data.clone()
        assert not engine.knows(model)
        with pytest.raises(ValueError, match="weights or adapters have been replaced.*new Engine"):
            engine.decode(first, 3)


def test_tokens_of_another_shape_are_refused(llama: Any) -> None:
    engine = Engine(llama, batch=2, max_length=64)
    engine.prefill(ids(2))
    for tokens in (torch.tensor([5]), torch.zeros(2)):
        with pytest.raises(ValueError, match="one token id for each of the engine's 2 rows, got"):
            engine.decode(tokens, 3)


def test_a_step_that_breaks_off_leaves_an_empty_engine(llama: Any) -> None:
    engine = Engine(llama, max_length=64)
    first = engine.pick(engine.prefill(ids(1)))
    calls = 0

    def interrupt(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    hook = llama.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.decode(first, 6)
    hook.remove()
    assert engine.length == 0
    assert {int(layer.length) for layer in engine.cache.duo_layers} == {0}


def test_chunk_visibility_looks_at_every_step() -> None:
    model = tiny("llama")
    with duo(model, policy_for(model, "none", visibility="chunk")):
        logits = []
        for check_every in (1, 16):
            engine = Engine(model, max_length=60)
            first = engine.pick(engine.prefill(ids(1)[:, :14]))
            tokens = engine.decode(first, 3)
            engine.reset()
            engine.prefill(ids(1)[:, :14])
            stop = [int(tokens[0, 1])]
            made = engine.decode(first, 20, stop=stop, check_every=check_every)
            logits.append(engine.prefill(torch.cat([made[:, -1:], ids(1)[:, 14:18]], 1)))
    torch.testing.assert_close(*logits)


def test_padded_rows_of_a_hybrid_are_not_fed_one_by_one() -> None:
    model = tiny("lfm2")
    policy = policy_for(model, "random")
    tokens, mask = left_padded([15, 9, 12])
    with duo(model, policy):
        options = {"attention_mask": mask, "max_new_tokens": 6}
        refused("chunk must be at least 2 tokens", generate, model, tokens, chunk=1, **options)
        found = generate(model, tokens, chunk=2, **options).tokens
    assert found.tolist() == expected_greedy(model, policy, tokens, 6, mask).tolist()


def test_beams_of_the_models_own_config_count(llama: Any) -> None:
    llama.generation_config.num_beams = 2
    asked = generate(llama, ids(1), max_new_tokens=3, engine="transformers").tokens
    llama.generation_config.num_beams = 1
    given = generate(llama, ids(1), max_new_tokens=3, num_beams=2, engine="transformers").tokens
    assert asked.tolist() == given.tolist()


def test_a_copied_static_cache_knows_its_own_addresses(llama: Any) -> None:
    import copy

    from duohead.cache.stored import layer_at

    engine = Engine(llama, max_length=40)
    engine.prefill(ids(1))
    twin: DuoCache = copy.deepcopy(engine.cache)
    for mine, theirs in zip(engine.cache.duo_layers, twin.duo_layers, strict=True):
        assert isinstance(theirs.length, torch.Tensor)
        assert layer_at(theirs.length) is theirs
        assert mine.kinds[0].codec is theirs.kinds[0].codec


def test_tokens_that_were_handed_out_stay_as_they_are(llama: Any) -> None:
    engine = Engine(llama, max_length=64)
    kept: list[torch.Tensor] = []
    first = engine.pick(engine.prefill(ids(1)))
    made = engine.decode(first, 8, check_every=4, on_tokens=kept.append)
    engine.reset()
    engine.decode(engine.pick(engine.prefill(ids(1, seed=5))), 8)
    assert torch.cat(kept, 1).tolist() == made.tolist()


def test_after_an_error_on_the_way_the_same_text_can_be_passed_again(llama: Any) -> None:
    class Broken:
        def put(self, tokens: torch.Tensor) -> None:
            if tokens.ndim == 1:
                raise RuntimeError("the reader has gone")

        def end(self) -> None: ...

    engine = Engine(llama, max_length=64)
    for text in (ids(1, 9), ids(1)):  # the first turn of a text, and a second one
        with pytest.raises(RuntimeError, match="the reader has gone"):
            generate(llama, text, max_new_tokens=6, engine=engine, streamer=Broken())
        assert engine.length == int(engine.cache.get_seq_length()) == 0
        found = generate(llama, text, max_new_tokens=6, engine=engine).tokens
        wanted = expected_greedy(llama, policy_for(llama, "alternating"), text, 6)
        assert found.tolist() == wanted.tolist()
        engine.reset()


def test_what_does_not_fit_is_refused_before_the_prompt_is_read(llama: Any) -> None:
    engine = Engine(llama, max_length=40)
    text = generate(llama, ids(1, 9), max_new_tokens=4, engine=engine).tokens
    held = engine.length
    longer = torch.cat([text, ids(1, 9)], 1)
    fed: list[int] = []
    options = {"engine": engine, "progress": fed.append}
    message = "max_length of this engine is 40 tokens but 60 are needed"
    refused(message, generate, llama, longer, max_new_tokens=39, **options)
    message = "stop holds at most 32 tokens, got 33"
    refused(
        message, generate, llama, longer, eos_token_id=list(range(33)), max_new_tokens=2, **options
    )
    assert fed == [] and engine.length == held
    found = generate(llama, longer, max_new_tokens=4, **options).tokens
    wanted = expected_greedy(llama, policy_for(llama, "alternating"), longer, 4)
    assert found.tolist() == wanted.tolist()


def test_a_rehearsal_that_breaks_off_leaves_an_empty_engine(llama: Any) -> None:
    engine = Engine(llama, max_length=64)
    engine._rehearses = True

    def fail(*_: Any) -> None:
        raise MemoryError

    hook = llama.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        engine.prepare()
    hook.remove()
    assert {int(layer.length) for layer in engine.cache.duo_layers} == {0}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch": 1.0}, "batch must be an integer, got 1.0"),
        ({"batch": True}, "batch must be an integer, got True"),
        ({"max_length": "64"}, "max_length must be an integer, got '64'"),
        ({"padded": 1}, "padded must be True or False, got 1"),
        ({"graphs": "no"}, "graphs must be True, False or 'auto', got 'no'"),
    ],
)
def test_an_engine_of_wrong_types_is_refused(
    llama: Any, fields: dict[str, Any], message: str
) -> None:
    refused(message, Engine, llama, **{"max_length": 64, **fields})


def test_numbers_of_numpy_are_numbers(llama: Any) -> None:
    engine = Engine(llama, batch=np.int64(1), max_length=np.int64(64))
    found = generate(llama, ids(1), max_new_tokens=np.int64(4), engine=engine)
    assert found.new_tokens == 4
    assert Sampler(temperature=np.float32(0.5)).processors()[0].temperature == 0.5


TEXT = "input_ids must be a tensor of token ids .*, got str; use tokenizer"
WRONG_INPUTS = [
    ({"input_ids": "a text"}, TEXT),
    (
        {"input_ids": ids(1)[0]},
        r"integers \[rows, tokens\], got shape \(29,\) of torch.int64; pass one row",
    ),
    ({"input_ids": ids(1).float()}, "must hold integers .* of torch.float32"),
    ({"attention_mask": [[1] * 29]}, "attention_mask must be a tensor .* the 1 rows .*, got list"),
    ({"attention_mask": torch.ones(2, 29)}, r"the 1 rows of input_ids, got shape \(2, 29\)"),
    ({"chunk": 8.0}, "chunk must be an integer, got 8.0; pass an int"),
    ({"progress": 3}, "progress must be a function or None, got 3"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG_INPUTS)
def test_prompts_of_wrong_types_are_refused_by_all_three_doors(
    llama: Any, wrong: dict[str, Any], message: str
) -> None:
    given = {"input_ids": ids(1), **wrong}
    engine = Engine(llama, max_length=64)
    refused(message, engine.prefill, **given)
    refused(message, prefill, llama, cache=DuoCache(engine.policy, llama), **given)
    refused(message, generate, llama, **given)
    assert engine.length == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_new_tokens": 3.0}, "max_new_tokens must be an integer, got 3.0"),
        ({"max_length": "40"}, "max_length must be an integer, got '40'"),
        ({"max_length": 0}, "max_length must be at least 1, got 0; leave it out"),
        ({"engine": None}, "engine must be an Engine or one of .*, got None"),
    ],
)
def test_a_call_of_wrong_types_is_refused(llama: Any, fields: dict[str, Any], message: str) -> None:
    refused(message, generate, llama, ids(1), **{"max_new_tokens": 2, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": [5]}, "tokens must be a tensor of token ids .*, got list"),
        ({"steps": 2.5}, "steps must be an integer, got 2.5"),
        ({"check_every": "often"}, "check_every must be an integer, got 'often'"),
        ({"pad": None}, "pad must be an integer, got None"),
        ({"stop": 5}, "stop must be a sequence of token ids, got 5"),
        ({"stop": [1.5]}, "stop must be an integer, got 1.5"),
        ({"on_tokens": "print"}, "on_tokens must be a function or None, got 'print'"),
        ({"sampler": 0.7}, "sampler must be a Sampler, got 0.7"),
    ],
)
def test_a_run_of_wrong_types_is_refused_and_changes_nothing(
    llama: Any, fields: dict[str, Any], message: str
) -> None:
    engine = Engine(llama, max_length=64)
    tokens = engine.pick(engine.prefill(ids(1)))
    refused(message, engine.decode, **{"tokens": tokens, "steps": 3, **fields})
    assert engine.length == int(engine.cache.get_seq_length()) == 29


def test_a_sampler_takes_numbers() -> None:
    refused("temperature must be a number, got '1'", Sampler, temperature="1")
    refused("top_k must be a number, got 2.5", Sampler, temperature=1.0, top_k=2.5)
    refused("temperature must be at least 0, got nan", Sampler, temperature=float("nan"))

"""The engine after interruptions, with other weights, dropped, or handed something else than tokens."""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import expected_greedy, ids, left_padded, policy_for, refused, tiny

from duohead import DuoCache, duo
from duohead.models.engine import Engine
from duohead.models.generate import generate


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

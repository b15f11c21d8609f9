"""What would give wrong tokens without an error is refused, in one sentence that names the cause and the remedy."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import (
    LENGTH,
    WINDOW,
    assert_close,
    chunked_logits,
    expected_logits,
    ids,
    left_padded,
    policy_for,
    refused,
    tiny,
)
from transformers import DynamicCache, StaticCache

from duohead import DuoCache, disable, duo, enable
from duohead.models.hooks import PLAN, duo_attention
from duohead.models.interface import LayerPlan


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny("llama")


@pytest.fixture(scope="module")
def windowed() -> Any:
    return tiny("gemma3")


@pytest.fixture
def running(llama: Any) -> Any:
    """The llama with a policy on it."""
    bound = enable(llama, policy_for(llama, "alternating"))
    with torch.no_grad():
        yield SimpleNamespace(model=llama, policy=bound)
    disable(llama)


def test_a_stock_static_cache_is_refused(running: Any) -> None:
    stock = StaticCache(config=running.model.config, max_cache_len=40)
    message = (
        r"a StaticCache of transformers gives wrong tokens.*DuoCache\(policy, model, max_length="
    )
    refused(message, running.model, ids(), past_key_values=stock)
    refused(message, running.model.generate, ids(), past_key_values=stock, max_new_tokens=2)
    refused(
        "keys of length 40 do not end at the last query",
        running.model.model,
        ids(),
        past_key_values=stock,
    )


def test_a_windowed_cache_that_has_dropped_tokens_is_refused(windowed: Any) -> None:
    policy = policy_for(windowed, "alternating")
    with torch.no_grad(), duo(windowed, policy):
        cache = DynamicCache(config=windowed.config)
        windowed(ids(1, WINDOW + 2), past_key_values=cache)
        refused(
            "has dropped tokens of native sliding windows",
            windowed,
            ids(1, 1),
            past_key_values=cache,
        )
        fresh = DynamicCache(config=windowed.config)
        refused(
            "drops tokens of native windows",
            windowed.generate,
            ids(),
            past_key_values=fresh,
            max_new_tokens=2,
        )


def test_our_cache_outside_a_policy_is_refused(llama: Any) -> None:
    policy = policy_for(llama, "alternating").bind(llama)
    for implementation in ("eager", "sdpa"):
        llama.set_attn_implementation(implementation)
        with pytest.raises(
            AttributeError, match=r"other than 'duo'; run the model inside duohead\.duo"
        ):
            llama(ids(), past_key_values=DuoCache(policy, llama))


def test_our_cache_of_another_policy_is_refused(running: Any) -> None:
    other = DuoCache(policy_for(running.model, "none"), running.model)
    refused("made for another policy", running.model, ids(), past_key_values=other)
    refused(
        "made for another policy",
        running.model.generate,
        ids(),
        past_key_values=other,
        max_new_tokens=2,
    )


def test_a_batch_of_another_size_is_refused(running: Any) -> None:
    cache = DuoCache(running.policy, running.model)
    running.model(ids(2), past_key_values=cache)
    refused("holds 2 rows, got a batch of 3", running.model, ids(3, 1), past_key_values=cache)


@pytest.mark.parametrize("name", ["quantized", "offloaded", "offloaded_static"])
def test_cache_implementations_that_we_do_not_have_are_refused(running: Any, name: str) -> None:
    message = f"cache_implementation must be 'dynamic' or 'static' under a policy, got '{name}'"
    refused(message, running.model.generate, ids(), max_new_tokens=2, cache_implementation=name)


def test_a_static_cache_that_is_too_small_is_refused_before_generating(running: Any) -> None:
    cache = DuoCache(running.policy, running.model, max_length=LENGTH + 3)
    message = rf"max_length of this static cache is {LENGTH + 3} tokens but {LENGTH + 4} are needed"
    refused(message, running.model.generate, ids(), past_key_values=cache, max_new_tokens=5)
    assert int(cache.get_seq_length()) == 0
    running.model.generate(ids(), past_key_values=cache, max_new_tokens=4)


def test_a_static_cache_cannot_start_to_record_its_past(running: Any) -> None:
    cache = DuoCache(running.policy, running.model, max_length=64)
    refused("a static cache cannot start to record its past", cache.activate_past_recording)
    refused(
        "a static cache cannot start to record its past",
        running.model.generate,
        ids(1, 8),
        past_key_values=DuoCache(running.policy, running.model, max_length=64),
        prompt_lookup_num_tokens=3,
        max_new_tokens=4,
    )


def test_a_cache_of_a_hybrid_model_needs_the_model() -> None:
    model = tiny("lfm2")
    refused(
        "model is needed for a policy with layers that have no KV heads",
        DuoCache,
        policy_for(model, "none"),
    )


def test_allocating_ahead_needs_a_bound_policy(llama: Any) -> None:
    cache = DuoCache(policy_for(llama, "none"), max_length=8)
    refused(
        "allocate needs the head sizes of a model",
        cache.allocate,
        1,
        dtype=torch.float32,
        device="cpu",
    )
    bound = policy_for(llama, "none").bind(llama)
    cache = DuoCache(bound, max_length=8)
    cache.allocate(2, dtype=torch.float32, device="cpu")
    assert cache.kv_bytes() == bound.kv_bytes(8, batch=2)


def test_offloading_our_cache_is_refused(running: Any) -> None:
    cache = DuoCache(running.policy, running.model)
    refused("does not offload", cache.layers[0].offload)


@pytest.mark.parametrize("max_length", [None, 64])
def test_cropping_what_has_been_evicted_is_refused(running: Any, max_length: int | None) -> None:
    cache = DuoCache(running.policy, running.model, max_length=max_length)
    text = ids(1)
    running.model(text[:, :20], past_key_values=cache)
    running.model(text[:, 20:24], past_key_values=cache)
    refused("cannot crop 4 tokens: .*have evicted tokens.*rollback=4", cache.crop, -4)
    assert int(cache.get_seq_length()) == 24
    found = running.model(text[:, 24:25], past_key_values=cache).logits
    disable(running.model)
    expected = expected_logits(running.model, running.policy, text[:, :25])
    enable(running.model, running.policy)
    assert_close(found, expected[:, -1:])


def test_a_refused_crop_leaves_every_layer_as_it_was(llama: Any) -> None:
    with torch.no_grad(), duo(llama, policy_for(llama, "gap")) as bound:
        cache = DuoCache(bound, llama)
        llama(ids(), past_key_values=cache)
        refused("cannot crop 4 tokens: streaming heads of layer 1", cache.crop, -4)
    assert {layer.length for layer in cache.duo_layers} == {LENGTH}


def test_cropping_by_a_positive_number_or_beyond_the_text_is_refused(running: Any) -> None:
    cache = DuoCache(running.policy, running.model)
    running.model(ids(1, 4), past_key_values=cache)
    refused("tokens_to_remove must be zero or negative .*got 2", cache.crop, 2)
    refused("must be at least -4, the tokens there are, got -5", cache.crop, -5)
    assert cache.get_seq_length() == 4


def test_packed_sequences_are_refused(running: Any) -> None:
    places = torch.cat([torch.arange(10), torch.arange(LENGTH - 10)])[None]
    refused("overlay .packed sequences", running.model, ids(), position_ids=places, use_cache=False)
    refused("position_ids must count up by one", running.model, ids(), position_ids=places)


def test_a_4d_mask_is_refused(running: Any) -> None:
    mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    for use_cache in (False, True):
        refused(
            "attention_mask must be 2-D .*got 4-D",
            running.model,
            ids(),
            attention_mask=mask,
            use_cache=use_cache,
        )


def test_padding_between_real_tokens_is_refused(running: Any) -> None:
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, 8:11] = 0
    refused(
        "one run of real tokens per row .*got a row with a gap",
        running.model,
        ids(2),
        attention_mask=mask,
    )
    refused(
        "got a row with a gap",
        running.model.generate,
        ids(2),
        attention_mask=mask,
        max_new_tokens=2,
    )


@pytest.mark.parametrize("max_length", [None, 64])
def test_a_mask_of_the_new_tokens_alone_is_refused(running: Any, max_length: int | None) -> None:
    cache = DuoCache(running.policy, running.model, max_length=max_length)
    tokens, mask = left_padded([12, 7])
    running.model(tokens[:, :8], attention_mask=mask[:, :8], past_key_values=cache)
    message = r"attention_mask must cover the 12 tokens seen so far \(past and new\), got 4 columns"
    refused(
        message, running.model, tokens[:, 8:], attention_mask=mask[:, 8:], past_key_values=cache
    )


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "position_bias", "max_length_q"])
def test_unknown_arguments_of_attention_are_refused(running: Any, name: str) -> None:
    message = f"passes arguments to attention that duohead does not know: {name}"
    refused(message, running.model, ids(), **{name: torch.zeros(2)})


def test_arguments_that_change_nothing_are_accepted(running: Any) -> None:
    plain = running.model(ids()).logits
    assert torch.equal(
        running.model(ids(), output_attentions=False, num_items_in_batch=3).logits, plain
    )


def test_dropout_in_training_is_refused() -> None:
    model = tiny("llama", attention_dropout=0.1)
    with duo(model, policy_for(model, "none")):
        model(ids())
        model.train()
        refused(r"dropout must be 0 with duohead, got 0\.1; call model\.eval\(\)", model, ids())


def test_the_name_without_a_policy_is_refused(llama: Any) -> None:
    llama.set_attn_implementation("duo")
    try:
        refused(
            r"attn_implementation='duo' needs a policy; use duohead\.duo",
            llama,
            ids(),
            use_cache=False,
        )
    finally:
        llama.set_attn_implementation("sdpa")


def test_a_window_that_the_policy_does_not_know_is_refused(llama: Any) -> None:
    module = torch.nn.Identity()
    setattr(module, PLAN, LayerPlan(policy_for(llama, "none").bind(llama), 0, "auto"))
    key = torch.zeros(1, 4, 3, 4)
    refused(
        "attends with sliding_window=5 but the policy was bound to a window of None",
        duo_attention,
        module,
        torch.zeros(1, 8, 3, 4),
        key,
        key,
        None,
        sliding_window=5,
    )


def test_attending_twice_to_one_handle_is_refused(llama: Any) -> None:
    policy = policy_for(llama, "alternating").bind(llama)
    module = torch.nn.Identity()
    setattr(module, PLAN, LayerPlan(policy, 0, "auto"))
    handle, _ = DuoCache(policy).update(torch.zeros(1, 4, 3, 4), torch.zeros(1, 4, 3, 4), 0)
    query = torch.zeros(1, 8, 3, 4)
    duo_attention(module, query, handle, handle, None)
    refused(
        "layer 0 attends twice to the same keys and values",
        duo_attention,
        module,
        query,
        handle,
        handle,
        None,
    )


def test_a_refused_call_leaves_a_cache_that_still_works(running: Any) -> None:
    cache = DuoCache(running.policy, running.model)
    text = ids(1)
    running.model(text[:, :9], past_key_values=cache)
    refused(
        "got 1 columns",
        running.model,
        text[:, 9:10],
        attention_mask=torch.ones(1, 1),
        past_key_values=cache,
    )
    refused(
        "does not know: position_bias",
        running.model,
        text[:, 9:10],
        past_key_values=cache,
        position_bias=1,
    )
    assert cache.get_seq_length() == 9
    found = chunked_logits(running.model, cache, text[:, 9:], [])
    disable(running.model)
    expected = expected_logits(running.model, running.policy, text)
    enable(running.model, running.policy)
    assert_close(found, expected[:, 9:])

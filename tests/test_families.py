"""Every family computes under a policy what a dense attention with the policy's masks computes.

One tiny random model per family; policies, chunk sizes and forms of the cache are paired rather than crossed, so that
each value of each occurs with every family.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import (
    FAMILIES,
    HYBRIDS,
    LENGTH,
    assert_close,
    chunked_logits,
    expected_greedy,
    expected_logits,
    ids,
    left_padded,
    policy_for,
    tiny,
)
from transformers import DynamicCache

from duohead import DuoCache, duo

# The gated delta rule of Qwen3-Next has a chunked form for prefill and a recurrent one for decode, which differ by this
# in fp32 with transformers' own cache as well.
LIMIT = {"qwen3-next": 2e-4}
CASES = [
    ("none", 1, None),
    ("none", LENGTH, LENGTH),
    ("all", 7, LENGTH + 8),
    ("alternating", 7, None),
    ("random", LENGTH, None),
    ("gap", 1, LENGTH),
]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Iterator[tuple[str, Any]]:
    yield request.param, tiny(request.param)


def test_the_reference_tells_policies_apart(family: tuple[str, Any]) -> None:
    _, model = family
    everything, nothing = (
        expected_logits(model, policy_for(model, kind), ids()) for kind in ("all", "none")
    )
    assert (everything - nothing).abs().max() > 0.1


def test_all_retrieval_equals_the_models_own_attention(family: tuple[str, Any]) -> None:
    name, model = family
    tokens, before = ids(2), model.config._attn_implementation
    with torch.no_grad():
        # Gemma 2 loses its soft cap under the SDPA of transformers 5.17.
        model.set_attn_implementation("eager")
        stock = model(input_ids=tokens, use_cache=False).logits
        model.set_attn_implementation(before)
        with duo(model, policy_for(model, "all")):
            found = model(input_ids=tokens, use_cache=False).logits
    assert_close(found, stock, limit=LIMIT.get(name, 1e-5))


@pytest.mark.parametrize("kind", ["none", "all", "alternating", "random", "gap"])
def test_a_forward_without_cache_equals_the_masked_reference(
    family: tuple[str, Any], kind: str
) -> None:
    name, model = family
    policy, tokens = policy_for(model, kind), ids(2)
    with torch.no_grad(), duo(model, policy):
        found = model(input_ids=tokens, use_cache=False).logits
    assert_close(found, expected_logits(model, policy, tokens), limit=LIMIT.get(name, 1e-5))


@pytest.mark.parametrize(("kind", "chunk", "max_length"), CASES)
def test_chunked_prefill_and_decode_equal_the_masked_reference(
    family: tuple[str, Any], kind: str, chunk: int, max_length: int | None
) -> None:
    name, model = family
    policy, tokens = policy_for(model, kind), ids(2)
    chunks = [chunk] * (1 if chunk > 7 else 2)
    with duo(model, policy) as bound:
        cache = DuoCache(bound, model, max_length=max_length)
        found = chunked_logits(model, cache, tokens, chunks)
    assert_close(found, expected_logits(model, policy, tokens), limit=LIMIT.get(name, 1e-5))
    assert cache.kv_bytes() == bound.kv_bytes(max_length or LENGTH, batch=2)


@pytest.mark.parametrize("max_length", [None, LENGTH])
def test_left_padded_rows_equal_the_same_texts_alone(
    family: tuple[str, Any], max_length: int | None
) -> None:
    name, model = family
    policy = policy_for(model, "alternating")
    lengths = [LENGTH, LENGTH - 4, LENGTH - 12]
    tokens, mask = left_padded(lengths)
    with duo(model, policy) as bound:
        cache = DuoCache(bound, model, max_length=max_length)
        found = chunked_logits(model, cache, tokens, [7, 7, 7, 2], mask)
    for row, length in enumerate(lengths):
        alone = expected_logits(model, policy, tokens[row : row + 1, -length:])
        assert_close(found[row : row + 1, -length:], alone, limit=LIMIT.get(name, 1e-5))


def test_greedy_generation_equals_a_loop_without_cache(family: tuple[str, Any]) -> None:
    _, model = family
    policy = policy_for(model, "alternating")
    tokens, mask = left_padded([17, 11])
    with duo(model, policy):
        found = model.generate(tokens, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert found.tolist() == expected_greedy(model, policy, tokens, 8, mask).tolist()


def test_a_dynamic_cache_that_keeps_every_token_gives_the_same_logits(
    family: tuple[str, Any],
) -> None:
    name, model = family
    policy, tokens = policy_for(model, "random"), ids()
    # Without the config it makes a layer that keeps every token, also where the model has native windows.
    cache = DynamicCache(config=model.config) if name in HYBRIDS else DynamicCache()
    with duo(model, policy):
        found = chunked_logits(model, cache, tokens, [LENGTH - 5])
    assert_close(found, expected_logits(model, policy, tokens), limit=LIMIT.get(name, 1e-5))

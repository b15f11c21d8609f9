"""Every way of generating with transformers gives, under a policy, what a dense attention without any cache gives."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    HYBRIDS,
    LENGTH,
    RECENT,
    assert_close,
    chunked_logits,
    expected_greedy,
    expected_logits,
    ids,
    left_padded,
    masked,
    policy_for,
    tiny,
)

from duohead import DuoCache, duo
from duohead.models.generate import generate

NEW = 10


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest) -> Iterator[Any]:
    yield tiny(request.param)


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny("llama")


def generated(model: Any, tokens: torch.Tensor, **arguments: Any) -> list[list[int]]:
    torch.manual_seed(3)
    return model.generate(tokens, max_new_tokens=NEW, **arguments).tolist()


WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
    "several beams returned": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "several samples returned": {"do_sample": True, "num_return_sequences": 3},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
def test_each_way_of_generating_equals_the_reference_without_cache(
    model: Any, way: str, padded: bool
) -> None:
    policy = policy_for(model, "alternating")
    tokens, mask = (
        left_padded([17, 9]) if padded else (ids(2, 17), torch.ones(2, 17, dtype=torch.long))
    )
    with masked(model, policy):
        expected = generated(model, tokens, attention_mask=mask, use_cache=False, **WAYS[way])
    with duo(model, policy):
        assert generated(model, tokens, attention_mask=mask, **WAYS[way]) == expected


@pytest.mark.parametrize("family", HYBRIDS)
@pytest.mark.parametrize("way", ["beams", "several samples returned"])
def test_rows_are_copied_in_layers_without_kv_heads_too(family: str, way: str) -> None:
    model, tokens = tiny(family), ids(2, 17)
    with duo(model, policy_for(model, "alternating")):
        torch.manual_seed(3)
        found = generate(model, tokens, max_new_tokens=4, chunk=5, **WAYS[way]).tokens
        torch.manual_seed(3)
        assert torch.equal(found, model.generate(tokens, max_new_tokens=4, **WAYS[way]))


@torch.no_grad()
def test_rows_are_chosen_in_layers_without_kv_heads_too() -> None:
    model, tokens = tiny("lfm2"), ids(3)
    with duo(model, policy_for(model, "alternating")) as bound:
        expected = model(tokens[[2, 1]], use_cache=False).logits
        cache = DuoCache(bound, model)
        cache.batch_repeat_interleave(2)  # of an empty cache
        chunked_logits(model, cache, tokens[:, :9], [9])
        cache.batch_select_indices(torch.tensor([False, True, True]))
        cache.batch_select_indices(torch.tensor([1, 0]))
        assert_close(chunked_logits(model, cache, tokens[[2, 1], 9:], [6]), expected[:, 9:])


def test_generation_without_a_cache_follows_the_policy(model: Any) -> None:
    policy = policy_for(model, "alternating")
    with duo(model, policy):
        found = generated(model, ids(2, 17), do_sample=False, use_cache=False)
    assert found == expected_greedy(model, policy, ids(2, 17), NEW).tolist()


@pytest.mark.parametrize(("chunk", "form"), [(1, None), (4, "static"), (7, None), (7, "static")])
def test_prefill_in_chunks_changes_nothing(model: Any, chunk: int, form: str | None) -> None:
    policy = policy_for(model, "random")
    tokens, mask = left_padded([21, 12])
    expected = expected_greedy(model, policy, tokens, NEW, mask)
    with duo(model, policy):
        ways = {"prefill_chunk_size": chunk, "cache_implementation": form}
        found = generated(model, tokens, attention_mask=mask, do_sample=False, **ways)
    assert found == expected.tolist()


@pytest.mark.parametrize("both", [True, False], ids=["both with a policy", "assistant dense"])
def test_assisted_decoding_gives_the_tokens_of_the_target_alone(model: Any, both: bool) -> None:
    assistant = tiny(
        "llama", seed=0 if model.config.model_type == "llama" else 5, num_hidden_layers=2
    )
    policy, draft = policy_for(model, "alternating"), policy_for(assistant, "gap", recent=4)
    expected = expected_greedy(model, policy, ids(1, 17), NEW)
    with duo(model, policy):
        if both:
            with duo(assistant, draft):
                found = generated(model, ids(1, 17), assistant_model=assistant)
        else:
            found = generated(model, ids(1, 17), assistant_model=assistant)
    assert found == expected.tolist()


def test_assisted_decoding_with_a_perfect_assistant_accepts_and_stays_exact(model: Any) -> None:
    policy = policy_for(model, "none")
    twin = copy.deepcopy(model)
    expected = expected_greedy(model, policy, ids(1, 17), NEW)
    with duo(model, policy), duo(twin, policy):
        assert generated(model, ids(1, 17), assistant_model=twin) == expected.tolist()


def test_prompt_lookup_gives_the_tokens_of_plain_greedy(model: Any) -> None:
    policy = policy_for(model, "alternating")
    tokens = ids(1, 6).repeat(1, 4)
    expected = expected_greedy(model, policy, tokens, NEW)
    with duo(model, policy):
        assert generated(model, tokens, prompt_lookup_num_tokens=4) == expected.tolist()


def test_a_static_cache_with_rollback_serves_speculative_decoding(model: Any) -> None:
    policy = policy_for(model, "alternating")
    tokens = ids(1, 6).repeat(1, 4)
    expected = expected_greedy(model, policy, tokens, NEW)
    with duo(model, policy) as bound:
        cache = DuoCache(bound, model, max_length=64, rollback=8)
        assert (
            generated(model, tokens, prompt_lookup_num_tokens=4, past_key_values=cache)
            == expected.tolist()
        )


@pytest.mark.parametrize("max_length", [None, 64])
def test_turns_that_share_a_cache_equal_one_long_text(model: Any, max_length: int | None) -> None:
    policy = policy_for(model, "alternating")
    text = ids(1, 9, seed=2)
    expected = text
    with duo(model, policy) as bound:
        cache = DuoCache(bound, model, max_length=max_length)
        for turn in range(3):
            question = ids(1, 4, seed=turn)
            text = torch.cat([text, question], 1)
            text = model.generate(text, past_key_values=cache, max_new_tokens=5, do_sample=False)
    for turn in range(3):
        expected = torch.cat([expected, ids(1, 4, seed=turn)], 1)
        expected = expected_greedy(model, policy, expected, 5)
    assert text.tolist() == expected.tolist()


@pytest.mark.parametrize("max_length", [None, 64])
def test_a_copied_prefix_cache_serves_several_continuations(
    model: Any, max_length: int | None
) -> None:
    policy, prefix = policy_for(model, "alternating"), ids(1, 14)
    texts = [torch.cat([prefix, ids(1, 3, seed=seed)], 1) for seed in (4, 5)]
    expected = [expected_greedy(model, policy, text, NEW).tolist() for text in texts]
    with torch.no_grad(), duo(model, policy) as bound:
        cache = DuoCache(bound, model, max_length=max_length)
        model(input_ids=prefix, past_key_values=cache, use_cache=True)
        found = [
            generated(model, text, past_key_values=copy.deepcopy(cache), do_sample=False)
            for text in texts
        ]
    assert found == expected
    assert int(cache.get_seq_length()) == prefix.shape[1]


@pytest.mark.parametrize("way", ["greedy", "beams", "several samples returned"])
def test_the_static_cache_of_generate_gives_the_same_tokens(model: Any, way: str) -> None:
    policy = policy_for(model, "alternating")
    tokens, mask = left_padded([17, 9])
    with duo(model, policy):
        growing = generated(model, tokens, attention_mask=mask, **WAYS[way])
        static = generated(
            model, tokens, attention_mask=mask, cache_implementation="static", **WAYS[way]
        )
    assert static == growing


def test_a_static_cache_serves_a_text_of_exactly_its_length_and_no_token_more(model: Any) -> None:
    policy, tokens = policy_for(model, "alternating"), ids(1, LENGTH)
    with duo(model, policy) as bound:
        cache = DuoCache(bound, model, max_length=LENGTH)
        found = chunked_logits(model, cache, tokens, [LENGTH - 3])
        with pytest.raises(
            ValueError, match=rf"max_length.*{LENGTH} tokens but {LENGTH + 1} are needed"
        ):
            model(input_ids=tokens[:, :1], past_key_values=cache, use_cache=True)
        with pytest.raises(ValueError, match="max_length of this static cache"):
            model(input_ids=tokens[:, :4], past_key_values=cache, use_cache=True)
    assert_close(found, expected_logits(model, policy, tokens))


@pytest.mark.parametrize(
    ("codec", "padded"), [("fp8", False), ("int8", True), ("int4", False), ("int4-hadamard", True)]
)
def test_lossy_storage_does_not_depend_on_chunks_or_on_the_kind_of_cache(
    model: Any, codec: str, padded: bool
) -> None:
    # In fp64: matrix products of other shapes round differently, and in fp32 that now and then moves a stored level.
    model = copy.deepcopy(model).double()
    policy = policy_for(
        model, "alternating", retrieval_dtype=codec, streaming_dtype=codec, window_dtype=codec
    )
    tokens, mask = left_padded([LENGTH, 18]) if padded else (ids(2), None)
    place = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), duo(model, policy) as bound:
        whole = model(
            input_ids=tokens, attention_mask=mask, position_ids=place, use_cache=False
        ).logits
        for chunks, max_length in (([LENGTH], None), ([7, 7, 7], LENGTH), ([1], None)):
            found = chunked_logits(
                model, DuoCache(bound, model, max_length=max_length), tokens, chunks, mask
            )
            assert_close(found, whole, mask)
    dense = expected_logits(model, policy, tokens, mask)
    assert 1e-4 < (whole - dense).abs().max() < 3.0


def test_mixed_precisions_apply_to_their_own_kind_of_head(llama: Any) -> None:
    tokens = ids(1)
    logits = {}
    for name, fields in {
        "retrieval": {"retrieval_dtype": "int4"},
        "streaming": {"streaming_dtype": "int4"},
        "both": {"retrieval_dtype": "int4", "streaming_dtype": "int4"},
    }.items():
        policy = policy_for(llama, "none" if name == "retrieval" else "all", **fields)
        with torch.no_grad(), duo(llama, policy):
            logits[name] = llama(input_ids=tokens, use_cache=False).logits
    none, everything = (
        expected_logits(llama, policy_for(llama, kind), tokens) for kind in ("none", "all")
    )
    assert_close(logits["retrieval"], none)  # no retrieval head, so its precision matters to nobody
    assert_close(logits["streaming"], everything)
    assert (logits["both"] - everything).abs().max() > 1e-3


def test_right_padded_scoring_without_a_mask_equals_the_rows_alone(model: Any) -> None:
    policy = policy_for(model, "alternating")
    tokens = ids(3)
    lengths = [LENGTH, 20, 11]
    for row, length in enumerate(lengths):
        tokens[row, length:] = 0
    with torch.no_grad(), duo(model, policy):
        found = model(tokens).logits
    for row, length in enumerate(lengths):
        assert_close(
            found[row : row + 1, :length],
            expected_logits(model, policy, tokens[row : row + 1, :length]),
        )


@pytest.mark.parametrize("use_cache", [None, True, False])
def test_a_bare_forward_uses_our_cache_unless_told_not_to(
    model: Any, use_cache: bool | None
) -> None:
    policy, tokens = policy_for(model, "alternating"), ids(2)
    with torch.no_grad(), duo(model, policy):
        out = model(tokens, use_cache=use_cache)
    assert_close(out.logits, expected_logits(model, policy, tokens))
    assert (
        (out.past_key_values is None)
        if use_cache is False
        else isinstance(out.past_key_values, DuoCache)
    )


def test_right_padding_with_a_mask_changes_nothing_for_real_tokens(model: Any) -> None:
    policy, tokens = policy_for(model, "alternating"), ids(2)
    mask = torch.ones_like(tokens)
    mask[1, 20:] = 0
    with torch.no_grad(), duo(model, policy):
        found = model(tokens, attention_mask=mask).logits
    assert_close(found, expected_logits(model, policy, tokens, None), mask)


def test_prefill_recent_widens_the_window_of_prefill_only(llama: Any) -> None:
    tokens = ids(1)
    wide = policy_for(llama, "none", prefill_recent=2 * RECENT)
    with duo(llama, wide) as bound:
        found = chunked_logits(llama, DuoCache(bound, llama), tokens, [7, 9])
    expected = expected_logits(llama, policy_for(llama, "none", recent=2 * RECENT), tokens[:, :16])
    assert_close(found[:, :16], expected)
    narrow = expected_logits(llama, policy_for(llama, "none"), tokens[:, :16])
    assert (expected - narrow).abs().max() > 1e-2


def test_lora_adapters_work_inside_and_around_a_policy(llama: Any) -> None:
    peft = pytest.importorskip("peft")
    policy, tokens = policy_for(llama, "alternating"), ids(1, 17)
    base = copy.deepcopy(llama)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], init_lora_weights=False
    )
    tuned = peft.get_peft_model(base, config).eval()
    expected = expected_greedy(base, policy, tokens, NEW)
    assert expected.tolist() != expected_greedy(llama, policy, tokens, NEW).tolist()
    with duo(tuned, policy):
        assert (
            tuned.generate(input_ids=tokens, max_new_tokens=NEW, do_sample=False).tolist()
            == expected.tolist()
        )
        with tuned.disable_adapter():
            plain = tuned.generate(input_ids=tokens, max_new_tokens=NEW, do_sample=False)
    assert plain.tolist() == expected_greedy(llama, policy, tokens, NEW).tolist()


def test_layers_offloaded_to_cpu_and_disk_give_the_same_tokens(llama: Any, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    policy, tokens = policy_for(llama, "alternating"), ids(1, 17)
    expected = expected_greedy(llama, policy, tokens, NEW)
    model = copy.deepcopy(llama)
    places = {
        "model.embed_tokens": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    places |= {f"model.layers.{layer}": "disk" if layer else "cpu" for layer in range(3)}
    accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True
    )
    assert next(model.model.layers[1].parameters()).device.type == "meta"
    with duo(model, policy):
        assert generated(model, tokens) == expected.tolist()


def test_int8_weights_compose_with_a_policy() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = tiny("llama")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    policy, tokens = policy_for(model, "alternating"), ids(1, 17)
    expected = expected_greedy(model, policy, tokens, NEW)
    with duo(model, policy):
        assert generated(model, tokens) == expected.tolist()

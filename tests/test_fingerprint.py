"""A model's fingerprint stays under casts, quantisation, adapters and mild tuning, and is another model's nowhere."""

import copy
import re
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from duohead import HeadPattern, enable, pocket
from duohead.fingerprint import ALIKE, check, fingerprint, likeness, whole
from duohead.shapes import layer_shapes


@pytest.fixture(scope="module")
def model():
    """A trained one, since in random ones every rounding grows from layer to layer."""
    try:
        return pocket.load("pocket")[0]
    except ValueError as error:
        pytest.skip(f"no bundled model: {error}")


@pytest.fixture(scope="module")
def known(model):
    return fingerprint(model)


def changed(model, change):
    """A copy with its matrices changed."""
    other = copy.deepcopy(model)
    torch.manual_seed(0)
    for parameter in other.parameters():
        if parameter.ndim == 2:
            parameter.data = change(parameter.data)
    return other


def rounded(bits):
    def change(weight):
        groups = weight.reshape(-1, 32)
        low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
        step = (high - low).clamp(min=1e-9) / (2**bits - 1)
        return (((groups - low) / step).round() * step + low).reshape(weight.shape)

    return change


def tuned(share):
    return lambda weight: weight + share * weight.std() * torch.randn_like(weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_leaves_it(model, known, dtype):
    assert likeness(fingerprint(copy.deepcopy(model).to(dtype)), known) > 0.999


@pytest.mark.parametrize(
    ("change", "least"), [(rounded(8), 0.999), (rounded(4), 0.98), (tuned(0.1), 0.98)]
)
def test_quantised_or_mildly_tuned_weights_are_the_same_model(model, known, change, least):
    assert least < check(changed(model, change), known, made_for="pocket") <= 1 + 1e-6


def test_a_new_adapter_changes_nothing(model, known):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "k_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    assert np.array_equal(fingerprint(wrapped), known, equal_nan=True)


def test_other_weights_of_the_same_shape_are_refused(model, known):
    torch.manual_seed(0)
    other = type(model)(model.config).eval()
    assert abs(likeness(fingerprint(other), known)) < 0.4 < ALIKE
    rule = (
        r"made for \(org/base\), got a likeness of -?0\.\d\d where 0\.5 is needed.*load that model.*"
        r"replace\(pattern, fingerprint=None\)"
    )
    with pytest.raises(ValueError, match=rule):
        check(other, known, made_for="org/base")


def test_heads_in_other_places_are_another_model(model, known):
    other = copy.deepcopy(model)
    dim = layer_shapes(model)[0].head_dim
    for layer in other.model.layers:
        weight = layer.self_attn.k_proj.weight.data
        layer.self_attn.k_proj.weight.data = weight.unflatten(0, (-1, dim)).flip(0).flatten(0, 1)
    with pytest.raises(ValueError, match="other places of the heads"):
        check(other, known, made_for="pocket")


def test_tokens_added_to_the_vocabulary_change_nothing(model, known):
    other = copy.deepcopy(model)
    other.resize_token_embeddings(model.config.vocab_size + 64, mean_resizing=False)
    assert np.array_equal(fingerprint(other), known, equal_nan=True)


def test_the_model_is_left_as_it_was_found_dropout_included():
    model = tiny.tiny("llama").train()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.lm_head.eval()
    before = [module.training for module in model.modules()]
    assert np.array_equal(fingerprint(model), fingerprint(model), equal_nan=True)
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("family", ["gemma3", "gpt-oss", "qwen3-next", "phi3"])
def test_every_family_has_one_with_a_number_for_each_gated_head(family):
    if family not in (*tiny.FAMILIES, *tiny.HYBRIDS):
        pytest.skip(f"{family} is not among the families of the tests")
    model = tiny.tiny(family)
    found = fingerprint(model)
    for row, shape in zip(found, layer_shapes(model), strict=True):
        gated = np.zeros(len(row), bool)
        gated[: shape.num_kv_heads if shape.gated else 0] = True
        assert np.array_equal(~np.isnan(row).any(1), gated)
    assert likeness(found, fingerprint(model)) == pytest.approx(1)


def test_models_of_other_shapes_are_told_apart_before_any_number():
    one, other = (np.zeros((2, heads, 4), np.float32) for heads in (2, 4))
    with pytest.raises(
        ValueError, match=re.escape("got 4 of 2 layers x 2 heads and 8 of 2 layers")
    ):
        likeness(one, other)


def test_a_process_with_a_part_of_the_heads_is_refused(monkeypatch):
    model = tiny.tiny("llama")
    monkeypatch.setattr(model.config, "num_key_value_heads", 2 * model.config.num_key_value_heads)
    with pytest.raises(ValueError, match=r"layer 0 must leave the keys of \d+ KV heads in a cache"):
        fingerprint(model)


# --- in patterns


@pytest.fixture(scope="module")
def pattern(model):
    return HeadPattern.from_alpha(torch.rand(6, 4), model=model, sink=4, recent=8)


def test_a_pattern_of_a_model_has_its_fingerprint_and_keeps_it_in_files(pattern, known, tmp_path):
    assert np.array_equal(pattern.fingerprint, known, equal_nan=True)
    assert not pattern.fingerprint.flags.writeable
    pattern.save(tmp_path)
    again = HeadPattern.load(tmp_path)
    assert again == pattern
    assert replace(again, fingerprint=None) != pattern


def test_a_pattern_of_a_config_or_of_shared_weights_has_none(model):
    alpha = torch.rand(6, 4)
    assert HeadPattern.from_alpha(alpha, model=model.config).fingerprint is None
    with torch.device("meta"):
        absent = type(model)(model.config)
    assert HeadPattern.from_alpha(alpha, model=absent).fingerprint is None


def test_validate_tells_other_weights_of_the_same_shape(model, pattern):
    torch.manual_seed(0)
    other = type(model)(model.config).eval()
    with pytest.raises(ValueError, match="got a likeness of"):
        pattern.validate(other)
    replace(pattern, fingerprint=None).validate(other)
    pattern.validate(other.config)
    assert pattern.validate(model) is pattern
    assert pattern.validate(changed(model, tuned(0.5))) is pattern


def test_a_model_under_a_policy_has_the_fingerprint_that_it_has_without(model, pattern):
    other = copy.deepcopy(model)
    enable(other, pattern.policy(retrieval_ratio=0.5))
    assert likeness(fingerprint(other), pattern.fingerprint) > 0.95
    pattern.validate(other)


def test_layers_left_to_their_native_attention_do_not_matter(model, pattern):
    pattern.ungate([0, 3]).validate(model)


@pytest.mark.parametrize("name", pocket.NAMES)
def test_the_bundled_patterns_are_of_the_bundled_models(name):
    try:
        model = pocket.load(name)[0]
    except ValueError as error:
        pytest.skip(f"no bundled model: {error}")
    bundled = HeadPattern.load(pocket.pattern(name))
    assert likeness(fingerprint(model), bundled.fingerprint) > 0.999


def test_fingerprints_of_other_layers_are_refused():
    rule = r"fingerprint must have shape \(layers, kv_heads, numbers\) with 2 layers .* got \(3, 4, 4\)"
    with pytest.raises(ValueError, match=rule):
        HeadPattern([[0.1, 0.9]] * 2, fingerprint=np.zeros((3, 4, 4)))


def test_only_all_weights_in_one_process_are_a_whole_model(model):
    assert whole(model)
    assert not whole(model.config)
    with torch.device("meta"):
        assert not whole(torch.nn.Linear(2, 2))
    alone = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=alone, rank=0, world_size=1)
    try:
        from torch.distributed.tensor import distribute_module, init_device_mesh

        shared = distribute_module(torch.nn.Linear(2, 2), init_device_mesh("cpu", (1,)))
        assert not whole(shared)
    finally:
        torch.distributed.destroy_process_group()

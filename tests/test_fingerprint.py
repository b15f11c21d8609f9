"""A model's fingerprint stays under casts, quantisation, adapters and mild tuning, and is another model's nowhere."""

import copy
import re

import numpy as np
import pytest
import tiny
import torch

from duohead import pocket
from duohead.fingerprint import ALIKE, check, fingerprint, likeness
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
    assert least < check(changed(model, change), known) <= 1 + 1e-6


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
        r"made for \(org/base\), got a likeness of -?0\.\d\d where 0\.5 is needed.*load that model"
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
        check(other, known)


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

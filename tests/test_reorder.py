"""Heads that were moved compute what they computed, and come back bit by bit."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import assert_close, ids, refused
from tiny_reorder import HEADS, KEPT, bits, build, changed, kept
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from duohead import DuoCache, HeadPolicy, disable, duo, enable
from duohead.models import reorder
from duohead.models.reorder import reorder_heads, restore_heads

PROJECTIONS = {"q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"}
BIASES = {"q_proj.bias", "k_proj.bias", "v_proj.bias"}
# Family -> (fields of the config, what must move).
MOVED: dict[str, tuple[dict[str, Any], set[str]]] = {
    "llama": ({"attention_bias": True}, PROJECTIONS | BIASES),
    "qwen2": ({}, PROJECTIONS | BIASES),
    "qwen3": ({}, PROJECTIONS),
    "gemma2": ({}, PROJECTIONS),
    "gemma3": ({}, PROJECTIONS),
    "gemma4": ({}, PROJECTIONS),
    "olmo2": ({}, PROJECTIONS | {"q_norm.weight", "k_norm.weight"}),
    "gpt-oss": ({"attention_bias": True}, PROJECTIONS | BIASES | {"sinks"}),
    "laguna": (
        {"num_attention_heads_per_layer": [4, 8, 12]},
        PROJECTIONS | {"g_proj.weight"},
    ),
    "afmoe": ({}, PROJECTIONS | {"gate_proj.weight"}),
    "lfm2": ({}, (PROJECTIONS - {"o_proj.weight"}) | {"out_proj.weight"}),
}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=ids(2), use_cache=False).logits


@pytest.fixture(scope="module")
def llama() -> Iterator[Any]:
    yield build("llama")


@pytest.mark.parametrize("family", MOVED)
def test_moved_heads_compute_what_they_did_and_come_back_bit_by_bit(family: str) -> None:
    fields, expected = MOVED[family]
    model = build(family, **fields).double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products have no fp64
    policy, before, full = kept(model), bits(model), logits(model)
    with duo(model, policy):
        wanted = logits(model)
    with reorder_heads(model, policy) as moved:
        names = {name.split("attn.")[-1] for name in changed(model, before)}
        assert names == expected
        assert_close(logits(model), full, limit=1e-6 if family == "olmo2" else 1e-12)
        with duo(model, moved.policy) as bound:
            found = logits(model)
            cache = DuoCache(bound, model)
            with torch.no_grad():
                for part in ids(2).split(11, dim=1):
                    last = model(input_ids=part, past_key_values=cache, use_cache=True).logits
        with duo(model, policy):
            assert (logits(model) - wanted).abs().max() > 0.1  # the old policy no longer fits
    assert_close(found, wanted, limit=1e-6 if family == "olmo2" else 1e-12)
    assert_close(last[:, -1], wanted[:, -1], limit=1e-6)
    assert not changed(model, before)
    assert all(
        layer.retrieval == tuple(range(len(layer.retrieval))) for layer in moved.policy.layers
    )


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        ("cohere", {"use_qk_norm": True}, {"o_proj.weight", "q_norm.weight", "k_norm.weight"}),
        ("phi", {"qk_layernorm": True}, {"dense.weight", *BIASES}),
        (
            "opt",
            {"num_attention_heads": 4, "head_dim": 8, "word_embed_proj_dim": 32},
            {"out_proj.weight", *BIASES},
        ),
        ("beam", {}, {"o_proj.weight", "gate_proj.weight", "gate_bias"}),
    ],
)
def test_the_same_parts_are_known_by_their_other_names(
    kind: str, fields: dict[str, Any], expected: set[str]
) -> None:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    config = CONFIG_MAPPING[kind](**(sizes | tokens | HEADS | {"head_dim": 4} | fields))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=weight.shape[-1] ** -0.5)
    policy = HeadPolicy.from_heads(retrieval=KEPT[:2], num_kv_heads=4)
    before, full = bits(model), logits(model)
    with reorder_heads(model, policy):
        names = {name.split("attn.")[-1] for name in changed(model, before)}
        assert names == expected | PROJECTIONS - {"o_proj.weight"}
        assert_close(logits(model), full)
    assert not changed(model, before)


def test_gates_of_every_element_move_with_their_heads() -> None:
    fields = {"gating": "per-element", "num_attention_heads_per_layer": [8] * 3}
    model = build("laguna", **fields)
    gate = model.model.layers[0].self_attn.g_proj.weight
    assert gate.shape[0] == 64
    before, full = gate.detach().clone(), logits(model)
    reorder_heads(model, kept(model))
    assert_close(logits(model), full)
    rows = before.reshape(4, 16, -1)[[2, 0, 1, 3]].flatten(0, 1)
    assert torch.equal(gate, rows)


def test_the_output_bias_stays() -> None:
    model = build("llama", attention_bias=True)
    output = model.model.layers[0].self_attn.o_proj
    bias, columns = output.bias.detach().clone(), output.weight.detach().clone()
    reorder_heads(model, kept(model))
    assert torch.equal(output.bias, bias)
    assert torch.equal(output.weight, columns.reshape(32, 4, 16)[:, [2, 0, 1, 3]].flatten(1))


def test_weights_move_in_place_and_keep_dtype_training_mode_and_gradients() -> None:
    model = build("qwen2").to(torch.bfloat16).train()
    model(input_ids=ids(1, 9), labels=ids(1, 9)).loss.backward()
    before = bits(model)
    places = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    key = model.model.layers[0].self_attn.k_proj.weight
    gradient = key.grad.clone()
    moved = reorder_heads(model, kept(model))
    assert changed(model, before)
    assert places == {name: weight.data_ptr() for name, weight in model.named_parameters()}
    assert all(weight.requires_grad for weight in model.parameters())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(key.grad, gradient.reshape(4, 8, -1)[[2, 0, 1, 3]].flatten(0, 1))
    moved.undo()
    assert not changed(model, before)
    assert torch.equal(key.grad, gradient)


def test_heads_that_are_in_order_are_not_touched(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touch(*args: Any) -> None:
        raise AssertionError("moved")

    monkeypatch.setattr(reorder, "_permuted", touch)
    policy = HeadPolicy.from_heads(retrieval=[[0], [0, 1], []], num_kv_heads=4)
    with reorder_heads(llama, policy) as moved:
        assert moved.policy == moved.original == policy.bind(llama)


def test_a_reordered_checkpoint_runs_with_its_policy_and_can_be_restored(tmp_path: Path) -> None:
    model = build("qwen2")
    policy, before = kept(model), bits(model)
    with duo(model, policy):
        wanted = logits(model)
    moved = reorder_heads(model, policy, ranks=2)
    model.save_pretrained(tmp_path)
    (tmp_path / "policy.json").write_text(moved.policy.to_json())

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    read = HeadPolicy.from_dict(json.loads((tmp_path / "policy.json").read_text()))
    with duo(loaded, read):
        assert_close(logits(loaded), wanted)
    assert changed(loaded, before)
    restore_heads(loaded, policy, ranks=2)
    assert not changed(loaded, before)


def test_the_order_is_that_of_the_reference_whose_checkpoints_can_be_restored() -> None:
    model = build("llama")
    policy, before = kept(model), bits(model)
    with torch.no_grad():
        for layer, full in zip(model.model.layers, KEPT, strict=False):
            order = [*full, *(head for head in range(4) if head not in full)]
            rows = [16 * head + row for head in order for row in range(16)]
            fewer = [8 * head + row for head in order for row in range(8)]
            attention = layer.self_attn
            attention.q_proj.weight.copy_(attention.q_proj.weight[rows])
            attention.k_proj.weight.copy_(attention.k_proj.weight[fewer])
            attention.v_proj.weight.copy_(attention.v_proj.weight[fewer])
            attention.o_proj.weight.copy_(attention.o_proj.weight[:, rows])
    theirs = bits(model)
    assert changed(model, before)
    restore_heads(model, policy)
    assert not changed(model, before)
    reorder_heads(model, policy)
    assert not changed(model, theirs)


@pytest.mark.gpu
def test_on_a_gpu_one_tensor_at_a_time_is_copied() -> None:
    model = build("llama").to("cuda", torch.bfloat16)
    before = bits(model)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    moved = reorder_heads(model, kept(model), probe=False)
    largest, order = 64 * 32 * 2, 64 * 8
    assert torch.cuda.max_memory_allocated() - held <= 2 * largest + order
    moved.undo()
    assert not changed(model, before)
    reorder_heads(model, kept(model)).undo()
    assert not changed(model, before)


def test_a_copy_knows_that_its_heads_were_moved(llama: Any) -> None:
    policy, before = kept(llama), bits(llama)
    with reorder_heads(llama, policy):
        twin = copy.deepcopy(llama)
    refused("reordered already; move them back first", reorder_heads, twin, policy)
    refused(
        "must be those that the heads.*were reordered for", restore_heads, twin, policy, ranks=2
    )
    restore_heads(twin, policy)
    assert not changed(twin, before)


def test_moving_back_works_once_and_not_under_a_policy(llama: Any) -> None:
    before = bits(llama)
    moved = reorder_heads(llama, kept(llama))
    enable(llama, moved.policy)
    refused("cannot be moved under a policy that says where they are", moved.undo)
    disable(llama)
    moved.undo()
    assert not changed(llama, before)
    refused("are back in their places; undo works once", moved.undo)
    with duo(llama, kept(llama)):
        refused("cannot be moved under a policy", reorder_heads, llama, kept(llama))


def test_what_breaks_off_half_way_leaves_everything_in_place(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, select, copy_ = bits(llama), torch.Tensor.index_select, torch.Tensor.copy_
    calls = {"index_select": 0, "copy_": 0}

    def full(*args: Any) -> torch.Tensor:  # no room for the copy
        calls["index_select"] += 1
        if calls["index_select"] == 7:
            raise MemoryError("full")
        return select(*args)

    def interrupted(*args: Any) -> torch.Tensor:  # Ctrl-C while copying is raised afterwards
        calls["copy_"] += 1
        copied = copy_(*args)
        if calls["copy_"] == 7:
            raise KeyboardInterrupt
        return copied

    for name, broken in (("index_select", full), ("copy_", interrupted)):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, name, broken)
            with pytest.raises((MemoryError, KeyboardInterrupt)):
                reorder_heads(llama, kept(llama), probe=False)
        assert calls[name] > 7
        assert not changed(llama, before)
    reorder_heads(llama, kept(llama)).undo()

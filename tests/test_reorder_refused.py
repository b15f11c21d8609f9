"""What cannot be moved is refused with the module and the reason, and nothing has moved then."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from tiny import refused
from tiny_reorder import bits, build, changed, kept
from torch import nn
from transformers import AutoModelForCausalLM

from duohead import HeadPolicy
from duohead.models.reorder import reorder_heads, restore_heads


def last_attention(model: Any) -> Any:
    return model.model.layers[-1].self_attn


def slopes(model: Any) -> None:
    last_attention(model).slopes = nn.Parameter(torch.ones(8))


def tables(model: Any) -> None:
    last_attention(model).register_buffer("bias_table", torch.ones(8, 3))


def odd_norm(model: Any) -> None:
    last_attention(model).q_norm = nn.RMSNorm(16)


def subclass(model: Any) -> None:
    class Linear8(nn.Linear):
        pass

    last_attention(model).v_proj.__class__ = Linear8


def computed(model: Any) -> None:
    values = last_attention(model).v_proj
    weight = values.weight.detach()
    del values.weight
    values.weight = weight


def no_values(model: Any) -> None:
    last_attention(model).v_proj = None


def second_attention(model: Any) -> None:
    model.model.layers[-1].cross = copy.deepcopy(last_attention(model))


def shared_module(model: Any) -> None:
    last_attention(model).k_proj = model.model.layers[0].self_attn.k_proj


def shared_memory(model: Any) -> None:
    attention = last_attention(model)
    attention.v_proj.weight = nn.Parameter(attention.k_proj.weight.detach())


def offloaded(model: Any) -> None:
    last_attention(model).o_proj.to("meta")


def inference(model: Any) -> None:
    with torch.inference_mode():
        made = torch.zeros(64, 32)
    last_attention(model).q_proj.weight = nn.Parameter(made, requires_grad=False)


def quantised(model: Any) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model.model.layers[-1], torchao.Int8WeightOnlyConfig())


def adapters(model: Any) -> None:
    peft = pytest.importorskip("peft")
    wanted = peft.LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[2])
    peft.inject_adapter_in_model(wanted, model)


NEEDS_NONE = r"duo\(model, policy\) indexes heads and needs no reordering$"
SPOILED: dict[str, tuple[Callable[[Any], None], str]] = {
    "unknown parameter": (slopes, r"layers\.2\.self_attn\.slopes \(8,\) is not known"),
    "unknown buffer": (tables, r"self_attn\.bias_table \(8, 3\) is not known"),
    "norm of unknown width": (odd_norm, r"q_norm\.weight must have 8 or 64 entries.*got \(16,\)"),
    "own linear": (subclass, r"v_proj must be a plain torch\.nn\.Linear, got Linear8"),
    "computed weights": (computed, r"v_proj\.weight is not a parameter of its own"),
    "no values": (no_values, r"layers\.2\.self_attn\.v_proj does not exist"),
    "two attentions": (second_attention, "layer 2 has more than one attention module"),
    "shared module": (shared_module, r"k_proj\.weight is shared with another module"),
    "shared memory": (shared_memory, r"k_proj\.weight is shared with another module"),
    "offloaded": (offloaded, r"o_proj\.weight is on the meta device.*; load the whole model"),
    "inference mode": (inference, r"q_proj\.weight was made in torch\.inference_mode"),
    "torchao": (quantised, r"\.weight is a \w+ \(quantised or sharded\); reorder first"),
    "LoRA": (adapters, r"q_proj is wrapped by an adapter \(Linear\); merge it first"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_cannot_be_moved_is_refused_before_anything_moves(name: str) -> None:
    spoil, message = SPOILED[name]
    model = build("llama", hidden_size=32)
    spoil(model)
    before = {key: weight.data_ptr() for key, weight in model.named_parameters()}
    kept_bits = bits(model.model.layers[0])
    refused(message + ".*" + NEEDS_NONE, reorder_heads, model, kept(model))
    assert before == {key: weight.data_ptr() for key, weight in model.named_parameters()}
    assert not changed(model.model.layers[0], kept_bits)


@pytest.mark.parametrize(
    ("prefix", "fields", "message"),
    [
        ("Phi3", {}, r"\(Phi3Attention\) must have q_proj, k_proj and v_proj apart, got o_proj, qkv_proj"),
        ("GPT2", {"n_inner": 32}, r"\(GPT2Attention\) must have .* got c_attn, c_proj \(fused"),
        ("GPTBigCode", {"multi_query": False}, r"\(GPTBigCodeAttention\) must have .* got c_attn"),
        ("GPTNeoX", {}, r"\(GPTNeoXAttention\) must have .* got query_key_value, dense"),
        ("StableLm", {"qk_layernorm": True}, r"q_layernorm\.norms\.0\.weight \(4,\) is not known"),
        ("DiffLlama", {}, r"lambda_q1 \(4,\) is not known"),
        ("Qwen3Next", {"head_dim": 4, "num_experts": 4}, r"q_proj\.weight must have 32 entries.*got 64"),
    ],
)  # fmt: skip
def test_families_with_another_layout_are_refused(
    prefix: str, fields: dict[str, Any], message: str
) -> None:
    common = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": 8 if prefix.startswith("GPT") else 4,
        "layer_types": ["full_attention"],
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config = getattr(transformers, f"{prefix}Config")(**{**common, **fields})
    model = AutoModelForCausalLM.from_config(config)
    heads = 8 if prefix.startswith("GPT") else 4
    policy = HeadPolicy.from_heads(retrieval=[[2]], num_kv_heads=heads)
    refused(message, reorder_heads, model, policy)


def test_heads_that_are_told_apart_by_their_number_are_found_out() -> None:
    model = build("llama")
    slope = torch.arange(1, 5).repeat_interleave(8)
    model.model.layers[1].self_attn.v_proj.register_forward_hook(
        lambda module, args, output: output * slope
    )
    before = bits(model)
    refused(
        "LlamaAttention of layer 1 gives other outputs afterwards .* treats heads by their number",
        reorder_heads,
        model,
        kept(model),
    )
    assert not changed(model, before)
    assert not any(module._forward_hooks for module in (model.model.layers[0].self_attn, model))
    reorder_heads(model, kept(model), probe=False).undo()
    assert not changed(model, before)


def test_what_does_not_fit_is_refused() -> None:
    llama = build("llama")
    refused(
        "ranks must divide the KV heads of every layer", reorder_heads, llama, kept(llama), ranks=3
    )
    refused(
        "policy has 3 layers but the model has 2",
        reorder_heads,
        build("llama", num_hidden_layers=2),
        kept(llama),
    )
    refused(
        "must be a transformers PreTrainedModel, got Linear",
        reorder_heads,
        nn.Linear(2, 2),
        kept(llama),
    )


def test_a_trained_prefix_holds_keys_of_heads() -> None:
    peft = pytest.importorskip("peft")
    wanted = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(build("llama"), wanted)
    before = bits(model)
    for call in (reorder_heads, restore_heads):
        refused("prefix tuning keeps keys and values of heads in Peft", call, model, kept(model))
    assert not changed(model, before)

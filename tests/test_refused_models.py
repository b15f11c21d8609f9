"""Models that break transformers' attention contract are refused before they run, with the part that failed."""

from typing import Any

import pytest
import torch
import transformers
from tiny import VOCAB, WINDOW, policy_for, refused, sharpen, tiny

from duohead import DuoCache, HeadPolicy, enable
from duohead.shapes import layer_shapes


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny("llama")


COMMON = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "qk_nope_head_dim": 8,
}
SHARED = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": WINDOW,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
    "altup_num_inputs": 2,
    "laurel_rank": 4,
    "activation_sparsity_pattern": [0.0] * 4,
}
REFUSED = {
    "Falcon": (
        "FalconForCausalLM",
        {"new_decoder_architecture": False, "multi_query": False},
        "it asks them for",
    ),
    "GPT-J": ("GPTJForCausalLM", {"rotary_dim": 4}, "no attention function that can be replaced"),
    "Bloom": ("BloomForCausalLM", {}, "no attention function that can be replaced"),
    "DiffLlama": ("DiffLlamaForCausalLM", {}, "handles keys and values between cache.update and"),
    "DeepSeek-V3": (
        "DeepseekV3ForCausalLM",
        {**LATENT, "first_k_dense_replace": 2},
        "multi-head latent attention",
    ),
    "Gemma3n": ("Gemma3nForCausalLM", SHARED, "attends twice|handles keys and values"),
    "Llama4": ("Llama4ForCausalLM", {"num_local_experts": 2}, "attention type 'chunked_attention'"),
    "BERT": (
        "BertForMaskedLM",
        {},
        "must be a causal language model with a KV cache, got BertForMaskedLM",
    ),
    "T5": (
        "T5ForConditionalGeneration",
        {"d_kv": 8},
        "must be a causal language model.*an encoder-decoder",
    ),
    "Mamba": ("MambaForCausalLM", {}, "must describe a decoder|takes no past_key_values"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_break_the_contract_are_refused_with_the_part_that_failed(name: str) -> None:
    class_name, fields, message = REFUSED[name]
    model_class = getattr(transformers, class_name)
    if class_name == "MambaForCausalLM":
        config = transformers.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2)
    else:
        config = _config(class_name, fields)
    model = model_class(config).eval()
    sharpen(model)
    policy = HeadPolicy.from_heads(
        retrieval=[[]] * getattr(config, "num_hidden_layers", 2), num_kv_heads=_kv(config)
    )
    configs = [module.config for module in model.modules() if "config" in vars(module)]
    refused(message, enable, model, policy)
    after = [module.config for module in model.modules() if "config" in vars(module)]
    assert all(one is other for one, other in zip(configs, after, strict=True))
    assert not model._forward_pre_hooks


def _config(class_name: str, fields: dict[str, Any]) -> Any:
    prefix = (
        class_name.removesuffix("ForCausalLM")
        .removesuffix("ForMaskedLM")
        .removesuffix("ForConditionalGeneration")
    )
    name = f"{prefix}TextConfig" if prefix in ("Gemma3n", "Llama4") else f"{prefix}Config"
    return getattr(transformers, name)(**{**COMMON, **TOKENS, "intermediate_size": 32, **fields})


def _kv(config: Any) -> list[int]:
    try:
        return [shape.num_kv_heads for shape in layer_shapes(config)]
    except ValueError:
        return [4] * 2


def test_a_model_whose_keys_change_after_the_cache_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny("llama")
    attention = type(model.model.layers[0].self_attn)
    plain = attention.forward

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        *args: Any,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        if past_key_values is not None:
            hidden_states = hidden_states * 1.5
        return plain(self, hidden_states, *args, past_key_values=past_key_values, **kwargs)

    monkeypatch.setattr(attention, "forward", forward)
    refused(
        "with every head kept, logits differ from its own attention",
        enable,
        model,
        policy_for(model, "all"),
    )


def test_a_layer_that_skips_the_cache_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    attention = type(model.model.layers[0].self_attn)
    plain = attention.forward

    def forward(self: Any, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        return plain(
            self, *args, past_key_values=None if self.layer_idx == 1 else past_key_values, **kwargs
        )

    monkeypatch.setattr(attention, "forward", forward)
    refused("layer 1 never calls cache.update", enable, model, policy_for(model, "all"))


def test_something_that_is_not_a_transformers_model_is_refused(llama: Any) -> None:
    policy = policy_for(llama, "all")
    refused(
        "model must be a transformers PreTrainedModel, got Linear",
        enable,
        torch.nn.Linear(2, 2),
        policy,
    )


def test_a_model_without_attention_layers_is_refused() -> None:
    model = tiny("qwen3-next", layer_types=["linear_attention"] * 4)
    refused(
        "Qwen3NextForCausalLM has no layer with KV heads", enable, model, policy_for(model, "all")
    )


def test_a_policy_of_another_model_is_refused(llama: Any) -> None:
    deeper = policy_for(tiny("llama", num_hidden_layers=4), "all")
    refused("policy has 4 layers but the model has 3", enable, llama, deeper)
    wider = HeadPolicy.from_heads(retrieval=[[0], [5], []], num_kv_heads=8)
    refused("policy has 8 KV heads in layer 0 but the model has 4", enable, llama, wider)
    refused("policy has 8 KV heads in layer 0 but the model has 4", DuoCache, wider, llama)


def test_a_bidirectional_decoder_is_refused() -> None:
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
    )
    model = transformers.BertLMHeadModel(config).eval()
    policy = HeadPolicy.from_heads(retrieval=[[], []], num_kv_heads=4)
    refused(
        "BertLMHeadModel does not keep the attention contract: .*(causal|overlay)",
        enable,
        model,
        policy,
    )

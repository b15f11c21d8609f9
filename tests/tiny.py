"""Tiny random models of many families, and a dense attention that says independently what each of them must compute.

The reference shares no code with the library: it rebuilds every head's mask from its own three lines and takes one
softmax. Weights are drawn larger than a fresh model's, so that attention is far from uniform and a wrong mask shows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from duohead import HeadPolicy

VOCAB = 61
SINK, RECENT, WINDOW = 3, 5, 7
LENGTH = 29

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
}
_HYBRID_MOE = {**_MOE, "shared_expert_intermediate_size": 16}
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]

# Family -> (class prefix, config fields beside the common ones).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_attention_heads": 8, "num_key_value_heads": 4}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {}),
    "qwen3-moe": ("Qwen3Moe", {**_MOE, "decoder_sparse_step": 1}),
    "gemma2": (
        "Gemma2",
        {"sliding_window": WINDOW, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 2},
    ),
    "gemma3": (
        "Gemma3",
        {"sliding_window": WINDOW, "layer_types": _SLIDING, "query_pre_attn_scalar": 2},
    ),
    "gemma4": (  # head sizes differ by layer
        "Gemma4",
        {
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "global_head_dim": 16,
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8,
        },
    ),
    "gpt-oss": (
        "GptOss",
        {
            "sliding_window": WINDOW,
            "layer_types": _SLIDING,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "phi3": ("Phi3", {}),
    "olmo2": ("Olmo2", {}),
    "granite": ("Granite", {"attention_multiplier": 0.2, "residual_multiplier": 0.5}),
    "mixtral": (
        "Mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "cohere2": ("Cohere2", {"sliding_window": WINDOW, "layer_types": _SLIDING, "logit_scale": 1.0}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1]}),
    "laguna": (
        "Laguna",
        {
            **_MOE,
            "num_attention_heads_per_layer": [4, 6, 8],
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "sliding_window": WINDOW,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "afmoe": (
        "Afmoe",
        {**_MOE, "sliding_window": WINDOW, "layer_types": _SLIDING, "num_dense_layers": 1},
    ),
    "qwen3-next": (
        "Qwen3Next",
        {
            **_HYBRID_MOE,
            "num_hidden_layers": 4,
            "layer_types": [
                "linear_attention",
                "full_attention",
                "linear_attention",
                "full_attention",
            ],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "lfm2": (
        "Lfm2",
        {
            "layer_types": ["conv", "full_attention", "full_attention"],
            "block_auto_adjust_ff_dim": False,
        },
    ),
}
HYBRIDS = ("qwen3-next", "lfm2")


def config_of(family: str, **fields: Any) -> Any:
    """The tiny config of a family, with some fields changed."""
    prefix, extra = FAMILIES[family]
    name = f"{prefix}TextConfig" if prefix in ("Gemma3", "Gemma4") else f"{prefix}Config"
    return getattr(transformers, name)(**{**_COMMON, **extra, **fields})


def tiny(family: str, *, seed: int = 0, **fields: Any) -> Any:
    """A tiny random model of a family, in eval mode."""
    prefix, _ = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{prefix}ForCausalLM")(config_of(family, **fields)).eval()
        sharpen(model)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def sharpen(model: nn.Module) -> None:
    """Weights large enough that attention is selective: unit gain per matrix, visible biases and learned sinks."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                weight.normal_(0.0, weight.shape[-1] ** -0.5)
            elif name.endswith(("bias", "sinks")):
                weight.normal_(0.0, 0.5)


def ids(rows: int = 1, length: int = LENGTH, *, seed: int = 1) -> Tensor:
    """Random token ids [rows, length], never the padding id."""
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padded(lengths: list[int], *, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Token ids and their padding mask for rows of these lengths, padded on the left with 0."""
    width = max(lengths)
    tokens = ids(len(lengths), width, seed=seed)
    mask = torch.stack([(torch.arange(width) >= width - length).long() for length in lengths])
    return tokens * mask, mask


def kv_heads(model: Any) -> list[int]:
    """KV heads per layer, 0 for layers without KV cache, counted on the model's own modules."""
    config = model.config
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [
        0 if kind in ("conv", "linear_attention") else config.num_key_value_heads for kind in types
    ]


def policy_for(
    model: Any, kind: str, *, sink: int = SINK, recent: int = RECENT, **fields: Any
) -> HeadPolicy:
    """A policy of a kind: none, all, alternating, random, gap (no retrieval head in layer 1)."""
    heads = kv_heads(model)
    draw = random.Random(7)
    choose: dict[str, Callable[[int, int], bool]] = {
        "none": lambda layer, head: False,
        "all": lambda layer, head: True,
        "alternating": lambda layer, head: (layer + head) % 2 == 0,
        "random": lambda layer, head: draw.random() < 0.4,
        "gap": lambda layer, head: layer != 1,
    }
    keep = choose[kind]
    retrieval = [
        [head for head in range(count) if keep(layer, head)] for layer, count in enumerate(heads)
    ]
    return HeadPolicy.from_heads(
        retrieval=retrieval, num_kv_heads=heads, sink=sink, recent=recent, **fields
    )


_kept: dict[nn.Module, tuple[list[bool], int, int]] = {}


def dense_reference(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Eager attention of a whole sequence, each KV head under its own dense mask."""
    retrieval, sink, recent = _kept[module]
    rows, heads, count, _ = query.shape
    group = heads // key.shape[1]
    mask = (
        torch.ones(rows, count, dtype=torch.bool)
        if attention_mask is None
        else attention_mask.bool()
    )
    place = torch.arange(count) - (~mask).int().cumprod(-1).sum(-1, keepdim=True)
    i, j = place[:, None, :, None], place[:, None, None, :]
    seen = (
        (j <= i)
        & (torch.tensor(retrieval)[None, :, None, None] | (j < sink) | (i - j < recent))
        & (j >= 0)
    )
    if sliding_window is not None:
        seen = seen & (i - j < sliding_window)
    seen = (seen | (i < 0)).repeat_interleave(group, 1)
    scores = query @ key.repeat_interleave(group, 1).transpose(-1, -2) * scaling
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    scores = scores.masked_fill(~seen, -torch.inf)
    if s_aux is not None:
        scores = torch.cat([scores, s_aux[None, :, None, None].expand(rows, -1, count, 1)], -1)
    weights = scores.softmax(-1)[..., :count]
    return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2).contiguous(), None


AttentionInterface.register("dense_reference", dense_reference)
AttentionMaskInterface.register(
    "dense_reference", lambda *args, attention_mask=None, **kwargs: attention_mask
)


@contextmanager
def masked(model: PreTrainedModel, policy: HeadPolicy) -> Iterator[None]:
    """Run ``model`` with the dense reference under ``policy`` inside the block (forward without a cache only)."""
    before = model.config._attn_implementation
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int):
            heads = policy.layers[layer]
            kinds = [head in heads.retrieval for head in range(heads.num_kv_heads)]
            _kept[module] = (kinds, policy.sink, policy.recent)
    model.set_attn_implementation("dense_reference")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        _kept.clear()


@torch.no_grad()
def expected_logits(
    model: Any, policy: HeadPolicy, tokens: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Logits [B, T, V] of the masked dense reference."""
    with masked(model, policy):
        return model(
            input_ids=tokens, attention_mask=mask, position_ids=_place(mask), use_cache=False
        ).logits


def _place(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def expected_greedy(
    model: Any, policy: HeadPolicy, tokens: Tensor, new: int, mask: Tensor | None = None
) -> Tensor:
    """Greedy continuation without a cache: the whole text through the reference for every token."""
    with masked(model, policy):
        for _ in range(new):
            logits = model(
                input_ids=tokens, attention_mask=mask, position_ids=_place(mask), use_cache=False
            ).logits
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
            mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return tokens


@torch.no_grad()
def chunked_logits(
    model: Any, cache: Any, tokens: Tensor, chunks: list[int], mask: Tensor | None = None
) -> Tensor:
    """Logits of every token, fed through ``cache`` in pieces of these lengths, then token by token."""
    place, found, start = _place(mask), [], 0
    for count in [*chunks, *[1] * (tokens.shape[1] - sum(chunks))]:
        stop = start + count
        found.append(
            model(
                input_ids=tokens[:, start:stop],
                attention_mask=None if mask is None else mask[:, :stop],
                position_ids=None if place is None else place[:, start:stop],
                past_key_values=cache,
                use_cache=True,
            ).logits
        )
        start = stop
    return torch.cat(found, 1)


def assert_close(
    found: Tensor, expected: Tensor, mask: Tensor | None = None, *, limit: float = 1e-5
) -> None:
    """Largest difference on real tokens at most ``limit`` times the largest logit (at least 1)."""
    if mask is not None:
        found, expected = found[mask.bool()], expected[mask.bool()]
    error = float((found - expected).abs().max())
    assert error <= limit * max(1.0, float(expected.abs().max())), f"logits differ by {error:.2e}"


def refused(message: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """The call raises one ValueError of one line that matches ``message``."""
    with pytest.raises(ValueError, match=message) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)

"""What a model's attention layers look like: KV heads, head size and native window, layer by layer.

Patterns, policies and caches must agree with the model on exactly these facts, so they are read in one place. Only
attributes of a transformers config are read (nothing is imported from transformers), which keeps this room at the top.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

GLOBAL_TYPES = frozenset({"full_attention", "attention"})
WINDOW_TYPES = frozenset({"sliding_attention"})
KV_FREE_TYPES = frozenset(
    {"linear_attention", "conv", "mamba", "mamba2", "recurrent", "moe", "mlp"}
)
MOST_WINDOW = 1 << 28
"""The longest sink or window, in tokens: longer than any text, and well within the 32 bits that kernels count in."""


@dataclass(frozen=True)
class LayerShape:
    """The KV geometry of one decoder layer.

    ``num_kv_heads`` is 0 for a layer without a KV cache (linear attention, convolution). ``window`` is the native
    sliding window in tokens, the query's own token included; None means global attention.
    """

    num_kv_heads: int
    head_dim: int
    value_dim: int
    window: int | None = None

    @property
    def gated(self) -> bool:
        """Whether the heads of this layer are ranked: it has KV heads and its native attention is global."""
        return self.num_kv_heads > 0 and self.window is None


def check_window(name: str, tokens: int) -> None:
    """Refuse a sink or window of more than `MOST_WINDOW` tokens; ValueError."""
    if tokens > MOST_WINDOW:
        raise ValueError(
            f"{name} must be at most {MOST_WINDOW} tokens, got {tokens}; a head that must see everything is a "
            f"retrieval head"
        )


def text_config(model_or_config: Any) -> Any:
    """The decoder's config of a model or of a (possibly composite) config."""
    config = getattr(model_or_config, "config", model_or_config)
    get_text_config = getattr(config, "get_text_config", None)
    return config if get_text_config is None else get_text_config(decoder=True)


def layer_shapes(model_or_config: Any) -> tuple[LayerShape, ...]:
    """The shape of every decoder layer of a transformers model or config.

    Raises:
        ValueError: the config lacks the usual fields, or a layer's attention type is not supported.
    """
    return tuple(_layer_shapes(text_config(model_or_config)))


def _layer_shapes(config: Any) -> Iterator[LayerShape]:
    num_layers = getattr(config, "num_hidden_layers", None)
    if num_layers is None or not hasattr(_layer_config(config, 0), "num_attention_heads"):
        raise ValueError(
            f"config must describe a decoder with num_hidden_layers and num_attention_heads, got "
            f"{type(config).__name__} without them; pass a causal language model or its config"
        )
    if getattr(config, "kv_lora_rank", None) is not None:
        raise ValueError(
            f"{type(config).__name__} describes multi-head latent attention (kv_lora_rank), whose cache has no KV "
            f"heads; duohead does not support it"
        )
    layer_types = getattr(config, "layer_types", None)
    for index in range(num_layers):
        layer_type = layer_types[index] if layer_types is not None else None
        if layer_type in KV_FREE_TYPES:
            yield LayerShape(num_kv_heads=0, head_dim=0, value_dim=0)
            continue
        layer = _layer_config(config, index)
        heads = _per_layer(layer.num_attention_heads, index)
        kv_heads = _per_layer(getattr(layer, "num_key_value_heads", None) or heads, index)
        head_dim = getattr(layer, "head_dim", None) or layer.hidden_size // heads
        value_dim = getattr(layer, "v_head_dim", None) or head_dim
        yield LayerShape(kv_heads, head_dim, value_dim, _window(layer, layer_type, index))


def _layer_config(config: Any, index: int) -> Any:
    """The config of one layer; a model whose layers differ in geometry refuses to be asked for all of them at once."""
    layers = getattr(config, "per_layer_config", None)
    return config if layers is None else layers[index]


def _per_layer(value: Any, index: int) -> int:
    return int(value[index] if isinstance(value, (list, tuple)) else value)


def _window(config: Any, layer_type: str | None, index: int) -> int | None:
    window = getattr(config, "sliding_window", None)
    if layer_type in GLOBAL_TYPES:
        return None
    if layer_type is None:
        if getattr(config, "attention_chunk_size", None) is not None:
            layer_type = "chunked_attention"
        elif window is None or getattr(config, "use_sliding_window", True) is False:
            return None
    if layer_type is not None and layer_type not in WINDOW_TYPES:
        raise ValueError(
            f"layer {index} has attention type {layer_type!r}, which duohead does not support; supported are "
            f"{sorted(GLOBAL_TYPES | WINDOW_TYPES)} and, left untouched, {sorted(KV_FREE_TYPES)}"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if window is None or (positions is not None and window >= positions):
        return None
    return int(window)

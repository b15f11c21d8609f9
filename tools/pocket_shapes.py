"""The sizes of every pocket model: what it is in transformers, how it is trained and scored, and how its card says so.

A shape makes its configuration, and from it the form that trains fast. `SHAPES["laguna"].model(...)` is that model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import LagunaConfig, LlamaConfig

    from tools.pocket_model import PocketModel

COMMON = {
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "dtype": "bfloat16",
}


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama, of its training batches, and of its evaluation."""

    family = "Llama"

    vocabulary: int = 4096
    hidden: int = 192
    layers: int = 6
    heads: int = 8
    kv_heads: int = 4
    inner: int = 384
    tokens_per_step: int = 131072
    report_lengths: tuple[int, ...] = (512, 2048, 8192)
    final_lengths: tuple[int, ...] = (2048, 4096, 8192, 16384)
    count: int = 200

    def config(self) -> LlamaConfig | LagunaConfig:
        """The configuration in transformers with these sizes."""
        from transformers import LlamaConfig

        rope = {"rope_type": "default", "rope_theta": 500000.0}
        return LlamaConfig(rope_parameters=rope, **self._shared())

    def _shared(self) -> dict[str, Any]:
        """What the configuration of every family takes."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": 64,
            **COMMON,
        }

    def model(self, *, compute: torch.dtype, compiled: bool) -> PocketModel:
        """The model in the form that trains fast, with random weights."""
        from tools.pocket_model import PocketLlama

        return PocketLlama(self.config(), compute=compute, compiled=compiled)

    def architecture(self) -> str:
        """One line for the card."""
        return (
            f"Llama, {self.layers} layers, {self.heads} query heads, {self.kv_heads} KV heads of size 64, "
            f"hidden {self.hidden}, MLP {self.inner}, RoPE base 5e5"
        )


@dataclass(frozen=True)
class LagunaShape(Shape):
    """Sizes of a Laguna: the first of each four layers is global, with `heads` query heads, the others windowed.

    Layer 0 has a dense feed-forward network of size `inner`, every other one `experts` small ones beside a shared one.
    """

    family = "Laguna"

    layers: int = 9
    inner: int = 224
    window: int = 64
    windowed_heads: int = 4
    experts: int = 8
    chosen: int = 2
    expert_inner: int = 16
    shared_inner: int = 80

    def config(self) -> LagunaConfig:
        """The configuration of transformers' Laguna with these sizes."""
        from transformers import LagunaConfig

        global_layers = [index % 4 == 0 for index in range(self.layers)]
        return LagunaConfig(
            layer_types=[
                "full_attention" if every else "sliding_attention" for every in global_layers
            ],
            num_attention_heads_per_layer=[
                self.heads if every else self.windowed_heads for every in global_layers
            ],
            sliding_window=self.window,
            gating=True,
            num_experts=self.experts,
            num_experts_per_tok=self.chosen,
            moe_intermediate_size=self.expert_inner,
            shared_expert_intermediate_size=self.shared_inner,
            **self._shared(),
        )

    def model(self, *, compute: torch.dtype, compiled: bool) -> PocketModel:
        """The model in the form that trains fast, with random weights."""
        from tools.pocket_laguna import PocketLaguna

        return PocketLaguna(self.config(), compute=compute, compiled=compiled)

    def architecture(self) -> str:
        """One line for the card."""
        places = ", ".join(str(index) for index in range(0, self.layers, 4))
        return (
            f"Laguna, {self.layers} layers: {places} global ({self.heads} query heads, RoPE base 5e5 on half of each), "
            f"the others with a window of {self.window} tokens ({self.windowed_heads} query heads, RoPE base 1e4); "
            f"{self.kv_heads} KV heads of size 64, per-head softplus gates, RMS norms of queries and keys; "
            f"hidden {self.hidden}, MLP {self.inner} in layer 0, then {self.chosen} of {self.experts} experts of "
            f"{self.expert_inner} beside a shared one of {self.shared_inner}; sigmoid router, balanced by its "
            "selection bias without an auxiliary loss"
        )


_TINY = {
    "vocabulary": 1024, "hidden": 64, "kv_heads": 1, "inner": 64, "tokens_per_step": 2048,
    "report_lengths": (512,), "final_lengths": (2048,), "count": 8,
}  # fmt: skip
SHAPES: dict[str, Shape] = {
    "gqa": Shape(),
    "mha": Shape(kv_heads=8, inner=224),
    "laguna": LagunaShape(),
    "tiny": Shape(layers=2, heads=2, **_TINY),  # type: ignore[arg-type]
    "tiny-laguna": LagunaShape(
        layers=5,
        heads=2,
        windowed_heads=1,
        window=16,
        experts=4,
        expert_inner=16,
        shared_inner=32,
        **_TINY,  # type: ignore[arg-type]
    ),
}

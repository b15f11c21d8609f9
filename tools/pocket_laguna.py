"""A compact Laguna for fast training: windowed and global layers, gated heads, a small mixture of experts.

Every expert is computed for every token: side by side they are one wide feed-forward network whose parts are weighed by
the router, as fast as a dense one of that size, and exact. Experts are kept equally busy as in DeepSeek-V3, by the
router's selection bias and without an auxiliary loss (arXiv 2408.15664): call `after_step` after every update.

Shapes: N tokens of a batch, H query heads, D head size, C hidden size, E experts, I inner size of an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from duohead.identify.banded import Scores, streaming_attention
from tools.pocket_model import (
    PocketLayer,
    PocketModel,
    add_weights,
    attend,
    causal,
    loaded,
    mlp,
    rms,
    rotate,
)

if TYPE_CHECKING:
    from transformers import LagunaConfig, PreTrainedModel

# Change of the selection bias per update until learning rates decay; routing scores lie in [0, 1]. DeepSeek-V3's is a
# fifth of it, over many times the updates.
BALANCE = 5e-3


def _before_attention(
    x: Tensor,
    norm: Tensor,
    projections: tuple[Tensor, Tensor, Tensor, Tensor],
    norms: tuple[Tensor, Tensor],
    cos: Tensor,
    sin: Tensor,
    size: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values (N, heads, D) and the gate of each query head (N, H)."""
    h = rms(x, norm, eps)
    flat_q, flat_k, flat_v, gate = (F.linear(h, weight.to(h.dtype)) for weight in projections)
    q, k, v = (t.unflatten(-1, (-1, size)) for t in (flat_q, flat_k, flat_v))
    q, k = (rotate(rms(t, weight, eps), cos, sin) for t, weight in zip((q, k), norms, strict=True))
    return q, k, v, F.softplus(gate.float()).to(h.dtype)


def _add_attended(x: Tensor, attended: Tensor, gate: Tensor, o: Tensor) -> Tensor:
    gated = attended.unflatten(-1, (gate.shape[-1], -1)) * gate[..., None]
    return x + F.linear(gated.flatten(-2), o.to(x.dtype))


def _after_dense(
    x: Tensor,
    attended: Tensor,
    heads_gate: Tensor,
    o: Tensor,
    norm: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    eps: float,
) -> Tensor:
    x = _add_attended(x, attended, heads_gate, o)
    return x + mlp(rms(x, norm, eps), gate, up, down)


def _routed(h: Tensor, router: Tensor, bias: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Share of each expert in each token (N, E), `top` of them not zero, and how many tokens chose it (E)."""
    scores = torch.sigmoid(F.linear(h, router.to(h.dtype)).float())
    with torch.no_grad():
        order = scores + bias
        ours, theirs = order[:, :, None], order[:, None, :]
        place = torch.arange(order.shape[-1], device=h.device)
        # The sorting of torch.topk is slow for so few experts; equal ones go by their place.
        ahead = (theirs > ours) | ((theirs == ours) & (place < place[:, None]))
        chosen = (ahead.sum(-1) < top).float()
    shares = scores * chosen
    return shares / shares.sum(-1, keepdim=True), chosen.sum(0)


def _after_sparse(
    x: Tensor,
    attended: Tensor,
    heads_gate: Tensor,
    o: Tensor,
    norm: Tensor,
    router: Tensor,
    bias: Tensor,
    experts: tuple[Tensor, Tensor, Tensor],
    shared: tuple[Tensor, Tensor, Tensor],
    top: int,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The layer's output (N, C), and how many tokens chose each expert (E)."""
    x = _add_attended(x, attended, heads_gate, o)
    h = rms(x, norm, eps)
    shares, load = _routed(h, router, bias, top)
    gate, up = (
        torch.cat((own.flatten(0, 1), other)).to(x.dtype)
        for own, other in zip(experts[:2], shared[:2], strict=True)
    )
    down = torch.cat((experts[2].transpose(0, 1).flatten(1), shared[2]), dim=1).to(x.dtype)
    inner = F.silu(F.linear(h, gate)) * F.linear(h, up)
    count, size = experts[0].shape[:2]
    weighed = inner[:, : count * size].unflatten(-1, (count, size))
    weighed = weighed * (scale * shares).to(x.dtype)[..., None]
    inner = torch.cat((weighed.flatten(-2), inner[:, count * size :]), dim=-1)
    return x + F.linear(inner, down), load


class PocketLaguna(PocketModel):
    """Laguna with tied embeddings and per-head gates."""

    def __init__(self, config: LagunaConfig, *, compute: torch.dtype, compiled: bool) -> None:
        from transformers.models.laguna.modeling_laguna import LagunaRotaryEmbedding

        rotary = LagunaRotaryEmbedding(config)
        frequencies = {kind: getattr(rotary, f"{kind}_inv_freq") for kind in rotary.layer_types}
        layers = [_Layer(config, index) for index in range(config.num_hidden_layers)]
        super().__init__(config, layers, frequencies, compute=compute, compiled=compiled)
        # A tuple beside the registered list, for their type.
        self._own = tuple(layers)

    @torch.no_grad()
    def after_step(self, decay: float) -> None:
        """Raises the selection bias of experts that were chosen less than the mean, and lowers that of the others."""
        sparse = [layer for layer in self._own if layer.sparse]
        loads = torch.stack([layer.load for layer in sparse])
        change = BALANCE * decay * torch.sign(loads.mean(1, keepdim=True) - loads)
        for layer, row in zip(sparse, change, strict=True):
            layer.bias += row

    def state_line(self) -> str:
        """How busy the busiest and the idlest expert of all layers were in the last batch, as multiples of the mean."""
        loads = torch.stack([layer.load for layer in self._own if layer.sparse])
        shares = loads / loads.mean(1, keepdim=True)
        return f"experts' load {float(shares.min()):.2f} to {float(shares.max()):.2f}"

    def to_transformers(self) -> PreTrainedModel:
        """The same model as transformers' LagunaForCausalLM, on the CPU in fp32."""
        from transformers import LagunaForCausalLM

        own = self._weights()
        for index, layer in enumerate(self._own):
            for name, weight in layer.exported().items():
                own[f"model.layers.{index}.{name}"] = weight
        return loaded(LagunaForCausalLM(self.config), own)


class _Layer(PocketLayer):
    bias: Tensor
    load: Tensor

    def __init__(self, config: LagunaConfig, index: int) -> None:
        super().__init__()
        self.kind = config.layer_types[index]
        self.sparse = config.mlp_layer_types[index] == "sparse"
        hidden, size = config.hidden_size, config.head_dim
        heads = config.num_attention_heads_per_layer[index]
        queries, keys = heads * size, config.num_key_value_heads * size
        shapes: dict[str, tuple[int, ...]] = {
            "norm1": (hidden,), "norm2": (hidden,), "q_norm": (size,), "k_norm": (size,),
            "q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "g": (heads, hidden),
            "o": (hidden, queries),
        }  # fmt: skip
        if self.sparse:
            count, inner = config.num_experts, config.moe_intermediate_size
            wide = config.shared_expert_intermediate_size
            shapes |= {
                "router": (count, hidden), "gate": (count, inner, hidden), "up": (count, inner, hidden),
                "down": (count, hidden, inner), "shared_gate": (wide, hidden), "shared_up": (wide, hidden),
                "shared_down": (hidden, wide),
            }  # fmt: skip
            self.register_buffer("bias", torch.zeros(count))
            self.register_buffer("load", torch.ones(count), persistent=False)
        else:
            inner = config.intermediate_size
            shapes |= {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        add_weights(self, shapes)
        self._size, self._eps = size, config.rms_norm_eps
        self._top, self._scale = config.num_experts_per_tok, config.moe_routed_scaling_factor
        self._attention: Callable[[Tensor, Tensor, Tensor], Tensor] = causal
        if self.kind == "sliding_attention":
            window = config.sliding_window
            self._attention = partial(streaming_attention, sink=0, recent=window, scores=Scores())

    def forward(
        self,
        x: Tensor,
        rows: int,
        length: int,
        angles: tuple[Tensor, Tensor],
        compiled: Callable[[Callable[..., Any]], Callable[..., Any]],
    ) -> Tensor:
        projections, norms = (self.q, self.k, self.v, self.g), (self.q_norm, self.k_norm)
        *parts, gate = compiled(_before_attention)(
            x, self.norm1, projections, norms, *angles, self._size, self._eps
        )
        attended = attend(self._attention, parts, rows, length)
        before = (x, attended, gate, self.o, self.norm2)
        if not self.sparse:
            out: Tensor = compiled(_after_dense)(*before, self.gate, self.up, self.down, self._eps)
            return out
        experts = (self.gate, self.up, self.down)
        shared = (self.shared_gate, self.shared_up, self.shared_down)
        out, self.load = compiled(_after_sparse)(
            *before, self.router, self.bias, experts, shared, self._top, self._scale, self._eps
        )
        return out

    def exported(self) -> dict[str, Tensor]:
        """Weights by their names within transformers' decoder layer."""
        weights = dict(self.named_parameters())
        names = _ATTENTION | (_SPARSE if self.sparse else _DENSE)
        own: dict[str, Tensor] = {theirs: weights[name] for name, theirs in names.items()}
        if self.sparse:
            fused = torch.cat((weights["gate"], weights["up"]), dim=1)
            own |= {
                "mlp.experts.gate_up_proj": fused,
                "mlp.gate.e_score_correction_bias": self.bias,
            }
        return own


_ATTENTION = {
    "norm1": "input_layernorm.weight",
    "norm2": "post_attention_layernorm.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    **{part: f"self_attn.{part}_proj.weight" for part in "qkvog"},
}
_DENSE = {part: f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
_SPARSE = {
    "router": "mlp.gate.weight",
    "down": "mlp.experts.down_proj",
    **{f"shared_{p}": f"mlp.shared_experts.{p}_proj.weight" for p in ("gate", "up", "down")},
}

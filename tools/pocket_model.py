"""A compact Llama for fast training, with the optimiser that trains it; its weights are transformers' weights.

Everything but attention works on one flat (tokens, hidden) tensor, so that torch.compile meets one shape although
sequence lengths change from batch to batch. Train with `loss`, export with `to_transformers()`.

Shapes: N tokens of a batch, B sequences of L tokens, H query heads, G KV heads, D head size, C hidden size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (N, heads, D), halves paired as transformers pairs them; cos, sin (N, D / 2)."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def _before_attention(
    x: Tensor,
    norm: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    size: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    h = _rms(x, norm, eps)
    queries, keys, values = (
        F.linear(h, w.to(h.dtype)).unflatten(-1, (-1, size)) for w in (q, k, v)
    )
    return _rotate(queries, cos, sin), _rotate(keys, cos, sin), values


def _after_attention(
    x: Tensor,
    attended: Tensor,
    o: Tensor,
    norm: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    eps: float,
) -> Tensor:
    x = x + F.linear(attended, o.to(x.dtype))
    h = _rms(x, norm, eps)
    return x + F.linear(
        F.silu(F.linear(h, gate.to(x.dtype))) * F.linear(h, up.to(x.dtype)), down.to(x.dtype)
    )


def _weighted_loss(
    x: Tensor, norm: Tensor, embedding: Tensor, targets: Tensor, weights: Tensor, eps: float
) -> Tensor:
    logits = F.linear(_rms(x, norm, eps), embedding.to(x.dtype)).float()
    chosen = logits.gather(-1, targets[:, None]).squeeze(-1)
    return ((logits.logsumexp(-1) - chosen) * weights).sum()


class PocketLlama(nn.Module):
    """Llama with tied embeddings; `forward` gives hidden states (N, C), `loss` the weighted sum of token losses."""

    _frequencies: Tensor

    def __init__(self, config: LlamaConfig, *, compute: torch.dtype, compiled: bool) -> None:
        super().__init__()
        from transformers import LlamaForCausalLM

        self.config, self._compute = config, compute
        hf = LlamaForCausalLM(config)
        self.embedding = nn.Parameter(torch.randn(config.vocab_size, config.hidden_size) * 0.02)
        self.final_norm = nn.Parameter(torch.ones(config.hidden_size))
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.register_buffer("_frequencies", hf.model.rotary_emb.inv_freq.float(), persistent=False)
        wrap: Callable[[Any], Any] = (
            torch.compile(dynamic=False) if compiled else lambda function: function
        )
        self._before, self._after = wrap(_before_attention), wrap(_after_attention)
        self._weighted = wrap(_weighted_loss)
        self._tables: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}

    def _angles(self, rows: int, length: int, padding: int) -> tuple[Tensor, Tensor]:
        key = (rows, length, padding)
        if key not in self._tables:
            places = torch.arange(
                length, device=self._frequencies.device, dtype=torch.float32
            ).repeat(rows)
            angles = torch.outer(F.pad(places, (0, padding)), self._frequencies)
            self._tables[key] = angles.cos(), angles.sin()
        return self._tables[key]

    def forward(self, ids: Tensor, *, padding: int = 0) -> Tensor:
        """Hidden states before the last norm, (B * L + padding, C); padding only keeps the flat shape constant."""
        rows, length = ids.shape
        cos, sin = self._angles(rows, length, padding)
        x = F.embedding(F.pad(ids.flatten(), (0, padding)), self.embedding).to(self._compute)
        for layer in self.layers:
            x = layer(x, rows, length, cos, sin, self)
        return x

    def loss(self, ids: Tensor, targets: Tensor, weights: Tensor, *, padding: int = 0) -> Tensor:
        """Sum of cross entropies of `targets` (B, L) times `weights` (B, L)."""
        x = self(ids, padding=padding)
        targets, weights = (F.pad(part.flatten(), (0, padding)) for part in (targets, weights))
        total: Tensor = self._weighted(
            x, self.final_norm, self.embedding, targets, weights, self.config.rms_norm_eps
        )
        return total

    @torch.no_grad()
    def logits(self, ids: Tensor, rows: Tensor) -> Tensor:
        """Logits (chosen, vocabulary) of ids (B, L) at the flat positions `rows`."""
        x = self(ids)[rows]
        return F.linear(
            _rms(x, self.final_norm, self.config.rms_norm_eps), self.embedding.to(x.dtype)
        ).float()

    def to_transformers(self) -> LlamaForCausalLM:
        """The same model as transformers' LlamaForCausalLM, on the CPU in fp32."""
        from transformers import LlamaForCausalLM

        hf = LlamaForCausalLM(self.config)
        own = {"model.embed_tokens.weight": self.embedding, "lm_head.weight": self.embedding}
        own["model.norm.weight"] = self.final_norm
        for index, layer in enumerate(self.layers):
            for name, weight in layer.named_parameters():
                own[f"model.layers.{index}.{_NAMES[name]}.weight"] = weight
        hf.load_state_dict({name: weight.detach().float().cpu() for name, weight in own.items()})
        return hf


_NAMES = {
    "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip


class _Layer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        size, hidden, inner = config.head_dim, config.hidden_size, config.intermediate_size
        queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
        self.norm1, self.norm2 = nn.Parameter(torch.ones(hidden)), nn.Parameter(torch.ones(hidden))
        shapes = {
            "q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries),
            "gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner),
        }  # fmt: skip
        for name, shape in shapes.items():
            scale = 0.0 if name in ("o", "down") else shape[1] ** -0.5
            self.register_parameter(name, nn.Parameter(torch.randn(shape) * scale))
        self._size, self._eps = size, config.rms_norm_eps

    def forward(
        self, x: Tensor, rows: int, length: int, cos: Tensor, sin: Tensor, owner: PocketLlama
    ) -> Tensor:
        q, k, v = owner._before(
            x, self.norm1, self.q, self.k, self.v, cos, sin, self._size, self._eps
        )
        q, k, v = (
            t[: rows * length].unflatten(0, (rows, length)).transpose(1, 2) for t in (q, k, v)
        )
        attended = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1]
        )
        attended = attended.transpose(1, 2).flatten(2).flatten(0, 1)
        attended = F.pad(attended, (0, 0, 0, x.shape[0] - attended.shape[0]))
        out: Tensor = owner._after(
            x, attended, self.o, self.norm2, self.gate, self.up, self.down, self._eps
        )
        return out


def orthogonal(update: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrices to a stack of them (S, m, n), by five Newton-Schulz steps in bf16."""
    x = update.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (Jordan et al. 2024); matrices of one shape go through it together."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, lr: float, momentum: float, weight_decay: float
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                shapes[parameter.shape].append(parameter)
            for shape, parameters in shapes.items():
                gradient = torch.stack([p.grad for p in parameters if p.grad is not None])
                state = self.state[parameters[0]]
                average = state.setdefault("average", torch.zeros_like(gradient))
                average.lerp_(gradient, 1 - group["momentum"])
                update = orthogonal(gradient.lerp(average, group["momentum"])).float()
                update *= max(1.0, shape[0] / shape[1]) ** 0.5 * group["lr"]
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                for parameter, change in zip(parameters, update, strict=True):
                    parameter.sub_(change)

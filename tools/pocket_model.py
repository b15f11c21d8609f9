"""What the pocket models share for fast training, the Llama among them, and the optimiser that trains them.

Everything but attention works on one flat (tokens, hidden) tensor, so that torch.compile meets one shape although
sequence lengths change from batch to batch. Train with `loss`, export with `to_transformers()`.

Shapes: N tokens of a batch, B sequences of L tokens, H query heads, G KV heads, D head size, C hidden size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x divided by the root mean square of its last dimension, times weight; computed in fp32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first R of x (N, heads, D), halves paired as in transformers; cos, sin (N, R / 2)."""
    size = 2 * cos.shape[-1]
    a, b = x[..., :size].float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
    return turned if size == x.shape[-1] else torch.cat((turned, x[..., size:]), dim=-1)


def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Gated feed-forward network with silu; weights as in transformers."""
    gate, up, down = (weight.to(x.dtype) for weight in (gate, up, down))
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


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
    h = rms(x, norm, eps)
    queries, keys, values = (
        F.linear(h, w.to(h.dtype)).unflatten(-1, (-1, size)) for w in (q, k, v)
    )
    return rotate(queries, cos, sin), rotate(keys, cos, sin), values


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
    return x + mlp(rms(x, norm, eps), gate, up, down)


def _weighted_loss(
    x: Tensor, norm: Tensor, embedding: Tensor, targets: Tensor, weights: Tensor, eps: float
) -> Tensor:
    logits = F.linear(rms(x, norm, eps), embedding.to(x.dtype)).float()
    chosen = logits.gather(-1, targets[:, None]).squeeze(-1)
    return ((logits.logsumexp(-1) - chosen) * weights).sum()


def attend(
    attention: Callable[[Tensor, Tensor, Tensor], Tensor],
    parts: Iterable[Tensor],
    rows: int,
    length: int,
) -> Tensor:
    """Attention over flat queries, keys and values (N, heads, D) of B sequences, then padding; flat again (N, H * D).

    Padding may be at the end of N; it is left out and comes back as zeros. `attention` takes (B, heads, L, D).
    """
    flat = list(parts)
    q, k, v = (t[: rows * length].unflatten(0, (rows, length)).transpose(1, 2) for t in flat)
    attended = attention(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1)
    return F.pad(attended, (0, 0, 0, flat[0].shape[0] - attended.shape[0]))


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of q (B, H, L, D) to k and v (B, G, L, D)."""
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1]
    )


def add_weights(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Gives `module` a parameter of each name and shape: ones for vectors, zeros for what adds to the residual."""
    for name, shape in shapes.items():
        scale = 0.0 if name in ("o", "down", "shared_down") else shape[-1] ** -0.5
        start = torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * scale
        module.register_parameter(name, nn.Parameter(start))


class PocketLayer(nn.Module):
    """A decoder layer; it is called with x (N, C), B, L, cosines and sines (N, R / 2), and what compiles a function.

    ``kind`` names its rotary embedding.
    """

    kind: str


class PocketModel(nn.Module):
    """Decoder with tied embeddings; `forward` gives hidden states (N, C), `loss` the weighted sum of token losses.

    A subclass brings the layers and the frequencies (R / 2) of each kind of rotary embedding that these name.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        layers: Sequence[PocketLayer],
        frequencies: Mapping[str, Tensor],
        *,
        compute: torch.dtype,
        compiled: bool,
    ) -> None:
        super().__init__()
        self.config, self._compute = config, compute
        self.embedding = nn.Parameter(torch.randn(config.vocab_size, config.hidden_size) * 0.02)
        self.final_norm = nn.Parameter(torch.ones(config.hidden_size))
        self.layers = nn.ModuleList(layers)
        self._kinds = [layer.kind for layer in layers]
        self._frequencies = {kind: values.float() for kind, values in frequencies.items()}
        self._compiled: dict[Callable[..., Any], Callable[..., Any]] | None = (
            {} if compiled else None
        )
        self._tables: dict[tuple[str, int, int, int], tuple[Tensor, Tensor]] = {}

    def _wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if self._compiled is None:
            return function
        if function not in self._compiled:
            self._compiled[function] = torch.compile(function, dynamic=False)
        return self._compiled[function]

    def _angles(self, kind: str, rows: int, length: int, padding: int) -> tuple[Tensor, Tensor]:
        key = (kind, rows, length, padding)
        if key not in self._tables:
            device = self.embedding.device
            places = torch.arange(length, device=device, dtype=torch.float32).repeat(rows)
            angles = torch.outer(F.pad(places, (0, padding)), self._frequencies[kind].to(device))
            self._tables[key] = angles.cos(), angles.sin()
        return self._tables[key]

    def forward(self, ids: Tensor, *, padding: int = 0) -> Tensor:
        """Hidden states before the last norm, (B * L + padding, C); padding only keeps the flat shape constant."""
        rows, length = ids.shape
        x = F.embedding(F.pad(ids.flatten(), (0, padding)), self.embedding).to(self._compute)
        for layer, kind in zip(self.layers, self._kinds, strict=True):
            x = layer(x, rows, length, self._angles(kind, rows, length, padding), self._wrapped)
        return x

    def loss(self, ids: Tensor, targets: Tensor, weights: Tensor, *, padding: int = 0) -> Tensor:
        """Sum of cross entropies of `targets` (B, L) times `weights` (B, L)."""
        x = self(ids, padding=padding)
        targets, weights = (F.pad(part.flatten(), (0, padding)) for part in (targets, weights))
        total: Tensor = self._wrapped(_weighted_loss)(
            x, self.final_norm, self.embedding, targets, weights, self.config.rms_norm_eps
        )
        return total

    @torch.no_grad()
    def logits(self, ids: Tensor, rows: Tensor) -> Tensor:
        """Logits (chosen, vocabulary) of ids (B, L) at the flat positions `rows`."""
        # Every length would be compiled anew, for a few forwards.
        with torch.compiler.set_stance("force_eager"):
            x = self(ids)[rows]
        return F.linear(
            rms(x, self.final_norm, self.config.rms_norm_eps), self.embedding.to(x.dtype)
        ).float()

    def after_step(self, decay: float) -> None:
        """What a model does besides after each update; `decay` in [0, 1] is that of the learning rate."""

    def state_line(self) -> str:
        """What a report says of the model besides its scores; may be empty."""
        return ""

    def to_transformers(self) -> PreTrainedModel:
        """The same model as transformers' own, on the CPU in fp32."""
        raise NotImplementedError

    def _weights(self) -> dict[str, Tensor]:
        """The weights outside the layers, by their names in transformers."""
        return {
            "model.embed_tokens.weight": self.embedding,
            "lm_head.weight": self.embedding,
            "model.norm.weight": self.final_norm,
        }


def loaded(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """`model` with exactly these weights."""
    model.load_state_dict({name: weight.detach().float().cpu() for name, weight in weights.items()})
    return model


class PocketLlama(PocketModel):
    """Llama with tied embeddings."""

    def __init__(self, config: LlamaConfig, *, compute: torch.dtype, compiled: bool) -> None:
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        layers = [_Layer(config) for _ in range(config.num_hidden_layers)]
        frequencies = {_Layer.kind: LlamaRotaryEmbedding(config).inv_freq}
        super().__init__(config, layers, frequencies, compute=compute, compiled=compiled)

    def to_transformers(self) -> PreTrainedModel:
        """The same model as transformers' LlamaForCausalLM, on the CPU in fp32."""
        from transformers import LlamaForCausalLM

        own = self._weights()
        for index, layer in enumerate(self.layers):
            for name, weight in layer.named_parameters():
                own[f"model.layers.{index}.{_NAMES[name]}.weight"] = weight
        return loaded(LlamaForCausalLM(self.config), own)


_NAMES = {
    "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip


class _Layer(PocketLayer):
    kind = "full"

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        size, hidden, inner = config.head_dim, config.hidden_size, config.intermediate_size
        queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
        add_weights(self, {
            "norm1": (hidden,), "norm2": (hidden,),
            "q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries),
            "gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner),
        })  # fmt: skip
        self._size, self._eps = size, config.rms_norm_eps

    def forward(
        self,
        x: Tensor,
        rows: int,
        length: int,
        angles: tuple[Tensor, Tensor],
        compiled: Callable[[Callable[..., Any]], Callable[..., Any]],
    ) -> Tensor:
        parts = compiled(_before_attention)(
            x, self.norm1, self.q, self.k, self.v, *angles, self._size, self._eps
        )
        attended = attend(causal, parts, rows, length)
        out: Tensor = compiled(_after_attention)(
            x, attended, self.o, self.norm2, self.gate, self.up, self.down, self._eps
        )
        return out


def orthogonal(update: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrices to a stack of them (..., m, n), by five Newton-Schulz steps in bf16."""
    x = update.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (Jordan et al. 2024); parameters of one shape go through it
    together, and the last two dimensions of each are its matrices.
    """

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
                update *= max(1.0, shape[-2] / shape[-1]) ** 0.5 * group["lr"]
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                for parameter, change in zip(parameters, update, strict=True):
                    parameter.sub_(change)

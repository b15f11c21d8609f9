"""Tiny random models to gate, attention inputs, and the dense attention that says what both must give."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from duohead.identify.assembly import Sample
from duohead.identify.banded import Scores
from duohead.identify.gates import Gates
from duohead.mask import visible

SINK, RECENT = 4, 8
# Transformers' eager attention computes its softmax in fp32, also in an fp64 model.
EAGER = 1e-5


def tiny(family: str = "llama", **changes: Any) -> Any:
    """A random fp64 model of two layers or more, 4 query heads, 2 KV heads, head size 8."""
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 4096,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        **changes,
    }
    config = getattr(transformers, f"{family}Config")(**sizes)
    return getattr(transformers, f"{family}ForCausalLM")(config).double()


def llama(**changes: Any) -> Any:
    """A tiny Llama that is fp64 throughout; transformers' own norm computes in fp32."""
    model = tiny("Llama", **changes)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = nn.RMSNorm(32, eps=child.variance_epsilon, dtype=torch.float64)
                setattr(module, name, norm)
    return model


def sample(
    length: int = 48, *, answers: tuple[tuple[int, int], ...] = ((36, 40), (44, 48))
) -> Sample:
    generator = torch.Generator().manual_seed(1)
    return Sample(torch.randint(1, 64, (length,), generator=generator), answers)


def gates_of(model: Any, **options: Any) -> Gates:
    gates = Gates.of(model, sink=SINK, recent=RECENT, **options)
    gates.values = nn.Parameter(gates.values.detach().double())
    return gates


def inputs(
    length: int, *, heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, count, length, 8) for count in (heads, kv_heads, kv_heads)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scores: Scores) -> Tensor:
    """The oracle: attention written out under a dense mask."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scaling = q.shape[-1] ** -0.5 if scores.scaling is None else scores.scaling
    logits = torch.einsum("bhqd,bhkd->bhqk", q, k) * scaling
    if scores.softcap is not None:
        logits = scores.softcap * torch.tanh(logits / scores.softcap)
    weights = torch.where(seen, logits, -torch.inf).exp()
    total = weights.sum(-1, keepdim=True)
    if scores.sinks is not None:
        total = total + scores.sinks.exp()[None, :, None, None]
    return torch.einsum("bhqk,bhkd->bhqd", weights / total, v)


def seen_by(length: int, *, sink: int, recent: int, retrieval: bool = False) -> Tensor:
    position = torch.arange(length)
    return visible(position[:, None], position[None], retrieval=retrieval, sink=sink, recent=recent)

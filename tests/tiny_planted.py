"""A model with a planted retrieval head: two layers, made by hand, in which one KV head alone looks things up.

Layer 0 has a head that brings every token the one before it; in layer 1 an induction head looks for tokens whose
predecessor is the present one and copies them. All other heads look at a few tokens close by. The residual holds the
token, its predecessor, what was copied, and a constant that gives queries and keys a direction of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

WIDTH, HEADS, LAYERS, HEAD_DIM = 32, 4, 2, 64
RETRIEVAL = (1, 2)
VOCAB = 400
# Rotary frequencies fall from 1 to 1e-8; the slow half does not turn within the texts of the tests.
THETA = 1e8
_TOKEN, _BEFORE, _COPIED, _ONE = (slice(i * WIDTH, (i + 1) * WIDTH) for i in range(4))


def planted(*, groups: int = 1, positions: int = 2048) -> Any:
    """The model, in fp32; with ``groups`` query heads per KV head, of which the first does what is planted."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=4 * WIDTH,
        intermediate_size=8,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS * groups,
        num_key_value_heads=HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=positions,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=False,
        rms_norm_eps=1e-6,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1)
        signs = torch.randint(0, 2, (VOCAB, WIDTH)).float() * 2 - 1
        model.model.embed_tokens.weight[:, _TOKEN] = signs
        model.model.embed_tokens.weight[:, _ONE] = 1
        model.lm_head.weight[:, _COPIED] = signs
        for layer in range(LAYERS):
            for head in range(HEADS):
                for query in range(groups):
                    _local(model, layer, head, head * groups + query, distance=1 + 2 * head)
        _output(model, 0, 0, 0, source=_TOKEN, target=_BEFORE)
        _lookup(model, *RETRIEVAL, RETRIEVAL[1] * groups)
        _output(model, *RETRIEVAL, RETRIEVAL[1] * groups, source=_TOKEN, target=_COPIED)
    return model


def _rows(head: int) -> slice:
    return slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)


def _local(model: Any, layer: int, kv_head: int, head: int, *, distance: int) -> None:
    """A head that looks ``distance`` tokens back, whatever the tokens are."""
    attention = model.model.layers[layer].self_attn
    half = HEAD_DIM // 2
    speed = THETA ** (-torch.arange(half).double() / half)
    fast = (speed > 1e-3).float() * 2.5
    key = torch.cat([fast, torch.zeros(half)])
    # The query that meets this key best when it has been turned by the distance.
    angle = -speed.float() * distance
    query = torch.cat([fast * angle.cos(), fast * angle.sin()])
    attention.q_proj.weight[_rows(head), _ONE] = query[:, None] / WIDTH
    attention.k_proj.weight[_rows(kv_head), _ONE] = key[:, None] / WIDTH


def _lookup(model: Any, layer: int, kv_head: int, head: int) -> None:
    """A head that looks for tokens whose predecessor is the present token."""
    attention = model.model.layers[layer].self_attn
    attention.q_proj.weight[_rows(head)] = 0
    attention.k_proj.weight[_rows(kv_head)] = 0
    slow = torch.arange(WIDTH // 2) + WIDTH // 2
    slow = torch.cat([slow, slow + HEAD_DIM // 2])
    places = torch.arange(WIDTH)
    attention.q_proj.weight[head * HEAD_DIM + slow, _TOKEN.start + places] = 2.0
    attention.k_proj.weight[kv_head * HEAD_DIM + slow, _BEFORE.start + places] = 1.0


def _output(
    model: Any, layer: int, kv_head: int, head: int, *, source: slice, target: slice
) -> None:
    """What a head finds in ``source`` of a token it writes into ``target`` of the one that looks."""
    attention = model.model.layers[layer].self_attn
    places = torch.arange(WIDTH)
    attention.v_proj.weight[kv_head * HEAD_DIM + places, source.start + places] = 1.0
    attention.o_proj.weight[target.start + places, head * HEAD_DIM + places] = 1.0


def order(alpha: Any) -> list[tuple[int, int]]:
    """(layer, head) from the highest alpha down."""
    flat = torch.tensor(alpha).flatten().argsort(descending=True, stable=True)
    return [divmod(int(place), HEADS) for place in flat]


def random_tokens(count: int, *, seed: int = 0) -> Tensor:
    return torch.randint(2, VOCAB, (count,), generator=torch.Generator().manual_seed(seed))

"""How many tokens fit on a card, from shapes alone, before anything is allocated.

Memory holds the weights, the cache (`HeadPolicy.kv_bytes` counts it to the byte), the activations of the longest
forward, and what the runtime keeps for itself; `estimate(config, policy, memory_bytes=...)` adds these up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from duohead.bench.models import estimated_weight_bytes
from duohead.models.engine import REHEARSAL
from duohead.policy import HeadPolicy

# The CUDA context, loaded kernels, libraries' workspaces and captured graphs.
RUNTIME_BYTES = 768 * 2**20
MOST_TOKENS = 1 << 40


@dataclass(frozen=True)
class Estimate:
    """What fills a card, in bytes, and the tokens that its cache holds."""

    tokens: int
    memory_bytes: int
    weight_bytes: int
    kv_bytes: int
    activation_bytes: int
    runtime_bytes: int = RUNTIME_BYTES


def estimate(
    made: Any,
    policy: HeadPolicy,
    *,
    memory_bytes: int,
    weights: str = "bf16",
    chunk: int = 1,
    batch: int = 1,
) -> Estimate:
    """Tokens that fit beside everything else.

    Args:
        made: transformers config of the model.
        policy: which heads keep what; bound to the model here.
        memory_bytes: memory of the card.
        weights: "bf16", "int8" or "int4".
        chunk: tokens per forward; 1 for decoding alone.
        batch: rows.

    Raises:
        ValueError: not even the weights fit.
    """
    whole = estimated_weight_bytes(made, weights)
    acts = activation_bytes(made, chunk=chunk, batch=batch, weights=weights)
    free = memory_bytes - whole - acts - RUNTIME_BYTES
    bound = policy.bind(made, dtype=policy.native_dtype)
    tokens = tokens_within(bound, free, batch=batch)
    if tokens < 1:
        raise ValueError(
            f"--memory must exceed weights, activations and runtime ({gib(whole + acts + RUNTIME_BYTES)}), got "
            f"{gib(memory_bytes)}; use smaller weights or a smaller chunk"
        )
    return Estimate(tokens, memory_bytes, whole, bound.kv_bytes(tokens, batch), acts)


def tokens_within(policy: HeadPolicy, free_bytes: int, *, batch: int = 1) -> int:
    """The most tokens whose cache takes at most ``free_bytes``, for a policy that is bound to a model.

    A policy that no length fills (no retrieval heads) gives MOST_TOKENS.
    """
    low, high = 0, MOST_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        if policy.kv_bytes(middle, batch) <= free_bytes:
            low = middle
        else:
            high = middle - 1
    return low


def activation_bytes(made: Any, *, chunk: int, batch: int = 1, weights: str = "bf16") -> int:
    """Bytes that a forward of ``chunk`` tokens takes at its peak, beside weights and cache.

    The feed-forward is the widest place: its two inner products, their product and the residual stream in 16 bits. The
    last position alone goes through the vocabulary, in fp32 too. Quantised weights are decoded one layer at a time.
    """
    text = made.get_text_config(decoder=True)
    rows = max(chunk * batch, REHEARSAL)
    wide = rows * (3 * text.intermediate_size + 4 * text.hidden_size) * 2
    logits = batch * text.vocab_size * (2 + 4 + 4)
    decoded = 0 if weights == "bf16" else text.vocab_size * text.hidden_size * 2
    return wide + logits + decoded


def device_memory(device: torch.device) -> int:
    """Bytes of memory of a GPU, or of this machine for the CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    import os

    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def gib(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB"

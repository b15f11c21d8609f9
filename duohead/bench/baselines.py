"""What else computes attention here: the competitors that every number of ours is held against, in the same process.

Each takes plain keys and values of every head and attends fully and causally; FlexAttention alone also knows the mask
of streaming heads. A name is a promise: `sdpa-flash` runs PyTorch's FlashAttention or says why it cannot.

Shape letters: B rows, H query heads, G KV heads, Q query tokens, K key tokens, D head size.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

SDPA_BACKENDS = {
    "sdpa-flash": "FLASH_ATTENTION",
    "sdpa-cudnn": "CUDNN_ATTENTION",
    "sdpa-efficient": "EFFICIENT_ATTENTION",
    "sdpa-math": "MATH",
}
FLEX_BLOCK = 128
NAMES = ("sdpa", *SDPA_BACKENDS, "flex", "fa4")


class Unavailable(ValueError):
    """A baseline or an implementation that cannot run this case here; the text says why."""


def check_baselines(names: list[str]) -> None:
    """Raise ValueError unless every name is a known baseline."""
    for name in names:
        if name not in NAMES:
            raise ValueError(f"--baselines must be among {', '.join(NAMES)}, got {name!r}")


def attend(
    name: str,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    window: tuple[int, int] | None = None,
) -> Tensor:
    """Attention of the last Q of K tokens.

    Args:
        name: one of NAMES.
        query: [B, H, Q, D]; query head h belongs to KV head h // (H / G).
        keys: [B, G, K, D].
        values: [B, G, K, D].
        scale: factor on the scores.
        window: (sink, recent) of streaming heads, for "flex"; None for full attention.

    Returns:
        [B, H, Q, D].

    Raises:
        Unavailable: the library is missing or refuses this case.
    """
    try:
        if name == "flex":
            return _flex(query, keys, values, scale=scale, window=window)
        if window is not None:
            raise Unavailable(f"{name} knows no mask of streaming heads")
        if name == "fa4":
            return _fa4(query, keys, values, scale=scale)
        return _sdpa(name, query, keys, values, scale=scale)
    except (torch.OutOfMemoryError, Unavailable):
        raise
    except Exception as error:  # each library has its own ways to refuse
        reason = " ".join(str(error).split())[:200]
        raise Unavailable(f"{type(error).__name__}: {reason}") from error


def _sdpa(name: str, query: Tensor, keys: Tensor, values: Tensor, *, scale: float) -> Tensor:
    causal = query.shape[2] > 1
    if causal and query.shape[2] != keys.shape[2]:
        raise Unavailable(f"{name} has no causal mask for queries that follow a past")

    def call() -> Tensor:
        return F.scaled_dot_product_attention(
            query, keys, values, is_causal=causal, scale=scale, enable_gqa=True
        )

    if name == "sdpa":
        return call()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, SDPA_BACKENDS[name])), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each backend that is switched off warns once
        return call()


def _fa4(query: Tensor, keys: Tensor, values: Tensor, *, scale: float) -> Tensor:
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError as error:
        raise Unavailable(
            f"flash-attn-4 is not installed; pip install 'duohead[cuda]' ({error})"
        ) from error
    inputs = (x.transpose(1, 2) for x in (query, keys, values))
    out = flash_attn_func(*inputs, softmax_scale=scale, causal=query.shape[2] > 1)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def _flex(
    query: Tensor, keys: Tensor, values: Tensor, *, scale: float, window: tuple[int, int] | None
) -> Tensor:
    if query.shape[2] == 1:
        return _compiled_flex()(query, keys, values, scale=scale, enable_gqa=True)
    mask = _block_mask(query.shape[2], keys.shape[2], window, str(query.device))
    return _compiled_flex()(query, keys, values, block_mask=mask, scale=scale, enable_gqa=True)


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@functools.lru_cache(maxsize=4)
def _block_mask(queries: int, keys: int, window: tuple[int, int] | None, device: str) -> Any:
    """Which blocks of keys each block of queries visits, computed from block borders alone.

    PyTorch's own function evaluates every pair of tokens, which takes half a minute of compilation at 128K.
    """
    from torch.nn.attention.flex_attention import BlockMask

    past = keys - queries
    sink, recent = window or (keys, keys)

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if window is None:
            return k <= q + past
        return (k <= q + past) & ((k < sink) | (q + past - k < recent))

    first = torch.arange(0, queries, FLEX_BLOCK, device=device)[:, None] + past
    last = (first + FLEX_BLOCK - 1).clamp(max=keys - 1)
    left = torch.arange(0, keys, FLEX_BLOCK, device=device)[None, :]
    right = left + FLEX_BLOCK - 1
    some = (left <= last) & ((left < sink) | (first - right < recent))
    whole = (right <= first) & ((right < sink) | (last - left < recent))
    return BlockMask.from_kv_blocks(
        *_block_table(some & ~whole),
        *_block_table(whole),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=seen,
        seq_lengths=(queries, keys),
    )


def _block_table(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Number of chosen blocks in each row and their indices, those first, as FlexAttention wants them."""
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1).int()[None, None], order.int()[None, None].contiguous()

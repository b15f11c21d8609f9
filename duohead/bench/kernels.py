"""Streaming prefill against dense causal attention: same process, same inputs, after the oracle has passed.

Streaming heads cost time in proportion to the length, dense causal attention to its square; this measures both where
the reader is and refuses to report a speed for a wrong result. Run `duohead bench kernels --lengths 4096 16384`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from duohead import attention
from duohead.bench.timing import Timing, measure
from duohead.cache.direct import direct_views
from duohead.mask import visible
from duohead.policy import HeadPolicy

CHECKED_QUERIES = 64


@dataclass(frozen=True)
class PrefillShape:
    """One attention call of one layer, all heads streaming; sizes in tokens, heads and numbers per head."""

    length: int
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    batch: int = 1
    sink: int = 64
    recent: int = 256


@dataclass(frozen=True)
class PrefillResult:
    """Times of both, how many times faster the streaming one is, its error, and the budget that the error kept."""

    shape: PrefillShape
    streaming: Timing
    causal: Timing
    speedup: float
    error: float
    budget: float

    def numbers(self) -> dict[str, Any]:
        """For a record: every number with its unit in the name."""
        named = {f"streaming_{key}": value for key, value in asdict(self.streaming).items()}
        named |= {f"causal_sdpa_{key}": value for key, value in asdict(self.causal).items()}
        threads = torch.get_num_threads()
        return {
            **named,
            "speedup": self.speedup,
            "error": self.error,
            "error_budget": self.budget,
            "threads": threads,
        }


def streaming_prefill(
    shape: PrefillShape,
    *,
    device: torch.device,
    dtype: torch.dtype,
    impl: str = "auto",
    seconds: float = 2.0,
) -> PrefillResult:
    """Measure one shape.

    Raises:
        ValueError: the result is off by more than the error budget, so its speed is not worth reporting.
    """
    generator = torch.Generator(device=device).manual_seed(0)

    def random(heads: int) -> Tensor:
        size = (shape.batch, heads, shape.length, shape.head_dim)
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    query, keys, values = random(shape.heads), random(shape.kv_heads), random(shape.kv_heads)
    policy = HeadPolicy.from_heads(
        retrieval=[[]], num_kv_heads=shape.kv_heads, sink=shape.sink, recent=shape.recent
    )
    scale = shape.head_dim**-0.5

    def streaming() -> Tensor:
        views = direct_views(policy, 0, keys, values, queries=shape.length, mask=None)
        return attention.prefill(query, views, scale=scale, impl=impl)

    def causal() -> Tensor:
        return F.scaled_dot_product_attention(
            query, keys, values, is_causal=True, scale=scale, enable_gqa=True
        )

    with torch.no_grad():
        error, budget = _error(streaming(), query, keys, values, policy)
        if not error <= budget:
            raise ValueError(
                f"streaming prefill is off by {error:.3g}, more than {budget:.3g}; no speed is reported"
            )
        fast, dense = (
            measure(call, device=device, seconds=seconds) for call in (streaming, causal)
        )
    return PrefillResult(shape, fast, dense, dense.median_ms / fast.median_ms, error, budget)


def _error(
    found: Tensor, query: Tensor, keys: Tensor, values: Tensor, policy: HeadPolicy
) -> tuple[float, float]:
    """Largest error against fp64 on evenly spaced queries, and the budget: twice that of eager code in this dtype."""
    length = query.shape[2]
    rows = torch.linspace(0, length - 1, min(CHECKED_QUERIES, length), device=query.device).long()
    mask = visible(
        rows[:, None],
        torch.arange(length, device=query.device)[None, :],
        retrieval=False,
        sink=policy.sink,
        recent=policy.recent,
    )

    def eager(dtype: torch.dtype) -> Tensor:
        repeats = query.shape[1] // keys.shape[1]
        key, value = (x.to(dtype).repeat_interleave(repeats, dim=1) for x in (keys, values))
        scores = query[:, :, rows].to(dtype) @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        return scores.masked_fill(~mask, -torch.inf).softmax(-1).to(dtype) @ value

    exact = eager(torch.float64)
    ours = (found.transpose(1, 2)[:, :, rows].double() - exact).abs().max()
    theirs = (eager(query.dtype).double() - exact).abs().max()
    band = torch.finfo(query.dtype).eps * exact.abs().max()
    return float(ours), float(2 * (theirs + band))

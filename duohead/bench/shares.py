"""What the streaming heads cost in a prefill: their part of the attention time of one layer, chunk by chunk.

Each kind of head is timed on its own, on the very views that attention gets in a chunked prefill, so that the part is
measured and not derived. Use `attention_share(case, place, chunk=32768)`.

Shape letters: B rows, H query heads, G KV heads, Q query tokens, D head size.
"""

from __future__ import annotations

import functools
import gc
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from duohead import attention
from duohead.bench.cases import Case
from duohead.bench.check import Truth, sampled
from duohead.bench.chosen import kernel_name
from duohead.bench.kernels import CHECKED_QUERIES, Place, case_inputs
from duohead.bench.timing import measure
from duohead.cache.view import HeadView


@dataclass(frozen=True)
class Share:
    """Milliseconds of attention of each kind of head in all chunks of one layer, and the check of the results.

    ``kernels`` names those that attended, by kind of head.
    """

    streaming_ms: float
    retrieval_ms: float
    error: float
    budget: float
    kernels: str = ""

    @property
    def share(self) -> float:
        """Streaming heads' part of the attention time."""
        return self.streaming_ms / (self.streaming_ms + self.retrieval_ms)

    def numbers(self) -> dict[str, Any]:
        """For a record."""
        return {
            "streaming_attention_ms": self.streaming_ms,
            "retrieval_attention_ms": self.retrieval_ms,
            "streaming_share": self.share,
            "error": self.error,
            "error_budget": self.budget,
            "kernels": self.kernels,
        }


@torch.no_grad()
def attention_share(case: Case, place: Place, *, chunk: int, impl: str = "auto") -> Share:
    """Time both kinds of heads in a prefill of ``case.length`` tokens, ``chunk`` at a time.

    Raises:
        ValueError: a chunk below 1, or a result that is off by more than the error budget.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    times = {True: 0.0, False: 0.0}
    worst = (0.0, 1.0)
    kernels: dict[str, None] = {}
    for start in range(0, case.length, chunk):
        part = replace(case, op="prefill", length=min(start + chunk, case.length), past=start)
        query, views, _ = case_inputs(part, place, 0)
        for view in views:
            own, alone = _alone(query, view, case.kv_heads)
            worst = max(worst, _checked(own, alone, part, impl), key=lambda pair: pair[0] / pair[1])
            call = functools.partial(
                attention.prefill, own, [alone], scale=case.head_dim**-0.5, impl=impl
            )
            timing = measure(call, device=place.device, seconds=place.seconds)
            times[view.retrieval] += timing.median_ms
            kind = "retrieval" if view.retrieval else "streaming"
            kernels[f"{kind} {kernel_name(own, alone, impl)}"] = None
        del query, views, own, alone
        gc.collect()
    return Share(times[False], times[True], *worst, ", ".join(sorted(kernels)))


def _alone(query: Tensor, view: HeadView, kv_heads: int) -> tuple[Tensor, HeadView]:
    """The queries [B, h, Q, D] of a view's heads, and the view as if there were no others."""
    if view.heads is None:
        return query, view
    own = query.unflatten(1, (kv_heads, -1)).index_select(1, view.heads).flatten(1, 2)
    return own, replace(view, heads=None)


def _checked(query: Tensor, view: HeadView, case: Case, impl: str) -> tuple[float, float]:
    scale = case.head_dim**-0.5
    rows = sampled(query.shape[2], most=CHECKED_QUERIES, device=query.device)
    found = attention.prefill(query, [view], scale=scale, impl=impl)[:, rows]
    error, budget = Truth.of(query, [view], rows, scale=scale).verdict(found)
    if not error <= budget:
        raise ValueError(
            f"prefill at {case.length} tokens is off by {error:.3g}, more than {budget:.3g}; no speed is reported"
        )
    return error, budget

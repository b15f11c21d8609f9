"""The truth that attention is measured against: dense masks and fp64, in plain sight.

`sees` is the definition of what a head sees, for one query and one key, as a person would write it. `dense` is
attention with a mask in any dtype; in fp64 it is the oracle. Every output row of a head has an error budget of its own,
derived in docs/numerics.md, and it is the one that benchmarks have to keep (`duohead.bench.check.allowed_error`).

Shape letters: B rows, H query heads, G KV heads, Q query tokens, K key tokens, D head size.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from duohead import attention, codec
from duohead.bench.check import WIDE_BOUND, Attended, allowed_error, verdict
from duohead.cache import DuoLayer
from duohead.cache.direct import direct_views
from duohead.mask import visible
from duohead.policy import HeadPolicy

# Largest error in units of the largest value, for comparisons that have no oracle of their own.
FIXED_BOUND = WIDE_BOUND


def sees(
    query: int,
    key: int,
    *,
    retrieval: bool,
    sink: int,
    recent: int,
    window: int | None = None,
    chunk_start: int | None = None,
) -> bool:
    """Whether the query at position ``query`` sees the key at position ``key`` (negative: padding)."""
    if key < 0 or key > query:
        return False
    if window is not None and query - key >= window:
        return False
    if retrieval or key < sink:
        return True
    if chunk_start is not None:
        return key >= chunk_start - recent
    return query - key < recent


def policy_mask(
    policy: HeadPolicy,
    index: int,
    query: Tensor,
    key: Tensor,
    *,
    recent: int | None = None,
    chunk_start: Tensor | None = None,
) -> Tensor:
    """Mask [B, G, Q, K] of a layer for positions ``query`` [B, Q] and ``key`` [B, K]; padding queries see all."""
    layer = policy.layers[index]
    retrieval = torch.zeros(layer.num_kv_heads, 1, 1, dtype=torch.bool)
    retrieval[list(layer.retrieval if policy.evict else range(layer.num_kv_heads))] = True
    start = None if chunk_start is None else chunk_start[:, None, :, None]
    seen = visible(
        query[:, None, :, None], key[:, None, None, :], retrieval=retrieval, sink=policy.sink,
        recent=policy.recent if recent is None else recent, window=layer.window, chunk_start=start,
    )  # fmt: skip
    return seen | (query < 0)[:, None, :, None]


def weighed(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Weights [B, H, Q, K] in ``dtype`` under a mask [B, G or H, Q, K], and values [B, H, K, Dv] to go with them."""
    heads = query.shape[1]
    keys, values, mask = (x.repeat_interleave(heads // x.shape[1], 1) for x in (keys, values, mask))
    scores = query.to(dtype) @ keys.to(dtype).transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sink_logits is not None:
        extra = sink_logits.to(dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, extra], -1)
    return scores.softmax(-1)[..., : keys.shape[2]], values.to(dtype)


def dense(*tensors: Tensor, **options: object) -> Tensor:
    """Attention [B, Q, H, Dv] of query [B, H, Q, D], keys, values and a mask, as `weighed` takes them."""
    weights, values = weighed(*tensors, **options)  # type: ignore[arg-type]
    return (weights @ values).transpose(1, 2)


def assert_within_budget(
    got: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    real: Tensor | None = None,
    **options: object,
) -> None:
    """Hold ``got`` [B, Q, H, Dv] against the oracle; ``real`` [B, Q] says which queries are no padding."""
    truth = Attended.of(*weighed(query, keys, values, mask, **options))  # type: ignore[arg-type]
    eager = dense(query, keys, values, mask, dtype=query.dtype, **options)
    allowed = allowed_error(truth, eager, query.dtype)
    exact = truth.out
    if real is not None:
        assert got.isfinite().all()
        got, exact, allowed = got[real], exact[real], allowed[real]
    error, budget = verdict(got, exact, allowed)
    # NaN fails as well.
    assert error <= budget, f"error {error:.3g} is beyond the budget of its row, {budget:.3g}"


@dataclass(frozen=True)
class Inputs:
    """Random tensors of one attention call: query [B, H, T, D], keys [B, G, T, D], values [B, G, T, Dv]."""

    query: Tensor
    keys: Tensor
    values: Tensor
    padding: tuple[int, ...] | None = None

    @property
    def mask(self) -> Tensor | None:
        """2-D padding mask [B, T], as tokenizers make it, or None."""
        if self.padding is None:
            return None
        return torch.arange(self.query.shape[2])[None, :] >= torch.tensor(self.padding)[:, None]

    @property
    def position(self) -> Tensor:
        """[B, T], -1 for padding."""
        rows, count = self.query.shape[0], self.query.shape[2]
        padding = torch.tensor(self.padding or (0,) * rows)
        return (torch.arange(count)[None, :] - padding[:, None]).clamp(min=-1)

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same numbers in another dtype."""
        return replace(
            self, query=self.query.to(dtype), keys=self.keys.to(dtype), values=self.values.to(dtype)
        )


def inputs(
    length: int,
    *,
    kv_heads: int,
    groups: int = 1,
    dim: int = 64,
    value_dim: int | None = None,
    batch: int = 1,
    padding: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Inputs:
    """Seeded normal inputs in ``dtype``."""
    make = torch.Generator().manual_seed(seed)
    batch = batch if padding is None else len(padding)

    def normal(heads: int, width: int) -> Tensor:
        return torch.randn(batch, heads, length, width, generator=make).to(dtype)

    return Inputs(
        normal(kv_heads * groups, dim), normal(kv_heads, dim), normal(kv_heads, value_dim or dim),
        None if padding is None else tuple(padding),
    )  # fmt: skip


def through_cache(
    policy: HeadPolicy,
    x: Inputs,
    chunks: Sequence[int],
    *,
    index: int = 0,
    max_length: int | None = None,
    impl: str = "tiled",
    layer: DuoLayer | None = None,
    start: int = 0,
    **options: object,
) -> Tensor:
    """Outputs [B, T, H, Dv] of feeding ``x`` chunk by chunk through one cache layer."""
    layer = layer or DuoLayer(policy, index, max_length=max_length)
    options.setdefault("scale", x.query.shape[-1] ** -0.5)
    outs = []
    for count in chunks:
        part = slice(start, start + count)
        handle, _ = layer.update(x.keys[:, :, part], x.values[:, :, part])
        mask = None if x.mask is None else x.mask[:, : start + count]
        views = handle.open(mask)
        outs.append(attention.prefill(x.query[:, :, part], views, impl=impl, **options))  # type: ignore[arg-type]
        handle.commit()
        start += count
    return torch.cat(outs, dim=1)


def without_cache(
    policy: HeadPolicy, x: Inputs, *, index: int = 0, impl: str = "tiled", **options: object
) -> Tensor:
    """Outputs [B, T, H, Dv] of one forward over plain tensors."""
    options.setdefault("scale", x.query.shape[-1] ** -0.5)
    views = direct_views(policy, index, x.keys, x.values, queries=x.query.shape[2], mask=x.mask)
    return attention.prefill(x.query, views, impl=impl, **options)  # type: ignore[arg-type]


def split(length: int, chunk: int | None) -> list[int]:
    """Chunk sizes that sum to ``length``; None means one chunk."""
    if chunk is None:
        return [length]
    return [min(chunk, length - start) for start in range(0, length, chunk)]


def make_policy(kind: str, kv_heads: int, *, seed: int = 0, **fields: object) -> HeadPolicy:
    """One layer with no, all, every other or some random retrieval heads."""
    heads = range(kv_heads)
    chosen = {
        "none": [],
        "all": list(heads),
        "alternating": list(heads)[::2],
        "random": random.Random(seed).sample(heads, max(1, kv_heads // 3)),
    }[kind]
    return HeadPolicy.from_heads(retrieval=[chosen], num_kv_heads=kv_heads, **fields)


def stored(policy: HeadPolicy, x: Inputs) -> Inputs:
    """The inputs as attention sees them: every head's keys and values after its storage."""
    keys, values = x.keys.clone(), x.values.clone()
    for spec in policy.stores(0):
        storage = codec.pair(spec.dtype, native=keys.dtype)
        for head in spec.heads:
            keys[:, head], values[:, head] = storage.round_trip(keys[:, head], values[:, head])
    return replace(x, keys=keys, values=values)


def hold(
    got, policy: HeadPolicy, x: Inputs, *, recent=None, queries: slice = slice(None), **options
) -> None:
    """Hold outputs for ``queries`` of ``x`` against the oracle."""
    options.setdefault("scale", x.query.shape[-1] ** -0.5)
    position = x.position
    mask = policy_mask(policy, 0, position[:, queries], position, recent=recent)
    seen = stored(policy, x)
    assert_within_budget(
        got, x.query[:, :, queries], seen.keys, seen.values, mask, real=position[:, queries] >= 0, **options
    )  # fmt: skip

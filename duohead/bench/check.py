"""The oracle of the benchmarks: dense attention in fp64 over the very views that an implementation got.

A speed is reported only for a result that keeps the error budget, which every output row of a head has of its own: late
rows of a long text are averages of many values and small, and a budget for all rows would not see what they miss.
`Truth.of(...).verdict(found)` says how far the worst row is off and what it was allowed; docs/numerics.md derives the
rule, and the tests use it.

Shape letters: B rows, H query heads, G KV heads, Q query tokens, R of them looked at, K key tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from duohead.cache.view import HeadView

# Roundings of fp32 and fp64 that an output may be off by, in units of its terms' magnitudes; docs/numerics.md.
WIDE_BOUND = {torch.float32: 4e-6, torch.float64: 1e-13}
# Roundings by which the 2-norm of its terms is off in 16 bits, typically.
TYPICAL_ROUNDINGS = 2.0


@dataclass(frozen=True)
class Attended:
    """What dense attention gave, and how large the terms are that each of its rows is a sum of.

    Attributes:
        out: [B, R, H, Dv].
        mass: [B, R, H], over the channels of a row the largest sum of abs(p v), p being a key's weight.
        spread: [B, R, H], the same of the root of the sum of (p v)^2.
    """

    out: Tensor
    mass: Tensor
    spread: Tensor

    @classmethod
    def of(cls, weights: Tensor, values: Tensor) -> Attended:
        """From weights [B, H, R, K] and values [B, H, K, Dv], or [B, 1, K, Dv] for all heads."""
        return cls(
            (weights @ values).transpose(1, 2),
            (weights @ values.abs()).amax(-1).transpose(1, 2),
            (weights.square() @ values.square()).amax(-1).sqrt().transpose(1, 2),
        )


def sampled(queries: int, *, most: int, device: torch.device) -> Tensor:
    """Evenly spaced query indices, the first and the last among them."""
    return torch.linspace(0, queries - 1, min(most, queries), device=device).long()


def dense(
    query: Tensor, views: Sequence[HeadView], rows: Tensor, *, scale: float, dtype: torch.dtype
) -> Tensor:
    """Attention of the queries ``rows`` [R] of query [B, H, Q, D] in ``dtype``; returns [B, R, H, Dv]."""
    outs = {
        head: weights @ values
        for head, weights, values in _weighed(query, views, rows, scale=scale, dtype=dtype)
    }
    return torch.cat([outs[head] for head in sorted(outs)], dim=1).transpose(1, 2)


def attended(query: Tensor, views: Sequence[HeadView], rows: Tensor, *, scale: float) -> Attended:
    """The same in fp64, with the size of what each row is a sum of."""
    found = {
        head: Attended.of(weights, values)
        for head, weights, values in _weighed(query, views, rows, scale=scale, dtype=torch.float64)
    }
    whole = [found[head] for head in sorted(found)]
    return Attended(
        torch.cat([one.out for one in whole], dim=2),
        torch.cat([one.mass for one in whole], dim=2),
        torch.cat([one.spread for one in whole], dim=2),
    )


def _weighed(
    query: Tensor, views: Sequence[HeadView], rows: Tensor, *, scale: float, dtype: torch.dtype
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """KV head, the weights [B, H / G, R, K] of its queries, and its values [B, 1, K, Dv]; one head at a time."""
    groups = sum(view.keys.shape[1] for view in views)
    asked = query[:, :, rows].unflatten(1, (groups, -1)).to(dtype)
    for view in views:
        pieces = [
            (keys, values, view.mask(view.query_position[:, rows], position, sinks=sinks))
            for keys, values, position, sinks in view.reads(0, query.shape[2])
        ]
        keys, values = (torch.cat([piece[part] for piece in pieces], dim=2) for part in (0, 1))
        batch = query.shape[0]
        mask = torch.cat([piece[2].expand(batch, -1, -1, -1) for piece in pieces], dim=-1)
        heads = range(groups) if view.heads is None else view.heads.tolist()
        for place, head in enumerate(heads):
            key, value = keys[:, None, place].to(dtype), values[:, None, place].to(dtype)
            scores = asked[:, head] @ key.transpose(-1, -2) * scale
            yield head, scores.masked_fill(~mask, -torch.inf).softmax(-1).to(dtype), value


def allowed_error(exact: Attended, eager: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The error budget of every row [B, R, H] of results in ``dtype``; docs/numerics.md derives it.

    Args:
        exact: the truth, in fp64.
        eager: [B, R, H, Dv], the same dense code in ``dtype``; not looked at in fp32 and wider.
        dtype: what the implementation computed in.

    Raises:
        ValueError: no ``eager`` for a 16-bit dtype.
    """
    if dtype in WIDE_BOUND:
        return WIDE_BOUND[dtype] * exact.mass
    if eager is None:
        raise ValueError(f"eager must hold the dense result in {dtype}, got None")
    eps = torch.finfo(dtype).eps
    theirs = (eager.double() - exact.out).abs().amax(-1)
    # A row may be lucky, but none has to be better than the eager code is at its worst.
    typical = (TYPICAL_ROUNDINGS * eps / 2 * exact.spread).clamp(max=theirs.max())
    return 2 * (torch.maximum(theirs, typical) + eps * exact.out.abs().amax(-1))


def verdict(found: Tensor, exact: Tensor, allowed: Tensor) -> tuple[float, float]:
    """Error and budget of the row that is worst for its budget; NaN, if there is one, is the worst.

    Args:
        found: [..., Dv], what is judged.
        exact: the same in fp64.
        allowed: [...], see `allowed_error`.
    """
    error = (found.double() - exact).abs().amax(-1)
    # Rows of zeros are allowed nothing and may be off by nothing.
    ratio = error / allowed.double().clamp(min=torch.finfo(torch.float64).tiny)
    worst = int(ratio.nan_to_num(nan=torch.inf).argmax())
    return float(error.flatten()[worst]), float(allowed.flatten()[worst])


@dataclass(frozen=True)
class Truth:
    """What some queries of a call have to give: exact [B, R, H, Dv] in fp64, allowed error [B, R, H]."""

    exact: Tensor
    allowed: Tensor

    @classmethod
    def of(cls, query: Tensor, views: Sequence[HeadView], rows: Tensor, *, scale: float) -> Truth:
        """For the queries ``rows`` [R] of query [B, H, Q, D], in the dtype of the query."""
        exact = attended(query, views, rows, scale=scale)
        wide = query.dtype in WIDE_BOUND
        eager = None if wide else dense(query, views, rows, scale=scale, dtype=query.dtype)
        return cls(exact.out, allowed_error(exact, eager, query.dtype))

    def verdict(self, found: Tensor) -> tuple[float, float]:
        """Error and budget of the row of found [B, R, H, Dv] that is worst for its budget."""
        return verdict(found, self.exact, self.allowed)

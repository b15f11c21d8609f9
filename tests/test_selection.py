"""Which heads keep everything: exact counts, a total order, and budgets that are met as closely as possible."""

import random

import numpy as np
import pytest

from duohead.pattern import HeadPattern
from duohead.selection import rank_heads, select_heads

NAN = float("nan")


def gates(layers: int, heads: int, seed: int = 0, *, ties: bool = False) -> np.ndarray:
    values = np.random.default_rng(seed).random((layers, heads)).astype(np.float32)
    return np.round(values * 2) / 2 if ties else values


def count(heads) -> int:
    return sum(len(row) for row in heads)


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_a_ratio_gives_exactly_its_count_rounded_half_up(ties) -> None:
    alpha = gates(5, 7, ties=ties)
    for step in range(0, 1001):
        ratio = step / 1000
        assert count(select_heads(alpha, retrieval_ratio=ratio)) == int(ratio * 35 + 0.5)


def test_the_order_is_alpha_descending_then_layer_then_head() -> None:
    alpha = [[0.5, 1.0, 0.5], [1.0, 0.25, 1.0]]
    assert rank_heads(alpha) == [(0, 1), (1, 0), (1, 2), (0, 0), (0, 2), (1, 1)]
    assert select_heads(alpha, retrieval_ratio=0.5) == ((1,), (0, 2))
    assert select_heads(alpha, retrieval_ratio=2 / 3) == ((0, 1), (0, 2))


def test_a_larger_ratio_keeps_every_head_of_a_smaller_one() -> None:
    alpha = gates(4, 6, ties=True)
    before: set = set()
    for share in range(25):
        heads = select_heads(alpha, retrieval_ratio=share / 24)
        now = {(layer, head) for layer, row in enumerate(heads) for head in row}
        assert before <= now
        assert len(now) == share
        before = now


def test_heads_without_a_gate_are_never_ranked_and_always_kept() -> None:
    alpha = [[0.1, 0.9], [NAN, NAN], [0.8, 0.2]]
    assert (1, 0) not in rank_heads(alpha)
    assert len(rank_heads(alpha)) == 4
    assert select_heads(alpha, retrieval_ratio=0.0) == ((), (0, 1), ())
    assert select_heads(alpha, retrieval_ratio=0.5) == ((1,), (0, 1), (0,))
    assert select_heads(alpha, threshold=1.0) == ((), (0, 1), ())


def test_layers_may_end_with_no_retrieval_head_or_with_nothing_else() -> None:
    alpha = [[0.9, 0.9], [0.1, 0.1]]
    assert select_heads(alpha, retrieval_ratio=0.5) == ((0, 1), ())


def test_a_threshold_is_inclusive_also_where_fp32_rounds_it() -> None:
    alpha = [[0.7, 0.1, 0.69999], [1.0, 0.0, 0.3]]
    assert select_heads(alpha, threshold=0.7) == ((0,), (0,))
    assert select_heads(alpha, threshold=0.1) == ((0, 1, 2), (0, 2))
    assert select_heads(alpha, threshold=0.0) == ((0, 1, 2), (0, 1, 2))
    assert select_heads(alpha, threshold=1.0) == ((), (0,))


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ({}, "exactly one of retrieval_ratio, kv_budget and threshold must be given, got none"),
        (
            {"retrieval_ratio": 0.5, "threshold": 0.5},
            r"exactly one of .*got \['retrieval_ratio', 'threshold'\]",
        ),
        ({"retrieval_ratio": 0.5, "kv_budget": 0.5}, r"got \['kv_budget', 'retrieval_ratio'\]"),
        ({"retrieval_ratio": 1.2}, r"retrieval_ratio must lie in \[0, 1\], got 1.2"),
        ({"retrieval_ratio": -0.1}, r"retrieval_ratio must lie in \[0, 1\], got -0.1"),
        ({"retrieval_ratio": NAN}, r"retrieval_ratio must lie in \[0, 1\], got nan"),
        ({"threshold": 1.5}, r"threshold must lie in \[0, 1\], got 1.5"),
        ({"kv_budget": 2}, r"kv_budget must lie in \[0, 1\], got 2"),
        ({"kv_budget": 0.5}, "kv_budget needs a length in tokens"),
        ({"threshold": 0.5, "ranks": 2}, "ranks goes with retrieval_ratio only, got threshold"),
        (
            {"retrieval_ratio": 0.5, "ranks": 3},
            r"ranks must divide the number of KV heads \(4\), got 3",
        ),
        (
            {"retrieval_ratio": 0.5, "ranks": 0},
            r"ranks must divide the number of KV heads \(4\), got 0",
        ),
    ],
    ids=lambda case: (
        ",".join(f"{k}={v}" for k, v in case.items()) or "none" if isinstance(case, dict) else ""
    ),
)
def test_bad_selectors_are_refused(selector, message) -> None:
    with pytest.raises(ValueError, match=message):
        select_heads(gates(2, 4), **selector)


def test_alpha_must_be_a_matrix() -> None:
    with pytest.raises(ValueError, match=r"alpha must have shape \(layers, kv_heads\), got \(4,\)"):
        rank_heads([0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("ratio", [0.0, 0.11, 0.25, 0.5, 0.77, 1.0])
def test_ranks_share_the_heads_evenly(ratio, ranks) -> None:
    alpha = gates(3, 8, ties=True)
    heads = select_heads(alpha, retrieval_ratio=ratio, ranks=ranks)
    block = 8 // ranks
    held = [sum(head // block == rank for row in heads for head in row) for rank in range(ranks)]
    assert sum(held) == int(ratio * 24 + 0.5)
    assert max(held) - min(held) <= 1
    assert held == sorted(held, reverse=True)
    for rank in range(ranks):
        columns = alpha[:, rank * block : (rank + 1) * block]
        best = select_heads(columns, retrieval_ratio=held[rank] / columns.size)
        assert [[h - rank * block for h in row if h // block == rank] for row in heads] == [
            list(r) for r in best
        ]


@pytest.mark.parametrize("seed", range(12))
def test_a_budget_takes_the_largest_selection_that_fits(seed) -> None:
    draw = random.Random(seed)
    alpha = gates(3, 4, seed)
    if draw.random() < 0.5:
        alpha[1] = NAN
    pattern = HeadPattern.from_alpha(alpha, sink=draw.choice((0, 4)), recent=draw.choice((8, 64)))
    options = {
        "tokens": draw.choice((16, 100, 4096)), "head_dim": 64,
        "retrieval_dtype": draw.choice(("auto", "fp8", "int4")), "streaming_dtype": draw.choice(("auto", "int4")),
    }  # fmt: skip
    total = int((~np.isnan(alpha)).sum())

    def share(kept: int) -> float:
        shape = {name: value for name, value in options.items() if name != "tokens"}
        shape.pop("head_dim")
        policy = pattern.policy(retrieval_ratio=kept / total, **shape)
        tokens = options["tokens"]
        return policy.kv_bytes(tokens, head_dim=64) / policy.dense_kv_bytes(tokens, head_dim=64)

    shares = [share(kept) for kept in range(total + 1)]
    for budget in (0.05, 0.2, 0.35, 0.5, 0.75, 0.999, 1.0):
        fitting = [kept for kept in range(total + 1) if shares[kept] <= budget]
        if not fitting:
            with pytest.raises(
                ValueError, match=f"kv_budget must be at least {min(shares):.4f} here"
            ):
                pattern.policy(kv_budget=budget, **options)
            continue
        policy = pattern.policy(kv_budget=budget, **options)
        gated = [
            layer.retrieval for i, layer in enumerate(policy.layers) if not np.isnan(alpha[i, 0])
        ]
        assert count(gated) == max(fitting)


def test_selection_does_not_touch_the_callers_array() -> None:
    alpha = gates(3, 4)
    before = alpha.copy()
    select_heads(alpha, retrieval_ratio=0.3)
    assert np.array_equal(alpha, before)

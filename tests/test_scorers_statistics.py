"""The attention statistics of scorers, against dense matrices in fp64 that are built without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import VOCAB, kv_heads, tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from duohead.identify.banded import Scores
from duohead.identify.scorers import attention
from duohead.identify.scorers.attention import observe, out_of_window, score_matrix, weights
from duohead.identify.scorers.mean_qk import mean_products

FAMILIES = ("llama", "qwen3", "gemma2", "gpt-oss", "smollm3", "lfm2", "qwen3-next")
LENGTH = 45


def sample(*, rows: int = 1, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, (rows, LENGTH), generator=generator)


def dense(q: Tensor, k: Tensor, scores: Scores) -> Tensor:
    """Causal weights [H, T, T] in fp64."""
    k = k[0].double().repeat_interleave(q.shape[1] // k.shape[1], 0)
    logits = q[0].double() @ k.mT * (scores.scaling or q.shape[-1] ** -0.5)
    if scores.softcap is not None:
        logits = torch.tanh(logits / scores.softcap) * scores.softcap
    logits = logits + torch.full(logits.shape[-2:], -torch.inf, dtype=torch.float64).triu(1)
    if scores.sinks is not None:
        extra = scores.sinks.double().reshape(-1, 1, 1).expand(-1, len(logits[0]), 1)
        logits = torch.cat([logits, extra], -1)
    return logits.softmax(-1)[..., : q.shape[2]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block", [1, 700, 1 << 20])
def test_weights_are_those_of_the_model_whatever_the_block(
    family: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "BLOCK", block)
    rows = torch.tensor([0, 3, 4, 17, 29, 44])
    errors = []

    def compare(q: Tensor, k: Tensor, scores: Scores) -> Tensor:
        expected = dense(q, k, scores)[:, rows]
        parts = list(weights(q, k, rows, scores=scores))
        assert torch.cat([part for part, _ in parts]).equal(rows)
        start = 0
        for part, found in parts:
            flat = found.flatten(0, 1).double()
            mine = expected[:, start : start + len(part)]
            errors.append(float((flat - mine[..., : flat.shape[-1]]).abs().max()))
            assert not mine[..., flat.shape[-1] :].any()
            start += len(part)
        return torch.zeros(k.shape[1])

    observe(tiny(family), [sample()], compare, progress=False)
    assert max(errors) < 2e-6


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt-oss"])
def test_weights_are_what_eager_attention_computes(family: str) -> None:
    model, rows = tiny(family), torch.arange(LENGTH)
    found: dict[int, Tensor] = {}

    def keep(q: Tensor, k: Tensor, scores: Scores) -> Tensor:
        ((_, block),) = weights(q, k, rows, scores=scores)
        return block.flatten(0, 1)

    found = observe(model, [sample()], keep, progress=False)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        seen = model(sample(), output_attentions=True, use_cache=False).attentions
    assert found
    for layer, block in found.items():
        assert torch.allclose(block.float(), seen[layer][0], atol=1e-5)


def test_what_is_out_of_the_window_is_what_a_streaming_head_cannot_see() -> None:
    position = torch.arange(20)
    far = out_of_window(position, position, sink=3, recent=5)
    for i in range(20):
        for j in range(20):
            assert bool(far[i, j]) == (j <= i and j >= 3 and i - j >= 5)


def test_observation_is_a_mean_over_samples_and_covers_gated_layers_alone() -> None:
    model = tiny("gemma2")
    first, second = sample(seed=1), sample(seed=2)

    def total(q: Tensor, k: Tensor, scores: Scores) -> Tensor:
        return k.float().sum((0, 2, 3))

    one, two, both = (
        observe(model, ids, total, progress=False) for ids in ([first], [second], [first, second])
    )
    assert list(both) == [1]
    assert torch.allclose(both[1], (one[1] + two[1]) / 2)
    matrix = score_matrix(model, both)
    assert matrix.isnan()[[0, 2]].all()
    assert matrix[1].tolist() == both[1].float().tolist()
    assert matrix.shape == (3, max(kv_heads(model)))


@pytest.mark.parametrize("sink", [0, 3])
def test_mean_products_are_means_over_all_pairs_of_different_passages(sink: int) -> None:
    generator = torch.Generator().manual_seed(0)
    batch, groups, count, size = 3, 2, 17, 4
    q = torch.randn(batch, 2 * groups, count, size, generator=generator, dtype=torch.float64)
    k = torch.randn(batch, groups, count, size, generator=generator, dtype=torch.float64)
    near, first = mean_products(q, k, sink=sink, distances=8)
    for head in range(2 * groups):
        for distance in range(8):
            products = [
                float(q[b, head, i] @ k[c, head // 2, i - distance])
                for b in range(batch)
                for c in range(batch)
                for i in range(sink + distance, count)
                if b != c
            ]
            expected = sum(products) / len(products)
            assert float(near[head // 2, head % 2, distance]) == pytest.approx(expected)
        for j in range(sink):
            products = [
                float(q[b, head, i] @ k[c, head // 2, j])
                for b in range(batch)
                for c in range(batch)
                for i in range(sink, count)
                if b != c
            ]
            expected = sum(products) / len(products)
            assert float(first[head // 2, head % 2, j]) == pytest.approx(expected)


class _Largest(TorchDispatchMode):
    """The most numbers that one tensor made inside had."""

    numbers = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(made, Tensor):
                self.numbers = max(self.numbers, made.numel())
        return out


def test_memory_does_not_grow_with_the_number_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK", 1 << 15)
    q, k = torch.randn(1, 8, 1024, 4), torch.randn(1, 2, 1024, 4)
    with _Largest() as largest:
        total = sum(
            float(block.sum()) for _, block in weights(q, k, torch.arange(1024), scores=Scores())
        )
    assert total == pytest.approx(8 * 1024, rel=1e-4)
    assert largest.numbers <= 1 << 15

"""Differentiable attention: right to rounding, linear in the length, and on a GPU the same bits every time."""

from __future__ import annotations

import pytest
import torch
from tiny_gates import dense, inputs, seen_by
from torch import Tensor

from duohead.identify.banded import TILE, Scores, full_attention, streaming_attention

SCORES = {
    "plain": Scores(),
    "scaled": Scores(scaling=0.7),
    "softcap": Scores(softcap=1.5),
    "sinks": Scores(sinks=torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)),
}


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize(
    ("length", "sink", "recent"),
    [
        (1, 4, 8),
        (13, 4, 8),
        (TILE - 1, 4, 8),
        (TILE + 1, 0, 1),
        (300, 0, 63),
        (300, 1, 129),
        (300, 64, 128),
        (300, 200, 1),
        (2 * TILE, 64, 64),
    ],
)
def test_streaming_attention_and_its_gradient_equal_the_dense_mask(
    length: int, sink: int, recent: int, kind: str
) -> None:
    q, k, v = inputs(length)
    out = streaming_attention(q, k, v, sink=sink, recent=recent, scores=SCORES[kind])
    oracle = dense(q, k, v, seen_by(length, sink=sink, recent=recent), SCORES[kind])
    assert torch.allclose(out, oracle, rtol=0, atol=1e-12)
    weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(0))
    ours = torch.autograd.grad((out * weight).sum(), (q, k, v))
    theirs = torch.autograd.grad((oracle * weight).sum(), (q, k, v))
    for mine, reference in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, reference, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_full_attention_and_its_gradient_equal_the_dense_mask(kind: str, kv_heads: int) -> None:
    q, k, v = inputs(TILE + 30, kv_heads=kv_heads)
    out = full_attention(q, k, v, scores=SCORES[kind])
    oracle = dense(q, k, v, seen_by(TILE + 30, sink=0, recent=1, retrieval=True), SCORES[kind])
    assert torch.allclose(out, oracle, rtol=0, atol=1e-12)
    ours = torch.autograd.grad(out.pow(2).sum(), (q, k, v))
    theirs = torch.autograd.grad(oracle.pow(2).sum(), (q, k, v))
    for mine, reference in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, reference, rtol=0, atol=1e-11)


def test_streaming_attention_takes_memory_linear_in_the_length() -> None:
    """Doubling the length doubles what the graph keeps; a dense mask would quadruple it."""

    def kept(length: int) -> int:
        total = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.untyped_storage().nbytes()
            return tensor

        q, k, v = inputs(length, dtype=torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            streaming_attention(q, k, v, sink=16, recent=64, scores=Scores())
        return total

    assert kept(4096) < 2.2 * kept(2048)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_on_a_gpu_attention_is_right_and_its_gradient_always_the_same(dtype: torch.dtype) -> None:
    """Twice the error of the same formula in the same dtype, as everywhere; then the same bits twice."""
    length, sink, recent = 1000, 64, 256
    exact = [x.detach() for x in inputs(length, dtype=dtype)]
    results = []
    for _ in range(2):
        q, k, v = (x.cuda().requires_grad_() for x in exact)
        stream = streaming_attention(q, k, v, sink=sink, recent=recent, scores=Scores())
        full = full_attention(q, k, v, scores=Scores())
        results.append((stream, full, *torch.autograd.grad((stream * full).sum(), (q, k, v))))
    masks = [seen_by(length, sink=sink, recent=recent, retrieval=every) for every in (False, True)]
    for out, mask in zip(results[0][:2], masks, strict=True):
        oracle = dense(*(x.double() for x in exact), mask, Scores())
        same_dtype = dense(*exact, mask, Scores()).double()
        budget = 2 * (
            (same_dtype - oracle).abs().max() + torch.finfo(dtype).eps * oracle.abs().max()
        )
        assert (out.double().cpu() - oracle).abs().max() <= budget
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_on_a_gpu_long_gradients_are_the_same_bits_and_no_mode_is_left_behind(
    dtype: torch.dtype,
) -> None:
    """Long enough that a kernel which adds up in any order shows it."""
    q, k, v = (torch.randn(1, heads, 8192, 64, dtype=dtype).cuda() for heads in (8, 4, 4))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    gradients = []
    for _ in range(4):
        full = full_attention(q, k, v, scores=Scores())
        stream = streaming_attention(q, k, v, sink=64, recent=256, scores=Scores())
        gradients.append(torch.autograd.grad((full * stream).sum(), (q, k, v)))
        assert not torch.are_deterministic_algorithms_enabled()
    for again in gradients[1:]:
        assert all(torch.equal(one, two) for one, two in zip(gradients[0], again, strict=True))


@pytest.mark.gpu
def test_on_a_gpu_the_fastest_attention_is_as_right_as_the_reproducible_one() -> None:
    exact = [x.detach() for x in inputs(1000, dtype=torch.bfloat16)]
    results = []
    for deterministic in (True, False):
        q, k, v = (x.cuda().requires_grad_() for x in exact)
        out = full_attention(q, k, v, scores=Scores(), deterministic=deterministic)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
    q, k, v = (x.double().requires_grad_() for x in exact)
    oracle = dense(q, k, v, seen_by(1000, sink=0, recent=1, retrieval=True), Scores())
    oracles = (oracle, *torch.autograd.grad(oracle.square().sum(), (q, k, v)))
    for reproducible, fastest, right in zip(*results, oracles, strict=True):
        errors = [(x.double().cpu() - right).abs().max() for x in (reproducible, fastest)]
        assert errors[1] <= 2 * (errors[0] + torch.finfo(torch.bfloat16).eps * right.abs().max())

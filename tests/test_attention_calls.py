"""Attention beyond its outputs: gradients, refusals, the automatic choice, and work that grows with the length only."""

import importlib.util
import logging
from dataclasses import replace

import pytest
import torch
from oracle import Inputs, dense, hold, inputs, make_policy, split, through_cache, without_cache

from duohead import attention
from duohead.attention import choice, hopper_launch, tiled
from duohead.cache import HeadView
from duohead.cache.direct import direct_views
from duohead.policy import HeadPolicy

IMPLS = ("reference", "tiled")


def gradients(x: Inputs, policy: HeadPolicy, impl: str, **options) -> list[torch.Tensor]:
    leaves = [tensor.double().requires_grad_() for tensor in (x.query, x.keys, x.values)]
    out = without_cache(policy, Inputs(*leaves, x.padding), impl=impl, **options)
    real = (x.position >= 0)[..., None, None]
    weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(7))
    return list(torch.autograd.grad((out * weight * real).sum(), leaves))


@pytest.mark.parametrize("padding", [None, [0, 30]], ids=["full", "padded"])
@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 2.0, "sink_logits": torch.tensor([0.5, -1.0, 2.0, 0.0])}],
    ids=["plain", "extras"],
)
def test_gradients_of_tiled_are_those_of_the_reference(options, padding) -> None:
    policy = make_policy("alternating", 2, sink=3, recent=40)
    x = inputs(320, kv_heads=2, groups=2, dim=8, padding=padding)
    for ours, theirs in zip(
        gradients(x, policy, "tiled", **options),
        gradients(x, policy, "reference", **options),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_are_the_slopes(impl) -> None:
    policy = make_policy("alternating", 2, sink=1, recent=3)
    x = inputs(7, kv_heads=2, dim=4, dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (x.query, x.keys, x.values)]
    assert torch.autograd.gradcheck(
        lambda *each: without_cache(policy, Inputs(*each), impl=impl), leaves
    )


def views(length: int, **fields) -> tuple[Inputs, list[HeadView]]:
    policy = make_policy("alternating", 2, sink=1, recent=3, **fields)
    x = inputs(length, kv_heads=2, dim=8)
    return x, direct_views(policy, 0, x.keys, x.values, queries=length, mask=None)


def test_an_unknown_implementation_is_refused() -> None:
    x, seen = views(3)
    names = "auto, reference, tiled, triton, hopper, cute"
    with pytest.raises(ValueError, match=f"impl must be one of {names}, got 'flash'"):
        attention.prefill(x.query, seen, scale=1.0, impl="flash")
    with pytest.raises(ValueError, match=f"impl must be one of {names}, got 'flash'"):
        attention.reads_storage(x.query, impl="flash")


def test_decode_takes_a_handful_of_queries() -> None:
    x, _ = views(9)
    with pytest.raises(ValueError, match="decode takes at most 8 query tokens, got 9; use prefill"):
        attention.decode(x.query, (), scale=1.0)
    assert not attention.reads_storage(x.query, impl="tiled")


def test_an_implementation_that_cannot_run_here_says_what_it_lacks(monkeypatch) -> None:
    x, seen = views(3)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="impl='triton' cannot run here: .*CPU.*impl='tiled'"):
        attention.prefill(x.query, seen, scale=1.0, impl="triton")
    with pytest.raises(ValueError, match="impl='cute' cannot run here: .*impl='tiled'"):
        attention.prefill(x.query, seen, scale=1.0, impl="cute")


def test_the_automatic_choice_is_logged_once_and_an_explicit_one_never(caplog) -> None:
    x, seen = views(3)
    choice.log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="duohead"):
        attention.prefill(x.query, seen, scale=1.0, impl="reference")
        assert not caplog.records
        for _ in range(3):
            attention.prefill(x.query, seen, scale=1.0)
    assert [record.getMessage() for record in caplog.records] == ["attention on cpu: impl=tiled"]


@pytest.fixture
def fresh():
    """Nothing has been found missing yet, nor logged."""
    for cached in (hopper_launch._lacking, choice.log_once):
        cached.cache_clear()
    yield
    for cached in (hopper_launch._lacking, choice.log_once):
        cached.cache_clear()


def test_a_compiler_that_does_not_work_is_found_once_and_named(fresh, monkeypatch) -> None:
    tried = []

    def refuse(text: str) -> bytes:
        tried.append(text)
        raise RuntimeError("libnvrtc.so.13\nnot found")

    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(hopper_launch, "_compile", refuse)
    for _ in range(3):
        reason = hopper_launch.missing(0)
        assert "libnvrtc.so.13 not found" in reason
        assert "impl='triton'" in reason
    assert len(tried) == 1


@pytest.mark.parametrize(
    "full",
    [
        RuntimeError("CUDA: <CUresult.CUDA_ERROR_OUT_OF_MEMORY: 2>"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
)
def test_a_device_that_was_full_once_is_asked_again(fresh, monkeypatch, full) -> None:
    answers = [full, full, None]

    def load(*_: object) -> None:
        if (answer := answers.pop(0)) is not None:
            raise answer

    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(hopper_launch, "_compile", lambda text: b"")
    monkeypatch.setattr(hopper_launch, "_load", load)
    for _ in range(2):
        assert "no memory left to load a trial kernel" in hopper_launch.missing(0)
    for _ in range(2):  # and what was found at last is not asked again
        assert hopper_launch.missing(0) is None


def test_auto_goes_on_without_a_kernel_that_cannot_be_loaded_and_hopper_raises(
    fresh, monkeypatch, caplog
) -> None:
    asked = []

    def lacks(index: int) -> str:
        asked.append(index)
        return "the driver is too old"

    monkeypatch.setattr(choice, "_installed", lambda package: package == "triton")
    monkeypatch.setattr(hopper_launch, "missing", lacks)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda index: (9, 0) if index == 1 else (8, 0)
    )
    with caplog.at_level(logging.INFO, logger="duohead"):
        for _ in range(2):
            assert choice.choose("auto", "cuda", index=1) == "triton"
        assert choice.choose("auto", "cuda", index=0) == "triton"
    assert asked == [1, 1], "the device of the tensors decides, not the current one"
    assert [record.getMessage() for record in caplog.records] == [
        "attention without hopper: the driver is too old",
        "attention on cuda: impl=triton",
    ]
    with pytest.raises(ValueError, match="impl='hopper' cannot run here: the driver is too old"):
        choice.choose("hopper", "cuda", index=1)
    with pytest.raises(ValueError, match="needs a Hopper GPU"):
        choice.choose("hopper", "cuda", index=0)


def test_a_policy_of_another_geometry_is_refused() -> None:
    x = inputs(4, kv_heads=3, dim=8)
    with pytest.raises(ValueError, match="layer 0 got 3 KV heads but its policy has 2"):
        without_cache(make_policy("none", 2), x)


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}], ids=["plain", "softcap"])
@pytest.mark.parametrize("form", ["cache", "no-cache"])
def test_the_work_of_streaming_prefill_is_linear_in_length(form, options, monkeypatch) -> None:
    """Beside the queries' own columns, a call reads no more than the sinks, the window and the rest of a tile."""
    columns: list[int] = []
    reads = HeadView.reads

    def counting(self: HeadView, start: int, stop: int):
        found = list(reads(self, start, stop))
        columns.append(sum(keys.shape[2] for keys, *_ in found) - (stop - start))
        return iter(found)

    monkeypatch.setattr(HeadView, "reads", counting)
    policy = make_policy("none", 1, sink=64, recent=256)
    work = {}
    for length in (2048, 4096, 8192):
        columns.clear()
        x = inputs(length, kv_heads=1, dim=8)
        run = without_cache if form == "no-cache" else through_cache
        run(policy, x, *([] if form == "no-cache" else [split(length, 1024)]), **options)
        assert columns
        assert max(columns) <= 64 + 256 + tiled.BAND_TILE
        work[length] = sum(columns) + length
        # Every call takes at least one tile of queries, so this bound per token holds at any length.
        assert work[length] <= length * (1 + (64 + 256 + tiled.BAND_TILE) / tiled.BAND_TILE)


def test_the_oracle_itself_is_softmax_attention() -> None:
    x = inputs(5, kv_heads=1, dim=8, dtype=torch.float64)
    out = dense(x.query, x.keys, x.values, torch.ones(1, 1, 5, 5, dtype=torch.bool), scale=0.5)
    weights = torch.exp(x.query[0, 0] @ x.keys[0, 0].T * 0.5)
    expected = weights @ x.values[0, 0] / weights.sum(-1, keepdim=True)
    assert torch.allclose(out[0, :, 0], expected, rtol=0, atol=1e-14)


def test_the_budget_refuses_what_is_wrong_by_one_token() -> None:
    policy = make_policy("none", 1, sink=4, recent=20)
    x = inputs(60, kv_heads=1)
    out = without_cache(policy, x)
    hold(out, policy, x)
    with pytest.raises(AssertionError, match="beyond the budget"):
        hold(out, replace(policy, recent=21), x)
    with pytest.raises(AssertionError):
        hold(out * float("nan"), policy, x)

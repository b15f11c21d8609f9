"""Attention under a policy: reference and tiled against the fp64 oracle, on shapes that hurt, and laws."""

import itertools
import random
from dataclasses import dataclass, replace

import pytest
import torch
from oracle import (
    FIXED_BOUND,
    Inputs,
    assert_within_budget,
    hold,
    inputs,
    make_policy,
    policy_mask,
    split,
    through_cache,
    without_cache,
)
from torch.nn import functional as F

from duohead import attention
from duohead.cache import DuoLayer
from duohead.cache.direct import direct_views
from duohead.policy import HeadPolicy

IMPLS = ("reference", "tiled")
FP32 = FIXED_BOUND[torch.float32]


@dataclass(frozen=True)
class Case:
    length: int
    sink: int
    recent: int
    groups: int
    dim: int
    kind: str
    chunk: int | None
    padded: bool
    dtype: torch.dtype
    storage: str

    def __str__(self) -> str:
        chunk = "whole" if self.chunk is None else f"c{self.chunk}"
        name = str(self.dtype).removeprefix("torch.")
        padded = "-padded" if self.padded else ""
        return (
            f"n{self.length}-s{self.sink}-r{self.recent}-x{self.groups}-d{self.dim}-{self.kind}-{chunk}-{name}"
            f"-{self.storage}{padded}"
        )


def sampled_cases(count: int) -> list[Case]:
    """Random corners of the cross product, each value of each axis in several of them."""
    axes = (
        (1, 63, 127, 129, 300), (0, 1, 4, 64), (1, 63, 256), (1, 4, 7, 8), (64, 128),
        ("none", "all", "alternating", "random"), (1, 7, 64, None), (False, True),
        (torch.float32, torch.bfloat16), ("auto", "auto", "int8", "int4", "int4-hadamard"),
    )  # fmt: skip
    draw = random.Random(2410)
    decks = [
        draw.sample(list(itertools.islice(itertools.cycle(axis), count)), count) for axis in axes
    ]
    return [Case(*values) for values in zip(*decks, strict=True)]


@pytest.mark.parametrize("case", sampled_cases(48), ids=str)
def test_shapes_that_hurt_stay_within_the_budget(case: Case) -> None:
    kv_heads = 2 if case.groups > 4 else 3
    policy = make_policy(
        case.kind,
        kv_heads,
        sink=case.sink,
        recent=case.recent,
        retrieval_dtype=case.storage,
        streaming_dtype=case.storage,
    )
    padding = [0, min(5, case.length - 1)] if case.padded else None
    x = inputs(
        case.length,
        kv_heads=kv_heads,
        groups=case.groups,
        dim=case.dim,
        padding=padding,
        dtype=case.dtype,
    )
    chunks = split(case.length, case.chunk)
    for impl in IMPLS:
        hold(without_cache(policy, x, impl=impl), policy, x)
        hold(through_cache(policy, x, chunks, impl=impl), policy, x)
    hold(through_cache(policy, x, chunks, max_length=case.length + 3), policy, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("padding", [None, [0, 700]], ids=["full", "padded"])
@pytest.mark.parametrize("kind", ["none", "alternating"])
def test_a_thousand_tokens_prefilled_in_chunks_then_decoded(kind, padding, dtype) -> None:
    policy = make_policy(kind, 2, sink=4, recent=63)
    x = inputs(1000, kv_heads=2, groups=2, padding=padding, dtype=dtype)
    for chunks in ([400, 580, *[1] * 20], [990, 3, 7]):
        hold(through_cache(policy, x, chunks), policy, x)


@pytest.mark.parametrize(
    "chunks", [[4097], [4096, 1], [1500, 2500, 90, 1, 6]], ids=["whole", "decode", "chunks"]
)
def test_4097_tokens(chunks) -> None:
    policy = make_policy("alternating", 2, sink=64, recent=256)
    x = inputs(4097, kv_heads=2)
    out = through_cache(policy, x, chunks)
    for queries in (slice(0, 4097, 97), slice(4080, 4097)):
        hold(out[:, queries], policy, x, queries=queries)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("extra", ["softcap", "sink-logits", "both", "scale", "value-size"])
def test_what_models_add_to_attention_is_honoured(extra, impl) -> None:
    options = {"scale": 0.3 if extra == "scale" else 0.125}
    if extra in ("softcap", "both"):
        options["softcap"] = 1.5
    if extra in ("sink-logits", "both"):
        options["sink_logits"] = torch.linspace(-2.0, 4.0, 6)
    x = inputs(
        600, kv_heads=3, groups=2, value_dim=24 if extra == "value-size" else 64, padding=[0, 40]
    )
    for kind in ("none", "all", "alternating"):
        policy = make_policy(kind, 3, sink=4, recent=63)
        hold(without_cache(policy, x, impl=impl, **options), policy, x, **options)
        hold(through_cache(policy, x, [300, 293, 1, 6], impl=impl, **options), policy, x, **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("window", [1, 3, 100, 300])
@pytest.mark.parametrize("kind", ["none", "all", "alternating"])
def test_native_windows_apply_on_top_also_to_sinks(kind, window, impl) -> None:
    policy = make_policy(kind, 2, sink=4, recent=63, windows=[window])
    for padding in (None, [0, 30]):
        x = inputs(1100, kv_heads=2, dim=16, padding=padding)
        hold(without_cache(policy, x, impl=impl), policy, x)
        hold(through_cache(policy, x, [900, 100, 95, 1, 4], impl=impl), policy, x)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("padding", [None, [0, 60]], ids=["full", "padded"])
@pytest.mark.parametrize("count", [1, 8, 100])
def test_plain_tensors_with_a_past_belong_to_the_last_queries(count, padding, impl) -> None:
    """As with a cache of transformers' own, which hands over every key."""
    policy = make_policy("alternating", 2, sink=4, recent=32, streaming_dtype="int8")
    x = inputs(160, kv_heads=2, groups=2, dim=16, padding=padding)
    last = slice(160 - count, 160)
    seen = direct_views(policy, 0, x.keys, x.values, queries=count, mask=x.mask)
    out = attention.prefill(x.query[:, :, last], seen, scale=0.25, impl=impl)
    hold(out, policy, x, queries=last)


@pytest.mark.parametrize(("count", "recent"), [(1, 8), (2, 30)], ids=["decode", "prefill"])
def test_plain_tensors_follow_the_prefill_window_as_caches_do(count, recent) -> None:
    policy = make_policy("alternating", 2, sink=4, recent=8, prefill_recent=30)
    x = inputs(60, kv_heads=2, dim=16)
    last = slice(60 - count, 60)
    seen = direct_views(policy, 0, x.keys, x.values, queries=count, mask=None)
    out = attention.prefill(x.query[:, :, last], seen, scale=0.25)
    hold(out, policy, x, recent=recent, queries=last)


@pytest.mark.parametrize("kind", ["none", "all", "alternating"])
@pytest.mark.parametrize("padding", [None, [0, 33]], ids=["full", "padded"])
def test_lengths_on_the_device_change_nothing(padding, kind, monkeypatch) -> None:
    """What compiled graphs run: no length is read on the host, every shape is fixed."""
    policy = make_policy(kind, 2, sink=4, recent=20, streaming_dtype="int8")
    x = inputs(100, kv_heads=2, groups=2, dim=16, padding=padding)
    layer = DuoLayer(policy, 0, max_length=120)
    out = [through_cache(policy, x, [50], layer=layer)]
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        for start in range(50, 100):
            out.append(through_cache(policy, x, [1], layer=layer, start=start))
    assert int(layer.get_seq_length()) == 100
    hold(torch.cat(out, dim=1), policy, x)


@pytest.mark.parametrize("impl", IMPLS)
def test_all_retrieval_is_plain_attention(impl) -> None:
    x = inputs(300, kv_heads=2, groups=4)
    plain = F.scaled_dot_product_attention(
        x.query, x.keys, x.values, is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    policy = make_policy("all", 2)
    assert torch.allclose(without_cache(policy, x, impl=impl), plain, rtol=0, atol=FP32)
    assert torch.allclose(
        through_cache(policy, x, [200, 99, 1], impl=impl), plain, rtol=0, atol=FP32
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("sink", "recent"), [(0, 300), (44, 256), (299, 1), (64, 256)])
def test_sink_plus_recent_at_the_length_is_plain_attention(sink, recent, impl) -> None:
    x = inputs(300, kv_heads=2, groups=2)
    plain = F.scaled_dot_product_attention(
        x.query, x.keys, x.values, is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    policy = make_policy("none", 2, sink=sink, recent=recent)
    assert torch.allclose(without_cache(policy, x, impl=impl), plain, rtol=0, atol=FP32)
    assert torch.allclose(
        through_cache(policy, x, [200, 99, 1], impl=impl), plain, rtol=0, atol=FP32
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_permuting_heads_permutes_outputs(impl) -> None:
    x = inputs(200, kv_heads=4, groups=2)
    order = torch.tensor([2, 0, 3, 1])
    query = x.query.unflatten(1, (4, 2))[:, order].flatten(1, 2)
    moved = Inputs(query, x.keys[:, order], x.values[:, order])
    chosen = [0, 3]
    here = HeadPolicy.from_heads(retrieval=[chosen], num_kv_heads=4, sink=4, recent=32)
    there = here.with_retrieval([[order.tolist().index(head) for head in chosen]])
    for chunks in ([200], [150, 49, 1]):
        out = through_cache(here, x, chunks, impl=impl).unflatten(2, (4, 2))
        out_moved = through_cache(there, moved, chunks, impl=impl).unflatten(2, (4, 2))
        assert torch.allclose(out[:, :, order], out_moved, rtol=0, atol=FP32)


@pytest.mark.parametrize("kind", ["none", "all", "alternating"])
def test_neither_chunks_nor_padding_nor_storage_form_change_anything(kind) -> None:
    policy = make_policy(kind, 2, sink=4, recent=20, streaming_dtype="int8")
    alone = inputs(150, kv_heads=2, groups=2, dim=16)
    whole = through_cache(policy, alone, [150])
    for pad in (0, 1, 37):
        garbage = inputs(pad, kv_heads=2, groups=2, dim=16, seed=9)
        both = [torch.cat([b, a], 2) for a, b in zip(
            (alone.query, alone.keys, alone.values), (garbage.query, garbage.keys, garbage.values), strict=True
        )]  # fmt: skip
        x = Inputs(*both, padding=(pad,) if pad else None)
        for chunk, max_length in itertools.product((1, 7, 64, None), (None, 200)):
            out = through_cache(policy, x, split(150 + pad, chunk), max_length=max_length)
            assert torch.allclose(out[:, pad:], whole, rtol=0, atol=FP32 * 4), (
                pad,
                chunk,
                max_length,
            )
        assert torch.allclose(without_cache(policy, x)[:, pad:], whole, rtol=0, atol=FP32 * 4)


def test_a_batch_of_padded_rows_is_its_rows_alone() -> None:
    policy = make_policy("alternating", 2, sink=4, recent=20)
    x = inputs(90, kv_heads=2, dim=16, padding=[0, 3, 50])
    out = through_cache(policy, x, [60, 29, 1])
    for row, pad in enumerate(x.padding or ()):
        part = [tensor[row : row + 1, :, pad:] for tensor in (x.query, x.keys, x.values)]
        alone = through_cache(policy, Inputs(*part), [90 - pad])
        assert torch.allclose(out[row : row + 1, pad:], alone, rtol=0, atol=FP32 * 4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "chunks",
    [[200], [7] * 28 + [4], [64, 64, 72], [150, 2, 48]],
    ids=["whole", "c7", "c64", "uneven"],
)
def test_a_longer_window_during_prefill_is_exact_for_any_chunks(chunks, impl) -> None:
    policy = make_policy("alternating", 2, sink=4, recent=16, prefill_recent=50)
    x = inputs(204, kv_heads=2, groups=2)
    out = through_cache(policy, x, [*chunks, 1, 1, 1, 1], impl=impl)
    hold(out[:, :200], policy, x, recent=50, queries=slice(0, 200))
    hold(out[:, 200:], policy, x, recent=16, queries=slice(200, 204))


def test_drafts_are_decoded_with_the_decoding_window() -> None:
    policy = make_policy("none", 2, sink=4, recent=16, prefill_recent=50)
    x = inputs(120, kv_heads=2)
    layer = DuoLayer(policy, 0)
    layer.activate_past_recording()
    out = through_cache(policy, x, [100, 5, 15], layer=layer)
    hold(out[:, :100], policy, x, recent=50, queries=slice(0, 100))
    hold(out[:, 100:], policy, x, recent=16, queries=slice(100, 120))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("padding", [None, [0, 9]], ids=["full", "padded"])
@pytest.mark.parametrize("chunk", [7, 64, None])
def test_chunk_visibility_is_sinks_and_recent_before_the_chunk_and_the_whole_chunk(
    chunk, padding, impl
) -> None:
    policy = make_policy("alternating", 2, sink=4, recent=16, visibility="chunk")
    x = inputs(150, kv_heads=2, padding=padding)
    chunks = split(150, chunk)
    start = torch.repeat_interleave(
        torch.tensor([0, *itertools.accumulate(chunks)])[:-1], torch.tensor(chunks)
    )
    skipped = torch.tensor(padding or [0])[:, None]
    mask = policy_mask(policy, 0, x.position, x.position, chunk_start=start[None, :] - skipped)
    out = through_cache(policy, x, chunks, impl=impl)
    assert_within_budget(out, x.query, x.keys, x.values, mask, real=x.position >= 0, scale=0.125)
    if chunk is None:
        causal = policy_mask(make_policy("all", 2), 0, x.position, x.position)
        assert torch.equal(mask, causal)  # the reference code's first chunk is dense


@pytest.mark.parametrize("impl", IMPLS)
def test_slots_that_were_never_written_cannot_leak(impl) -> None:
    """What no token has reached is full of NaN, and nothing of it shows."""
    policy = make_policy("alternating", 2, sink=4, recent=40)
    x = inputs(90, kv_heads=2)
    for max_length, total in itertools.product((None, 200), (20, 90)):
        layer = DuoLayer(policy, 0, max_length=max_length)
        start = total - 2
        through_cache(policy, x, [start], layer=layer)
        for kind in layer.kinds:
            segments = kind.store.segments()
            for tensor in itertools.chain(segments[-1].keys, segments[-1].values):
                tensor[:, :, start:] = float("nan")
        out = through_cache(policy, x, [1, 1], layer=layer, start=start, impl=impl)
        cut = Inputs(x.query[:, :, :total], x.keys[:, :, :total], x.values[:, :, :total])
        hold(out, policy, cut, queries=slice(start, total))


@pytest.mark.parametrize("impl", IMPLS)
def test_huge_values_in_padding_change_no_bit(impl) -> None:
    policy = make_policy("alternating", 2, sink=4, recent=40)
    x = inputs(90, kv_heads=2, padding=[0, 33])
    poisoned = replace(x, keys=x.keys.clone(), values=x.values.clone())
    poisoned.keys[1, :, :33] = 1e15
    poisoned.values[1, :, :33] = -1e30
    for chunks in ([90], [60, 29, 1]):
        clean, dirty = (through_cache(policy, each, chunks, impl=impl) for each in (x, poisoned))
        assert torch.equal(clean[0], dirty[0])
        assert torch.equal(clean[1, 33:], dirty[1, 33:])
    clean, dirty = (without_cache(policy, each, impl=impl) for each in (x, poisoned))
    assert torch.equal(clean[1, 33:], dirty[1, 33:])

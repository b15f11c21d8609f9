"""Prefill through flash-attn-4: on the CPU what runs without it (spans, merging, padded rows), the rest on a GPU.

On the CPU a stand-in takes the place of flash-attn-4's forward, in fp64.
"""

from dataclasses import replace

import pytest
import torch
from oracle import Inputs, dense, hold, inputs, make_policy, split
from torch import Tensor

from duohead.attention import cute_prefill
from duohead.cache import DuoLayer
from duohead.cache.direct import direct_views
from duohead.policy import HeadPolicy


def fill(x: Inputs, policy: HeadPolicy, views, count: int, query: Tensor, **options) -> Tensor:
    """What `attend` writes for every view, into poisoned memory."""
    out = query.new_full((query.shape[0], count, query.shape[1], x.values.shape[-1]), torch.nan)
    for view in views:
        cute_prefill.attend(
            query, view, out, scale=x.query.shape[-1] ** -0.5,
            kv_heads=policy.layers[0].num_kv_heads, **options,
        )  # fmt: skip
    return out


def cute_through_cache(policy: HeadPolicy, x: Inputs, chunks, **options) -> Tensor:
    """Outputs [B, T, H, Dv] of feeding ``x`` chunk by chunk through one cache layer."""
    max_length = options.pop("max_length", None)
    layer, start, outs = DuoLayer(policy, 0, max_length=max_length), 0, []
    mask = None if x.mask is None else x.mask.to(x.query.device)
    for count in chunks:
        part = slice(start, start + count)
        handle, _ = layer.update(x.keys[:, :, part], x.values[:, :, part])
        views = handle.open(None if mask is None else mask[:, : start + count])
        outs.append(fill(x, policy, views, count, x.query[:, :, part], **options))
        handle.commit()
        start += count
    return torch.cat(outs, dim=1)


def there(x: Inputs, device: str) -> Inputs:
    return replace(x, **{n: getattr(x, n).to(device) for n in ("query", "keys", "values")})


def stand_in(q, k, v, *, softmax_scale, softcap, learnable_sink, out, causal=False, lse=None):
    """Flash-attn-4's forward as `cute_prefill` uses it, in fp64."""
    rows, queries, heads, _ = q.shape
    keys = k.shape[1]
    see = torch.ones(rows, queries, keys, dtype=torch.bool)
    if causal:
        see &= torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries
    q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
    group = heads // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * softmax_scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~see[:, None], -torch.inf)
    if learnable_sink is not None:
        extra = learnable_sink.double()[None, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, extra], -1)
    if lse is not None:
        lse.copy_(scores.logsumexp(-1))
    weights = scores.softmax(-1)[..., :keys].nan_to_num(0.0)
    out.copy_((weights @ v).transpose(1, 2))


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in in place of flash-attn-4."""
    monkeypatch.setattr(cute_prefill, "_forward", lambda: stand_in)


@pytest.mark.parametrize("padding", [None, (0, 77, 300)], ids=["plain", "padded"])
@pytest.mark.parametrize("chunk", [1, 7, 64, None])
def test_any_chunks_and_padding_keep_the_error_budget(
    on_cpu: None, chunk: int | None, padding
) -> None:
    policy = make_policy("all", 4)
    length = 60 if chunk == 1 else 420
    if chunk == 1 and padding:
        padding = (0, 11, 59)
    x = inputs(length, kv_heads=4, groups=2, dim=16, value_dim=8, padding=padding)
    got = cute_through_cache(policy, x, split(length, chunk))
    hold(got, policy, x)


def test_softcap_and_sink_logits_come_through(on_cpu: None) -> None:
    policy = make_policy("all", 4)
    x = inputs(150, kv_heads=4, groups=2, dim=16)
    options = {"softcap": 2.0, "sink_logits": torch.randn(8)}
    hold(cute_through_cache(policy, x, [100, 50], **options), policy, x, **options)


@pytest.mark.parametrize("static", [False, True])
def test_a_past_in_many_spans_is_merged(
    on_cpu: None, monkeypatch: pytest.MonkeyPatch, static: bool
) -> None:
    monkeypatch.setattr("duohead.cache.store.READ_LIMIT", 32)
    policy = make_policy("all", 2, retrieval_dtype="int8", sink=4, recent=8)
    x = inputs(300, kv_heads=2, groups=2, dim=16, padding=(0, 45))
    logits = torch.randn(4)
    # Room for two pieces, for every piece, and less than for one.
    for limit in (2 * 32 * 2 * 2 * 2 * 16 * 4, 1 << 30, 1):
        monkeypatch.setattr(cute_prefill, "SPAN_BYTES", limit)
        got = cute_through_cache(
            policy, x, [200, 100], sink_logits=logits, max_length=300 if static else None
        )
        hold(got, policy, x, sink_logits=logits)


def test_spans_keep_to_their_bytes_and_hold_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duohead.cache.store.READ_LIMIT", 32)
    policy = make_policy("all", 2, retrieval_dtype="int8")
    x = inputs(300, kv_heads=2, dim=16)
    layer = DuoLayer(policy, 0)
    for part in (slice(0, 280), slice(280, 300)):
        handle, _ = layer.update(x.keys[:, :, part], x.values[:, :, part])
        views = handle.open(None)
        handle.commit()
    token = 2 * 2 * 16 * 4
    found = list(cute_prefill.spans(views[0], 100 * token))
    assert [keys.shape[2] for keys, _, _ in found] == [96, 96, 88, 20]
    assert [last for *_, last in found] == [False, False, False, True]


def test_merging_by_log_sum_exp_equals_attention_over_everything() -> None:
    x = inputs(90, kv_heads=2, groups=2, dim=16, dtype=torch.float64)
    scores = x.query @ x.keys.repeat_interleave(2, 1).transpose(-1, -2) * 0.25
    parts = []
    for part in (slice(0, 30), slice(30, 31), slice(31, 90)):
        see = torch.ones(1, 1, 90, part.stop - part.start, dtype=torch.bool)
        out = dense(x.query, x.keys[:, :, part], x.values[:, :, part], see, scale=0.25)
        parts.append((out, scores[..., part].logsumexp(-1)))
    merged = parts[0]
    for part in parts[1:]:
        merged = cute_prefill.merge(*merged, *part)
    see = torch.ones(1, 1, 90, 90, dtype=torch.bool)
    torch.testing.assert_close(merged[0], dense(x.query, x.keys, x.values, see, scale=0.25))
    torch.testing.assert_close(merged[1], scores.logsumexp(-1))


def test_merging_with_nothing_seen_in_one_part_is_the_other_part() -> None:
    out, lse = torch.randn(1, 3, 2, 4), torch.randn(1, 2, 3)
    nothing = torch.zeros(1, 3, 2, 4), torch.full((1, 2, 3), -torch.inf)
    found, _ = cute_prefill.merge(out.clone(), lse, *nothing)
    torch.testing.assert_close(found, out)


def test_queries_may_belong_to_the_last_keys_of_a_plain_forward(on_cpu: None) -> None:
    policy = make_policy("all", 4)
    x = inputs(200, kv_heads=4, groups=2, dim=16, padding=(0, 30))
    query = x.query[:, :, 150:]
    views = direct_views(policy, 0, x.keys, x.values, queries=50, mask=x.mask)
    got = fill(x, policy, views, 50, query)
    hold(got, policy, x, queries=slice(150, 200))


def test_other_heads_stay_as_they_were(on_cpu: None) -> None:
    policy = make_policy("alternating", 4, sink=4, recent=8)
    x = inputs(20, kv_heads=4, groups=2, dim=16)
    retrieval, streaming = direct_views(policy, 0, x.keys, x.values, queries=20, mask=None)
    out = fill(x, policy, [retrieval], 20, x.query).unflatten(2, (4, 2))
    assert out[:, :, streaming.heads].isnan().all()
    assert out[:, :, retrieval.heads].isfinite().all()


def test_some_heads_without_their_number_are_refused(on_cpu: None) -> None:
    policy = make_policy("alternating", 4, sink=4, recent=8)
    x = inputs(20, kv_heads=4, dim=16)
    view, _ = direct_views(policy, 0, x.keys, x.values, queries=20, mask=None)
    with pytest.raises(ValueError, match="kv_heads must be given"):
        cute_prefill.attend(x.query, view, torch.empty(1, 20, 4, 16), scale=1.0)


def view_of(dtype: torch.dtype = torch.bfloat16, dim: int = 64, **fields):
    policy = make_policy("all", 2, **fields)
    x = inputs(8, kv_heads=2, dim=dim, dtype=dtype)
    return x, direct_views(policy, 0, x.keys, x.values, queries=8, mask=None)[0]


def test_a_cpu_is_refused_with_the_reason() -> None:
    x, view = view_of()
    assert "CUDA" in cute_prefill.supports(x.query, view)


def test_without_the_package_the_reason_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cute_prefill.importlib.util, "find_spec", lambda name: None)
    cute_prefill._missing.cache_clear()
    reason = cute_prefill._missing()
    cute_prefill._missing.cache_clear()
    assert "pip install 'duohead[cuda]'" in reason


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"dtype": torch.float32}, "fp16 and bf16"),
        ({"dim": 20}, "multiples of 8"),
        ({"dim": 264}, "up to 256"),
    ],
)
def test_calls_that_no_kernel_does_are_refused_with_the_reason(fields: dict, reason: str) -> None:
    x, view = view_of(**fields)
    assert reason in cute_prefill._unfit(view, x.query.dtype, x.query.shape[-1], 9)


def test_heads_with_a_band_go_to_other_kernels() -> None:
    x = inputs(8, kv_heads=2, dim=64, dtype=torch.bfloat16)
    policy = make_policy("none", 2, sink=2, recent=3)
    (view,) = direct_views(policy, 0, x.keys, x.values, queries=8, mask=None)
    assert "kernels of their own" in cute_prefill._unfit(view, x.query.dtype, 64, 9)


def test_gradients_are_refused() -> None:
    x, view = view_of()
    query = x.query.requires_grad_()
    assert "no_grad" in cute_prefill._differentiated(query, view, None)
    with torch.no_grad():
        assert cute_prefill._differentiated(query, view, None) is None


def test_blackwell_takes_large_heads_only_in_pairs() -> None:
    x, view = view_of(dim=256)
    assert cute_prefill._unfit(view, x.query.dtype, 256, 10) is None
    x, view = view_of(dim=192)
    assert "up to 128" in cute_prefill._unfit(view, x.query.dtype, 192, 10)


@pytest.fixture
def flash_attention() -> None:
    reason = cute_prefill._missing()
    if reason is not None:
        pytest.skip(reason)
    if torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("flash-attn-4 needs a Hopper or Blackwell GPU")


@pytest.mark.gpu
@pytest.mark.parametrize("padding", [None, (0, 77, 1500)], ids=["plain", "padded"])
@pytest.mark.parametrize("chunk", [1000, None])
@pytest.mark.parametrize(
    ("groups", "dim", "dtype"),
    [
        (4, 128, torch.bfloat16),
        (4, 64, torch.float16),
        (7, 128, torch.float16),
        (2, 256, torch.bfloat16),
    ],
)
def test_flash_attention_keeps_the_error_budget(
    flash_attention, groups: int, dim: int, dtype, chunk, padding
) -> None:
    policy = make_policy("all", 4)
    length = 1700
    x = inputs(length, kv_heads=4, groups=groups, dim=dim, padding=padding, dtype=dtype)
    got = cute_through_cache(policy, there(x, "cuda"), split(length, chunk))
    hold(got.cpu(), policy, x)


@pytest.mark.gpu
def test_flash_attention_caps_scores_and_takes_sink_logits(flash_attention) -> None:
    policy = make_policy("all", 4)
    x = inputs(700, kv_heads=4, groups=4, dim=64, dtype=torch.bfloat16)
    logits = torch.randn(16)
    got = cute_through_cache(
        policy, there(x, "cuda"), [300, 400], softcap=5.0, sink_logits=logits.cuda()
    )
    hold(got.cpu(), policy, x, softcap=5.0, sink_logits=logits)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fp8", "int4"])
def test_flash_attention_merges_spans_of_a_decoded_past(
    flash_attention, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("duohead.cache.store.READ_LIMIT", 256)
    monkeypatch.setattr(cute_prefill, "SPAN_BYTES", 3 << 20)
    policy = make_policy("all", 4, retrieval_dtype=name)
    x = inputs(3000, kv_heads=4, groups=4, dim=128, padding=(0, 1100), dtype=torch.bfloat16)
    got = cute_through_cache(policy, there(x, "cuda"), [2500, 500])
    hold(got.cpu(), policy, x)


@pytest.mark.gpu
def test_flash_attention_reads_a_static_cache_in_place(flash_attention) -> None:
    policy = make_policy("all", 4)
    x = inputs(2000, kv_heads=4, groups=4, dim=128, dtype=torch.bfloat16)
    got = cute_through_cache(policy, there(x, "cuda"), [1100, 900], max_length=4096)
    hold(got.cpu(), policy, x)

"""Patterns: built, ranked, checked against a model, turned into a policy."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from duohead.pattern import HeadPattern

NAN = float("nan")


def config(layers=3, heads=4, windows=None, model_type="llama", **more):
    """As much of a transformers config as patterns read."""
    types = ["sliding_attention" if w else "full_attention" for w in windows or [None] * layers]
    window = next((w for w in windows or () if w), None)
    return SimpleNamespace(
        model_type=model_type, num_hidden_layers=layers, num_attention_heads=2 * heads, num_key_value_heads=heads,
        hidden_size=16 * heads, head_dim=8, layer_types=types, sliding_window=window, **more,
    )  # fmt: skip


def pattern(**fields) -> HeadPattern:
    alpha = [[0.1, 0.9, 0.5, 0.0], [NAN] * 4, [1.0, 1.0, 0.5, 1e-7]]
    return HeadPattern.from_alpha(alpha, **fields)


def test_alpha_is_kept_exactly_and_cannot_be_changed() -> None:
    source = np.array([[0.25, 1.0]], dtype=np.float32)
    made = HeadPattern.from_alpha(source, sink=4, recent=8)
    source[0, 0] = 0.75
    assert made.alpha.dtype == np.float32
    assert made.alpha.tolist() == [[0.25, 1.0]]
    assert (made.sink, made.recent) == (4, 8)
    with pytest.raises(ValueError, match="read-only"):
        made.alpha[0, 0] = 0.5


def test_alpha_may_be_a_tensor_with_gradients() -> None:
    gates = torch.nn.Parameter(torch.tensor([[0.5, 0.25]], dtype=torch.bfloat16))
    assert HeadPattern.from_alpha(gates).alpha.tolist() == [[0.5, 0.25]]


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        ([[0.5, 1.2]], r"must lie in \[0, 1\].*got 1.2 in layer 0, KV head 1; clip"),
        ([[-0.1, 1.0]], r"got -0.1 in layer 0, KV head 0"),
        ([[float("inf"), 1.0]], "got inf"),
        ([0.5, 0.5], r"shape \(layers, kv_heads\), got \(2,\)"),
        (np.zeros((0, 4)), r"got \(0, 4\)"),
        ([[0.5], [0.5, 0.5]], "must be a matrix of numbers"),
        ([["a"]], "must be a matrix of numbers"),
        (
            [[0.5, NAN]],
            "alpha of layer 0 must have gates for all of its 2 KV heads or be nan throughout",
        ),
        ([[NAN, NAN]], "no layer is gated"),
    ],
)
def test_bad_alphas_are_refused(alpha, message) -> None:
    with pytest.raises(ValueError, match=message):
        HeadPattern.from_alpha(alpha)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"recent": 0}, "recent must be an integer >= 1, got 0"),
        ({"sink": -1}, "sink must be an integer >= 0, got -1"),
        ({"sink": 1.5}, "sink must be an integer >= 0, got 1.5"),
        ({"recent": 10**30}, "recent must be at most 268435456 tokens, got 10{30}"),
        ({"windows": [None]}, r"windows must have one entry per layer of alpha \(3\), got 1"),
        ({"windows": [None, "a", None]}, "an entry of windows must be an integer >= 1, got 'a'"),
        ({"kv_heads": [4, 4]}, "kv_heads must have one entry per layer"),
        (
            {"raw_alpha": np.zeros((3, 3))},
            r"raw_alpha must hold a finite gate for every entry .*got shape \(3, 3\)",
        ),
        (
            {"raw_alpha": np.full((3, 4), NAN)},
            "raw_alpha must hold a finite gate .*with 12 that are not finite",
        ),
        ({"kv_heads": [4, 4, 3]}, "alpha of layer 2 must have gates for all of its 3 KV heads"),
        ({"kv_heads": [4, 4, 5]}, "alpha of layer 2 must have gates for all of its 5 KV heads"),
    ],
)
def test_bad_fields_are_refused(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        pattern(**fields)


def test_rank_is_by_alpha_then_layer_then_head_and_leaves_out_what_is_not_gated() -> None:
    expected = [(2, 0), (2, 1), (0, 1), (0, 2), (2, 2), (0, 0), (2, 3), (0, 3)]
    assert pattern().rank() == expected
    assert pattern().gated.sum() == 8


def test_layers_may_have_different_numbers_of_kv_heads() -> None:
    made = HeadPattern.from_alpha([[0.5, 0.6, 0.7], [0.8, NAN, NAN], [NAN] * 3], kv_heads=[3, 1, 0])
    policy = made.policy(retrieval_ratio=0.5)
    assert [layer.num_kv_heads for layer in policy.layers] == [3, 1, 0]
    assert [layer.retrieval for layer in policy.layers] == [(2,), (0,), ()]
    assert policy.retrieval_ratio == 0.5


def test_a_pattern_of_this_model_is_valid() -> None:
    made = pattern()
    assert made.validate(config()) is made
    assert made.validate(SimpleNamespace(config=config())) is made
    assert pattern(base_type="llama").validate(config(windows=[None, 512, None])).alpha.shape == (
        3,
        4,
    )


@pytest.mark.parametrize(
    ("made", "other", "message"),
    [
        (pattern(base_model="a/b"), config(layers=4),
         "pattern has 3 layers but the model has 4; it was made for a/b; use the pattern of this model"),
        (pattern(), config(heads=8), "pattern has 4 KV heads in layer 0 but the model has 8"),
        (pattern(base_type="mistral"), config(), "pattern is of a 'mistral' model but the model is 'llama'"),
        (pattern(windows=[None, 512, None]), config(windows=[None, 256, None]),
         "made with native window 512 in layer 1 but the model has 256"),
        (pattern(windows=[None, 512, None]), config(),
         "made with native window 512 in layer 1 but the model has None"),
        (pattern(), config(windows=[512, None, None]),
         r"pattern gates layers \[0\], which in the model have a native sliding window \(512 tokens in layer 0\)"),
    ],
)  # fmt: skip
def test_a_pattern_of_another_model_is_refused(made, other, message) -> None:
    with pytest.raises(ValueError, match=message):
        made.validate(other)


def test_a_layer_can_be_left_to_its_native_window() -> None:
    native = config(windows=[512, None, None])
    made = pattern().ungate([0])
    assert made.validate(native) is made
    assert made.rank() == [place for place in pattern().rank() if place[0] == 2]


def test_a_pattern_made_for_a_model_carries_what_identifies_it() -> None:
    made = HeadPattern.from_alpha(
        pattern().alpha, model=config(windows=[None, 512, None], _name_or_path="some/model"), sink=4
    )
    assert (made.base_model, made.base_type, made.sink) == ("some/model", "llama", 4)
    assert made.windows == (None, 512, None)
    assert made.kv_heads == (4, 4, 4)
    with pytest.raises(ValueError, match="alpha has 3 layers but the model has 2"):
        HeadPattern.from_alpha(pattern().alpha, model=config(layers=2))


def test_a_policy_takes_the_window_of_identification_unless_told() -> None:
    made = pattern(sink=4, recent=32)
    policy = made.policy(retrieval_ratio=0.5)
    assert (policy.sink, policy.recent) == (4, 32)
    policy = made.policy(
        retrieval_ratio=0.5, sink=0, recent=16, prefill_recent=64, streaming_dtype="int4"
    )
    assert (policy.sink, policy.recent, policy.prefill_recent) == (0, 16, 64)
    assert policy.streaming_dtype == "int4"


@pytest.mark.parametrize("ratio", [0.0, 0.125, 0.25, 0.5, 0.75, 1.0])
def test_a_ratio_keeps_exactly_that_many_of_the_gated_heads(ratio: float) -> None:
    made = pattern(windows=[None, 512, None])
    policy = made.policy(retrieval_ratio=ratio)
    kept = [(i, h) for i in (0, 2) for h in policy.layers[i].retrieval]
    assert sorted(made.rank()[: int(8 * ratio)]) == kept
    assert policy.layers[1].retrieval == (0, 1, 2, 3)
    assert policy.retrieval_ratio == ratio


def test_a_budget_is_met_and_the_next_head_would_exceed_it() -> None:
    alpha = np.random.default_rng(0).random((8, 4))
    made = HeadPattern.from_alpha(alpha, sink=64, recent=256)
    for tokens in (4096, 32768):
        policy = made.policy(kv_budget=0.4, tokens=tokens)
        dense = policy.dense_kv_bytes(tokens, head_dim=128)
        kept = sum(len(layer.retrieval) for layer in policy.layers)
        larger = made.policy(retrieval_ratio=(kept + 1) / 32)
        assert (
            policy.kv_bytes(tokens, head_dim=128)
            <= 0.4 * dense
            < larger.kv_bytes(tokens, head_dim=128)
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of retrieval_ratio, kv_budget and threshold"),
        (
            {"retrieval_ratio": 0.5, "threshold": 0.5},
            "exactly one of retrieval_ratio, kv_budget and threshold",
        ),
        ({"retrieval_ratio": 1.2}, r"retrieval_ratio must lie in \[0, 1\], got 1.2"),
        (
            {"kv_budget": 0.0001},
            "kv_budget must be at least .*lower sink, recent or the storage precision$",
        ),
        (
            {"kv_budget": 0.0001, "evict": False},
            "kv_budget must be at least .*lower the storage precision, or let streaming heads forget",
        ),
        (
            {"retrieval_ratio": 0.5, "sink": 10**30},
            "sink must be at most 268435456 tokens, got 10{30}",
        ),
        ({"threshold": NAN}, "threshold must lie in"),
        ({"retrieval_ratio": 0.5, "recent": 0}, "recent must be an integer >= 1"),
        ({"retrieval_ratio": 0.5, "streaming_dtype": "int3"}, "streaming_dtype must be one of"),
    ],
)
def test_bad_selections_are_refused(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        pattern().policy(**arguments)

"""Policies: what they refuse, how they travel, and that they predict the cache's bytes to the byte."""

import itertools
import json
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import DynamicCache, Gemma2Config, LlamaConfig

from duohead.cache import DuoCache
from duohead.policy import HeadPolicy, LayerPolicy
from duohead.storage import MAX_STEP, Store, capacity

DTYPES = ("auto", "bf16", "fp8", "int8", "int4", "int4-hadamard")


def config(layers=2, kv_heads=4, head_dim=64, **more) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2 * kv_heads,
        num_key_value_heads=kv_heads, head_dim=head_dim, vocab_size=32, **more,
    )  # fmt: skip


def two_layers(**fields) -> HeadPolicy:
    return HeadPolicy.from_heads(retrieval=[[3, 0], []], num_kv_heads=4, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"recent": 0}, r"recent must be an integer >= 1 .*got 0; .*is a retrieval head"),
        ({"recent": True}, "recent must be an integer >= 1 .*got True"),
        ({"recent": 2.0}, "recent must be an integer >= 1 .*got 2.0"),
        ({"sink": -1}, "sink must be an integer >= 0, got -1"),
        ({"sink": True}, "sink must be an integer >= 0, got True"),
        ({"sink": None}, "sink must be an integer >= 0, got None"),
        ({"prefill_recent": 255}, r"prefill_recent must be an integer >= recent \(256\), got 255"),
        (
            {"prefill_recent": 512.5},
            r"prefill_recent must be an integer >= recent \(256\), got 512.5",
        ),
        (
            {"retrieval_dtype": "fp4"},
            "retrieval_dtype must be one of auto, bf16, fp8, int8, int4, int4-hadamard, or two of them as KEYS/VALUES "
            "such as 'fp8/int4', got 'fp4'",
        ),
        (
            {"retrieval_dtype": "fp8/int4/int8"},
            "retrieval_dtype must be one of .*got 'fp8/int4/int8'",
        ),
        ({"streaming_dtype": "fp8/"}, "streaming_dtype must be one of .*got 'fp8/'"),
        ({"window_dtype": "int4 / int4"}, "window_dtype must be one of .*got 'int4 / int4'"),
        ({"evict": 0}, "evict must be True or False, got 0"),
        (
            {"evict": False, "prefill_recent": 256},
            "prefill_recent must be None with evict=False.*got 256; leave one of the two out",
        ),
        (
            {"evict": False, "visibility": "chunk"},
            "visibility must be 'token' with evict=False.*got 'chunk'; leave one of the two out",
        ),
        ({"streaming_dtype": "float8"}, "streaming_dtype must be one of .*got 'float8'"),
        ({"window_dtype": None}, "window_dtype must be one of .*got None"),
        ({"visibility": "block"}, "visibility must be 'token' or 'chunk', got 'block'"),
    ],
    ids=lambda case: (
        "-".join(f"{k}={v}" for k, v in case.items()) if isinstance(case, dict) else ""
    ),
)
def test_a_field_out_of_range_is_refused_by_name(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        two_layers(**fields)


@pytest.mark.parametrize("heads", [[0, 0], [4], [-1]], ids=["twice", "too-large", "negative"])
def test_retrieval_heads_must_be_distinct_heads_of_the_layer(heads) -> None:
    with pytest.raises(
        ValueError, match=r"retrieval must list distinct KV heads in 0\.\.3 in ascending order"
    ):
        HeadPolicy.from_heads(retrieval=[heads], num_kv_heads=4)


def test_layer_counts_must_agree_and_there_must_be_a_layer() -> None:
    with pytest.raises(ValueError, match=r"one entry per layer of retrieval \(2\), got 1 and 2"):
        HeadPolicy.from_heads(retrieval=[[], []], num_kv_heads=[4])
    with pytest.raises(ValueError, match=r"one entry per layer of retrieval \(1\), got 1 and 2"):
        HeadPolicy.from_heads(retrieval=[[]], num_kv_heads=4, windows=[None, 8])
    with pytest.raises(ValueError, match="layers must name at least one layer, got none"):
        HeadPolicy(layers=())
    with pytest.raises(ValueError, match=r"retrieval must have one entry per layer \(2\), got 1"):
        two_layers().with_retrieval([[0]])
    with pytest.raises(ValueError, match="window must be None or an integer >= 1, got 0"):
        HeadPolicy.from_heads(retrieval=[[0]], num_kv_heads=4, windows=[0])


@pytest.mark.parametrize("heads", [[0.5], ["0"], 3], ids=["float", "text", "no-list"])
def test_retrieval_heads_must_be_integers(heads) -> None:
    with pytest.raises(ValueError, match="retrieval must list the KV heads of a layer as integers"):
        HeadPolicy.from_heads(retrieval=[heads], num_kv_heads=4)
    with pytest.raises(ValueError, match="retrieval must list the KV heads of a layer as integers"):
        two_layers().with_retrieval([heads, []])


def test_numpy_heads_become_plain_integers() -> None:
    policy = HeadPolicy.from_heads(retrieval=[np.array([3, 0]), []], num_kv_heads=4)
    assert policy == two_layers()
    assert policy.digest() == two_layers().digest()


@pytest.mark.parametrize("count", [-1, 2.0, True])
def test_kv_head_counts_must_be_integers(count) -> None:
    with pytest.raises(ValueError, match=f"num_kv_heads must be an integer >= 0, got {count}"):
        LayerPolicy(count)


def test_heads_are_sorted_and_the_rest_stream() -> None:
    policy = two_layers()
    assert [layer.retrieval for layer in policy.layers] == [(0, 3), ()]
    assert [layer.streaming for layer in policy.layers] == [(1, 2), (0, 1, 2, 3)]
    assert policy.retrieval_ratio == 0.25
    assert policy.with_retrieval([[1], [2, 0]]).layers[1].retrieval == (0, 2)


def test_the_ratio_counts_gated_layers_only() -> None:
    policy = HeadPolicy.from_heads(
        retrieval=[[0], [0, 1], []], num_kv_heads=[2, 2, 0], windows=[None, 8, None]
    )
    assert policy.retrieval_ratio == 0.5
    assert (
        HeadPolicy.from_heads(retrieval=[[0]], num_kv_heads=1, windows=[8]).retrieval_ratio == 1.0
    )


def test_a_policy_survives_json_and_equality_hash_and_digest_follow_its_fields() -> None:
    policy = two_layers(
        sink=4, recent=8, prefill_recent=16, retrieval_dtype="fp8", streaming_dtype="int4"
    ).bind(config(), dtype="bf16")
    again = HeadPolicy.from_dict(json.loads(policy.to_json()))
    assert again == policy
    assert hash(again) == hash(policy)
    assert again.digest() == policy.digest()
    other = two_layers(sink=5, recent=8)
    assert other != policy
    assert other.digest() != policy.digest()


def test_the_digest_is_stable_between_versions() -> None:
    assert two_layers().to_json() == (
        '{"layers":[{"num_kv_heads":4,"retrieval":[0,3],"window":null},'
        '{"num_kv_heads":4,"retrieval":[],"window":null}],"native_dtype":null,"prefill_recent":null,'
        '"recent":256,"retrieval_dtype":"auto","shapes":[],"sink":64,"streaming_dtype":"auto",'
        '"visibility":"token","window_dtype":"auto"}'
    )
    assert two_layers().digest() == "b0bfb92228e5"


def test_a_policy_that_keeps_all_travels_too_and_has_another_digest() -> None:
    policy = two_layers(evict=False, retrieval_dtype="fp8/int4", streaming_dtype="int4/int4")
    assert policy.streaming_dtype == "int4"
    assert policy == two_layers(evict=False, retrieval_dtype="fp8/int4", streaming_dtype="int4")
    again = HeadPolicy.from_dict(json.loads(policy.to_json()))
    assert again == policy
    assert not again.evict
    assert again.with_retrieval([[1], []]).retrieval_dtype == "fp8/int4"
    assert not again.bind(config()).evict
    evicting = replace(policy, evict=True)
    assert "evict" in policy.to_dict()
    assert "evict" not in evicting.to_dict()
    assert HeadPolicy.from_dict(evicting.to_dict()) == evicting
    assert evicting.digest() != policy.digest()


def test_unknown_fields_in_json_are_refused() -> None:
    fields = two_layers().to_dict() | {"sinks": 4}
    with pytest.raises(ValueError, match=r"policy has unknown fields \['sinks'\]; known are"):
        HeadPolicy.from_dict(fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": None}, "layers must be a list, got None; pass what to_dict or to_json gave"),
        ({"layers": "abc"}, "layers must be a list, got 'abc'"),
        ({"layers": [{"retrieval": [0], "window": None}]}, r"layers must .* the fields \['num_kv_heads', "),
        ({"shapes": [{"head_dim": 8}]}, r"shapes must .* the fields \['head_dim', .*got \{'head_dim': 8\}"),
        ({"shapes": [3]}, "shapes must list entries with the fields .*got 3; pass what"),
        ({"layers": [{"num_kv_heads": 1, "retrieval": [], "window": None, "sink": 4}]}, "layers must .*'sink': 4"),
    ],
)  # fmt: skip
def test_damaged_layers_in_json_are_refused(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        HeadPolicy.from_dict(two_layers().to_dict() | fields)


@pytest.mark.parametrize("wrong", [-1, 2.5, True])
def test_sizes_that_no_cache_has_are_refused(wrong) -> None:
    policy = two_layers(retrieval_dtype="fp8")
    for call in (policy.saves_from, lambda **given: policy.kv_bytes(100, **given)):
        with pytest.raises(ValueError, match=f"rollback must be an integer >= 0 .*got {wrong}"):
            call(head_dim=8, rollback=wrong)
        with pytest.raises(ValueError, match=f"head_dim must be .* integer >= 1, got {wrong}"):
            call(head_dim=wrong)


def test_capacity_is_monotone_close_and_exact_at_powers_of_two() -> None:
    slots = [capacity(tokens) for tokens in range(70000)]
    assert slots[0] == capacity(-3) == 0
    assert all(a <= b for a, b in itertools.pairwise(slots))
    assert all(n <= have <= n * 1.125 + 16 for n, have in enumerate(slots))
    assert all(capacity(1 << bits) == 1 << bits for bits in range(4, 24))
    assert len(set(slots)) < 120  # few allocations on the way


def test_steps_of_capacity_are_bounded_at_both_ends() -> None:
    sizes = sorted({capacity(tokens) for tokens in range(1, 1 << 20, 97)} | {capacity(1)})
    assert sizes[0] == 16
    assert max(b - a for a, b in itertools.pairwise(sizes)) == MAX_STEP


def test_capacity_says_the_same_of_its_own_result() -> None:
    """So that the size depends on the length alone, however the tokens arrived."""
    assert all(capacity(capacity(tokens)) == capacity(tokens) for tokens in range(1, 20000, 7))


def fill(
    cache: DuoCache, counts: list[int], *, batch: int, dims: dict[int, tuple[int, int, int]], dtype
) -> None:
    for count in counts:
        for index, (heads, key_dim, value_dim) in dims.items():
            keys = torch.zeros(batch, heads, count, key_dim, dtype=dtype)
            handle, _ = cache.update(
                keys, torch.zeros(batch, heads, count, value_dim, dtype=dtype), index
            )
            handle.open(None)
            handle.commit()


def history(draw: random.Random, tokens: int) -> list[int]:
    counts = []
    while tokens:
        counts.append(min(tokens, draw.choice((1, 7, 64, 500, 4000))))
        tokens -= counts[-1]
    return counts


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
@pytest.mark.parametrize("streaming", DTYPES)
@pytest.mark.parametrize("retrieval", DTYPES)
def test_predicted_bytes_are_the_allocated_bytes(retrieval, streaming, static) -> None:
    draw = random.Random(f"{retrieval} {streaming} {static}")
    for tokens in [*draw.sample(range(1, 5001), 3), 1, 16, 65]:
        policy = HeadPolicy.from_heads(
            retrieval=[[0], [1, 0], [], [1]], num_kv_heads=2, windows=[None, None, None, 40],
            sink=draw.choice((0, 1, 64)), recent=draw.choice((1, 63, 256)), evict=(evict := draw.random() < 0.7),
            prefill_recent=draw.choice((None, 300)) if evict else None,
            retrieval_dtype=f"{retrieval}/{draw.choice(DTYPES)}",
            streaming_dtype=f"{draw.choice(DTYPES)}/{streaming}", window_dtype=draw.choice(DTYPES),
        )  # fmt: skip
        batch, rollback = draw.randint(1, 3), draw.choice((0, 5, 128))
        dtype = draw.choice((torch.float32, torch.bfloat16))
        length = tokens + draw.choice((0, 100)) if static else None
        cache = DuoCache(policy, max_length=length, rollback=rollback)
        dims = dict.fromkeys(range(4), (2, 16, 16))
        fill(cache, history(draw, tokens), batch=batch, dims=dims, dtype=dtype)
        predicted = policy.kv_bytes(
            length or tokens, batch, head_dim=16, dtype=dtype, rollback=rollback
        )
        assert cache.kv_bytes() == predicted, (tokens, policy)


def test_bytes_follow_the_geometry_of_a_bound_model() -> None:
    shape = SimpleNamespace(
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_size=64,
        head_dim=32,
        v_head_dim=48,
    )
    policy = HeadPolicy.from_heads(
        retrieval=[[0], []], num_kv_heads=2, sink=4, recent=12, retrieval_dtype="int8"
    )
    bound = policy.bind(shape, dtype="fp32")
    cache = DuoCache(bound)
    fill(cache, [100], batch=1, dims=dict.fromkeys(range(2), (2, 32, 48)), dtype=torch.float32)
    assert cache.kv_bytes() == bound.kv_bytes(100) == 112 * (34 + 50) + 3 * 16 * 4 * (32 + 48)
    with pytest.raises(ValueError, match=r"head_dim is needed .*pass head_dim= or bind\(model\)"):
        policy.kv_bytes(100)


def test_bytes_are_those_of_the_paper_arithmetic() -> None:
    """At 64 K tokens, half the heads streaming and bf16: a little over half of the dense cache."""
    policy = HeadPolicy.from_heads(retrieval=[[0, 1]] * 32, num_kv_heads=4, sink=64, recent=256)
    dense = policy.dense_kv_bytes(65536, head_dim=128)
    assert dense == 32 * 4 * 65536 * 256 * 2
    assert policy.kv_bytes(65536, head_dim=128) == dense // 2 + 32 * 2 * 320 * 256 * 2
    small = HeadPolicy.from_heads(
        retrieval=[[0, 1]] * 32, num_kv_heads=4, retrieval_dtype="fp8", streaming_dtype="int4"
    )
    assert small.kv_bytes(65536, head_dim=128) == 32 * 2 * (65536 * 260 + 320 * 136)


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 100])
def test_dense_bytes_are_those_of_the_cache_of_transformers(tokens) -> None:
    shape = Gemma2Config(
        hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, vocab_size=32, sliding_window=8,
    )  # fmt: skip
    policy = HeadPolicy.from_heads(retrieval=[[0, 1]] * 4, num_kv_heads=2).bind(shape, dtype="fp32")
    assert [layer.window for layer in policy.layers] == [8, None, 8, None]
    cache = DynamicCache(config=shape)
    for index in range(4):
        cache.update(torch.zeros(3, 2, tokens, 32), torch.zeros(3, 2, tokens, 32), index)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert policy.dense_kv_bytes(tokens, batch=3) == held


def test_binding_fills_in_the_model_and_checks_it() -> None:
    bound = two_layers().bind(config(head_dim=48), dtype=torch.float16)
    assert [(shape.num_kv_heads, shape.head_dim, shape.value_dim) for shape in bound.shapes] == [
        (4, 48, 48)
    ] * 2
    assert bound.native_dtype == "float16"
    assert bound.bind(config(head_dim=48), dtype="fp16") == bound
    assert two_layers().bind(config()).native_dtype == "bfloat16"
    assert two_layers().bind(config(dtype="float32")).native_dtype == "float32"
    with pytest.raises(
        ValueError, match="policy has 2 layers but the model has 3; use a policy or pattern"
    ):
        two_layers().bind(config(layers=3))
    with pytest.raises(ValueError, match="policy has 4 KV heads in layer 0 but the model has 8"):
        two_layers().bind(config(kv_heads=8))
    with pytest.raises(
        ValueError, match="config must describe a decoder .*got SimpleNamespace without them"
    ):
        two_layers().bind(SimpleNamespace())
    with pytest.raises(
        ValueError, match="layer 0 has attention type 'chunked_attention', .* does not support"
    ):
        two_layers().bind(config(layer_types=["chunked_attention"] * 2))


def test_binding_takes_the_models_windows_and_refuses_others() -> None:
    windowed = LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        layer_types=["sliding_attention", "full_attention"], sliding_window=128,
    )  # fmt: skip
    bound = two_layers().bind(windowed)
    assert [layer.window for layer in bound.layers] == [128, None]
    assert two_layers(windows=[128, None]).bind(windowed) == bound == bound.bind(windowed)
    with pytest.raises(
        ValueError,
        match="native window of 64 tokens in layer 0 but the model has one of 128 tokens; leave windows out",
    ):
        two_layers(windows=[64, None]).bind(windowed)
    with pytest.raises(ValueError, match="of 128 tokens in layer 0 but the model has none"):
        bound.bind(config())


def everything(*heads: int, dtype: str, ring: int | None = None, kind="retrieval") -> Store:
    return Store(kind, heads, dtype, 0, ring, sees_all=True)


def test_a_policy_says_what_each_layer_stores() -> None:
    policy = HeadPolicy.from_heads(
        retrieval=[[0], [], [0, 1], [1], []], num_kv_heads=[2, 2, 2, 2, 0], windows=[None, None, None, 16, None],
        sink=4, recent=32, prefill_recent=48, retrieval_dtype="fp8", streaming_dtype="int4", window_dtype="bf16",
    )  # fmt: skip
    assert [list(policy.stores(index)) for index in range(5)] == [
        [everything(0, dtype="fp8"), Store("streaming", (1,), "int4", 4, 48, sees_all=False)],
        [Store("streaming", (0, 1), "int4", 4, 48, sees_all=False)],
        [everything(0, 1, dtype="fp8")],
        # The window is all that they see, as `recent` reaches further.
        [
            everything(1, dtype="bf16", ring=16),
            everything(0, dtype="int4", ring=16, kind="streaming"),
        ],
        [],
    ]
    shorter = replace(policy, recent=15)
    assert list(shorter.stores(3))[1] == Store("streaming", (0,), "int4", 4, 16, sees_all=False)
    kept = replace(policy, evict=False, prefill_recent=None)
    assert [store for index in (0, 3) for store in kept.stores(index)] == [
        everything(0, dtype="fp8"), everything(1, dtype="int4", kind="streaming"),
        everything(1, dtype="bf16", ring=16), everything(0, dtype="int4", ring=16, kind="streaming"),
    ]  # fmt: skip


def test_policies_are_frozen() -> None:
    with pytest.raises(AttributeError):
        two_layers().sink = 3  # type: ignore[misc]
    with pytest.raises(AttributeError):
        LayerPolicy(2).window = 3  # type: ignore[misc]

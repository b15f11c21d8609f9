"""The Triton decode kernel against the fp64 oracle: in the interpreter without a GPU, compiled with one.

Every case builds storage as a cache would have left it, with NaN (or its bytes) in each slot that holds no token, and
with every buffer that the kernel allocates poisoned as well.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field, replace

import pytest
import torch
from oracle import Inputs, assert_within_budget, inputs, make_policy, policy_mask, stored
from torch import Tensor

from duohead import codec
from duohead.cache.view import Segment, StoredView
from duohead.policy import HeadPolicy

pytest.importorskip("triton")

from duohead.attention import triton_decode

HADAMARD = codec.HADAMARD
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
bf16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu, id="bf16")
fp16, fp32 = pytest.param(torch.float16, id="fp16"), pytest.param(torch.float32, id="fp32")


@dataclass(frozen=True)
class Case:
    """One call: a policy of ``kind`` over ``kv_heads`` heads, ``length`` tokens of which the last ``count`` are asked.

    Heads that see all of a window have a ring if ``segments`` is 1, as in the cache, else a store of every token.
    """

    length: int = 200
    kind: str = "alternating"
    kv_heads: int = 2
    groups: int = 4
    count: int = 1
    dim: int = 64
    value_dim: int | None = None
    batch: int = 1
    padding: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32
    retrieval: str = "auto"
    streaming: str = "auto"
    sink: int = 4
    recent: int = 63
    evict: bool = True
    slack: int = 0
    window: int | None = None
    segments: int = 1
    room: int = 40
    on_device: bool = True
    options: dict[str, object] = field(default_factory=dict)

    def inputs(self) -> Inputs:
        return inputs(
            self.length, kv_heads=self.kv_heads, groups=self.groups, dim=self.dim, value_dim=self.value_dim,
            batch=self.batch, padding=self.padding, dtype=self.dtype, seed=self.length,
        )  # fmt: skip

    def policy(self) -> HeadPolicy:
        policy = make_policy(
            self.kind, self.kv_heads, sink=self.sink, recent=self.recent,
            retrieval_dtype=self.retrieval, window_dtype=self.retrieval, streaming_dtype=self.streaming,
            evict=self.evict,
        )  # fmt: skip
        if self.window is None:
            return policy
        return replace(policy, layers=(replace(policy.layers[0], window=self.window),))


def poison(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """NaN, or bytes that are NaN in e4m3."""
    tensor = torch.empty(shape, dtype=dtype)
    return tensor.fill_(torch.nan if dtype.is_floating_point else 0x7F)


def linear(part: Tensor, low: int, high: int) -> Tensor:
    """Slots of the tokens [low, high) of encoded [B, G, T, width]."""
    store = poison((*part.shape[:2], high - low, part.shape[3]), part.dtype)
    here = part[:, :, low:high]
    store[:, :, : here.shape[2]] = here
    return store


def ring(part: Tensor, sink: int, slots: int, padding: Tensor) -> Tensor:
    """Sinks and a ring of ``slots`` after every token of ``part`` has come, one after the other."""
    store = poison((*part.shape[:2], sink + slots, part.shape[3]), part.dtype)
    for row, skip in enumerate(padding.tolist()):
        position = torch.arange(part.shape[2] - skip)
        slot = torch.where(position < sink, position, sink + (position - sink) % slots)
        last = (position < sink) | (position >= len(position) - slots)
        store[row, :, slot[last]] = part[row, :, skip:][:, last]
    return store


def views_of(case: Case, x: Inputs, policy: HeadPolicy) -> list[StoredView]:
    padding = torch.tensor(x.padding or (0,) * x.query.shape[0])
    views = []
    for spec in policy.stores(0):
        heads = list(spec.heads)
        storage = codec.pair(spec.dtype, native=case.dtype)
        sides = storage.keys.encode(x.keys[:, heads]), storage.values.encode(x.values[:, heads])
        reach, slots = spec.ring, None
        if spec.ring is None or (case.segments > 1 and spec.sees_all):
            room = case.length + case.room
            bounds = [room * part // case.segments for part in range(case.segments + 1)]
            segments = [
                Segment(*(tuple(linear(p, low, high).to(DEVICE) for p in side) for side in sides), first=low)
                for low, high in itertools.pairwise(bounds)
            ]  # fmt: skip
        else:
            slots = spec.ring + case.count - 1 + case.slack
            segments = [
                Segment(*(tuple(ring(p, spec.sink, slots, padding).to(DEVICE) for p in side) for side in sides))
            ]  # fmt: skip
        views.append(
            StoredView(
                heads=None if len(heads) == case.kv_heads else torch.tensor(heads, device=DEVICE),
                codecs=(storage.keys.name, storage.values.name), segments=tuple(segments), sink=spec.sink,
                ring=slots, reach=reach, window=case.window,
                tokens=torch.tensor(case.length, device=DEVICE) if case.on_device else case.length,
                padding=None if x.padding is None else padding.to(DEVICE),
            )
        )  # fmt: skip
    return views


def check(case: Case, x: Inputs | None = None) -> None:
    """Hold one call against the oracle."""
    x, policy = x or case.inputs(), case.policy()
    options = {"scale": case.dim**-0.5} | case.options
    if options.pop("sink_logits", None):
        options["sink_logits"] = torch.linspace(-2, 4, case.kv_heads * case.groups).to(case.dtype)
    on_device = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in options.items()}
    last = slice(case.length - case.count, None)
    query = x.query[:, :, last]
    got = triton_decode.attend(query.to(DEVICE), views_of(case, x, policy), **on_device).cpu()
    position = x.position
    mask = policy_mask(policy, 0, position[:, last], position)
    seen = stored(policy, x)
    assert_within_budget(
        got, query, seen.keys, seen.values, mask, real=position[:, last] >= 0, **options
    )


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel allocates holds NaN: nothing may be read that was not written."""

    def nans(*shape: object, **options: object) -> Tensor:
        return torch.full(shape, torch.nan, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(triton_decode, "_empty", nans)


def check_all(cases: list[Case]) -> None:
    for case in cases:
        try:
            check(case)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


@pytest.mark.parametrize("dtype", [fp16, fp32, bf16])
@pytest.mark.parametrize("name", ["auto", "fp8", "int8", "int4", HADAMARD])
def test_every_codec_is_read_as_it_was_written(name: str, dtype: torch.dtype) -> None:
    check_all(
        [
            Case(dtype=dtype, retrieval=name, streaming=name),
            Case(
                dtype=dtype, retrieval=name, streaming=name, length=65, count=3, dim=128, kind="all"
            ),
        ]
    )


@pytest.mark.parametrize("dtype", [fp16, bf16])
@pytest.mark.parametrize(
    ("retrieval", "streaming"), [("fp8", "int4"), ("int8", "auto"), ("bf16", "fp8"), ("int4", "int8"),
     (HADAMARD, "int4"), ("fp8", HADAMARD), ("int8/int4-hadamard", "int4-hadamard/int8")],
)  # fmt: skip
def test_the_two_kinds_may_be_stored_differently(
    retrieval: str, streaming: str, dtype: torch.dtype
) -> None:
    check(Case(dtype=dtype, retrieval=retrieval, streaming=streaming))


@pytest.mark.parametrize("dtype", [fp32, bf16])
@pytest.mark.parametrize("length", [1, 63, 127, 129, 1000])
def test_lengths_that_hurt(length: int, dtype: torch.dtype) -> None:
    check_all(
        [
            Case(length=length, dtype=dtype),
            Case(length=length, dtype=dtype, on_device=False, kind="all", room=0, groups=1),
            Case(length=length, dtype=dtype, kind="none", streaming="int4", recent=256),
        ]
    )


@pytest.mark.parametrize("dtype", [fp32, bf16])
@pytest.mark.parametrize("groups", [1, 4, 7, 8, 20])
def test_groups_and_a_handful_of_queries(groups: int, dtype: torch.dtype) -> None:
    counts = (1, 3, 8) if groups < 20 else (8,)
    check_all([Case(groups=groups, count=count, dtype=dtype, length=140) for count in counts])


@pytest.mark.parametrize("sink", [0, 1, 4, 64])
@pytest.mark.parametrize("recent", [1, 63, 256])
def test_rings_before_and_after_they_wrap(sink: int, recent: int) -> None:
    check_all(
        [
            Case(length=length, kind="none", kv_heads=1, sink=sink, recent=recent, count=count, slack=slack)
            for length, count, slack in ((30, 1, 0), (330, 1, 3), (401, 3, 0))
        ]
    )  # fmt: skip


@pytest.mark.parametrize("retrieval", ["auto", "int4"])
def test_left_padding_moves_the_sinks_and_hides_tokens(retrieval: str) -> None:
    check_all(
        [
            Case(length=180, padding=(0, 5, 70, 179), retrieval=retrieval, dtype=torch.float16),
            Case(length=180, padding=(0, 178, 180), count=4, retrieval=retrieval, streaming="fp8"),
        ]
    )


@pytest.mark.parametrize("window", [1, 30, 100])
def test_native_windows_limit_every_head(window: int) -> None:
    check_all(
        [
            Case(length=250, window=window),
            Case(length=250, window=window, count=5, padding=(0, 200), sink=20, recent=50),
            Case(length=250, window=window, count=3, padding=(0, 150), segments=2),
        ]
    )


@pytest.mark.parametrize(
    "options",
    [{"softcap": 20.0}, {"sink_logits": True}, {"softcap": 3.0, "sink_logits": True, "scale": 0.3}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [fp16, fp32, bf16])
def test_softcap_and_learned_sinks(options: dict[str, object], dtype: torch.dtype) -> None:
    check_all(
        [
            Case(options=options, dtype=dtype, count=2),
            Case(options=options, dtype=dtype, retrieval="int8", padding=(0, 199)),
        ]
    )


@pytest.mark.parametrize("retrieval", ["auto", "int8", "int4", HADAMARD])
@pytest.mark.parametrize("segments", [2, 5])
def test_a_growing_cache_is_read_segment_by_segment(segments: int, retrieval: str) -> None:
    check_all(
        [
            Case(segments=segments, retrieval=retrieval),
            # The last segments are empty still, and the first ones may be padding.
            Case(segments=segments, retrieval=retrieval, room=300, padding=(0, 150), count=3),
            Case(segments=segments, kind="all", window=50, on_device=False),
        ]
    )


@pytest.mark.parametrize("dtype", [fp16, bf16])
@pytest.mark.parametrize(
    ("dim", "value_dim"), [(64, 128), (80, 80), (96, 64), (112, 112), (128, 96), (256, 256)]
)
def test_head_sizes(dim: int, value_dim: int, dtype: torch.dtype) -> None:
    check_all(
        [
            Case(dim=dim, value_dim=value_dim, dtype=dtype, retrieval=retrieval, streaming=streaming, length=100)
            for retrieval, streaming in (("auto", "int4"), ("int4", "fp8"), (HADAMARD, "fp8/int4-hadamard"))
        ]
    )  # fmt: skip


@pytest.mark.parametrize("name", ["fp8", "int8", "int4", HADAMARD])
def test_large_and_small_scales_neither_overflow_nor_vanish(name: str) -> None:
    for dtype in (torch.float16, torch.float32):
        case = Case(dtype=dtype, retrieval=name, kind="all", length=90)
        x = case.inputs()
        grow = torch.logspace(-3, 4, case.length)[:, None].to(dtype)
        check(case, replace(x, keys=x.keys / 64, values=x.values * grow))


def test_a_graph_may_be_replayed_at_every_length() -> None:
    """The same tensors and launch, only the length on the device changes."""
    x, case = Case(length=160).inputs(), Case(length=160, sink=2, recent=20)
    policy = case.policy()
    for length in (160, 3, 64, 65, 128):
        now = replace(case, length=length)
        part = Inputs(x.query[:, :, :length], x.keys[:, :, :length], x.values[:, :, :length])
        views = views_of(replace(now, room=160 - length), part, policy)
        got = triton_decode.attend(part.query[:, :, -1:].to(DEVICE), views, scale=0.125).cpu()
        position = part.position
        mask = policy_mask(policy, 0, position[:, -1:], position)
        assert_within_budget(got, part.query[:, :, -1:], part.keys, part.values, mask, scale=0.125)


def test_random_small_cases() -> None:
    draw = random.Random(1)
    for seed in range(400 if DEVICE == "cuda" else 12):
        length = draw.randint(1, 300)
        count = draw.choice([c for c in (1, 1, 1, 2, 5) if c <= length])
        codecs = draw.choice([("auto", "auto"), ("fp8", "int4"), (HADAMARD, "int8/int4-hadamard")])
        check_all(
            [
                Case(
                    length=length, count=count, kind=draw.choice(["alternating", "alternating", "all", "none"]),
                    retrieval=codecs[0], streaming=codecs[1], sink=draw.randint(0, 70),
                    recent=draw.randint(1, 150), slack=draw.randint(0, 9), room=draw.randint(0, 200),
                    padding=draw.choice([None, (0, draw.randint(0, length))]), groups=draw.choice([1, 4]),
                    window=draw.choice([None, None, draw.randint(1, 200)]), segments=draw.choice([1, 1, 2]),
                    dtype=torch.float32 if seed % 2 else torch.float16,
                )
            ]
        )  # fmt: skip


def test_query_heads_may_be_strided() -> None:
    case = Case(kind="all")
    x = case.inputs()
    views = views_of(case, x, case.policy())
    query = x.query[:, :, -3:].to(DEVICE)
    strided = query.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    got, expected = (triton_decode.attend(each, views, scale=0.1) for each in (strided, query))
    assert torch.equal(got, expected)


def views_and_query(**fields: object) -> tuple[Tensor, list[StoredView]]:
    case = Case(**fields)  # type: ignore[arg-type]
    x = case.inputs()
    query = x.query[:, :, case.length - case.count :].to(DEVICE)
    return query, views_of(case, x, case.policy())


def test_too_many_query_tokens_are_refused() -> None:
    query, views = views_and_query(count=9)
    with pytest.raises(ValueError, match=r"1 to 8 query tokens, got 9; use prefill"):
        triton_decode.attend(query, views, scale=1.0)


def test_the_views_have_to_cover_the_heads_once() -> None:
    query, views = views_and_query()
    with pytest.raises(ValueError, match=r"one or two views, got 3"):
        triton_decode.attend(query, [*views, views[0]], scale=1.0)
    with pytest.raises(ValueError, match=r"multiple of the 2 KV heads of its views, got 7 heads"):
        triton_decode.attend(query[:, :7], views, scale=1.0)


def test_a_ring_has_to_reach_as_far_as_its_oldest_query() -> None:
    query, views = views_and_query(count=3)
    short = [view if view.ring is None else replace(view, ring=view.ring - 1) for view in views]
    with pytest.raises(ValueError, match=r"ring must have 65 slots.* got 64; .*rollback=2"):
        triton_decode.attend(query, short, scale=1.0)


def test_storage_has_to_be_contiguous() -> None:
    query, views = views_and_query(kind="all")
    sliced = Segment(
        tuple(k[:, :, 1:] for k in views[0].segments[0].keys), views[0].segments[0].values
    )
    with pytest.raises(ValueError, match=r"must be contiguous.* call \.contiguous\(\)"):
        triton_decode.attend(query, [replace(views[0], segments=(sliced,))], scale=1.0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, r"dtype torch\.float64; the kernel computes in"),
        ({"dim": 66}, r"multiple of 4 up to 256, got 66"),
        ({"dim": 260}, r"multiple of 4 up to 256, got 260"),
    ],
)
def test_what_it_cannot_do_has_a_reason(change: dict[str, object], reason: str) -> None:
    query, views = views_and_query(kind="all", **change)
    with pytest.raises(ValueError, match=rf"{reason}.*use impl='tiled'"):
        triton_decode.attend(query, views, scale=1.0)
    assert triton_decode.supports(query) is not None
    assert "got 300" in str(triton_decode.supports(query[..., :64].float(), value_dim=300))


def test_gradients_are_not_for_this_kernel() -> None:
    query, views = views_and_query()
    query.requires_grad_()
    reason = triton_decode.supports(query, views)
    assert reason is not None and "no gradient" in reason
    with torch.no_grad():
        assert triton_decode.supports(query, views) is None

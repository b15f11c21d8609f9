"""The Triton prefill against the fp64 oracle: in the interpreter and on a GPU, by pointers and by descriptors."""

import random
from dataclasses import dataclass, replace

import pytest
import torch
from oracle import Inputs, direct_views, hold, inputs, make_policy

pytest.importorskip("triton", reason="needs Triton")

from duohead.attention import triton_prefill
from duohead.attention.triton_launch import Launch
from duohead.attention.triton_tiles import Tiles, forward_tiles, pack_of
from duohead.cache import DuoLayer
from duohead.cache.view import HeadView, Piece
from duohead.policy import HeadPolicy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def to_device(view: HeadView) -> HeadView:
    """The view with what it holds on the test's device."""

    def moved(piece: Piece | None) -> Piece | None:
        if piece is None:
            return None
        return Piece(lambda: tuple(x.to(DEVICE) for x in piece.read()), piece.position.to(DEVICE))

    return replace(
        view,
        heads=None if view.heads is None else view.heads.to(DEVICE),
        sinks=moved(view.sinks),
        past=tuple(moved(piece) for piece in view.past),
        keys=view.keys.to(DEVICE),
        values=view.values.to(DEVICE),
        key_position=view.key_position.to(DEVICE),
        query_position=view.query_position.to(DEVICE),
    )


def attend(query: torch.Tensor, views: list[HeadView], **options) -> torch.Tensor:
    """All heads, into an output full of NaN."""
    kv_heads = sum(view.keys.shape[1] for view in views)
    rows, heads, count, _ = query.shape
    out = query.new_full((rows, count, heads, views[0].values.shape[-1]), torch.nan).to(DEVICE)
    logits = options.pop("sink_logits", None)
    options["sink_logits"] = None if logits is None else logits.to(DEVICE)
    for view in views:
        triton_prefill.attend(query.to(DEVICE), to_device(view), out, kv_heads=kv_heads, **options)
    return out.cpu()


def without_cache(policy: HeadPolicy, x: Inputs, *, queries: int | None = None, **options):
    options.setdefault("scale", x.query.shape[-1] ** -0.5)
    count = x.query.shape[2] if queries is None else queries
    views = direct_views(policy, 0, x.keys, x.values, queries=count, mask=x.mask)
    return attend(x.query[:, :, -count:], views, **options)


def through_cache(policy: HeadPolicy, x: Inputs, chunks: list[int], *, max_length=None, **options):
    options.setdefault("scale", x.query.shape[-1] ** -0.5)
    layer = DuoLayer(policy, 0, max_length=max_length)
    outs, start = [], 0
    for count in chunks:
        part = slice(start, start + count)
        handle, _ = layer.update(x.keys[:, :, part], x.values[:, :, part])
        views = handle.open(None if x.mask is None else x.mask[:, : start + count])
        outs.append(attend(x.query[:, :, part], views, **options))
        handle.commit()
        start += count
    return torch.cat(outs, dim=1)


@dataclass(frozen=True)
class Case:
    length: int
    sink: int
    recent: int
    group: int
    dim: int
    kind: str
    chunk: int | None
    padded: bool
    dtype: torch.dtype
    storage: str

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return (
            f"n{self.length}-s{self.sink}-r{self.recent}-x{self.group}-d{self.dim}-{self.kind}"
            f"-c{self.chunk or 'all'}-{name}-{self.storage}{'-padded' * self.padded}"
        )


def sampled(count: int, *, seed: int, **axes: tuple) -> list[Case]:
    """Random corners of the cross product, every value of an axis in several of them."""
    draw = random.Random(seed)
    decks = [draw.sample((axis * count)[:count], count) for axis in axes.values()]
    return [Case(**dict(zip(axes, values, strict=True))) for values in zip(*decks, strict=True)]


SMALL = sampled(
    14,
    seed=3,
    length=(1, 63, 127, 129, 200),
    sink=(0, 1, 4, 64),
    recent=(1, 63, 256),
    group=(1, 4, 7),
    dim=(64, 128, 80),
    kind=("none", "all", "alternating"),
    chunk=(7, 64, None, None),
    padded=(False, True),
    dtype=(torch.float16, torch.float16, torch.float32),
    storage=("auto", "auto", "int8"),
)


def check(case: Case) -> None:
    """Without a cache, and in chunks through one."""
    policy = make_policy(
        case.kind, 2, sink=case.sink, recent=case.recent,
        retrieval_dtype=case.storage, streaming_dtype=case.storage,
    )  # fmt: skip
    padding = [0, min(50, case.length - 1)] if case.padded else None
    x = inputs(
        case.length, kv_heads=2, groups=case.group, dim=case.dim, padding=padding, dtype=case.dtype
    )
    if case.chunk is None:
        hold(without_cache(policy, x), policy, x)
    else:
        # Two small chunks in the middle of few large ones show what many would, faster.
        chunk = min(case.chunk, case.length)
        middle = [chunk, min(chunk, case.length - chunk)]
        rest = case.length - sum(middle)
        hold(
            through_cache(policy, x, [n for n in (rest - rest // 2, *middle, rest // 2) if n]),
            policy,
            x,
        )


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_shapes_that_hurt_stay_within_the_budget(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("extra", ["softcap", "sink-logits", "both", "value-size"])
def test_what_models_add_to_attention_is_honoured(extra: str) -> None:
    options = {"scale": 0.2}
    if extra in ("softcap", "both"):
        options["softcap"] = 1.5
    if extra in ("sink-logits", "both"):
        options["sink_logits"] = torch.linspace(-2.0, 4.0, 4)
    x = inputs(
        150, kv_heads=2, groups=2, dim=32, value_dim=24 if extra == "value-size" else 32,
        padding=[0, 40], dtype=torch.float16,
    )  # fmt: skip
    policy = make_policy("alternating", 2, sink=4, recent=33)
    hold(through_cache(policy, x, [90, 60], **options), policy, x, **options)


@pytest.mark.parametrize("window", [1, 3, 100])
@pytest.mark.parametrize("kind", ["none", "all"])
def test_native_windows_apply_on_top_also_to_sinks(kind: str, window: int) -> None:
    policy = make_policy(kind, 2, sink=4, recent=63, windows=[window])
    x = inputs(260, kv_heads=2, dim=16, padding=[0, 30], dtype=torch.float16)
    hold(through_cache(policy, x, [150, 100, 10]), policy, x)
    hold(without_cache(policy, x), policy, x)


@pytest.mark.parametrize("dim", [96, 112, 256])
def test_any_head_size_up_to_256(dim: int) -> None:
    policy = make_policy("alternating", 2, sink=4, recent=40)
    x = inputs(100, kv_heads=2, groups=2, dim=dim, dtype=torch.float16)
    hold(without_cache(policy, x), policy, x)


def test_a_past_of_several_blocks_is_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a past are joined up to a bound of bytes; beyond it, sums are carried from launch to launch."""
    monkeypatch.setattr("duohead.cache.store.READ_LIMIT", 32)
    monkeypatch.setattr(triton_prefill, "PAST_BYTES", 64 * 2 * 2 * (32 + 24) * 2)
    policy = make_policy("alternating", 3, sink=4, recent=33, retrieval_dtype="int8")
    for padding in (None, [0, 110]):
        x = inputs(
            230, kv_heads=3, groups=2, dim=32, value_dim=24, padding=padding, dtype=torch.float16
        )
        options = {"sink_logits": torch.linspace(-1.0, 2.0, 6), "scale": 0.2}
        hold(through_cache(policy, x, [100, 30, 100], **options), policy, x, **options)


def test_a_past_whose_length_only_the_device_knows() -> None:
    """As a static cache gives it under CUDA graphs: every slot, the empty ones marked."""
    policy = make_policy("all", 2, sink=0, recent=1)
    x = inputs(140, kv_heads=2, dim=32, padding=[0, 90], dtype=torch.float16)
    (whole,) = direct_views(policy, 0, x.keys, x.values, queries=60, mask=x.mask)
    slots = 120
    store = (torch.zeros(2, 2, slots, 32, dtype=torch.float16) for _ in "kv")
    keys, values = (
        torch.cat([held[:, :, :80], empty[:, :, 80:]], dim=2)
        for held, empty in zip((x.keys, x.values), store, strict=True)
    )
    position = torch.where(torch.arange(slots) < 80, torch.arange(slots), -1)
    position = (position[None] - torch.tensor([[0], [90]])).clamp(min=-1)
    view = replace(
        whole,
        past=(Piece(lambda: (keys, values), position),),
        keys=x.keys[:, :, 80:],
        values=x.values[:, :, 80:],
        key_position=whole.key_position[:, 80:],
    )
    got = attend(x.query[:, :, 80:], [view], scale=32**-0.5)
    hold(got, policy, x, queries=slice(80, 140))


@pytest.mark.parametrize("count", [1, 8, 60])
def test_plain_tensors_with_a_past_belong_to_the_last_queries(count: int) -> None:
    policy = make_policy("alternating", 2, sink=4, recent=32, streaming_dtype="int8")
    x = inputs(150, kv_heads=2, groups=2, dim=32, padding=[0, 60], dtype=torch.float16)
    got = without_cache(policy, x, queries=count)
    hold(got, policy, x, queries=slice(150 - count, 150))


def test_a_longer_window_during_prefill() -> None:
    policy = make_policy("none", 1, sink=4, recent=16, prefill_recent=90)
    x = inputs(200, kv_heads=1, dim=32, dtype=torch.float16)
    hold(through_cache(policy, x, [120, 80]), policy, x, recent=90)


@pytest.mark.parametrize("kind", ["none", "all"])
def test_tiles_by_descriptor_are_the_tiles_by_pointer(kind: str) -> None:
    """What Hopper's accelerator loads; its zeros beyond the ends must not count as keys."""
    policy = make_policy(kind, 2, sink=4, recent=33)
    x = inputs(
        150, kv_heads=2, groups=2, dim=24, value_dim=16, padding=[0, 70], dtype=torch.float16
    )
    (view,) = map(to_device, direct_views(policy, 0, x.keys, x.values, queries=150, mask=x.mask))
    outs = []
    for tma in (False, True):
        out = x.query.new_full((2, 150, 4, 16), torch.nan, device=DEVICE)
        launch = Launch(
            x.query.to(DEVICE), view.keys, view.values, out, heads=None, kv_heads=2, tma=tma,
            position=view.key_position, sink=4 if view.sinks else 0, reach=view.reach, window=None,
            scale=0.2, softcap=None, sink_logits=None,
        )  # fmt: skip
        sinks = None if view.sinks is None else view.sinks.read()
        launch(sinks=sinks, tiles=Tiles(16, 2, 32, 4, 1))
        outs.append(out)
    assert torch.equal(*outs)
    hold(outs[0].cpu(), policy, x, scale=0.2)


def test_strides_do_not_matter() -> None:
    """Models hand over transposed projections."""
    policy = make_policy("alternating", 2, sink=4, recent=33)
    x = inputs(100, kv_heads=2, groups=2, dim=32, dtype=torch.float16)
    strided = Inputs(
        *(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x.query, x.keys, x.values))
    )
    assert torch.equal(without_cache(policy, x), without_cache(policy, strided))


def test_what_it_cannot_do_is_said() -> None:
    def reason(x: Inputs, kind: str = "none", **options) -> str | None:
        policy = make_policy(kind, 2, sink=4, recent=8, **options)
        (view,) = direct_views(policy, 0, x.keys, x.values, queries=x.query.shape[2], mask=None)
        return triton_prefill.supports(x.query.to(DEVICE), to_device(view))

    x = inputs(20, kv_heads=2, dim=16)
    assert reason(x) is None
    assert "chunk" in str(reason(x, visibility="chunk"))
    assert "float64" in str(reason(x.to(torch.float64)))
    assert "at most 256" in str(reason(inputs(20, kv_heads=2, dim=288)))
    wanted = Inputs(x.query.clone().requires_grad_(), x.keys, x.values)
    assert "gradient" in str(reason(wanted))
    with torch.no_grad():
        assert reason(wanted) is None
    policy = make_policy("alternating", 2, sink=4, recent=8)
    view = direct_views(policy, 0, x.keys, x.values, queries=20, mask=None)[0]
    with pytest.raises(ValueError, match="kv_heads must be given"):
        triton_prefill.attend(x.query.to(DEVICE), to_device(view), x.query, scale=1.0)
    with pytest.raises(ValueError, match="scale is -1"):
        triton_prefill.attend(x.query.to(DEVICE), to_device(view), x.query, scale=-1.0)


@pytest.mark.parametrize("shared", [48 << 10, 64 << 10, 99 << 10, 163 << 10, 227 << 10])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tiles_fit_into_shared_memory(dtype: torch.dtype, dim: int, shared: int) -> None:
    for banded in (False, True):
        for queries in (1, 20, 4096):
            tiles = forward_tiles(
                dim, dtype, group=4, queries=queries, banded=banded, tma=False, shared=shared
            )
            rows = tiles.queries * tiles.pack + 2 * tiles.keys * tiles.stages
            assert rows * dim * dtype.itemsize <= shared
            assert tiles.queries * tiles.pack >= 16 and tiles.keys >= 16


def test_heads_are_packed_where_little_is_wasted() -> None:
    packs = {group: pack_of(group, 4) for group in (1, 2, 3, 4, 5, 6, 7, 8, 16)}
    assert packs == {1: 1, 2: 2, 3: 1, 4: 4, 5: 1, 6: 2, 7: 4, 8: 4, 16: 4}


LARGE = sampled(
    48,
    seed=5,
    length=(1, 63, 129, 1000, 1500, 4097),
    sink=(0, 1, 4, 64, 128),
    recent=(1, 63, 256, 1024),
    group=(1, 3, 4, 7, 8),
    dim=(64, 128, 128, 80, 256),
    kind=("none", "all", "alternating"),
    chunk=(7, 64, 500, None, None),
    padded=(False, False, True),
    dtype=(torch.bfloat16, torch.bfloat16, torch.float16, torch.float32),
    storage=("auto", "auto", "int8", "int4"),
)


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_on_a_gpu_shapes_that_hurt_stay_within_the_budget(case: Case) -> None:
    check(case)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["none", "all"])
@pytest.mark.parametrize("dim", [64, 128])
def test_on_a_gpu_hundreds_of_small_calls(dim: int, kind: str) -> None:
    """One code, many lengths, windows, paddings and chunk sizes."""
    draw = random.Random(dim)
    for seed in range(120):
        length = draw.randint(2, 400)
        policy = make_policy(kind, 2, sink=draw.choice((1, 4, 33, 64)), recent=draw.randint(1, 300))
        padding = [draw.randint(0, length - 1), draw.randint(0, length - 1)]
        x = inputs(
            length, kv_heads=2, groups=2, dim=dim, dtype=torch.bfloat16, seed=seed,
            padding=padding if draw.random() < 0.5 else None,
        )  # fmt: skip
        first = draw.randint(1, length - 1)
        hold(through_cache(policy, x, [first, length - first]), policy, x)


@pytest.mark.gpu
def test_on_a_gpu_an_output_of_more_elements_than_32_bits_count() -> None:
    """600K tokens of 32 heads: the last ones are computed as in a short call on what they see."""
    count, recent = 600_000, 256
    make = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(1, count, 32, 128, device="cuda", dtype=torch.bfloat16, generator=make)
    k, v = torch.randn(2, 1, count, 8, 128, device="cuda", dtype=torch.bfloat16, generator=make)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    policy = make_policy("none", 8, sink=0, recent=recent)
    outs = []
    for last in (count, 1024):  # both begin where a tile does
        part = slice(count - last, count)
        (view,) = direct_views(policy, 0, k[:, :, part], v[:, :, part], queries=last, mask=None)
        out = torch.full((1, last, 32, 128), torch.nan, device="cuda", dtype=torch.bfloat16)
        triton_prefill.attend(q[:, :, part], view, out, scale=0.1)
        outs.append(out[:, -500:])
    assert torch.equal(*outs)

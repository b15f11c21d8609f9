"""The append kernel against the codecs and stores in PyTorch, to the bit; without a GPU in Triton's interpreter."""

import random
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from duohead import codec
from duohead.cache.append import append, supports
from duohead.cache.ring import RingStore
from duohead.cache.store import GrowingStore, StaticStore, encode_pair
from duohead.cache.view import Segment, StoredView, pick_heads

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("auto", "bf16", "fp8", "int8", "int4", "int4-hadamard")
SCALED = NAMES[2:]
PAIRS = ("fp8/int4", "int4-hadamard/int8", "int4/auto", "auto/int8", "bf16/fp8", "int8/int4")
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
DTYPES = [torch.float32, torch.float16]
if torch.cuda.is_available():
    DTYPES.append(torch.bfloat16)  # Triton's interpreter does not round to bf16


def bits(x: Tensor) -> Tensor:
    return x.view(INTEGERS[x.element_size()])


def normal(*shape: int, dtype=torch.float32, seed: int = 0) -> Tensor:
    make = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=make).to(dtype).to(DEVICE)


def hard_vectors(dim: int, dtype: torch.dtype) -> Tensor:
    """Vectors [1, 1, K, D] that end up in every branch of a codec: ties, signs, zeros, denormals, clips, outliers."""
    x = normal(12, dim, seed=dim)
    spike = torch.where(torch.arange(dim, device=DEVICE) == 3, 300.0, 1.0)
    steps = torch.arange(dim, device=DEVICE) - dim // 2
    kinds = [
        x, x * spike, x * 0.01 + 7.3, x.abs() + 1, x * 2.0**-12, x * 2.0**-30, x * 0, x * 2e4, x * 1e-42, -x.abs(),
        torch.stack([steps * 0.5, steps * 2.0**-12, steps * 0.125 + 0.0625, steps % 16 + 0.5, -0.0 * steps]),
        torch.tensor([[1000.3], [-0.1], [6e4], [3e38]], device=DEVICE).expand(-1, dim),
    ]  # fmt: skip
    rows = torch.cat([kind.float() for kind in kinds])
    limit = torch.finfo(dtype).max
    return rows.clamp(-limit, limit).to(dtype)[None, None]


@dataclass
class Twins:
    """A store filled by the kernel and one filled by PyTorch, for some heads of a layer, poisoned alike."""

    kernel: RingStore | StaticStore | GrowingStore
    torch: RingStore | StaticStore | GrowingStore
    heads: Tensor | None
    storage: codec.Pair

    def __post_init__(self) -> None:
        if not isinstance(self.kernel, GrowingStore):
            for store in (self.kernel, self.torch):
                for tensor in store.slots.keys + store.slots.values:
                    bits(tensor).fill_(91)

    def view(self, tokens: int | Tensor, padding: Tensor | None) -> StoredView:
        store = self.kernel
        ring = store if isinstance(store, RingStore) else None
        return StoredView(
            heads=self.heads,
            codecs=(self.storage.keys.name, self.storage.values.name),
            segments=store.segments(),
            sink=ring.sink if ring else 0,
            ring=ring.ring if ring else None,
            reach=None,
            window=None,
            tokens=tokens,
            padding=padding,
            floor=ring.floor if ring and isinstance(ring.floor, Tensor) else None,
        )

    def put(self, length: int | Tensor, keys: Tensor, values: Tensor, padding) -> None:
        """What the layer does in PyTorch."""
        encoded = encode_pair(
            self.storage, pick_heads(keys, self.heads), pick_heads(values, self.heads)
        )
        if isinstance(self.torch, RingStore) and self.torch.sink:
            self.torch.put_sinks(length, encoded, padding)
        self.torch.append(length, encoded, padding)

    def check(self) -> None:
        for mine, theirs in zip(self.kernel.segments(), self.torch.segments(), strict=True):
            assert mine.first == theirs.first
            for ours, other in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                for a, b in zip(ours, other, strict=True):
                    assert torch.equal(a, b)
                    # Of zeros with both signs, either may be an int4 group's minimum.
                    assert len(ours) == 3 or torch.equal(bits(a), bits(b))
        if isinstance(self.kernel, RingStore) and isinstance(self.kernel.floor, Tensor):
            assert self.kernel.floor == self.torch.floor


def twins(name: str, like, make, heads: Tensor | None = None) -> Twins:
    storage = codec.pair(name, native=like[0].dtype)
    pair = tuple(pick_heads(x[:, :, :0], heads) for x in like)
    return Twins(make(storage, pair), make(storage, pair), heads, storage)


@dataclass
class Layer:
    """Two kinds of heads that get the same tokens, as in a layer of the cache."""

    keys: Tensor
    values: Tensor
    kinds: list[Twins]
    padding: Tensor | None = None
    device_length: bool = False
    length: int = 0
    launches: list[int] = field(default_factory=list)

    def add(self, count: int) -> None:
        part = slice(self.length, self.length + count)
        keys, values = self.keys[:, :, part], self.values[:, :, part]
        before: int | Tensor = self.length
        self.length += count
        tokens: int | Tensor = self.length
        if self.device_length:
            before, tokens = (
                torch.tensor(before, device=DEVICE),
                torch.tensor(tokens, device=DEVICE),
            )
        for kind in self.kinds:
            kind.put(before, keys, values, self.padding)
            if not isinstance(kind.kernel, StaticStore):
                kind.kernel.reserve(self.length)
        append(keys, values, [kind.view(tokens, self.padding) for kind in self.kinds])
        for kind in self.kinds:
            kind.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_stored_bits_are_those_of_the_codec(name, dtype) -> None:
    least = 4 if name == "int4-hadamard" else 2
    for dim, value_dim in ((64, 64), (80, 112), (96, 96), (128, 64), (256, 256), (192, least)):
        keys, values = hard_vectors(dim, dtype), hard_vectors(value_dim, dtype)
        count = keys.shape[2]
        both = twins(name, (keys, values), lambda c, p: StaticStore(c, p, max_length=200))
        Layer(keys, values, [both]).add(count)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*NAMES, "int4/fp8"])
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_a_round_trip_is_what_attention_will_see(name, dtype) -> None:
    keys, values = (
        hard_vectors(64, dtype).expand(2, 3, -1, -1),
        hard_vectors(96, dtype).expand(2, 3, -1, -1),
    )
    heads = torch.tensor([0, 2], device=DEVICE)
    both = twins(name, (keys, values), lambda c, p: StaticStore(c, p, max_length=200), heads)
    out = tuple(
        torch.full_like(x[:, :2], float("nan"), memory_format=torch.contiguous_format)
        for x in (keys, values)
    )
    append(keys, values, [both.view(keys.shape[2], None)], round_trip=[out])
    both.put(0, keys, values, None)
    both.check()
    expected = both.storage.round_trip(keys[:, heads], values[:, heads])
    for seen, wanted in zip(out, expected, strict=True):
        assert torch.equal(bits(seen), bits(wanted))


@pytest.mark.parametrize("form", ["growing", "static", "device-length"])
@pytest.mark.parametrize(("sink", "ring"), [(0, 1), (0, 16), (4, 16), (64, 30)])
def test_both_kinds_of_heads_hold_what_the_stores_in_pytorch_hold(sink, ring, form) -> None:
    static = form != "growing"
    for seed in range(2):
        draw = random.Random(seed)
        rows = draw.choice((1, 3))
        padding = [draw.choice((0, 3, 40)) for _ in range(rows)] if draw.random() < 0.7 else None
        keys, values = normal(rows, 3, 220, 16, seed=seed), normal(rows, 3, 220, 24, seed=seed + 9)
        first, second = draw.sample(PAIRS if seed else NAMES, 2)
        some = torch.tensor([1], device=DEVICE), torch.tensor([0, 2], device=DEVICE)

        def full(storage, pair):
            return (
                StaticStore(storage, pair, max_length=220)
                if static
                else GrowingStore(storage, pair)
            )

        def ringed(storage, pair):
            return RingStore(
                storage, pair, sink=sink, ring=ring, max_length=400 if static else None
            )

        layer = Layer(
            keys,
            values,
            [
                twins(first, (keys, values), full, some[0]),
                twins(second, (keys, values), ringed, some[1]),
            ],
            None if padding is None else torch.tensor(padding, device=DEVICE),
            device_length=form == "device-length",
        )
        for count in (1, 9, 2, 60, 1, 33, 1):
            layer.add(count)


def test_token_by_token_and_in_chunks_end_in_the_same_bits() -> None:
    keys, values = normal(2, 1, 50, 32), normal(2, 1, 50, 32, seed=1)
    padding = torch.tensor([0, 13], device=DEVICE)
    ends = []
    for chunks in ([1] * 50, [50], [7] * 7 + [1]):
        both = twins(
            "fp8", (keys, values), lambda c, p: RingStore(c, p, sink=4, ring=20, max_length=50)
        )
        start = 0
        for count in chunks:
            part = slice(start, start + count)
            start += count
            append(keys[:, :, part], values[:, :, part], [both.view(start, padding)])
        ends.append([bits(x).clone() for x in both.kernel.slots.keys + both.kernel.slots.values])
        assert both.kernel.floor == 30
    for end in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0], end, strict=True))


def test_tokens_that_straddle_segments_of_a_growing_store_land_in_each() -> None:
    keys, values = normal(1, 2, 9000, 8), normal(1, 2, 9000, 4, seed=1)
    some = [torch.tensor([head], device=DEVICE) for head in range(2)]
    for name in ("auto", "int4"):
        full = twins(name, (keys, values), GrowingStore, some[0])
        ring = twins(name, (keys, values), lambda c, p: RingStore(c, p, sink=4, ring=300), some[1])
        layer = Layer(keys, values, [full, ring])
        for count in (4000, 500, 700, 3000):
            layer.add(count)
        assert len(full.kernel.segments()) > 2
        layer.length = 3900  # after a crop, a chunk may reach from the first segment into the last
        layer.add(4200)


def test_sinks_first_and_the_ring_after_attention_is_the_same_as_all_at_once() -> None:
    keys, values = normal(2, 2, 120, 16), normal(2, 2, 120, 16, seed=1)
    padding = torch.tensor([5, 0], device=DEVICE)
    both = twins(
        "int8", (keys, values), lambda c, p: RingStore(c, p, sink=8, ring=32, max_length=200)
    )
    for start, stop in ((0, 3), (3, 10), (10, 70), (70, 120)):
        new = keys[:, :, start:stop], values[:, :, start:stop]
        encoded = encode_pair(both.storage, *new)
        floor = both.kernel.floor.clone()
        append(*new, [both.view(stop, padding)], evict=False)
        both.torch.put_sinks(start, encoded, padding)
        both.check()
        assert both.kernel.floor == floor
        append(*new, [both.view(stop, padding)])
        both.torch.append(start, encoded, padding)
        both.check()


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
def test_infinities_clip_and_nan_stays_nan_in_its_own_group(name) -> None:
    x = normal(1, 1, 6, 256)
    inf, nan = float("inf"), float("nan")
    x[0, 0, 1, 5], x[0, 0, 2, 7], x[0, 0, 3, 9], x[0, 0, 4, 200] = inf, -inf, nan, -nan
    both = twins(name, (x, x), lambda c, p: StaticStore(c, p, max_length=16))
    out = (torch.zeros_like(x), torch.zeros_like(x))
    append(x, x, [both.view(6, None)], round_trip=[out])
    both.put(0, x, x, None)
    whole = slice(0, 3), slice(5, 6)
    for mine, theirs in zip(both.kernel.slots.keys, both.torch.slots.keys, strict=True):
        for part in whole:
            assert torch.equal(bits(mine)[:, :, part], bits(theirs)[:, :, part])
    (seen, _), (expected, _) = (
        both.kernel.slots.read(0, 6, x.dtype),
        both.torch.slots.read(0, 6, x.dtype),
    )
    assert torch.equal(seen.isnan(), expected.isnan())
    assert torch.equal(seen.nan_to_num(), expected.nan_to_num())
    assert torch.equal(out[0].nan_to_num(1.5), expected.nan_to_num(1.5))
    assert seen[0, 0, :3].isfinite().all()


@pytest.mark.parametrize("layout", ["tokens before heads", "slice", "one head repeated"])
def test_new_tokens_may_have_any_strides(layout) -> None:
    x = normal(2, 40, 3, 32)
    keys = {
        "tokens before heads": x.transpose(1, 2),
        "slice": normal(2, 3, 90, 96)[:, :, 20:60, 32:64],
        "one head repeated": x[:, :, :1].transpose(1, 2).expand(-1, 3, -1, -1),
    }[layout]
    assert not keys.is_contiguous()
    both = twins("int4", (keys, keys), lambda c, p: StaticStore(c, p, max_length=40))
    Layer(keys, keys, [both]).add(40)


def test_tokens_beyond_the_last_slot_are_dropped_and_nothing_around_is_touched() -> None:
    memory = torch.full((3, 2, 10, 8), 7.0, device=DEVICE)
    segment = Segment((memory[1:2],), (memory[2:].clone(),))
    new = normal(1, 2, 6, 8)
    for tokens in (14, torch.tensor(14, device=DEVICE)):
        append(
            new,
            new,
            [StoredView(None, ("fp32", "fp32"), (segment,), 0, None, None, None, tokens, None)],
        )
        assert torch.equal(memory[1, :, 8:], new[0, :, :2])
        assert (memory[1, :, :8] == 7).all()
        assert (memory[0] == 7).all()
        assert (memory[2] == 7).all()


def test_no_tokens_change_nothing() -> None:
    x = normal(1, 2, 0, 16)
    both = twins("fp8", (x, x), lambda c, p: RingStore(c, p, sink=2, ring=8, max_length=30))
    append(x, x, [both.view(0, None)])
    both.check()


def test_what_the_kernel_cannot_do_is_refused_with_the_reason() -> None:
    x = normal(1, 2, 3, 16)
    both = twins("fp8", (x, x), lambda c, p: StaticStore(c, p, max_length=30))
    view = both.view(3, None)
    assert supports(x, x, [view]) is None
    assert "float16" in str(supports(x.double(), x.double(), [view]))
    assert "share" in str(supports(x, x.half(), [view]))
    assert "contiguous" in str(supports(x.transpose(2, 3), x.transpose(2, 3), [view]))
    assert "at most 512" in str(supports(normal(1, 1, 1, 1024), x, [view]))
    assert "not of one layer" in str(supports(x, x, [view, both.view(4, None)]))
    assert "at most 2" in str(supports(x, x, [view] * 3))
    assert "CUDA" in str(supports(x.to("meta"), x.to("meta"), [view]))
    with pytest.raises(ValueError, match="cannot store these tokens: keys and values must share"):
        append(x, x.half(), [view])
    with pytest.raises(ValueError, match="round_trip must have one entry per view, 1, got 2"):
        append(x, x, [view], round_trip=[None, None])

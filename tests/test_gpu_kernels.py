"""Several thousand random small cases for the GPU kernels, against the fp64 oracle; poison wherever none may look.

Compiling is what takes time here, so a `Family` fixes what a kernel is compiled for, and everything that is a number to
a kernel is drawn anew for each of its cases: lengths, chunks, rows, padding, sinks, windows, heads. A failure names the
family and the seed. Everything is computed on the GPU.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch
from oracle import Inputs, hold, make_policy, split
from torch import Tensor

from duohead import HeadPolicy, attention
from duohead.cache import DuoLayer
from duohead.cache.view import HeadView

triton_prefill = pytest.importorskip("duohead.attention.triton_prefill", exc_type=ImportError)

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::UserWarning")]

HURTING = (1, 2, 63, 64, 65, 127, 128, 129, 255, 257, 1000, 4097)
SINKS = (0, 1, 4, 64)
RECENT = (1, 2, 63, 64, 256)
DECODE_CASES = 200
PREFILL_CASES = 80


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """New tensors on the GPU, and uninitialised ones full of NaN: outputs and scratch of the kernels among them."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    with torch.device("cuda"):
        assert torch.empty(7).isnan().all()
        yield
    torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Family:
    """What a kernel is compiled for."""

    dtype: torch.dtype
    dim: int
    group: int
    heads: str = "alternating"
    codecs: tuple[str, str] = ("auto", "auto")
    value_dim: int | None = None
    static: bool = False
    softcap: float | None = None
    logits: bool = False
    window: bool = False
    evict: bool = True
    padded: bool = False
    sinks: tuple[int, ...] = SINKS
    new: int = 1

    def __str__(self) -> str:
        names = ("static", "softcap", "logits", "window", "padded")
        marks = [name for name in names if getattr(self, name)] + ["keep"] * (not self.evict)
        dtype = str(self.dtype).removeprefix("torch.")
        marks = [dtype, f"d{self.dim}", f"group{self.group}", self.heads, *self.codecs, *marks]
        return "-".join(marks + [f"new{self.new}"] * (self.new > 1))

    def policy(self, draw: random.Random) -> HeadPolicy:
        """A layer of this family."""
        policy = make_policy(
            self.heads, draw.choice((2, 3, 5)), seed=draw.randrange(99), sink=draw.choice(self.sinks),
            recent=draw.choice(RECENT), retrieval_dtype=self.codecs[0], streaming_dtype=self.codecs[1],
            window_dtype=self.codecs[0], evict=self.evict,
        )  # fmt: skip
        if not self.window:
            return policy
        (layer,) = policy.layers
        return replace(policy, layers=(replace(layer, window=draw.choice((1, 17, 64, 300))),))

    def inputs(self, draw: random.Random, length: int, kv_heads: int) -> Inputs:
        """Tokens of some rows, now and then with an outlier; a row has one real token at least."""
        rows = draw.choice((1, 1, 2, 3))
        pads = [
            min(draw.choice((0, 1, 5, length // 2, length - 1)), length - 1) for _ in range(rows)
        ]
        padding = tuple(pads) if self.padded else None

        def normal(heads: int, width: int) -> Tensor:
            # As attention gets them: heads of a token side by side.
            return torch.randn(rows, length, heads, width).to(self.dtype).transpose(1, 2)

        keys = normal(kv_heads, self.dim)
        keys[:, :, draw.randrange(length), draw.randrange(self.dim)] *= draw.choice((1, 1, 8))
        values = normal(kv_heads, self.value_dim or self.dim)
        return Inputs(normal(kv_heads * self.group, self.dim), keys, values, padding)

    def options(self, draw: random.Random, heads: int) -> dict[str, object]:
        """Arguments of the attention call."""
        options: dict[str, object] = {"scale": self.dim**-0.5 * draw.choice((1.0, 1.0, 0.3, 2.0))}
        if self.softcap is not None:
            options["softcap"] = self.softcap
        if self.logits:
            options["sink_logits"] = (2 * torch.randn(heads)).to(self.dtype)
        return options


def fill(layer: DuoLayer, x: Inputs, tokens: int) -> None:
    """Store the first tokens through PyTorch, and NaN into every slot that stays unused."""
    keys, values = x.keys[:, :, :tokens], x.values[:, :, :tokens]
    if tokens:
        handle, _ = layer.update(keys, values)
        handle.open(None if x.mask is None else x.mask[:, :tokens])
        handle.commit()
    else:
        layer.lazy_initialization(keys, values)
    padding = [0] * keys.shape[0] if x.padding is None else x.padding
    for kind in layer.kinds:
        for segment in kind.store.segments():
            for tensor in segment.keys + segment.values:
                for row, skipped in enumerate(padding):
                    # A ring counts from the first real token of a row.
                    used = tokens - segment.first if kind.spec.ring is None else tokens - skipped
                    spoil(tensor[row, :, max(0, used) :])


def spoil(tensor: Tensor) -> None:
    """NaN, or for integers the bits that are one in e4m3."""
    tensor.fill_(float("nan") if tensor.is_floating_point() else 0x7F)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DECODE = [
    Family(BF16, 128, 4),
    Family(BF16, 128, 4, codecs=("fp8", "int4"), static=True, padded=True),
    Family(BF16, 128, 1, codecs=("int8", "int8"), heads="random", static=True, new=8),
    Family(BF16, 128, 8, codecs=("int4", "fp8"), softcap=20.0, logits=True, new=4),
    Family(FP16, 128, 7, codecs=("int4", "int4"), heads="all", padded=True),
    Family(BF16, 64, 1, heads="none", logits=True, padded=True),
    Family(FP16, 80, 3, codecs=("int8", "int4"), value_dim=96, padded=True),
    Family(BF16, 256, 2, codecs=("int4", "int4"), window=True),
    Family(FP16, 64, 4, codecs=("fp8", "auto"), window=True, static=True, padded=True, new=2),
    Family(FP32, 64, 2, codecs=("auto", "fp8")),
    Family(BF16, 128, 4, codecs=("fp8/int4", "int4/fp8"), static=True, padded=True),
    Family(BF16, 128, 4, codecs=("fp8", "fp8/int4"), static=True, padded=True, evict=False),
    Family(BF16, 128, 2, codecs=("auto/int4", "int8/auto"), new=3, evict=False),
    Family(FP16, 96, 7, codecs=("int4/int8", "fp8/auto"), value_dim=80, padded=True),
    Family(BF16, 256, 2, codecs=("int4/fp8", "int8/int4"), window=True, static=True, new=4),
    Family(FP32, 128, 1, codecs=("int8/fp8", "int4/auto"), heads="random"),
    Family(BF16, 128, 4, codecs=("int4-hadamard", "int4-hadamard"), static=True, padded=True),
    Family(BF16, 128, 8, codecs=("int4-hadamard/fp8", "int8/int4-hadamard"), logits=True, new=4),
    Family(FP16, 96, 7, codecs=("fp8", "int4-hadamard"), value_dim=80, padded=True),
    Family(BF16, 256, 2, codecs=("int4-hadamard", "auto"), window=True, static=True, new=8),
    Family(FP32, 64, 2, codecs=("int4-hadamard", "int4"), softcap=15.0),
]


@pytest.mark.parametrize("family", DECODE, ids=str)
def test_decode_keeps_the_error_budget(family: Family) -> None:
    for seed in range(DECODE_CASES):
        draw = random.Random(seed)
        torch.manual_seed(seed)
        new = family.new
        length = new + draw.choice((0, draw.choice(HURTING), draw.randint(0, 400)))
        policy = family.policy(draw)
        x = family.inputs(draw, length, policy.layers[0].num_kv_heads)
        options = family.options(draw, x.query.shape[1])
        layer = DuoLayer(
            policy,
            0,
            max_length=length + draw.randint(0, 300) if family.static else None,
            rollback=8,
        )
        fill(layer, x, length - new)
        last = slice(length - new, length)
        handle, _ = layer.update(x.keys[:, :, last], x.values[:, :, last])
        views = handle.append(x.mask)
        got = attention.decode(x.query[:, :, last], views, **options)
        with explained(family, seed, policy, x):
            hold(got, policy, x, queries=last, **options)


# ``new`` is the largest chunk; tiles of up to 16 queries, and of more than 64, are compiled on their own.
LARGE, SMALL = 300, 16
PREFILL = [
    Family(BF16, 128, 4, codecs=("auto", "int4"), padded=True, sinks=(1, 4, 64), new=LARGE),
    Family(FP16, 64, 7, heads="random", static=True, sinks=(0,), new=SMALL),
    Family(
        BF16, 128, 1, window=True, logits=True, softcap=15.0, padded=True, sinks=(0,), new=LARGE
    ),
    Family(
        FP16, 80, 2, heads="none", value_dim=112, codecs=("fp8", "auto"), sinks=(1, 64), new=LARGE
    ),
    Family(BF16, 128, 8, codecs=("int8", "auto"), padded=True, sinks=(4,), new=SMALL),
    Family(BF16, 128, 4, codecs=("fp8/int4", "int4/auto"), padded=True, new=LARGE, evict=False),
    Family(BF16, 128, 4, codecs=("int4-hadamard", "int4-hadamard"), padded=True, new=LARGE),
]


@pytest.mark.parametrize("family", PREFILL, ids=str)
def test_prefill_in_any_chunks_keeps_the_error_budget(family: Family) -> None:
    for seed in range(PREFILL_CASES):
        assert check_prefill(family, seed, triton_prefill) == {None}


HOPPER = [
    Family(BF16, 128, 4, sinks=(1, 4, 64), new=LARGE),
    Family(FP16, 64, 7, heads="none", padded=True, logits=True, new=LARGE),
]


@pytest.mark.parametrize("family", HOPPER, ids=str)
@pytest.mark.parametrize("name", ["hopper_prefill", "cute_prefill"])
def test_prefill_on_hopper_keeps_the_error_budget(name: str, family: Family) -> None:
    """Views that the kernel does not take are PyTorch's."""
    kernel = importlib.import_module(f"duohead.attention.{name}")
    reasons: list[set[str | None]] = []
    for seed in range(PREFILL_CASES):
        reasons.append(check_prefill(family, seed, kernel))
        if seed == 2 and not any(None in found for found in reasons):
            pytest.skip(f"{name} takes no view here: {sorted(map(str, set().union(*reasons)))}")
    assert sum(None in found for found in reasons) >= PREFILL_CASES // 4, reasons


def chunks_of(draw: random.Random, largest: int) -> list[int]:
    """Chunks of a sequence: all of at most 16 tokens, or all of more than 64."""
    if largest <= SMALL:
        return split(
            draw.choice((1, 2, 63, 128, 257, draw.randint(1, 300))), draw.choice((3, 7, 16))
        )
    length = draw.choice((65, 127, 128, 129, 257, 1000, draw.randint(65, 700)))
    *chunks, last = split(length, draw.choice((None, 65, 128, largest)))
    if last > 64 or not chunks:
        return [*chunks, last]
    return [*chunks[:-1], chunks[-1] + last]


def check_prefill(family: Family, seed: int, kernel: ModuleType) -> set[str | None]:
    """One sequence in chunks, and every output of it; returns why ``kernel`` refused views (None: it took one)."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    chunks = chunks_of(draw, family.new)
    length = sum(chunks)
    policy = family.policy(draw)
    x = family.inputs(draw, length, policy.layers[0].num_kv_heads)
    options = family.options(draw, x.query.shape[1])
    layer = DuoLayer(policy, 0, max_length=length + 50 if family.static else None)
    layer.lazy_initialization(x.keys, x.values)
    outs, start, reasons = [], 0, set()
    for count in chunks:
        part = slice(start, start + count)
        start += count
        handle, _ = layer.update(x.keys[:, :, part], x.values[:, :, part])
        query = x.query[:, :, part]
        out = query.new_empty(query.shape[0], count, query.shape[1], x.values.shape[3])
        for view in handle.open(None if x.mask is None else x.mask[:, :start]):
            logits = {name: options.get(name) for name in ("softcap", "sink_logits")}
            reason = kernel.supports(query, view, **logits)
            reasons.add(reason)
            attend = kernel.attend if reason is None else by_pytorch
            attend(query, view, out, kv_heads=x.keys.shape[1], **options)
        handle.commit()
        outs.append(out)
    with explained(family, seed, policy, x):
        hold(torch.cat(outs, 1), policy, x, **options)
    return reasons


def by_pytorch(
    query: Tensor,
    view: HeadView,
    out: Tensor,
    *,
    kv_heads: int,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> None:
    """What a kernel's ``attend`` does."""
    group = query.shape[1] // kv_heads
    kv = torch.arange(kv_heads) if view.heads is None else view.heads
    heads = (kv[:, None] * group + torch.arange(group)).flatten()
    out[:, :, heads] = attention.prefill(
        query[:, heads],
        [replace(view, heads=None)],
        scale=scale,
        softcap=softcap,
        sink_logits=None if sink_logits is None else sink_logits[heads],
        impl="tiled",
    )


class explained:
    """Add the case to an assertion that fails inside."""

    def __init__(self, family: Family, seed: int, policy: HeadPolicy, x: Inputs) -> None:
        (layer,) = policy.layers
        self.case = (
            f"{family}, seed {seed}: retrieval {layer.retrieval} of {layer.num_kv_heads}, sink {policy.sink}, "
            f"recent {policy.recent}, window {layer.window}, keys {tuple(x.keys.shape)}, padding {x.padding}"
        )

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            error.add_note(self.case)


@pytest.mark.parametrize(
    "storage",
    [
        ("fp8", "int4", True),
        ("fp8/int4", "int4/int8", True),
        ("fp8", "fp8/int4", False),
        ("int4-hadamard", "fp8/int4-hadamard", True),
    ],
    ids=["equal", "mixed", "keep", "rotated"],
)
@pytest.mark.parametrize("padding", [None, (0, 9)], ids=["unpadded", "padded"])
def test_600_steps_in_a_cuda_graph_keep_the_error_budget(padding, storage) -> None:
    """Append and decode of one step are captured once; lengths, ring places and the floor move on the device."""
    prompt, steps = 40, 600
    retrieval, streaming, evict = storage
    family = Family(BF16, 128, 4, codecs=(retrieval, streaming), static=True)
    policy = make_policy(
        "alternating", 4, sink=4, recent=64, retrieval_dtype=retrieval, streaming_dtype=streaming, evict=evict
    )  # fmt: skip
    x = family.inputs(random.Random(0), prompt + steps, 4)
    x = replace(x, query=x.query[:1], keys=x.keys[:1], values=x.values[:1])
    if padding is not None:
        x = Inputs(*(t.repeat(2, 1, 1, 1) for t in (x.query, x.keys, x.values)), padding)
    else:
        x = replace(x, padding=None)
    layer = DuoLayer(policy, 0, max_length=prompt + steps)
    fill(layer, x, prompt)
    feed = [torch.empty_like(t[:, :, :1]) for t in (x.query, x.keys, x.values)]

    def step() -> Tensor:
        handle, _ = layer.update(feed[1], feed[2])
        return attention.decode(feed[0], handle.append(None), scale=128**-0.5)

    def load(place: int) -> None:
        for to, source in zip(feed, (x.query, x.keys, x.values), strict=True):
            to.copy_(source[:, :, place : place + 1])

    load(prompt)
    outs = [step().clone()]  # compiles, and is a step like any other
    graph = torch.cuda.CUDAGraph()
    length = layer.length.clone()
    with torch.cuda.graph(graph):
        out = step()
    assert layer.length == length, "capturing must not run anything"
    for place in range(prompt + 1, prompt + steps):
        load(place)
        graph.replay()
        outs.append(out.clone())
    assert layer.length == prompt + steps
    hold(torch.cat(outs, 1), policy, x, queries=slice(prompt, None), scale=128**-0.5)
    rings = [kind.store for kind in layer.kinds if kind.spec.ring is not None]
    assert len(rings) == evict
    assert all(ring.floor == prompt + steps - ring.ring for ring in rings)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
def test_appended_bits_are_those_of_the_stores_in_pytorch(dtype: torch.dtype) -> None:
    from test_append import Layer, twins

    from duohead.cache.ring import RingStore
    from duohead.cache.store import StaticStore

    for seed in range(15):
        draw = random.Random(seed)
        torch.manual_seed(seed)
        rows, sink, ring = draw.choice((1, 3)), draw.choice(SINKS), draw.choice((1, 30, 64, 300))
        size = torch.logspace(-5, 4, 900)[:, None]
        keys, values = ((torch.randn(rows, 4, 900, 128) * size).to(dtype) for _ in "kv")
        first, second = draw.choice(
            (("auto", "int4"), ("fp8", "int8"), ("fp8/int4-hadamard", "int4/auto"), ("int8/fp8", "int4-hadamard"))
        )  # fmt: skip
        kinds = [
            twins(first, (keys, values), lambda c, p: StaticStore(c, p, max_length=900), torch.tensor([0, 3])),
            twins(
                second, (keys, values),
                lambda c, p, s=sink, r=ring: RingStore(c, p, sink=s, ring=r, max_length=900), torch.tensor([1, 2]),
            ),
        ]  # fmt: skip
        padding = (
            torch.tensor([draw.choice((0, 3, 70)) for _ in range(rows)])
            if draw.random() < 0.5
            else None
        )
        layer = Layer(keys, values, kinds, padding, device_length=True)
        for count in draw.choice(((1,) * 30, (200, 1, 1, 5, 500), (1, 700, 8, 100), (3, 33, 333))):
            layer.add(count)

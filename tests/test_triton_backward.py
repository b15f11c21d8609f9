"""Streaming attention for training, in Triton: output and gradient against fp64, and the same bits every time."""

import pytest
import torch
from oracle import FIXED_BOUND, dense
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")

from duohead.attention.triton_backward import gradients_of
from duohead.attention.triton_tiles import Tiles
from duohead.attention.triton_training import streaming, trains
from duohead.identify.banded import Scores, streaming_attention
from duohead.mask import visible

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
Tensors = tuple[Tensor, Tensor, Tensor]


def made(
    length: int,
    *,
    heads: int,
    kv_heads: int,
    dim: int,
    value_dim: int,
    rows: int,
    dtype: torch.dtype,
) -> Tensors:
    make = torch.Generator().manual_seed(length)
    shapes = ((heads, dim), (kv_heads, dim), (kv_heads, value_dim))
    q, k, v = (
        torch.randn(rows, count, length, width, generator=make).to(dtype) for count, width in shapes
    )
    return q, k, v


def budget(exact: Tensor, eager: Tensor, dtype: torch.dtype) -> float:
    """Twice what the same formula is off in this dtype and a rounding step, or a fixed bound; see `oracle`."""
    # A lone token's weight is 1 whatever its key: differences that vanish are measured in units of 1.
    size = exact.abs().max().item() or 1.0
    if dtype in FIXED_BOUND:
        return FIXED_BOUND[dtype] * size
    return 2 * ((eager.double() - exact).abs().max().item() + torch.finfo(dtype).eps * size)


def differentiated(call, tensors: Tensors, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Output [B, H, T, Dv] and gradients of ``call`` on leaves of this dtype, on the CPU in fp64."""
    leaves = [x.to(dtype).requires_grad_() for x in tensors]
    out = call(*leaves)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    gradients = torch.autograd.grad(out, leaves, weight.to(out.device))
    return tuple(x.detach().double().cpu() for x in (out, *gradients))


def compare(
    tensors: Tensors, dtype: torch.dtype, *, sink: int, recent: int | None, **options
) -> None:
    """Output and gradients of `streaming` against the dense reference in fp64 and in the target dtype."""
    length = tensors[0].shape[2]
    place = torch.arange(length)
    seen = visible(place[:, None], place, retrieval=recent is None, sink=sink, recent=recent or 1)
    seen = seen.expand(1, tensors[1].shape[1], -1, -1)

    def reference(kind: torch.dtype):
        return lambda *x: dense(*x, seen, dtype=kind, **options).transpose(1, 2)

    logits = options.get("sink_logits")
    ours = {**options, "sink_logits": None if logits is None else logits.to(DEVICE)}
    got = differentiated(
        lambda *x: streaming(*x, sink=sink, recent=recent, **ours),
        tuple(x.to(DEVICE) for x in tensors),
        dtype,
    )
    exact = differentiated(reference(torch.float64), tensors, torch.float64)
    eager = differentiated(reference(dtype), tensors, dtype)
    for mine, truth, rough in zip(got, exact, eager, strict=True):
        error = (mine - truth).abs().max().item()
        assert error <= budget(truth, rough, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    ("length", "sink", "recent", "heads", "kv_heads", "dim", "value_dim"),
    [
        (1, 4, 8, 2, 2, 16, 16),
        (33, 64, 8, 2, 1, 16, 16),
        (70, 0, 16, 3, 3, 32, 16),
        (100, 40, 20, 7, 1, 24, 24),
        (129, 1, 1, 2, 2, 16, 16),
        (130, 4, 33, 4, 2, 64, 64),
        (150, 3, 200, 4, 1, 16, 16),
        (120, 0, None, 3, 1, 16, 16),
    ],
)
def test_output_and_gradient_equal_the_dense_mask(
    length, sink, recent, heads, kv_heads, dim, value_dim, dtype
) -> None:
    tensors = made(
        length, heads=heads, kv_heads=kv_heads, dim=dim, value_dim=value_dim, rows=2, dtype=dtype
    )
    compare(tensors, dtype, sink=sink, recent=recent, scale=0.2)


@pytest.mark.parametrize("extra", ["softcap", "sink-logits", "both"])
def test_what_models_add_to_attention_has_its_gradient(extra: str) -> None:
    options = {"scale": 0.3}
    if extra in ("softcap", "both"):
        options["softcap"] = 1.5
    if extra in ("sink-logits", "both"):
        options["sink_logits"] = torch.linspace(-2.0, 4.0, 4)
    tensors = made(90, heads=4, kv_heads=2, dim=16, value_dim=16, rows=1, dtype=torch.float32)
    compare(tensors, torch.float32, sink=4, recent=20, **options)


def test_transposed_projections_and_expanded_gradients_are_taken_as_they_are() -> None:
    """Models hand over [B, T, H, D] transposed, and a sum's gradient has no strides."""
    tensors = made(50, heads=2, kv_heads=1, dim=16, value_dim=16, rows=1, dtype=torch.float32)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    gradients = []
    for parts in (tensors, strided):
        leaves = [x.to(DEVICE).requires_grad_() for x in parts]
        out = streaming(*leaves, sink=4, recent=8, scale=0.25)
        gradients.append(torch.autograd.grad(out.sum(), leaves))
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def test_the_sinks_sums_are_cut_into_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many programs share the queries that see the sinks."""
    tensors = made(200, heads=2, kv_heads=1, dim=16, value_dim=16, rows=1, dtype=torch.float32)
    for programs in (1, 3, 64):
        monkeypatch.setattr("duohead.attention.triton_backward._SINK_PROGRAMS", programs)
        compare(tensors, torch.float32, sink=36, recent=17, scale=0.25)


def test_gradients_by_descriptor_are_those_by_pointer() -> None:
    """What Hopper's accelerator loads beyond a slice or the end must not count."""
    q, k, v = (
        x.to(DEVICE)
        for x in made(75, heads=4, kv_heads=2, dim=24, value_dim=16, rows=2, dtype=torch.float16)
    )
    out = torch.randn(2, 4, 75, 16, dtype=q.dtype, device=DEVICE)
    grad = torch.randn_like(out)
    lse = torch.randn(2, 4, 75, device=DEVICE) + 6
    tiles = (Tiles(16, 2, 16, 4, 1), Tiles(16, 1, 16, 4, 1))
    found = [
        gradients_of(
            q,
            k,
            v,
            out,
            grad,
            lse,
            sink=20,
            recent=9,
            scale=0.2,
            softcap=None,
            tiles=tiles,
            tma=tma,
        )
        for tma in (False, True)
    ]
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_what_it_cannot_do_is_said() -> None:
    q, k, v = (
        x.to(DEVICE)
        for x in made(10, heads=2, kv_heads=1, dim=16, value_dim=16, rows=1, dtype=torch.float32)
    )
    assert trains(q, k, v, scale=1.0) is None
    assert "float64" in str(trains(q.double(), k.double(), v.double(), scale=1.0))
    logits = torch.zeros(2, device=DEVICE, requires_grad=True)
    assert "gradient" in str(trains(q, k, v, scale=1.0, sink_logits=logits))
    with pytest.raises(ValueError, match="cannot train here: keys are torch.float16"):
        streaming(q, k.half(), v, sink=1, recent=1, scale=1.0)


def test_gate_training_takes_the_kernels_where_they_are_asked_for() -> None:
    """`identify.banded` streams the same by kernels and by tiles; a request that cannot be met is refused."""
    q, k, v = (
        x.to(DEVICE)
        for x in made(150, heads=4, kv_heads=2, dim=16, value_dim=16, rows=1, dtype=torch.float32)
    )
    scores = Scores(softcap=2.0)
    outs = []
    for impl in ("tiles", "triton"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = streaming_attention(*leaves, sink=4, recent=20, scores=scores, impl=impl)
        outs.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for tiles, kernels in zip(*outs, strict=True):
        size = tiles.abs().max().item()
        assert (tiles - kernels).abs().max().item() <= 2 * FIXED_BOUND[torch.float32] * size
    wide = [x.double() for x in (q, k, v)]
    with pytest.raises(ValueError, match=r"cannot run here: dtype is torch\.float64"):
        streaming_attention(*wide, sink=4, recent=20, scores=scores, impl="triton")
    with pytest.raises(ValueError, match="impl must be one of auto, triton, tiles"):
        streaming_attention(q, k, v, sink=4, recent=20, scores=scores, impl="fast")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "sink", "recent"),
    [
        (32, 8, 128, 128, 256),
        (8, 8, 64, 4, 63),
        (7, 1, 128, 0, 255),
        (4, 2, 96, 64, 1),
        (4, 4, 256, 1, 100),
        (8, 2, 128, 0, None),
    ],
)
def test_on_a_gpu_output_and_gradient_are_right_and_always_the_same(
    heads, kv_heads, dim, sink, recent, dtype
) -> None:
    tensors = made(
        1000, heads=heads, kv_heads=kv_heads, dim=dim, value_dim=dim, rows=1, dtype=dtype
    )
    compare(tensors, dtype, sink=sink, recent=recent, scale=dim**-0.5)
    leaves = [x.cuda().requires_grad_() for x in tensors]
    first, *others = (
        torch.autograd.grad(
            streaming(*leaves, sink=sink, recent=recent, scale=dim**-0.5).square().sum(), leaves
        )
        for _ in range(4)
    )
    assert all(torch.equal(x, y) for again in others for x, y in zip(first, again, strict=True))

"""Storage codecs: the layout, bytes and worst-case errors that docs/numerics.md states."""

import copy
import functools
import re

import pytest
import torch
from oracle import FIXED_BOUND, dense, inputs, without_cache

from duohead import codec
from duohead.policy import HeadPolicy

HADAMARD = codec.HADAMARD
NAMES = ("bf16", "fp8", "int8", "int4", HADAMARD)
PLAIN = NAMES[:-1]
LISTED = "auto, bf16, fp8, int8, int4, int4-hadamard"
SCALED = ("fp8", "int8", "int4")
DIMS = (64, 80, 96, 128, 256)
UP = 1 + 2**-10  # a scale is rounded up to the next fp16
TINY = 2**-14  # and never below the least normal fp16
FP32 = 2**-22  # a few roundings of fp32 arithmetic


def get(name: str) -> codec.Codec:
    return codec.get(name, native=torch.float32)


def bound(name: str, x: torch.Tensor) -> torch.Tensor:
    """The worst-case error of each number that docs/numerics.md derives, for values within the codec's range."""
    if name == "bf16":
        return x.abs() * 2**-8 + 2**-134
    peak = x.abs().amax(-1, keepdim=True)
    if name == "fp8":
        scale = (peak / 448 * UP).clamp(min=TINY)
        return torch.maximum(x.abs() / 16, scale / 1024) + peak * FP32
    if name == "int8":
        return (peak / 127 * UP).clamp(min=TINY).expand_as(x) / 2 + peak * FP32
    if name == HADAMARD:
        # Of a number, at most what all of its block can add up to.
        bits = codec.rotation(name, x.shape[-1])
        return bound("int4", rotated(x)) * 2 ** (bits // 2)
    group = x.unflatten(-1, (-1, codec._group(x.shape[-1])))
    low, high = group.amin(-1, keepdim=True), group.amax(-1, keepdim=True)
    slip = low.abs() * 2**-11 + 2**-25  # the minimum is rounded to fp16
    scale = ((high - low + slip) / 15 * UP).clamp(min=TINY)
    worst = torch.maximum(scale / 2, slip) + group.abs().amax(-1, keepdim=True) * FP32
    return worst.expand_as(group).flatten(-2)


@functools.cache
def hadamard(dim: int) -> torch.Tensor:
    """What the channels are multiplied with before int4, from docs/numerics.md: fp64 [dim, dim]."""
    size = 2 ** codec.rotation(HADAMARD, dim)
    sign = [-1.0 if bin(i & i >> 1).count("1") % 2 else 1.0 for i in range(size)]
    rows = [
        [sign[i] * sign[k] * (-1) ** bin(i & k).count("1") for i in range(size)]
        for k in range(size)
    ]
    block = torch.tensor(rows, dtype=torch.float64) * 2.0 ** -((size.bit_length() - 1) // 2)
    return torch.block_diag(*[block] * (dim // size))


def rotated(x: torch.Tensor) -> torch.Tensor:
    return (x.double() @ hadamard(x.shape[-1]).T).to(x.dtype)


def vectors(dim: int, kind: str) -> torch.Tensor:
    normal = torch.randn(40, dim, generator=torch.Generator().manual_seed(dim))
    spikes = torch.where(torch.arange(dim) == 3, 300.0, 1.0)
    return {
        "normal": normal,
        "outliers": normal * spikes,
        "offset": normal * 0.01 + 7.3,
        "positive": normal.abs() + 1.0,
        "small": normal * 2**-12,
        "denormal": normal * 2**-30,
        "constant": torch.full((40, dim), 1000.3),
        "negative constant": torch.full((40, dim), -0.1),
        "zeros": torch.zeros(40, dim),
        "beyond fp16": torch.cat((normal * 2e4, normal * 0.1)),
    }[kind]


KINDS = (
    "normal",
    "outliers",
    "offset",
    "positive",
    "small",
    "denormal",
    "constant",
    "negative constant",
    "zeros",
)


@pytest.mark.parametrize("dim", DIMS, ids=lambda d: f"d{d}")
@pytest.mark.parametrize("name", NAMES)
def test_the_round_trip_error_stays_within_the_stated_bound(name, dim) -> None:
    for kind in KINDS:
        x = vectors(dim, kind)
        excess = (get(name).round_trip(x) - x).abs() - bound(name, x)
        assert excess.max() <= 0, (kind, excess.max())


@pytest.mark.parametrize("name", SCALED)
def test_the_bound_is_not_slack(name) -> None:
    x = vectors(128, "normal")
    share = (get(name).round_trip(x) - x).abs() / bound(name, x)
    assert share.max() > 0.9


@pytest.mark.parametrize("name", SCALED)
def test_a_scale_is_rounded_up_so_that_nothing_saturates(name) -> None:
    x = vectors(128, "positive")
    scale = get(name).encode(x)[1].float()[..., -1]
    low = get(name).encode(x)[2].float()[..., 0] if name == "int4" else 0.0
    needed = (x.amax(-1) - low) / {"fp8": 448, "int8": 127, "int4": 15}[name]
    assert (scale >= needed).all()
    assert (scale <= needed * UP).all()


@pytest.mark.parametrize("name", ("fp8", "int8"))
def test_values_beyond_fp16_keep_the_bound_up_to_the_largest_scale(name) -> None:
    x = vectors(64, "beyond fp16")
    assert ((get(name).round_trip(x) - x).abs() <= bound(name, x)).all()


def test_an_outlier_takes_the_others_from_int4_but_not_from_fp8() -> None:
    x = torch.cat((torch.full((1, 1), 300.0), torch.randn(1, 63).clamp(-1, 1)), dim=-1)
    rest = {name: get(name).round_trip(x)[0, 1:] for name in ("fp8", "int4")}
    assert rest["int4"].unique().numel() == 1
    assert ((rest["fp8"] - x[0, 1:]).abs() <= x[0, 1:].abs() / 16 + 300 / 448 / 1000).all()


@pytest.mark.parametrize(("name", "limit"), [("fp8", 448 * 65504.0), ("int8", 127 * 65504.0)])
def test_values_clip_just_beyond_the_stated_range(name, limit) -> None:
    x = torch.full((1, 64), limit)
    assert ((get(name).round_trip(x) - x).abs() <= limit * 1e-6).all()
    assert ((get(name).round_trip(2 * x) - x).abs() <= limit * 1e-6).all()


def test_int4_covers_the_stated_range_and_clips_beyond() -> None:
    x = torch.linspace(-65504.0, 15 * 65504.0 - 65504.0, 64)[None]
    assert ((get("int4").round_trip(x) - x).abs() <= 65504.0 / 2 * (1 + 1e-6)).all()
    assert get("int4").round_trip(x * 4).min() == -65504.0


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("size", [1e5, 1e9, 3e38])
def test_huge_values_stay_finite_and_keep_their_sign(name, size) -> None:
    signs = torch.where(torch.arange(64) % 3 == 0, -1.0, 1.0)
    back = get(name).round_trip(signs * size)
    assert back.isfinite().all()
    assert (back[signs > 0] > 0).all()
    assert (back[signs < 0] < 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zeros_and_signs_of_small_numbers_do_not_flip(name) -> None:
    assert torch.equal(get(name).round_trip(torch.zeros(2, 64)), torch.zeros(2, 64))
    if name in ("bf16", "fp8", "int8"):
        x = vectors(64, "normal")
        assert (get(name).round_trip(x) * x >= 0).all()


@pytest.mark.parametrize("name", PLAIN)
def test_a_constant_vector_comes_back_as_near_as_one_rounding_to_fp16_or_better(name) -> None:
    for value in (0.1, -3.7, 1000.3):
        x = torch.full((1, 64), value)
        limit = {"bf16": 2**-8, "fp8": 2**-9, "int8": 2**-9, "int4": 2**-11}[name]
        assert ((get(name).round_trip(x) - x).abs() <= abs(value) * limit + TINY / 2).all()


@pytest.mark.parametrize("dim", DIMS, ids=lambda d: f"d{d}")
@pytest.mark.parametrize("name", PLAIN)
def test_encoding_what_was_decoded_changes_nothing(name, dim) -> None:
    """Exact in fp32; int4 needs a group whose range is at least 1/64 of its magnitude (see docs/numerics.md)."""
    for kind in ("normal", "outliers", "positive", "small", "zeros"):
        once = get(name).round_trip(vectors(dim, kind))
        assert torch.equal(get(name).round_trip(once), once), kind


@pytest.mark.parametrize("name", NAMES)
def test_a_vector_is_encoded_without_regard_to_its_neighbours(name) -> None:
    x = torch.randn(2, 3, 5, 96) * torch.tensor([0.01, 1.0, 100.0, 1e4, 0.0])[:, None]
    together = get(name).encode(x)
    for token in range(5):
        alone = get(name).encode(x[:, 1:2, token : token + 1])
        for all_parts, part in zip(together, alone, strict=True):
            assert torch.equal(all_parts[:, 1:2, token : token + 1], part)


@pytest.mark.parametrize("dim", DIMS, ids=lambda d: f"d{d}")
@pytest.mark.parametrize("name", NAMES)
def test_the_parts_are_what_is_stored(name, dim) -> None:
    stored = get(name).encode(torch.randn(2, 3, dim))
    parts = get(name).parts(dim)
    assert [(part.dtype, part.shape) for part in stored] == [
        (d, (2, 3, width)) for d, width in parts
    ]
    assert sum(part.nbytes for part in stored) == 2 * 3 * get(name).vector_bytes(dim)


def test_storage_dtypes_and_bytes_are_the_documented_ones() -> None:
    payload = {name: get(name).parts(128)[0][0] for name in NAMES}
    assert payload == {
        "bf16": torch.bfloat16,
        "fp8": torch.uint8,
        "int8": torch.int8,
        "int4": torch.uint8,
        "int4-hadamard": torch.uint8,
    }
    sizes = {name: [get(name).vector_bytes(dim) for dim in DIMS] for name in NAMES}
    assert sizes == {
        "bf16": [128, 160, 192, 256, 512],
        "fp8": [66, 82, 98, 130, 258],
        "int8": [66, 82, 98, 130, 258],
        "int4": [36, 44, 52, 68, 136],
        "int4-hadamard": [36, 44, 52, 68, 136],
    }


@pytest.mark.parametrize(
    ("dim", "group"),
    [(2, 2), (64, 64), (80, 80), (96, 96), (128, 128), (192, 96), (256, 128), (576, 96)],
)
def test_int4_groups_divide_the_head_evenly_and_stay_within_128(dim, group) -> None:
    assert codec._group(dim) == group
    assert get("int4").parts(dim)[1][1] == dim // group


def test_int4_puts_even_elements_in_the_low_nibble() -> None:
    payload, scale, minimum = get("int4").encode(torch.arange(16.0).repeat(4)[None])
    assert scale.item() == 1.0
    assert minimum.item() == 0.0
    assert payload[0, :8].tolist() == [low | (low + 1) << 4 for low in range(0, 16, 2)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_round_trip_keeps_shape_and_dtype(name, dtype) -> None:
    x = torch.randn(2, 3, 4, 64).to(dtype)
    back = get(name).round_trip(x)
    assert (back.shape, back.dtype) == (x.shape, dtype)
    rounding = torch.finfo(dtype).eps / 2 * x.float().abs().amax(-1, keepdim=True)
    assert ((back.float() - x.float()).abs() <= bound(name, x.float()) + rounding).all()


@pytest.mark.parametrize("name", NAMES)
def test_no_tokens_are_encoded_to_no_tokens(name) -> None:
    x = torch.zeros(1, 2, 0, 64)
    assert get(name).round_trip(x).shape == x.shape


@pytest.mark.parametrize("native", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_auto_storage_changes_no_bit(native) -> None:
    x = torch.randn(3, 64).to(native)
    assert torch.equal(codec.get("auto", native=native).round_trip(x), x)
    assert codec.get("auto", native=native).vector_bytes(64) == 64 * native.itemsize


def test_a_pair_names_the_codec_of_the_keys_before_that_of_the_values() -> None:
    assert codec.split("fp8/int4") == ("fp8", "int4")
    assert codec.split("int8") == ("int8", "int8")
    pair = codec.pair("fp8/auto", native=torch.float16)
    assert (pair.keys.name, pair.values.name) == ("fp8", "fp16")
    assert pair.vector_bytes(64, 32) == 66 + 64
    assert not pair.lossless(torch.float16)
    assert codec.pair("auto/bf16", native=torch.bfloat16).lossless(torch.bfloat16)
    assert not codec.pair("auto/bf16", native=torch.float16).lossless(torch.float16)
    assert copy.deepcopy(pair) is pair
    assert codec.normal("int4/int4", field="x") == "int4"
    assert codec.normal("int4/auto", field="x") == "int4/auto"


@pytest.mark.parametrize("spec", ["", "fp8/", "/int4", "fp8/int4/int8", "fp8,int4", "FP8", None, 8])
def test_what_is_no_codec_and_no_pair_of_them_is_refused_by_the_name_of_its_field(spec) -> None:
    for call in (codec.split, codec.normal):
        with pytest.raises(
            ValueError,
            match=f"window_dtype must be one of {LISTED}, or two of .*got {re.escape(repr(spec))}$",
        ):
            call(spec, field="window_dtype")


def test_bad_names_and_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match=f"storage dtype must be one of {LISTED}, got 'fp16'"):
        codec.get("fp16", native=torch.float32)
    with pytest.raises(
        ValueError,
        match="dtype must be a floating-point type that a model computes in, got torch.int8",
    ):
        codec.get("auto", native=torch.int8)
    with pytest.raises(
        ValueError, match="head_dim must be even for int4 storage, got 65; use 'int8'"
    ):
        codec.get("int4", native=torch.float32).parts(65)
    with pytest.raises(
        ValueError, match="dtype must name a floating-point type such as 'bfloat16', got 'int8'"
    ):
        codec.parse_dtype("int8")
    for name in ("bf16", "bfloat16", "torch.bfloat16", torch.bfloat16):
        assert codec.parse_dtype(name) is torch.bfloat16


def attention_bound(x, spec: str, scale: float) -> torch.Tensor:
    """Per output channel [G, Dv]: tanh(half the largest score error) x (range of the values) + largest value error."""
    keys, values = codec.split(spec)
    key_error = bound(keys, x.keys)[0].amax(1)
    score_error = scale * (x.query[0].abs() @ key_error[..., None]).amax((1, 2))
    spread = x.values[0].amax(1) - x.values[0].amin(1)
    return torch.tanh(score_error / 2)[:, None] * spread + bound(values, x.values)[0].amax(1)


@pytest.mark.parametrize("evict", [True, False], ids=["retrieval", "kept"])
@pytest.mark.parametrize(
    "name", [*NAMES, "fp8/int4", "int4/fp8", "int8/bf16", "bf16/int4", "int4-hadamard/int8"]
)
def test_attention_over_stored_keys_and_values_stays_within_the_stated_bound(
    name: str, evict: bool
) -> None:
    """Of retrieval heads, and of streaming heads that keep every token: both are held against all of the context."""
    x = inputs(200, kv_heads=2, dim=64)
    policy = HeadPolicy.from_heads(
        retrieval=[[0, 1] if evict else []], num_kv_heads=2, sink=0, recent=1, evict=evict,
        **{"retrieval_dtype" if evict else "streaming_dtype": name},
    )  # fmt: skip
    causal = torch.ones(1, 1, 200, 200, dtype=torch.bool).tril()
    truth = dense(x.query, x.keys, x.values, causal, scale=0.125)[0].transpose(0, 1)
    error = (without_cache(policy, x)[0].transpose(0, 1) - truth).abs().amax(1)
    allowed = attention_bound(x, name, 0.125) + FIXED_BOUND[torch.float32] * x.values.abs().max()
    assert (error <= allowed).all()
    assert error.max() > 10 * FIXED_BOUND[torch.float32]  # lossy storage has been applied


def test_more_bits_make_a_smaller_attention_error() -> None:
    x = inputs(300, kv_heads=2, dim=64)
    causal = torch.ones(1, 1, 300, 300, dtype=torch.bool).tril()
    truth = dense(x.query, x.keys, x.values, causal, scale=0.125)
    errors = {}
    for name in (*NAMES, "fp8/int4", "int4/fp8"):
        policy = HeadPolicy.from_heads(retrieval=[[0, 1]], num_kv_heads=2, retrieval_dtype=name)
        errors[name] = (without_cache(policy, x) - truth).pow(2).mean().sqrt().item()
    assert errors["bf16"] < errors["int8"] < errors["fp8"] < errors["int4"] < 0.1
    # The coarser side decides, and it matters little which side that is.
    mixed = sorted((errors["fp8/int4"], errors["int4/fp8"]))
    assert errors["fp8"] < mixed[0] <= mixed[1] < errors["int4"]
    assert mixed[1] < 1.3 * mixed[0]

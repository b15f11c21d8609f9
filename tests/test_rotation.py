"""The rotation of int4-hadamard: the matrix that docs/numerics.md states, what it gains, and that it never changes."""

import hashlib

import pytest
import torch
from test_codec import DIMS, HADAMARD, bound, get, hadamard, rotated, vectors

from duohead import codec


@pytest.mark.parametrize(
    ("dim", "block"),
    [(4, 4), (64, 64), (72, 8), (80, 16), (96, 32), (128, 128), (192, 32), (256, 128)],
)
def test_channels_are_rotated_in_the_largest_blocks_that_divide_an_int4_group(dim, block) -> None:
    assert 2 ** codec.rotation(HADAMARD, dim) == block
    assert codec.rotation("int4", dim) == 0
    gram = hadamard(dim) @ hadamard(dim).T
    # Orthogonal but for a power of two, or its root where the block is an odd power.
    assert torch.equal(gram, gram[0, 0] * torch.eye(dim, dtype=torch.float64))
    assert gram[0, 0] == (2.0 if block in (8, 32, 128) else 1.0)
    x = torch.randn(20, dim, generator=torch.Generator().manual_seed(dim))
    stored, plain = get(HADAMARD).encode(x), get("int4").encode(rotated(x))
    # In other roundings of fp32, a number may fall on the other side of a border between levels.
    assert (stored[0] != plain[0]).float().mean() < 0.01
    for mine, theirs in zip(stored[1:], plain[1:], strict=True):
        assert torch.allclose(mine.float(), theirs.float(), rtol=2**-10, atol=0)


def test_signs_spread_whatever_a_hadamard_matrix_alone_would_gather() -> None:
    for bits in (4, 5, 6, 7):
        size = 2**bits
        signs = codec._signs(size, torch.device("cpu"))
        # Every row of the matrix without signs, the one of equal numbers first.
        rows = signs * codec._rotated(torch.diag(signs), bits, 0)
        assert (rows[0] == 1).all()
        found = codec._rotated(rows, bits, -bits)
        assert found.abs().max() == 2.0 ** (-(bits // 2))
        torch.testing.assert_close(found.square().sum(-1), torch.ones(size))
    assert signs[:16].tolist() == [1, 1, 1, -1, 1, 1, -1, 1, 1, 1, 1, -1, -1, -1, 1, -1]


def rms_gain(x: torch.Tensor) -> float:
    """The error of int4 over that of int4-hadamard."""
    error = [(get(name).round_trip(x) - x).square().mean().sqrt() for name in ("int4", HADAMARD)]
    return float(error[0] / error[1])


@pytest.mark.parametrize(("dim", "gain"), [(64, 3.1), (80, 1.9), (96, 2.5), (128, 3.5), (256, 3.2)])
def test_a_rotation_gains_what_is_stated_where_a_channel_stands_out(dim, gain) -> None:
    x = torch.randn(2000, dim, generator=torch.Generator().manual_seed(dim))
    peaked = torch.where(torch.arange(dim) == 5, 30.0, 1.0) * x
    assert rms_gain(peaked) == pytest.approx(gain, rel=0.05)
    assert rms_gain(x) == pytest.approx(1.0, abs=0.01)
    # What all numbers of a vector share is the minimum's in int4, and spread by a rotation.
    assert rms_gain(3 + 0.1 * x) < 0.1


def test_a_rotated_vector_is_off_by_no_more_than_half_a_step_in_the_mean_of_squares() -> None:
    for dim in DIMS:
        x = vectors(dim, "outliers")
        limit = (bound("int4", rotated(x)) ** 2).mean(-1).sqrt()
        error = (get(HADAMARD).round_trip(x) - x).square().mean(-1).sqrt()
        assert (error <= limit).all()


@pytest.mark.parametrize("size", [1e5, 1e9, 3e38])
def test_huge_vectors_stay_finite_and_their_rotated_numbers_keep_their_sign(size: float) -> None:
    x = torch.where(torch.arange(64) % 3 == 0, -1.0, 1.0)[None] * size
    back = get(HADAMARD).round_trip(x)
    assert back.isfinite().all()
    before, after = (each.double() @ hadamard(64).T for each in (x, back))
    large = before.abs() > size / 2
    assert 8 <= large.sum() < 64
    assert torch.equal(before[large].sign(), after[large].sign())


def test_a_rotation_gives_the_same_bits_wherever_a_vector_stands() -> None:
    x = torch.randn(3, 5, 7, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    together = get(HADAMARD).encode(x)
    again = get(HADAMARD).encode(x.transpose(0, 2).contiguous().transpose(0, 2))
    assert all(map(torch.equal, together, again))
    alone = get(HADAMARD).encode(x[1, 2, 3])
    torch.set_default_dtype(torch.float64)
    try:
        assert all(map(torch.equal, together, get(HADAMARD).encode(x)))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(part[1, 2, 3], one) for part, one in zip(together, alone, strict=True))


@pytest.mark.parametrize(
    ("dim", "digest"), [(64, "ccb6153dd437"), (80, "556d2a2eb8cb"), (128, "42a854e96af3")]
)
def test_stored_bits_are_those_of_the_first_release(dim, digest) -> None:
    """Caches, policies and records name the format: whatever changes its bits needs another name."""
    x = ((torch.arange(dim) * 37) % 101 - 50) / 8.0
    stored = b"".join(part.numpy().tobytes() for part in get(HADAMARD).encode(x))
    assert hashlib.sha256(stored).hexdigest()[:12] == digest


def test_heads_whose_groups_cannot_be_rotated_are_refused() -> None:
    with pytest.raises(
        ValueError,
        match="needs groups of a multiple of 4 channels, .* head_dim 132 have 66; use 'int4'",
    ):
        get(HADAMARD).parts(132)

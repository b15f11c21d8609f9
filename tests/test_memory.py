"""What growing and reading a long cache costs in bytes; counted by watching every operation, never by the clock.

`Meter` is a dispatch mode: it sees each tensor that an operation returns, sums the storages that are still alive, and
counts the bytes that were newly allocated or written in place. Buffers that PyTorch's kernels free again before they
return are not seen.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import inputs, through_cache, without_cache
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from duohead.cache import DuoCache
from duohead.policy import HeadPolicy
from duohead.storage import capacity

LONG = 65536
MIB = 1 << 20


class Meter(TorchDispatchMode):
    """Bytes of tensors made inside the mode: ``peak`` alive at once, ``moved`` allocated or written."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.moved = 0
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        given = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in given:
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.moved += storage.nbytes()
        if func._schema.is_mutable:
            written = args[3] if "index_copy" in func.__name__ else args[0]
            self.moved += written.nbytes if isinstance(written, Tensor) else 0
        self.peak = max(self.peak, self.living())
        return out

    def living(self) -> int:
        """Bytes of the storages that are still referenced."""
        self.alive = {key: pair for key, pair in self.alive.items() if not pair[0].expired()}
        return sum(size for _, size in self.alive.values())


def one_layer(*, retrieval: list[int], dtype: str = "auto", kv_heads: int = 4) -> HeadPolicy:
    return HeadPolicy.from_heads(
        retrieval=[retrieval],
        num_kv_heads=kv_heads,
        sink=64,
        recent=256,
        retrieval_dtype=dtype,
        streaming_dtype=dtype,
    )


def feed(cache: DuoCache, count: int, *, kv_heads: int = 4, dim: int = 64) -> None:
    """``count`` new tokens through open and commit, without attention."""
    keys = torch.zeros(1, kv_heads, count, dim)
    handle, _ = cache.update(keys, torch.zeros(1, kv_heads, count, dim), 0)
    handle.open(None)
    handle.commit()


def test_the_meter_sees_what_lives_and_what_moves() -> None:
    with Meter() as meter:
        first = torch.zeros(1000)
        assert meter.living() == 4000
        second = first + 1
        assert meter.peak == 8000
        del first
        assert meter.living() == 4000
        before = meter.moved
        second[:10] = 3.0
        assert meter.moved - before == 40
        del second
        assert meter.living() == 0
    assert meter.peak == 8000


@pytest.mark.parametrize("dtype", ["auto", "int4"])
def test_one_more_token_at_64k_moves_only_its_own_bytes(dtype) -> None:
    policy = one_layer(retrieval=[0, 1], dtype=dtype)
    cache = DuoCache(policy)
    for _ in range(LONG // 4096):
        feed(cache, 4096)
    whole = cache.kv_bytes()
    token = 4 * 2 * 64 * 4
    costs = []
    for _ in range(40):
        keys, values = torch.zeros(1, 4, 1, 64), torch.zeros(1, 4, 1, 64)
        handle, _ = cache.update(keys, values, 0)
        handle.open(None)
        with Meter() as meter:
            handle.commit()
        costs.append(meter.moved)
    assert (
        costs[0] <= whole * (capacity(LONG + 1) / LONG - 1) + 8 * token
    )  # a new segment, nothing copied
    assert max(costs[1:]) <= 8 * token


@pytest.mark.parametrize("chunk", [512, 4096])
def test_growing_to_64k_moves_a_bounded_number_of_bytes_per_token(chunk) -> None:
    cache = DuoCache(one_layer(retrieval=[0, 1, 2, 3]))
    moved = 0
    for _ in range(LONG // chunk):
        keys = torch.zeros(1, 4, chunk, 64)
        handle, _ = cache.update(keys, keys, 0)
        handle.open(None)
        with Meter() as meter:
            handle.commit()
        moved += meter.moved
    assert (
        moved <= 2.5 * cache.kv_bytes()
    )  # allocated once, written once, and the small start copied


@pytest.mark.parametrize(
    ("retrieval", "dtype"),
    [([0, 1, 2, 3], "auto"), ([0, 2], "auto"), ([0, 1, 2, 3], "int8"), ([1], "int4")],
    ids=["all", "half", "all-int8", "quarter-int4"],
)
def test_the_peak_while_growing_and_attending_at_64k_is_little_more_than_the_cache(
    retrieval, dtype
) -> None:
    policy = one_layer(retrieval=retrieval, dtype=dtype)
    cache = DuoCache(policy)
    x = inputs(512 + 4, kv_heads=4, groups=2)
    with Meter() as meter:
        for count in [2048] * 16 + [8192] * 3 + [LONG - 7 * 8192 - 519, 1, 1, 1]:
            feed(cache, count)
        grown = meter.peak
        for start, count in ((0, 512), (512, 1), (513, 3)):
            through_cache(policy, x, [count], layer=cache.layers[0], start=start)
    assert cache.get_seq_length() == LONG
    assert grown <= 1.15 * cache.kv_bytes() + 64 * MIB
    assert meter.peak <= 1.15 * cache.kv_bytes() + 64 * MIB


def test_a_first_chunk_of_64k_is_freed_once_it_is_stored() -> None:
    cache = DuoCache(one_layer(retrieval=[0, 1, 2, 3]))
    with Meter() as meter:
        feed(cache, LONG)
        assert meter.living() <= cache.kv_bytes() + MIB
    static = DuoCache(one_layer(retrieval=[0, 1, 2, 3], dtype="int8"), max_length=LONG)
    with Meter() as meter:
        feed(static, LONG)
        assert meter.living() <= static.kv_bytes() + MIB


@pytest.mark.parametrize("options", [{}, {"softcap": 30.0}], ids=["plain", "softcap"])
def test_temporaries_of_attention_do_not_grow_with_the_second_turn(options) -> None:
    """A long turn on top of a past is attended to in tiles and pieces, whatever its length."""
    policy = one_layer(retrieval=[0], kv_heads=1)
    peaks = []
    for length in (2048, 8192):
        cache = DuoCache(policy)
        feed(cache, 8192, kv_heads=1)
        x = inputs(length, kv_heads=1, groups=2)
        with Meter() as meter:
            through_cache(policy, x, [length], layer=cache.layers[0], **options)
        peaks.append(meter.peak - 3 * x.query.nbytes)  # outputs, and what the cache gained
    assert max(peaks) <= 48 * MIB


def test_the_mask_of_a_padded_prefill_does_not_grow_with_its_length() -> None:
    policy = one_layer(retrieval=[0], kv_heads=1)
    peaks = []
    for length in (8192, 24576):
        x = inputs(length, kv_heads=1, dim=8, padding=[100])
        with Meter() as meter:
            without_cache(policy, x)
        peaks.append(meter.peak - 3 * x.query.nbytes)
    assert peaks[1] <= 1.2 * peaks[0]

"""One attention call of one layer, as numbers: what to build, how many bytes it must read, how much it must multiply.

A `Case` is frozen and goes into the record as it is. `presets(name)` lists the cases of a published table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from duohead import codec
from duohead.policy import HeadPolicy

OPERATIONS = ("streaming", "prefill", "decode", "append")
LONG = (8192, 32768, 131072, 524288)


@dataclass(frozen=True)
class Case:
    """One call; sizes in tokens, heads and numbers per head.

    Attributes:
        op: "streaming" (prefill, every head streams), "prefill" (both kinds), "decode" (attention of the newest
            tokens), "append" (storing them).
        length: tokens in all, the new ones included.
        heads, kv_heads, head_dim, batch: the layer and the rows.
        sink, recent: window of streaming heads.
        retrieval_ratio: share of KV heads that keep everything; 0 for "streaming", whatever is given.
        queries: new tokens of decode and append; the other operations take all that follow ``past``.
        past: tokens that prefill finds in the cache.
        retrieval_dtype, streaming_dtype: storage (`duohead.codec.NAMES`).
    """

    op: str
    length: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    batch: int = 1
    sink: int = 64
    recent: int = 256
    retrieval_ratio: float = 1.0
    queries: int = 1
    past: int = 0
    retrieval_dtype: str = "auto"
    streaming_dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.op not in OPERATIONS:
            raise ValueError(f"--op must be one of {', '.join(OPERATIONS)}, got {self.op!r}")
        for name in ("length", "heads", "kv_heads", "head_dim", "batch", "recent", "queries"):
            if getattr(self, name) < 1:
                raise ValueError(f"{_flag(name)} must be at least 1, got {getattr(self, name)}")
        for name in ("sink", "past"):
            if getattr(self, name) < 0:
                raise ValueError(f"{_flag(name)} must be at least 0, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"--heads must be a multiple of --kv-heads, got {self.heads} and {self.kv_heads}"
            )
        if not 0 <= self.retrieval_ratio <= 1:
            raise ValueError(f"--retrieval-ratio must lie in [0, 1], got {self.retrieval_ratio}")
        if self.new_tokens < 1 or self.new_tokens > self.length:
            raise ValueError(
                f"the new tokens must be at least 1 and fit --lengths {self.length}, got --past {self.past} and "
                f"--queries {self.queries}"
            )
        if self.op == "streaming":
            object.__setattr__(self, "retrieval_ratio", 0.0)
        self.policy()  # checks the storage names

    @property
    def new_tokens(self) -> int:
        """Query tokens of the call."""
        return self.queries if self.op in ("decode", "append") else self.length - self.past

    def policy(self) -> HeadPolicy:
        """Policy of the one layer; the retrieval heads lie spread among the others, as identified ones do."""
        count = round(self.retrieval_ratio * self.kv_heads)
        return HeadPolicy.from_heads(
            retrieval=[[index * self.kv_heads // count for index in range(count)]],
            num_kv_heads=self.kv_heads,
            sink=self.sink,
            recent=self.recent,
            retrieval_dtype=self.retrieval_dtype,
            streaming_dtype=self.streaming_dtype,
        )

    def kv_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of keys and values that one new token has to read; the new one's own included."""
        total = 0
        for store in self.policy().stores(0):
            seen = self.length if store.ring is None else min(self.length, store.sink + store.ring)
            token = codec.pair(store.dtype, native=dtype).vector_bytes(self.head_dim, self.head_dim)
            total += self.batch * len(store.heads) * seen * token
        return total

    def full_kv_bytes(self, dtype: torch.dtype) -> int:
        """The same when every head keeps everything in ``dtype``."""
        return 2 * self.batch * self.kv_heads * self.length * self.head_dim * dtype.itemsize

    def flops(self) -> int:
        """Multiplications and additions on visible pairs of query and key, in both products."""
        policy = self.policy()
        share = len(policy.layers[0].retrieval), len(policy.layers[0].streaming)
        first = self.length - self.new_tokens
        all_pairs = _sum_to(self.length) - _sum_to(first)
        window = self.sink + self.recent
        # A query at position p sees min(p + 1, window) tokens.
        short = _sum_to(min(self.length, window)) - _sum_to(min(first, window))
        near = short + window * (max(self.length, window) - max(first, window))
        pairs = share[0] * all_pairs + share[1] * near
        return 4 * self.batch * (self.heads // self.kv_heads) * self.head_dim * pairs


def preset(name: str) -> list[Case]:
    """The cases of a table, each once; ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return list(dict.fromkeys(PRESETS[name]()))


def _decode_table() -> Iterator[Case]:
    """Issue 3, kernels: decode by length, codec and ratio."""
    for length in LONG:
        case = Case("decode", length)
        yield case
        yield replace(case, retrieval_ratio=0.5)
        for name in ("fp8", "int8", "int4"):
            yield replace(case, retrieval_dtype=name, streaming_dtype=name)
        yield replace(case, retrieval_ratio=0.5, retrieval_dtype="fp8", streaming_dtype="int4")


def _prefill_table() -> Iterator[Case]:
    """Issue 3, kernels: streaming prefill, then both kinds together."""
    for length in LONG[:3]:
        yield Case("streaming", length, sink=128)
    for length in LONG[:3]:
        yield Case("prefill", length)
        yield Case("prefill", length, retrieval_ratio=0.5)
    yield Case("prefill", 131072, retrieval_ratio=0.5, past=131072 - 32768)
    yield Case("streaming", 131072, sink=128, past=131072 - 32768)


def _shapes() -> Iterator[Case]:
    """No cliff: neighbours of the tables' shape, one thing changed at a time."""
    for dtype in ("auto", "fp8", "int4"):
        stored = {"retrieval_dtype": dtype, "streaming_dtype": dtype}
        base = Case("decode", 65536, **stored)  # type: ignore[arg-type]
        yield base
        yield replace(base, batch=8)
        yield replace(base, heads=32, kv_heads=32)
        yield replace(base, head_dim=64)
        yield replace(base, heads=16, kv_heads=4)
        yield replace(base, heads=28, kv_heads=4)
    half = Case("decode", 65536, retrieval_ratio=0.5)
    for sink in (0, 4, 64, 128):
        yield replace(half, sink=sink)
        yield Case("streaming", 32768, sink=sink)
    for recent in (64, 256, 1024, 8192):
        yield replace(half, recent=recent)
        yield Case("streaming", 32768, recent=recent)
    for queries in (1, 4, 8):
        yield replace(half, queries=queries)
        yield replace(
            half, op="append", queries=queries, retrieval_dtype="fp8", streaming_dtype="int4"
        )
    for heads, kv_heads, head_dim, batch in (
        (32, 32, 128, 1),
        (32, 8, 64, 1),
        (28, 4, 128, 1),
        (32, 8, 128, 8),
    ):
        yield Case("streaming", 32768, heads, kv_heads, head_dim, batch)


def _rotation() -> Iterator[Case]:
    """What a rotation of keys and values costs decode, and storing them, beside the same format without."""
    for length in (32768, 131072):
        for name in ("int4", codec.HADAMARD):
            for op in ("decode", "append"):
                yield Case(op, length, retrieval_dtype=name, streaming_dtype=name)


PRESETS: dict[str, Callable[[], Iterator[Case]]] = {
    "decode-table": _decode_table,
    "prefill-table": _prefill_table,
    "shapes": _shapes,
    "rotation": _rotation,
}


def _sum_to(count: int) -> int:
    return count * (count + 1) // 2


def _flag(name: str) -> str:
    return f"--{'lengths' if name == 'length' else name.replace('_', '-')}"

"""What to measure of a whole model, as plain data: one `Job` per number, and the presets of the published tables.

The order of a preset matters only in that jobs of one model stand together, because building a model takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from duohead import codec
from duohead.bench.models import SHAPES, check_weights, config, kv_geometry
from duohead.policy import HeadPolicy

MEASURES = ("prefill", "decode", "share")
METHODS = ("full", "duo", "transformers")
K = 1024


@dataclass(frozen=True)
class Job:
    """One measurement of one model.

    Attributes:
        measure: "prefill" (reading a prompt), "decode" (a step after a past of that length), or "share" (the streaming
            heads' part of the attention time of a prefill).
        method: "full" (our engine, every head keeps everything), "duo" (under a policy) or "transformers".
        model: a preset of `duohead.bench.models`.
        length: tokens of the prompt, or of the past.
        chunk: tokens per forward of prefill.
        retrieval_ratio, sink, recent: the policy of "duo".
        retrieval_dtype, streaming_dtype: storage of "duo" and "full".
        batch: rows.
        weights: "bf16" or "int8".
        compile: what `Engine` takes.
        room: tokens that the cache is allocated for, if more than ``length``; jobs in a row that differ in nothing else
            share one engine then, which compiles once.
        impl: attention implementation of the engine.
    """

    measure: str
    method: str
    model: str
    length: int
    chunk: int = 32 * K
    retrieval_ratio: float = 0.5
    sink: int = 64
    recent: int = 256
    retrieval_dtype: str = "auto"
    streaming_dtype: str = "auto"
    batch: int = 1
    weights: str = "bf16"
    compile: bool | str = "auto"
    impl: str = "auto"
    room: int = 0

    def __post_init__(self) -> None:
        for name, word, known in (
            ("measure", self.measure, MEASURES),
            ("methods", self.method, METHODS),
            ("model", self.model, tuple(SHAPES)),
        ):
            if word not in known:
                raise ValueError(f"--{name} must be one of {', '.join(known)}, got {word!r}")
        for name, value, least in (
            ("lengths", self.length, 1),
            ("chunks", self.chunk, 1),
            ("batch", self.batch, 1),
        ):
            if value < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}")
        if not 0 <= self.retrieval_ratio <= 1:
            raise ValueError(f"--retrieval-ratio must lie in [0, 1], got {self.retrieval_ratio}")
        if self.measure == "share" and not 0 < self.ratio < 1:
            raise ValueError(
                "--measure share needs heads of both kinds; use --methods duo and a --retrieval-ratio between 0 and 1"
            )
        check_weights(self.weights)
        self.policy()  # checks the window and the storage names

    @property
    def ratio(self) -> float:
        """Share of retrieval heads that the method really has."""
        return self.retrieval_ratio if self.method == "duo" else 1.0

    def policy(self) -> HeadPolicy:
        """The policy of the method, not yet bound to the model."""
        layers, heads = kv_geometry(config(self.model))
        return HeadPolicy.from_heads(
            retrieval=spread(self.ratio, layers, heads),
            num_kv_heads=heads,
            sink=self.sink,
            recent=self.recent,
            retrieval_dtype=self.retrieval_dtype,
            streaming_dtype=self.streaming_dtype,
        )

    def shape(self) -> dict[str, object]:
        """For a record: what the number depends on."""
        fields = dict(vars(self))
        for name in ("measure", "method", "impl"):
            del fields[name]
        fields["retrieval_ratio"] = self.ratio
        if self.measure == "decode":
            del fields["chunk"]
        return fields


def spread(ratio: float, layers: int, heads: int) -> list[list[int]]:
    """Retrieval heads of layers that are alike: as many as ``ratio`` asks for, evenly over them and within each.

    Records name policies by digest, so the places stay; `models.even_heads` is for layers with native windows.
    """
    total = round(ratio * layers * heads)
    found, given = [], 0
    for layer in range(layers):
        count = total * (layer + 1) // layers - given
        given += count
        found.append([(layer + index * heads // count) % heads for index in range(count)])
    return found


def read_bytes(policy: HeadPolicy, tokens: int, batch: int = 1) -> int:
    """Bytes of keys and values that one decode step after ``tokens`` tokens reads; the policy is bound to a model."""
    native = codec.parse_dtype(policy.native_dtype or "bf16")
    total = 0
    for index, shape in enumerate(policy.shapes):
        for store in policy.stores(index):
            storage = codec.pair(store.dtype, native=native)
            token = storage.vector_bytes(shape.head_dim, shape.value_dim)
            seen = tokens if store.ring is None else min(tokens, store.sink + store.ring)
            total += len(store.heads) * seen * token
    return total * batch


def preset(name: str) -> list[Job]:
    """The jobs of a table or figure; ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return list(PRESETS[name]())


def _decode_table() -> Iterator[Job]:
    """Issue 3, engine: decode steps against the floor, and duo against full in the same engine."""
    llama = Job("decode", "transformers", "llama-3-8b", 128 * K)
    yield llama
    for method, lengths in (("full", (128, 400)), ("duo", (128, 400, 512))):
        for length in lengths:
            yield replace(llama, method=method, length=length * K, room=lengths[-1] * K)
    mha = Job("decode", "full", "llama-2-7b", 100 * K, retrieval_ratio=0.25)
    yield mha
    yield replace(mha, method="duo")


def _prefill_table() -> Iterator[Job]:
    """Issue 3, engine: 128K in 32K chunks against transformers, and the MHA model by chunk size."""
    for method in ("transformers", "full", "duo"):
        yield Job("prefill", method, "llama-3-8b", 128 * K)
    yield Job("share", "duo", "llama-3-8b", 128 * K)
    yield from _mha_prefill()


def _long_prefill() -> Iterator[Job]:
    """Issue 3, engine: 320K tokens in chunks of 32K and 128K."""
    for method in ("duo", "full"):
        for chunk in (32 * K, 128 * K):
            yield Job("prefill", method, "llama-3-8b", 320 * K, chunk)


def _mha_prefill() -> Iterator[Job]:
    for method in ("full", "duo"):
        for chunk in (10 * K, 25 * K, 50 * K, 100 * K):
            yield Job("prefill", method, "llama-2-7b", 100 * K, chunk, retrieval_ratio=0.25)


def _paper_decode() -> Iterator[Job]:
    """The paper's decoding figure: MHA from 20K to 200K, GQA from 100K to 1M."""
    for model, lengths, ratio in (
        ("llama-2-7b", (20, 50, 100, 150, 200), 0.25),
        ("llama-3-8b", (100, 200, 400, 700, 1000), 0.5),
    ):
        for length in lengths:
            for method in ("full", "duo"):
                yield Job("decode", method, model, length * K, retrieval_ratio=ratio)


def _paper_prefill() -> Iterator[Job]:
    """The paper's prefill figure: time against chunk size."""
    yield from _mha_prefill()
    for method in ("full", "duo"):
        for chunk in (10 * K, 25 * K, 50 * K, 100 * K):
            yield Job("prefill", method, "llama-3-8b", 100 * K, chunk)


def _paper_ratio() -> Iterator[Job]:
    """The ratio sweep: decode step and memory against the share of retrieval heads."""
    for model, length in (("llama-2-7b", 100 * K), ("llama-3-8b", 320 * K)):
        yield Job("decode", "full", model, length)
        for ratio in (0.75, 0.5, 0.25, 0.125, 0.0):
            yield Job("decode", "duo", model, length, retrieval_ratio=ratio)


PRESETS: dict[str, Callable[[], Iterator[Job]]] = {
    "decode-table": _decode_table,
    "prefill-table": _prefill_table,
    "long-prefill": _long_prefill,
    "paper-decode": _paper_decode,
    "paper-prefill": _paper_prefill,
    "paper-ratio": _paper_ratio,
}

"""Which pictures a set of records makes: series of measured points by name, before anything is drawn.

Only what was measured becomes a point; what ran out of memory becomes a sentence under the picture. Of several records
of the same thing the newest counts. `duohead.bench.plots` draws the result as PNG and into an HTML page.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from duohead import codec
from duohead.evaluate.svg import short_count

Record = Mapping[str, Any]
GIB = 2**30


@dataclass
class Figure:
    """One picture: named lines of measured points, {x: y}, and what could not be measured.

    ``doubling`` says that x values double from point to point, so that a logarithmic axis suits them.
    """

    name: str
    title: str
    caption: str
    x_label: str
    y_label: str
    unit: str
    doubling: bool = False
    series: dict[str, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))
    missing: list[str] = field(default_factory=list)

    def add(self, line: str, x: int, y: float | str | None) -> None:
        """A point of a line; text says why there is none."""
        if isinstance(y, str):
            self.missing.append(f"{line} at {short_count(x)}: {y}")
        elif y is not None:
            self.series[line][x] = y

    @property
    def drawable(self) -> bool:
        """Whether some line has two points."""
        return any(len(points) > 1 for points in self.series.values())


def figures(records: Sequence[Record]) -> list[Figure]:
    """Every picture that the records have points for."""
    found = [
        *_decode_kernels(records),
        *_streaming_kernels(records),
        *_model_decode(records),
        *_model_prefill(records),
        *_ratios(records),
    ]
    return [figure for figure in found if figure.drawable]


def newest(records: Sequence[Record], op: str) -> list[Record]:
    """The records of an operation, of each shape and implementation the last one.

    Machines are not mixed: those of the last record's machine count.
    """
    last: dict[str, Record] = {}
    found = [entry for entry in records if entry["op"] == op]
    for entry in found:
        if machine(entry) == machine(found[-1]):
            key = repr((entry["impl"], entry["dtype"], sorted(entry["shape"].items())))
            last.pop(key, None)
            last[key] = entry
    return list(last.values())


def machine(entry: Record) -> str:
    """The GPU of a record, or the processor if there is none."""
    hardware = entry["hardware"]
    gpus = hardware.get("gpus")
    return str(gpus[0]) if gpus else f"{hardware['cpu']}, {hardware['cores']} cores"


def time_of(entry: Record, name: str) -> float | str | None:
    """A median in milliseconds, or the text that stands for it."""
    value: float | str | None = entry["numbers"].get(f"{name}_median_ms")
    return value


def stored_as(shape: Mapping[str, Any]) -> str:
    """Storage of a record's case in a few letters: of retrieval heads and, where others occur, "+ " that of those."""
    ratio = shape.get("retrieval_ratio")
    kinds = [kind for kind, left_out in (("retrieval", 0), ("streaming", 1)) if ratio != left_out]
    names = (shape.get(f"{kind}_dtype", "auto").replace("auto", "bf16") for kind in kinds)
    return " + ".join(dict.fromkeys(names))


def as_they_come(shape: Mapping[str, Any]) -> bool:
    """Whether neither weights nor cache of a whole model are stored in another format."""
    return bool(shape.get("weights", "bf16") == stored_as(shape) == "bf16")


def _plain(shape: Mapping[str, Any]) -> bool:
    """Whether a kernel case is of the tables' shape, not one of its neighbours."""
    usual = {"heads": 32, "kv_heads": 8, "head_dim": 128, "batch": 1, "queries": 1, "past": 0}
    return all(shape.get(name, value) == value for name, value in usual.items())


def _decode_kernels(records: Sequence[Record]) -> Iterator[Figure]:
    picture = Figure(
        "decode-kernels",
        "Decode attention against the fastest full attention",
        "One layer, 32 query heads, 8 KV heads of size 128, one row: how many times faster, by share of retrieval "
        "heads and storage (mixed: retrieval heads in fp8, streaming heads in int4).",
        "tokens in the cache",
        "times faster",
        "x",
        doubling=True,
    )
    # The page draws the first few lines only.
    first = ("100% bf16", "50% bf16", "100% int4", "50% mixed")
    for line in first:
        picture.series[line] = {}
    for entry in newest(records, "decode"):
        shape = entry["shape"]
        window = shape.get("sink", 64), shape.get("recent", 256)
        stored = stored_as(shape)
        # A rotation changes no bytes, so its line would lie on that of the format itself.
        if codec.HADAMARD in stored:
            continue
        if _plain(shape) and window == (64, 256) and "speedup" in entry["numbers"]:
            line = f"{shape['retrieval_ratio']:.0%} {'mixed' if '/' in stored else stored}"
            picture.add(line, shape["length"], entry["numbers"]["speedup"])
    for line in first:
        if not picture.series[line]:
            del picture.series[line]
    yield picture


def _streaming_kernels(records: Sequence[Record]) -> Iterator[Figure]:
    picture = Figure(
        "streaming-kernels",
        "Prefill attention when every head streams",
        "One layer; lines rise with the length and not with its square.",
        "tokens",
        "ms",
        "ms",
        doubling=True,
    )
    for entry in newest(records, "prefill.streaming"):
        shape = entry["shape"]
        window = shape.get("sink", 128), shape.get("recent", 256)
        if _plain(shape) and window == (128, 256) and entry["hardware"].get("gpus"):
            picture.add(entry["impl"], shape["length"], time_of(entry, "streaming"))
            picture.add("flex", shape["length"], _number(time_of(entry, "flex")))
    yield picture


def _model_decode(records: Sequence[Record]) -> Iterator[Figure]:
    for model, entries in _by_model(newest(records, "model.decode")).items():
        ratio = _main_ratio(entries)
        time, memory = (
            Figure(
                f"decode-{what}-{model}",
                f"{model}: {title}",
                f"Random weights of the true shape, one row, {ratio:.0%} retrieval heads for duo.",
                "tokens in the cache",
                label,
                label,
            )
            for what, title, label in (
                ("time", "a decode step by length", "ms"),
                ("memory", "peak memory of decoding by length", "GiB"),
            )
        )
        for entry in entries:
            shape, numbers = entry["shape"], entry["numbers"]
            if entry["impl"] == "duo" and shape["retrieval_ratio"] != ratio:
                continue
            told, line = time_of(entry, "decode"), _line(entry)
            time.add(line, shape["length"], told)
            if shape.get("room", 0) <= shape["length"]:  # else the cache was made for more
                size = told if isinstance(told, str) else numbers["peak_bytes"] / GIB
                memory.add(line, shape["length"], size)
        yield time
        if any(sum(points.values()) for points in memory.series.values()):
            yield memory


def _model_prefill(records: Sequence[Record]) -> Iterator[Figure]:
    groups: dict[tuple[str, int], list[Record]] = defaultdict(list)
    for entry in newest(records, "model.prefill"):
        groups[entry["shape"]["model"], entry["shape"]["length"]].append(entry)
    for (model, length), entries in groups.items():
        picture = Figure(
            f"prefill-{model}-{length}",
            f"{model}: prefill of {short_count(length)} tokens by chunk size",
            "Random weights of the true shape, one row.",
            "tokens a chunk",
            "s",
            "s",
        )
        for entry in entries:
            told = time_of(entry, "prefill")
            seconds = told / 1000 if isinstance(told, float | int) else told
            picture.add(_line(entry), entry["shape"]["chunk"], seconds)
        yield picture


def _ratios(records: Sequence[Record]) -> Iterator[Figure]:
    groups: dict[tuple[str, int], dict[int, Record]] = defaultdict(dict)
    for entry in newest(records, "model.decode"):
        shape = entry["shape"]
        if entry["impl"] in ("duo", "full") and as_they_come(shape):
            key = (shape["model"], shape["length"])
            groups[key][round(100 * shape["retrieval_ratio"])] = entry
    for (model, length), entries in groups.items():
        if len(entries) < 3:
            continue
        picture = Figure(
            f"ratio-{model}-{length}",
            f"{model}: a decode step at {short_count(length)} tokens by ratio",
            "Share of KV heads that keep everything; the floor is weights and cache read once.",
            "retrieval heads, %",
            "ms",
            "ms",
        )
        for percent, entry in sorted(entries.items()):
            picture.add("measured", percent, time_of(entry, "decode"))
            picture.add("floor", percent, entry["numbers"].get("floor_ms"))
        yield picture


def _by_model(entries: Sequence[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = defaultdict(list)
    for entry in entries:
        if entry["shape"].get("weights", "bf16") == "bf16":
            groups[entry["shape"]["model"]].append(entry)
    return groups


def _line(entry: Record) -> str:
    """A method's name, short enough to stand beside its line, with the storage unless that is bf16."""
    if entry["impl"] == "transformers":
        return "HF SDPA"
    stored = stored_as(entry["shape"])
    return str(entry["impl"]) + ("" if stored == "bf16" else f" {stored}")


def _main_ratio(entries: Sequence[Record]) -> float:
    """The ratio of duo that was measured at most lengths."""
    lengths: dict[float, set[int]] = defaultdict(set)
    for entry in entries:
        if entry["impl"] == "duo":
            lengths[entry["shape"]["retrieval_ratio"]].add(entry["shape"]["length"])
    return max(lengths, key=lambda ratio: len(lengths[ratio]), default=0.5)


def _number(value: float | str | None) -> float | None:
    return None if isinstance(value, str) else value

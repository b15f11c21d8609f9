"""The tables of docs/laguna.md: bytes of caches on the geometry of Laguna-XS.2, beside what the adapter's card counts.

Made from the records of `duohead bench footprint --preset laguna-card`; of several records of one thing the newest
counts. Savings are against the model's own cache in FP8, native windows respected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tools.speed_tables import NOTHING, Entry, Records, machine_line, table

KIND = (
    "retrieval_ratio",
    "retrieval_dtype",
    "streaming_dtype",
    "window_dtype",
    "evict",
    "sink",
    "recent",
)
# The policies with columns of their own: share of retrieval heads and their storage, the rest as the adapter has it.
COLUMNS = ((0.4, "fp8"), (0.25, "fp8"), (0.4, "fp8/int4"))


def card(records: Records) -> str:
    """The nine rows of the card as printed, the model's own cache, and ours."""
    return _sizes(records, lambda numbers: numbers["published_mib"] is not None)


def longer(records: Records) -> str:
    """The same for longer prompts, which the card does not have; its columns are what its accounting gives."""
    return _sizes(records, lambda numbers: numbers["published_mib"] is None)


def policies(records: Records) -> str:
    """Every policy: its bytes for two texts, and its least saving over every length of each range."""
    sizes, spans = _by(records, "footprint", _text), _by(records, "footprint.lengths", _span)
    if not spans:
        return NOTHING
    ends = min(sizes), max(sizes)
    rows = []
    for kind in next(iter(spans.values())):
        cells = [_mib(sizes[text][kind]["numbers"]["kv_bytes"]) for text in ends]
        rows.append([_name(kind), *cells, *(_least(found[kind]) for found in spans.values())])
    head = ["retrieval heads; others; windows", *(f"{_said(text)}, MiB" for text in ends)]
    head += [
        f"least saved, {first:,} to {last:,} (asked: {100 * target:.0f} %)"
        for first, last, target in spans
    ]
    return table(head, rows) + _machine(records)


def _sizes(records: Records, wanted: Callable[[Entry], bool]) -> str:
    rows = []
    for text, found in sorted(_by(records, "footprint", _text).items()):
        by_card = found["card"]["numbers"]
        if not wanted(by_card):
            continue
        own, fp8 = by_card["own_bytes"], by_card["own_fp8_bytes"]
        told = [by_card["published_base_mib"], by_card["published_mib"]]
        counted = [by_card["base_kv_bytes"], by_card["kv_bytes"]]
        ours = [_entry(found, *column)["numbers"]["kv_bytes"] for column in COLUMNS]
        rows.append(
            [
                _said(text),
                *(f"{a:.2f}" if a is not None else _mib(b) for a, b in zip(told, counted, strict=True)),
                _mib(own),
                _mib(fp8),
                *(f"{_mib(size)}, {100 * (1 - size / fp8):.0f} % less" for size in ours),
            ]
        )  # fmt: skip
    if not rows:
        return NOTHING
    head = ["MiB, prompt + decoded", "card: base", "card: mixed", "own, bf16", "own, fp8"]
    head += [f"ours, {100 * ratio:g} % {dtype}" for ratio, dtype in COLUMNS]
    return table(head, rows) + _machine(records)


def _by(records: Records, op: str, key: Callable[[Entry], Any]) -> dict[Any, dict[Any, Entry]]:
    """The newest records of an operation, by what ``key`` takes from their shapes and then by kind of policy."""
    found: dict[Any, dict[Any, Entry]] = {}
    for entry in records:
        if entry["op"] == op:
            shape = entry["shape"]
            kind = tuple(shape[name] for name in KIND) if entry["impl"] == "duo" else entry["impl"]
            found.setdefault(key(shape), {})[kind] = entry
    return found


def _entry(found: dict[Any, Entry], ratio: float, dtype: str) -> Entry:
    """The record of a policy with columns of its own."""
    kinds: Iterable[Any] = (kind for kind in found if not isinstance(kind, str))
    return next(found[kind] for kind in kinds if kind[:2] == (ratio, dtype) and kind[4])


def _text(shape: Entry) -> tuple[int, int]:
    return shape["prompt"], shape["decode"]


def _span(shape: Entry) -> tuple[int, int, float]:
    return shape["first"], shape["last"], shape["target"]


def _name(kind: tuple[Any, ...]) -> str:
    ratio, retrieval, streaming, window, evict, sink, recent = kind
    rest = f"{sink} + {recent} tokens in {streaming}" if evict else f"all tokens in {streaming}"
    return f"{100 * ratio:g} % {retrieval}; {rest}; {window}"


def _least(entry: Entry) -> str:
    numbers = entry["numbers"]
    told = f"{100 * numbers['least_saving']:.1f} %"
    missed = numbers["missed_tokens"]
    if not missed:
        return told
    first, last, _ = _span(entry["shape"])
    share = sum(b - a + 1 for a, b in missed) / (last - first + 1)
    return f"{told}, missed at {100 * share:.0f} % of lengths up to {missed[-1][1]:,}"


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f}"


def _said(text: tuple[int, int]) -> str:
    return f"{text[0]:,} + {text[1]}"


def _machine(records: Records) -> str:
    return f"\n{machine_line(records[-1])}\n"

"""Write the tables of the README and of docs/numbers.md from the records in results/, so that none is typed by hand.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; this replaces what is between them. Run
`python tools/readme.py` after new records; `tests/test_readme.py` fails while a page says something else.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from duohead.bench.figures import machine, newest, stored_as, time_of  # noqa: E402
from duohead.evaluate.results import NeedleResult  # noqa: E402
from duohead.evaluate.svg import short_count  # noqa: E402
from duohead.files import write_text  # noqa: E402
from duohead.record import read_records  # noqa: E402

RESULTS = ROOT / "results"
GIB = 2**30
PAGES = ("README.md", "docs/numbers.md")
NAMES = {"full": "all (full attention)", "streaming": "none (all heads stream)"}
MARK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, first column left-aligned, the others right-aligned."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def needles() -> str:
    """Exact match of each choice of heads at each length, and what the cache weighs at the longest."""
    path = RESULTS / "needle-pocket.jsonl"
    result = NeedleResult.read(path)
    lengths = result.lengths
    dense = result.kv_bytes(method="full", length=lengths[-1], task="passkeys")
    rows = []
    for method in result.methods:
        if method.startswith("random"):
            continue
        name = NAMES.get(method) or f"identified, {_share(method)}"
        rows.append(_needle_row(result, name, [method], lengths, dense))
        rivals = [
            rival
            for rival in result.methods
            if rival.startswith(method.replace("duo", "random") + "_")
        ]
        if rivals:
            name = f"random, {_share(method)} ({len(rivals)} draws)"
            rows.append(_needle_row(result, name, rivals, lengths, dense))
    head = [
        "heads that keep everything",
        *(f"{n // 1024}K" for n in lengths),
        f"cache at {lengths[-1] // 1024}K",
    ]
    return table(head, rows) + f"\n{_machine(read_records(path)[-1])}\n"


def _needle_row(
    result: NeedleResult, name: str, methods: list[str], lengths: list[int], dense: int
) -> list[str]:
    scores = []
    for length in lengths:
        found = [
            100 * result.mean(method=method, length=length, task="passkeys") for method in methods
        ]
        low, high = min(found), max(found)
        scores.append(f"{low:.1f} %" if len(found) == 1 else f"{low:.0f} – {high:.0f} %")
    size = result.kv_bytes(method=methods[0], length=lengths[-1], task="passkeys")
    return [name, *scores, f"{size / 2**20:.2f} MiB, {100 * size / dense:.0f} %"]


def _share(method: str) -> str:
    return f"{method.split('_')[1]} %"


def prefill() -> str:
    """Streaming prefill against dense causal attention, the last record of each length."""
    entries = {
        entry["shape"]["length"]: entry for entry in read_records(RESULTS / "prefill-cpu.jsonl")
    }
    rows = [
        [
            f"{length // 1024}K",
            f"{entry['numbers']['causal_sdpa_median_ms']:.0f} ms",
            f"{entry['numbers']['streaming_median_ms']:.0f} ms",
            f"{entry['numbers']['speedup']:.1f} ×",
        ]
        for length, entry in sorted(entries.items())
    ]
    head = ["tokens", "causal SDPA", "all heads streaming", "faster"]
    return table(head, rows) + f"\n{_machine(entries[max(entries)])}\n"


def _machine(entry: dict[str, Any]) -> str:
    versions = entry["versions"]
    return f"{machine(entry)}; torch {versions['torch']}, transformers {versions['transformers']}."


BASELINES = {"sdpa-cudnn": "cuDNN", "sdpa-flash": "flash", "fa4": "FA4", "flex": "Flex"}
MODELS = {
    "llama-3-8b": "Llama-3-8B",
    "llama-2-7b": "Llama-2-7B",
    "qwen2.5-7b": "Qwen2.5-7B",
    "mistral-7b": "Mistral-7B",
}


def decode_kernels() -> str:
    """Decode attention of one layer: the fastest full attention of others, then ours by storage and ratio."""
    entries = newest(read_records(RESULTS / "kernels-h100.jsonl"), "decode")
    columns = {
        "full, bf16": (1.0, "bf16"),
        "50 %, bf16": (0.5, "bf16"),
        "full, fp8": (1.0, "fp8"),
        "full, int4": (1.0, "int4"),
    }
    cells: dict[int, dict[str, dict[str, Any]]] = {}
    for entry in filter(_is_table_shape, entries):
        shape = entry["shape"]
        kind = (shape["retrieval_ratio"], stored_as(shape))
        for name, wanted in columns.items():
            if kind == wanted:
                cells.setdefault(shape["length"], {})[name] = entry
    rows = [
        [
            short_count(length),
            _fastest(found),
            *(_time(found.get(name), "decode", share=True) for name in columns),
        ]
        for length, found in sorted(cells.items())
    ]
    head = ["tokens", "best full attention of others", *columns]
    return table(head, rows) + f"\n{_machine(entries[-1])}\n"


def streaming_kernels() -> str:
    """Prefill attention of one layer with every head streaming."""
    entries = newest(read_records(RESULTS / "kernels-h100.jsonl"), "prefill.streaming")
    cells: dict[int, dict[str, dict[str, Any]]] = {}
    for entry in filter(_is_table_shape, entries):
        if (entry["shape"]["sink"], entry["shape"]["recent"]) == (128, 256):
            cells.setdefault(entry["shape"]["length"], {})[entry["impl"]] = entry
    rows = []
    for length, found in sorted(cells.items()):
        rows.append(
            [
                short_count(length),
                _fastest(found, without="flex"),
                _time(_together(found), "flex"),
                _time(found.get("triton"), "streaming"),
                _time(found.get("hopper") or found.get("cute"), "streaming"),
            ]
        )
    head = [
        "tokens",
        "best full attention of others",
        "FlexAttention, same mask",
        "Triton",
        "Hopper",
    ]
    return table(head, rows) + f"\n{_machine(entries[-1])}\n"


def model_decode() -> str:
    """A decode step of whole models, and how far it is from reading weights and cache once."""
    entries = newest(read_records(RESULTS / "model-h100.jsonl"), "model.decode")
    cells: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for entry in entries:
        key = (entry["shape"]["model"], entry["shape"]["length"])
        cells.setdefault(key, {})[_method(entry)] = entry
    rows = []
    for (model, length), found in sorted(cells.items(), key=_by_model):
        duo = found.get(MAIN_RATIOS.get(model, "duo 50 %"))
        rows.append(
            [
                f"{MODELS.get(model, model)}, {short_count(length)}",
                _time(found.get("transformers"), "decode"),
                _with_floor(found.get("full")),
                _with_floor(duo)
                + ("" if duo is None else f", {_method(duo).removeprefix('duo ')}"),
                _ratio(found.get("full"), duo, "decode"),
            ]
        )
    head = [
        "a decode step",
        "transformers",
        "full, × floor",
        "duo, × floor, ratio",
        "faster than full",
    ]
    return table(head, rows) + f"\n{_machine(entries[-1])}\n"


def model_prefill() -> str:
    """Prefill of whole models in chunks."""
    entries = newest(read_records(RESULTS / "model-h100.jsonl"), "model.prefill")
    cells: dict[tuple[str, int, int], dict[str, dict[str, Any]]] = {}
    for entry in entries:
        shape = entry["shape"]
        key = (shape["model"], shape["length"], shape["chunk"])
        cells.setdefault(key, {})[_method(entry)] = entry
    rows = []
    for (model, length, chunk), found in sorted(cells.items(), key=_by_model):
        duo = found.get(MAIN_RATIOS.get(model, "duo 50 %"))
        rows.append(
            [
                f"{MODELS.get(model, model)}, {short_count(length)} in {short_count(chunk)} chunks",
                _seconds(found.get("transformers")),
                _seconds(found.get("full")),
                _seconds(duo) + ("" if duo is None else f", {_method(duo).removeprefix('duo ')}"),
                _ratio(found.get("full"), duo, "prefill"),
            ]
        )
    head = ["prefill", "transformers", "full", "duo, ratio", "faster than full"]
    return table(head, rows) + f"\n{_machine(entries[-1])}\n"


def capacity() -> str:
    """The longest cache on one card."""
    entries = newest(read_records(RESULTS / "capacity-h100.jsonl"), "capacity")
    rows = []
    for entry in entries:
        shape, numbers = entry["shape"], entry["numbers"]
        step = numbers["decode_median_ms"]
        told = (
            step if isinstance(step, str) else f"{step:.1f} ms, {numbers['over_floor']:.2f} × floor"
        )
        prompt = numbers.get("prefill_seconds")
        read = f"{numbers['prefill_tokens']:,} in " if prompt is not None else ""
        read += prompt if isinstance(prompt, str) else "" if prompt is None else f"{prompt:.0f} s"
        beyond = numbers.get("beyond")
        rows.append(
            [
                f"{MODELS.get(shape['model'], shape['model'])}, {shape['weights']} weights, "
                f"{stored_as(shape)} cache, {100 * shape['retrieval_ratio']:g} %",
                f"{numbers['estimated_tokens']:,}",
                f"{numbers['tokens']:,}",
                "" if beyond is None else f"{numbers['beyond_tokens']:,}: {beyond}",
                told,
                read,
            ]
        )
    head = [
        "one card",
        "tokens estimated",
        "measured at",
        "3 % more",
        "a decode step",
        "a real prompt",
    ]
    return table(head, rows) + f"\n{_machine(entries[-1])}\n"


# The share of retrieval heads that the paper takes for a model, where it is not a half.
MAIN_RATIOS = {"llama-2-7b": "duo 25 %"}


def _is_table_shape(entry: dict[str, Any]) -> bool:
    shape = entry["shape"]
    usual = {"heads": 32, "kv_heads": 8, "head_dim": 128, "batch": 1, "queries": 1, "past": 0}
    return all(shape[name] == value for name, value in usual.items())


def _fastest(found: dict[str, dict[str, Any]], *, without: str = "") -> str:
    """The quickest baseline of these records."""
    numbers = _together(found)["numbers"]
    times = {
        name: value
        for key, name in BASELINES.items()
        if key != without
        and isinstance(value := numbers.get(f"{key.replace('-', '_')}_median_ms"), int | float)
    }
    if not times:
        return ""
    best = min(times, key=lambda name: times[name])
    return f"{_milliseconds(times[best])} ({best})"


def _together(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One entry with the numbers of all, whose baselines complete one another."""
    return {
        "numbers": {name: x for entry in found.values() for name, x in entry["numbers"].items()}
    }


def _time(entry: dict[str, Any] | None, name: str, *, share: bool = False) -> str:
    if entry is None:
        return ""
    value = time_of(entry, name)
    if not isinstance(value, int | float):
        return (value or "").partition(":")[0]
    part = entry["numbers"].get("share_of_read_ceiling") if share else None
    return _milliseconds(value) + ("" if part is None else f", {100 * part:.0f} %")


def _milliseconds(value: float) -> str:
    if value < 1:
        return f"{value:.3f} ms"
    return f"{value:#.3g} ms" if value < 100 else f"{value:.0f} ms"


def _with_floor(entry: dict[str, Any] | None) -> str:
    told = _time(entry, "decode")
    over = None if entry is None else entry["numbers"].get("over_floor")
    return told if over is None else f"{told}, {over:.2f} ×"


def _seconds(entry: dict[str, Any] | None) -> str:
    value = None if entry is None else time_of(entry, "prefill")
    if not isinstance(value, int | float):
        return (value or "").partition(":")[0]
    return f"{value / 1000:.2f} s"


def _ratio(full: dict[str, Any] | None, duo: dict[str, Any] | None, name: str) -> str:
    times = [time_of(entry, name) for entry in (full, duo) if entry is not None]
    if len(times) < 2 or any(isinstance(value, str) or value is None for value in times):
        return ""
    return f"{times[0] / times[1]:.2f} ×"  # type: ignore[operator]


def _method(entry: dict[str, Any]) -> str:
    """ "full", "transformers", or "duo" with its ratio."""
    if entry["impl"] != "duo":
        return str(entry["impl"])
    return f"duo {100 * entry['shape']['retrieval_ratio']:g} %"


def _by_model(item: tuple[tuple[Any, ...], Any]) -> tuple[Any, ...]:
    model, *rest = item[0]
    place = list(MODELS).index(model) if model in MODELS else len(MODELS)
    return place, *rest


# Name -> the file of records it is made from, and the function.
SOURCES: dict[str, tuple[str, Callable[[], str]]] = {
    "needles": ("needle-pocket.jsonl", needles),
    "prefill": ("prefill-cpu.jsonl", prefill),
    "decode_kernels": ("kernels-h100.jsonl", decode_kernels),
    "streaming_kernels": ("kernels-h100.jsonl", streaming_kernels),
    "model_decode": ("model-h100.jsonl", model_decode),
    "model_prefill": ("model-h100.jsonl", model_prefill),
    "capacity": ("capacity-h100.jsonl", capacity),
}


def tables(text: str) -> dict[str, Callable[[], str]]:
    """The tables that a text shows.

    Raises:
        ValueError: it shows one that is not known, or whose records have not been made.
    """
    shown = [match[2] for match in MARK.finditer(text)]
    for name in shown:
        if name not in SOURCES:
            raise ValueError(f"table {name!r} must be one of {', '.join(SOURCES)}")
        if not (RESULTS / SOURCES[name][0]).exists():
            raise ValueError(
                f"table {name!r} needs {RESULTS / SOURCES[name][0]}, which is not there"
            )
    return {name: SOURCES[name][1] for name in shown}


def rendered(text: str) -> str:
    """The text with every table made anew."""
    makers = tables(text)
    return MARK.sub(lambda match: match[1] + makers[match[2]]() + match[3], text)


def main() -> None:
    """Rewrite the pages."""
    for page in PAGES:
        path = ROOT / page
        write_text(path, rendered(path.read_text()))


if __name__ == "__main__":
    main()

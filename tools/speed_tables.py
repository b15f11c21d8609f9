"""The tables of speed and memory, as functions from records to Markdown; `tools/readme.py` puts them into the pages.

Of several records of one thing the newest counts, and times that are divided by one another were taken in the same way.
A table without records is one sentence that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from duohead.bench.cases import LONG, Case, preset
from duohead.bench.figures import as_they_come, machine, newest, stored_as, time_of
from duohead.evaluate.svg import short_count

Entry = Mapping[str, Any]
Records = Sequence[Entry]
Shape = Mapping[str, Any]
NOTHING = "Nothing was measured yet.\n"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, first column left-aligned, the others right-aligned."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def machine_line(entry: Entry) -> str:
    """Where and with what a record was made."""
    versions = entry["versions"]
    return f"{machine(entry)}; torch {versions['torch']}, transformers {versions['transformers']}."


BASELINES = {"sdpa-cudnn": "cuDNN", "sdpa-flash": "flash", "fa4": "FA4", "flex": "Flex"}
MODELS = {
    "llama-3-8b": "Llama-3-8B",
    "llama-2-7b": "Llama-2-7B",
    "qwen2.5-7b": "Qwen2.5-7B",
    "mistral-7b": "Mistral-7B",
}


def decode_kernels(records: Records) -> str:
    """Decode attention of one layer: the fastest full attention of others, then ours by storage and ratio."""
    columns = {
        "full, bf16": (1.0, "bf16"),
        "50 %, bf16": (0.5, "bf16"),
        "full, fp8": (1.0, "fp8"),
        "full, int4": (1.0, "int4"),
    }
    return _decode(records, columns, rivals=True)


def decode_pairs(records: Records) -> str:
    """Decode attention of one layer, every head full, with keys and values in formats of their own."""
    names = ("fp8", "fp8/int4", "int4/fp8", "int4")
    return _decode(records, {name: (1.0, name) for name in names}, rivals=False)


def _decode(records: Records, columns: Mapping[str, tuple[float, str]], *, rivals: bool) -> str:
    """Decode times by length; a column is a share of retrieval heads and a storage. Without rivals, full rows."""
    entries = newest(records, "decode")
    cells: dict[int, dict[str, Entry]] = {}
    for entry in filter(_is_table_shape, entries):
        shape = entry["shape"]
        if (shape["sink"], shape["recent"]) != (64, 256) or shape["length"] not in LONG:
            continue
        kind = (shape["retrieval_ratio"], stored_as(shape))
        for name, wanted in columns.items():
            if kind == wanted:
                cells.setdefault(shape["length"], {})[name] = entry
    rows = [
        [
            short_count(length),
            *([_fastest(found)] if rivals else []),
            *(_time(found.get(name), "decode", share=True) for name in columns),
        ]
        for length, found in sorted(cells.items())
        if rivals or len(found) == len(columns)
    ]
    if not rows:
        return NOTHING
    head = ["tokens", *(["best full attention of others"] if rivals else []), *columns]
    return table(head, rows) + f"\n{machine_line(entries[-1])}\n"


def streaming_kernels(records: Records) -> str:
    """Prefill attention of one layer with every head streaming."""
    entries = newest(records, "prefill.streaming")
    if not entries:
        return NOTHING
    cells: dict[int, dict[str, Entry]] = {}
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
    return table(head, rows) + f"\n{machine_line(entries[-1])}\n"


def model_decode(records: Records) -> str:
    """A decode step of whole models, and how far it is from reading weights and cache once."""
    entries = _of_models(records, "model.decode")
    if not entries:
        return NOTHING
    cells: dict[tuple[str, int], dict[str, Entry]] = {}
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
    return table(head, rows) + f"\n{machine_line(entries[-1])}\n"


def model_prefill(records: Records) -> str:
    """Prefill of whole models in chunks, apart from what has a table of its own."""
    return _prefills(records, lambda shape: not _is_long(shape) and not _is_mha(shape))


def long_prefill(records: Records) -> str:
    """Prefill of the model with grouped queries at the paper's long length, by chunk size."""
    return _prefills(records, _is_long)


def mha_prefill(records: Records) -> str:
    """Prefill of the model with as many KV heads as query heads, by chunk size."""
    return _prefills(records, _is_mha)


def _is_long(shape: Shape) -> bool:
    return shape["model"] == "llama-3-8b" and shape["length"] == 320 * 1024


def _is_mha(shape: Shape) -> bool:
    return shape["model"] == "llama-2-7b" and shape["length"] == 100 * 1024


def _prefills(records: Records, wanted: Callable[[Shape], bool]) -> str:
    entries = [entry for entry in _of_models(records, "model.prefill") if wanted(entry["shape"])]
    if not entries:
        return NOTHING
    cells: dict[tuple[str, int, int], dict[str, Entry]] = {}
    for entry in entries:
        shape = entry["shape"]
        found = cells.setdefault((shape["model"], shape["length"], shape["chunk"]), {})
        # Compiled times and others do not divide; the newest say which ones count.
        for name, other in list(found.items()):
            ours = "transformers" not in (entry["impl"], other["impl"])
            if ours and other["shape"]["compile"] != shape["compile"]:
                del found[name]
        found[_method(entry)] = entry
    with_others = any("transformers" in found for found in cells.values())
    rows = []
    for (model, length, chunk), found in sorted(cells.items(), key=_by_model):
        duo = found.get(MAIN_RATIOS.get(model, "duo 50 %"))
        rows.append(
            [
                f"{MODELS.get(model, model)}, {short_count(length)} in {short_count(chunk)} chunks",
                *([_seconds(found.get("transformers"))] if with_others else []),
                _seconds(found.get("full")),
                _seconds(duo) + ("" if duo is None else f", {_method(duo).removeprefix('duo ')}"),
                _ratio(found.get("full"), duo, "prefill"),
            ]
        )
    others = ["transformers"] if with_others else []
    head = ["prefill", *others, "full", "duo, ratio", "faster than full"]
    return table(head, rows) + f"\n{machine_line(entries[-1])}\n"


def shapes(records: Records) -> str:
    """The share of its ceiling that each neighbour of the tables' shape reaches, and whether one falls off a cliff."""
    found = {
        (entry["op"].rpartition(".")[2], *sorted(entry["shape"].items())): entry
        for op in ("decode", "prefill.streaming")
        for entry in newest(records, op)
    }
    shares: dict[str, dict[str, float | str]] = {}
    for case in preset("shapes"):
        entry = found.get((case.op, *sorted((k, v) for k, v in vars(case).items() if k != "op")))
        share = None if entry is None else _share_of_ceiling(entry)
        if share is not None:
            column, row = _place(case)
            shares.setdefault(row, {})[column] = share
    plain = shares.pop(PLAIN, {})
    if not plain:
        return NOTHING
    rows = [["of the tables", *(_percent(plain.get(name)) for name in COLUMNS), ""]]
    for change, cells in shares.items():
        cliffs = [name for name in cells if not _near(cells[name], plain.get(name))]
        told = ", ".join(cliffs) if cliffs else "none"
        rows.append([change, *(_percent(cells.get(name)) for name in COLUMNS), told])
    head = ["shape", *COLUMNS, f"more than {100 * CLIFF:.0f} % below the first row"]
    return table(head, rows) + f"\n{machine_line(list(found.values())[-1])}\n"


# Columns of the table of shapes, by operation, ratio and storage; every one has a plain case of its own.
COLUMNS = {
    "decode, bf16": Case("decode", 65536),
    "fp8": Case("decode", 65536, retrieval_dtype="fp8", streaming_dtype="fp8"),
    "int4": Case("decode", 65536, retrieval_dtype="int4", streaming_dtype="int4"),
    "50 %, bf16": Case("decode", 65536, retrieval_ratio=0.5),
    "streaming prefill": Case("streaming", 32768),
}
PLAIN = ""
CLIFF = 0.25


def _place(case: Case) -> tuple[str, str]:
    """Column and row of a case: what it is a neighbour of, and what is different."""
    same = ("op", "length", "retrieval_ratio", "retrieval_dtype", "streaming_dtype")
    column = next(
        name
        for name, base in COLUMNS.items()
        if all(getattr(base, field) == getattr(case, field) for field in same)
    )
    base = vars(COLUMNS[column])
    changed = {name: value for name, value in vars(case).items() if value != base[name]}
    return column, ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in changed.items())


def _share_of_ceiling(entry: Entry) -> float | str | None:
    """Of the read rate for decode, of the matrix rate for prefill; the reason if the case has no time."""
    op = entry["op"].rpartition(".")[2]
    told = time_of(entry, op)
    if isinstance(told, str):
        return told.partition(":")[0]
    kind = "read" if op == "decode" else "matmul"
    share: float | None = entry["numbers"].get(f"share_of_{kind}_ceiling")
    return share


def _near(share: float | str, plain: float | str | None) -> bool:
    """Whether a share is no cliff beside the plain one, as far as both are known."""
    if isinstance(share, str):
        return False
    return not isinstance(plain, float) or share >= (1 - CLIFF) * plain


def _percent(share: float | str | None) -> str:
    return "" if share is None else share if isinstance(share, str) else f"{100 * share:.0f} %"


def capacity(records: Records) -> str:
    """The longest cache on one card."""
    entries = newest(records, "capacity")
    if not entries:
        return NOTHING
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
    return table(head, rows) + f"\n{machine_line(entries[-1])}\n"


# The share of retrieval heads that the paper takes for a model, where it is not a half.
MAIN_RATIOS = {"llama-2-7b": "duo 25 %"}


def _is_table_shape(entry: Entry) -> bool:
    shape = entry["shape"]
    usual = {"heads": 32, "kv_heads": 8, "head_dim": 128, "batch": 1, "queries": 1, "past": 0}
    return all(shape[name] == value for name, value in usual.items())


def _fastest(found: dict[str, Entry], *, without: str = "") -> str:
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


def _together(found: dict[str, Entry]) -> Entry:
    """One entry with the numbers of all, whose baselines complete one another."""
    return {
        "numbers": {name: x for entry in found.values() for name, x in entry["numbers"].items()}
    }


def _time(entry: Entry | None, name: str, *, share: bool = False) -> str:
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


def _with_floor(entry: Entry | None) -> str:
    told = _time(entry, "decode")
    over = None if entry is None else entry["numbers"].get("over_floor")
    return told if over is None else f"{told}, {over:.2f} ×"


def _seconds(entry: Entry | None) -> str:
    value = None if entry is None else time_of(entry, "prefill")
    if not isinstance(value, int | float):
        return (value or "").partition(":")[0]
    return f"{value / 1000:.2f} s"


def _ratio(full: Entry | None, duo: Entry | None, name: str) -> str:
    times = [time_of(entry, name) for entry in (full, duo) if entry is not None]
    if len(times) < 2 or any(isinstance(value, str) or value is None for value in times):
        return ""
    return f"{times[0] / times[1]:.2f} ×"  # type: ignore[operator]


def _method(entry: Entry) -> str:
    """ "full", "transformers", or "duo" with its ratio."""
    if entry["impl"] != "duo":
        return str(entry["impl"])
    return f"duo {100 * entry['shape']['retrieval_ratio']:g} %"


def _of_models(records: Records, op: str) -> list[Entry]:
    """The newest records of whole models as they come: weights and cache in bf16."""
    return [entry for entry in newest(records, op) if as_they_come(entry["shape"])]


def _by_model(item: tuple[tuple[Any, ...], Any]) -> tuple[Any, ...]:
    model, *rest = item[0]
    place = list(MODELS).index(model) if model in MODELS else len(MODELS)
    return place, *rest

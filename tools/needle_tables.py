"""The tables of needles: what each choice of heads finds, what its cache weighs, and how long generation takes.

Made from the records of `duohead evaluate needle`, of which a share is the one that was kept: a pattern of few heads
rounds what was asked for. `tools/readme.py` puts them into the pages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from duohead.evaluate.results import OP, NeedleResult, NeedleRow
from duohead.evaluate.svg import short_count
from duohead.record import read_records
from tools.speed_tables import NOTHING, machine_line, table

ENDS = {"full": "all (full attention)", "streaming": "none (all heads stream)"}
HEADS = "heads that keep everything"
MIB = 2**20


def needles(path: Path) -> str:
    """Exact match of passkeys of each choice of heads at each length, and what the cache weighs at the longest."""
    result = NeedleResult.read(path).select(task="passkeys")
    lengths = result.lengths
    rows = []
    for name, methods in named(result).items():
        scores = [
            span([100 * result.mean(method=method, length=length) for method in methods])
            for length in lengths
        ]
        rows.append([name, *scores, weight(result, methods[0])])
    head = [HEADS, *map(short_count, lengths), f"cache at {short_count(lengths[-1])}"]
    return table(head, rows) + f"\n{_made_on(path)}\n"


def times(model: str) -> Callable[[Path], str]:
    """A table maker for one model: exact match at the longest context, the cache there, and times of generation."""

    def make(path: Path) -> str:
        given = NeedleResult.read(path)
        result = given.select(length=given.lengths[-1])
        if all(row.ttft_ms is None for row in result.rows):
            return NOTHING
        rows = []
        for name, methods in named(result).items():
            own = [row for row in result.rows if row.method in methods]
            rows.append(
                [
                    name,
                    _windows(own[0]),
                    span([100 * result.mean(method=method) for method in methods]),
                    weight(result, methods[0]),
                    _milliseconds([row.ttft_ms for row in own]),
                    _milliseconds([row.tpot_ms for row in own]),
                ]
            )
        length = short_count(result.lengths[-1])
        tasks = ", ".join(dict.fromkeys(row.task for row in result.rows))
        head = [f"{model}, {length} tokens", "sink + recent", f"exact match ({tasks})", "cache"]
        head += ["first token", "per token"]
        return table(head, rows) + f"\n{_made_on(path)}\n"

    return make


def grid(path: Path) -> str:
    """The paper's grid in a few numbers: exact match of each choice of heads, and where it is lowest."""
    result = NeedleResult.read(path)
    rows = []
    for name, methods in named(result).items():
        own = result.select(method=methods[0])
        rows.append(
            [
                name,
                f"{100 * own.mean():.1f} %",
                _lowest({f"{n:,} tokens": own.mean(length=n) for n in own.lengths}),
                _lowest({f"depth {100 * d:.0f} %": own.mean(depth=d) for d in own.depths}),
                weight(result, methods[0]),
            ]
        )
    head = [HEADS, "exact match", "lowest length", "lowest depth"]
    head += [f"cache at {result.lengths[-1]:,} tokens"]
    return table(head, rows) + f"\n{_made_on(path)}\n"


def named(result: NeedleResult) -> dict[str, list[str]]:
    """What a row is called and its methods, from many heads to few; random draws of one share are one row."""
    shares = {row.method: row.retrieval_ratio for row in result.rows}
    found: dict[str, list[str]] = {}
    for method in sorted(shares, key=lambda method: (-shares[method], method.startswith("random"))):
        name = called(method, shares[method], ends=ENDS)
        found.setdefault(name, []).append(method)
    return {
        f"{name} ({len(own)} draw{'s'[: len(own) - 1]})" if name.startswith("random") else name: own
        for name, own in found.items()
    }


def called(method: str, share: float, *, ends: Mapping[str, str]) -> str:
    """What a choice of heads is called: all heads and none as in ``ends``, others by the share that was kept."""
    kind, kept = method.partition("_")[0], f"{100 * share:.3g} %"
    return ends.get(kind) or {"duo": f"identified, {kept}", "random": f"random, {kept}"}[kind]


def span(scores: Sequence[float]) -> str:
    """A score in percent, or the lowest and the highest of several draws."""
    low, high = min(scores), max(scores)
    return f"{low:.1f} %" if len(scores) == 1 else f"{low:.0f} – {high:.0f} %"


def weight(result: NeedleResult, method: str) -> str:
    """What a method's cache weighs at the longest context, and its share of full attention's."""
    longest = result.lengths[-1]
    size, dense = (result.kv_bytes(method=m, length=longest) for m in (method, "full"))
    return f"{size / MIB:.2f} MiB, {100 * size / dense:.0f} %"


def _made_on(path: Path) -> str:
    return machine_line([entry for entry in read_records(path) if entry["op"] == OP][-1])


def _windows(row: NeedleRow) -> str:
    if row.sink is None:
        return ""
    prompts = row.prefill_recent
    seen = "" if prompts in (None, row.recent) else f" ({prompts} in prompts)"
    return f"{row.sink} + {row.recent}{seen}"


def _milliseconds(found: Sequence[float | None]) -> str:
    """The time of one method, or the span of several; every cell of a length has the same."""
    known = sorted({value for value in found if value is not None})
    if not known:
        return ""
    low, high = known[0], known[-1]
    return f"{low:.2f} ms" if low == high else f"{low:.2f} – {high:.2f} ms"


def _lowest(scores: dict[str, float]) -> str:
    name = min(scores, key=lambda key: scores[key])
    return f"{100 * scores[name]:.0f} % ({name})"


# Name of a table -> its file of records in results/, and the function; `tools/readme.py` takes them as they are.
SOURCES: dict[str, tuple[str, Callable[[Path], str]]] = {
    "needles": ("needle-pocket.jsonl", needles),
    **{
        f"{kind}_{model.removeprefix('pocket-')}": (f"{file}-{model}.jsonl", make)
        for model in ("pocket", "pocket-mha", "pocket-laguna")
        for kind, file, make in (
            ("times", "needle", times(model)),
            ("grid", "needle-grid", grid),
        )
    },
}

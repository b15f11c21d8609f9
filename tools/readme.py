"""Write the README's tables from the records in results/, so that no number there is typed by hand.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; this replaces what is between them. Run
`python tools/readme.py` after new records; `tests/test_readme.py` fails while the README says something else.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from duohead.evaluate.results import NeedleResult  # noqa: E402
from duohead.files import write_text  # noqa: E402
from duohead.record import read_records  # noqa: E402

NAMES = {"full": "all (full attention)", "streaming": "none (all heads stream)"}
MARK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, first column left-aligned, the others right-aligned."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def needles() -> str:
    """Exact match of each choice of heads at each length, and what the cache weighs at the longest."""
    path = ROOT / "results" / "needle-pocket.jsonl"
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
        entry["shape"]["length"]: entry
        for entry in read_records(ROOT / "results" / "prefill-cpu.jsonl")
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
    hardware, versions = entry["hardware"], entry["versions"]
    name = (hardware.get("gpus") or [f"{hardware['cpu']}, {hardware['cores']} cores"])[0]
    return f"{name}; torch {versions['torch']}, transformers {versions['transformers']}."


TABLES: dict[str, Callable[[], str]] = {"needles": needles, "prefill": prefill}


def rendered(text: str) -> str:
    """The text with every table made anew."""
    return MARK.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], text)


def main() -> None:
    """Rewrite README.md."""
    path = ROOT / "README.md"
    write_text(path, rendered(path.read_text()))


if __name__ == "__main__":
    main()

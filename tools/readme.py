"""Write the tables of the README and of the pages in docs/ from the records in results/, so that none is typed by hand.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; this replaces what is between them. Run
`python tools/readme.py` after new records; `tests/test_readme.py` fails while a page says something else.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from duohead.files import write_text  # noqa: E402
from duohead.record import read_records  # noqa: E402
from tools import (  # noqa: E402
    finding_compare,
    finding_tables,
    footprint_tables,
    gate_tables,
    laguna_tables,
    needle_tables,
    precision_tables,
    reach_tables,
    rotation_tables,
    speed_tables,
)
from tools.speed_tables import NOTHING, machine_line, table  # noqa: E402

RESULTS = ROOT / "results"
PAGES = ("README.md", "docs/numbers.md", "docs/findings.md", "docs/precision.md", "docs/laguna.md")
MARK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def prefill(path: Path) -> str:
    """Streaming prefill against dense causal attention, the last record of each length."""
    entries = {entry["shape"]["length"]: entry for entry in read_records(path)}
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
    return table(head, rows) + f"\n{machine_line(entries[max(entries)])}\n"


# Name -> the file of records it is made from, and the function.
SOURCES: dict[str, tuple[str, Callable[[Path], str]]] = {
    **needle_tables.SOURCES,
    "prefill": ("prefill-cpu.jsonl", prefill),
    "laguna_accuracy": ("needle-pocket-laguna.jsonl", laguna_tables.accuracy),
    "rotation_cost": ("kernels-h100.jsonl", rotation_tables.rotation_cost),
    **{
        name: (file, lambda path, make=make: make(read_records(path)))  # type: ignore[misc]
        for name, (file, make) in {
            "decode_kernels": ("kernels-h100.jsonl", speed_tables.decode_kernels),
            "decode_pairs": ("kernels-h100.jsonl", speed_tables.decode_pairs),
            "streaming_kernels": ("kernels-h100.jsonl", speed_tables.streaming_kernels),
            "shapes": ("kernels-h100.jsonl", speed_tables.shapes),
            "model_decode": ("model-h100.jsonl", speed_tables.model_decode),
            "model_prefill": ("model-h100.jsonl", speed_tables.model_prefill),
            "long_prefill": ("model-h100.jsonl", speed_tables.long_prefill),
            "mha_prefill": ("model-h100.jsonl", speed_tables.mha_prefill),
            "capacity": ("capacity-h100.jsonl", speed_tables.capacity),
            "identify_steps": ("identify-h100.jsonl", finding_tables.identify_steps),
            "identify_saved": ("identify-steps-pocket.jsonl", gate_tables.saved),
            "identify_two": ("identify-2gpu-h200.jsonl", finding_tables.identify_steps),
            "compare_pocket": ("compare-pocket.jsonl", finding_compare.compare),
            "compare_mha": ("compare-pocket-mha.jsonl", finding_compare.compare),
            "close_pocket": ("compare-close-pocket.jsonl", finding_compare.close),
            "close_mha": ("compare-close-pocket-mha.jsonl", finding_compare.close),
            "rivals_pocket": ("compare-close-pocket.jsonl", finding_compare.rivals),
            "rivals_mha": ("compare-close-pocket-mha.jsonl", finding_compare.rivals),
            "eighth_pocket": ("compare-close-pocket.jsonl", finding_compare.close_tasks),
            "eighth_mha": ("compare-close-pocket-mha.jsonl", finding_compare.close_tasks),
            "gates_pocket": ("findings.jsonl", gate_tables.gates("pocket")),
            "gates_mha": ("findings.jsonl", gate_tables.gates("pocket-mha")),
            "reach": ("findings.jsonl", reach_tables.reach),
            "sinks": ("findings.jsonl", finding_tables.varied("sinks", "window")),
            "windows": ("findings.jsonl", finding_tables.windows),
            "objectives": ("findings.jsonl", finding_tables.varied("objectives", "objective")),
            "passkeys": ("findings.jsonl", finding_tables.varied("passkeys", "variant")),
            "tasks": ("findings.jsonl", finding_tables.varied("tasks", "identified_on")),
            "agreement": ("findings.jsonl", finding_tables.agreement),
            "tuning": ("findings.jsonl", finding_tables.tuning),
            "errors": ("findings.jsonl", finding_tables.errors),
            "lengths": ("findings.jsonl", finding_tables.lengths),
            "extras": ("findings.jsonl", finding_tables.extras),
            "precision_pocket": ("precision.jsonl", precision_tables.precision("pocket")),
            "precision_mha": ("precision.jsonl", precision_tables.precision("pocket-mha")),
            "precision_laguna": ("precision.jsonl", precision_tables.precision("pocket-laguna")),
            "laguna_windows": ("gates-pocket-laguna.jsonl", laguna_tables.windows),
            "laguna_card": ("footprint-laguna.jsonl", footprint_tables.card),
            "laguna_longer": ("footprint-laguna.jsonl", footprint_tables.longer),
            "laguna_policies": ("footprint-laguna.jsonl", footprint_tables.policies),
            "precision_lengths": ("precision.jsonl", precision_tables.lengths),
            "precision_pairs": ("precision.jsonl", precision_tables.pairs),
            "rotation": ("precision.jsonl", precision_tables.rotation),
        }.items()
    },
}


def made(name: str) -> str:
    """One table, or a sentence where its records have not been made.

    Raises:
        ValueError: it is not known.
    """
    if name not in SOURCES:
        raise ValueError(f"table {name!r} must be one of {', '.join(SOURCES)}")
    file, make = SOURCES[name]
    path = RESULTS / file
    return make(path) if path.exists() else NOTHING


def rendered(text: str) -> str:
    """The text with every table made anew."""
    return MARK.sub(lambda match: match[1] + made(match[2]) + match[3], text)


def main() -> None:
    """Rewrite the pages."""
    for page in PAGES:
        path = ROOT / page
        write_text(path, rendered(path.read_text()))


if __name__ == "__main__":
    main()

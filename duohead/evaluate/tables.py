"""Results as rows of text: one line per method, the same for the terminal and for the report.

Having one place decide what a line says keeps the two from drifting apart. `summary(methods, result)` makes head and
rows, `text_table(head, rows)` lays them out for a terminal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from duohead.evaluate.methods import Method, share_name, storage_words
from duohead.evaluate.prose_results import ProseResult
from duohead.evaluate.results import NeedleResult

MIB = 1 << 20
HEAD = (
    "method",
    "retrieval heads",
    "exact match",
    "first token",
    "token accuracy",
    "answers",
    "cache bytes",
    "of full",
)
TIMES = ("first token, ms", "per token, ms")
PROSE_HEAD = (
    "method",
    "retrieval heads",
    "perplexity",
    "KL, nats",
    "same first choice",
    "KL, last part",
    "cache bytes",
    "of full",
)


def label(method: Method) -> str:
    """What a method is called: "identified heads, 25 %", and how heads are stored if not in the model's dtype."""
    words = storage_words(method.policy).replace(",", ", ")
    stored = f", {words}" if words else ""
    if method.kind == "full":
        return "full attention"
    if method.kind == "streaming":
        return f"streaming heads only{stored}"
    share = f"{share_name(method.share)} %"
    if method.kind == "duo":
        window = "" if method.window is None else f", {method.window[0]}+{method.window[1]}"
        return f"identified heads, {share}{window}{stored}"
    return f"random heads, {share}, draw {(method.draw or 0) + 1}{stored}"


def percent(fraction: float) -> str:
    """0.975 -> "97.5 %"."""
    return f"{100 * fraction:.1f} %"


def mib(count: int) -> str:
    """Bytes as MiB with two decimals."""
    return f"{count / MIB:.2f} MiB"


def summary(methods: Mapping[str, Method], result: NeedleResult) -> list[list[str]]:
    """One row per method under `HEAD`: means over all its cells, cache bytes at the longest context."""
    longest = result.lengths[-1]
    full = result.kv_bytes(method="full", length=longest)
    rows = []
    for name, method in methods.items():
        own = result.select(method=name)
        taken = own.kv_bytes(length=longest)
        scores = (own.mean(metric) for metric in ("exact_match", "first_token", "token_accuracy"))
        count = sum(row.answers for row in own.rows)
        share = f"{share_name(method.share)} %"
        rows.append(
            [
                label(method),
                share,
                *map(percent, scores),
                str(count),
                f"{taken:,}",
                percent(taken / full),
            ]
        )
    return rows


def times(methods: Mapping[str, Method], result: NeedleResult) -> list[list[str]]:
    """One row per method under `TIMES`: those of the longest context, a hyphen where none were taken."""
    rows = []
    for name in methods:
        row = result.select(method=name, length=result.lengths[-1]).rows[0]
        rows.append(
            ["-" if value is None else f"{value:,.1f}" for value in (row.ttft_ms, row.tpot_ms)]
        )
    return rows


def prose_rows(methods: Mapping[str, Method], result: ProseResult, length: int) -> list[list[str]]:
    """One row per method under `PROSE_HEAD`, at one length."""
    full = result.row("full", length).kv_bytes
    rows = []
    for name, method in methods.items():
        own = result.row(name, length)
        rows.append(
            [
                label(method),
                f"{share_name(method.share)} %",
                f"{own.perplexity:.2f}",
                f"{own.kl_nats:.4f}",
                percent(own.top1_agreement),
                f"{own.kl_nats_by_position[-1]:.4f}",
                f"{own.kv_bytes:,}",
                percent(own.kv_bytes / full),
            ]
        )
    return rows


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under their heads, the first flush left and the others flush right."""
    widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]
    lines = []
    for line in (head, ["-" * width for width in widths], *rows):
        first, *rest = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        lines.append("  ".join((first, *rest)).rstrip())
    return "\n".join(lines)

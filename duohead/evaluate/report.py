"""The report: one HTML page with everything a run of the demo found, to be opened, mailed or printed.

Style, charts and numbers are all inside the file and nothing is fetched, because a result that needs a network or a
chart library to be read is soon unreadable. `write_report(path, report)` writes it whole or not at all; every figure on
it comes from the rows of a `NeedleResult` or from the pattern, none from here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from duohead.evaluate.charts import line_chart, share_chart
from duohead.evaluate.heatmap import HeatMap, colour_key
from duohead.evaluate.methods import Method, share_name
from duohead.evaluate.page import card, details_table, document, html_table
from duohead.evaluate.results import NeedleResult
from duohead.evaluate.svg import short_count
from duohead.evaluate.tables import HEAD, MIB, label, mib, percent, summary
from duohead.files import write_text


@dataclass(frozen=True)
class Example:
    """A question asked for real: what was expected, and what each method generated, by method name."""

    question: str
    expected: str
    replies: Mapping[str, str]


@dataclass(frozen=True)
class Report:
    """All that the page shows.

    Attributes:
        model: its name.
        alpha: gates, one row per layer and one column per KV head; NaN where a head is not gated.
        methods: by name, in the order of the table.
        accuracy: scores of every method at one context length.
        grid: scores of `full` and of `chosen` over lengths and depths.
        sizes: method -> {tokens: bytes of an allocated cache}.
        example: one question and its answers.
        chosen: the method that the head of the page and the second needle grid are about.
        figures: the JSON figures, shown as they are.
        provenance: what a number needs to be believed, label to text.
    """

    model: str
    alpha: Sequence[Sequence[float]]
    methods: Mapping[str, Method]
    accuracy: NeedleResult
    grid: NeedleResult
    sizes: Mapping[str, Mapping[int, int]]
    example: Example
    chosen: str
    figures: Mapping[str, Any]
    provenance: Mapping[str, str]


def write_report(path: str | os.PathLike[str], report: Report) -> None:
    """Write the page to `path`, replacing what was there; a reader never meets half of it."""
    write_text(path, render(report))


def render(report: Report) -> str:
    """The whole page."""
    cards = [
        _gates(report),
        _accuracy(report),
        *_needles(report),
        _sizes(report),
        _example(report),
        _table(report),
        _provenance(report),
    ]
    grid = "\n".join(cards)
    return document(
        f"duohead: {report.model}", f'{_header(report)}\n<div class="grid">\n{grid}\n</div>'
    )


def _rivals(report: Report, ratio: float) -> list[float]:
    """Exact match of every random draw at a share of retrieval heads."""
    return [
        report.accuracy.mean(method=name)
        for name, method in report.methods.items()
        if method.kind == "random" and method.share == ratio
    ]


def _header(report: Report) -> str:
    chosen = report.methods[report.chosen]
    share = f"{share_name(chosen.share)} %"
    length = report.accuracy.lengths[-1]
    heads = sum(1 for row in report.alpha for value in row if value == value)
    kept = round(chosen.share * heads)
    exact = report.accuracy.mean(method=report.chosen)
    full_bytes, chosen_bytes = (
        report.accuracy.kv_bytes(method=name, length=length) for name in ("full", report.chosen)
    )
    tiles = [
        (
            "one",
            f"Exact match, {share} retrieval heads",
            percent(exact),
            f"full attention {percent(report.accuracy.mean(method='full'))}",
        ),
        (
            "",
            f"KV cache at {length:,} tokens",
            f"{100 * chosen_bytes / full_bytes:.0f} %",
            f"{mib(chosen_bytes)} instead of {mib(full_bytes)}",
        ),
    ]
    if rivals := _rivals(report, chosen.share):
        mean = sum(rivals) / len(rivals)
        note = f"mean of {len(rivals)} draws of as many heads"
        tiles.insert(1, ("two", f"Exact match, random {share}", percent(mean), note))
    body = "".join(
        f'<div><dt>{escape(name)}</dt><dd class="big {kind}">{value}</dd><dd class="soft">{escape(note)}</dd></div>'
        for kind, name, value, note in tiles
    )
    policy = chosen.policy
    assert policy is not None, "the chosen method is one of identified heads"
    return (
        f'<header>\n<p class="over">duohead report, model {escape(report.model)}</p>\n'
        "<h1>Which attention heads need the whole context?</h1>\n"
        f"<p>The model {escape(report.model)} has {heads} key/value heads. Their gates were learned during this run. "
        f"The {kept} highest keep every token; the other {heads - kept} keep {policy.sink} sink tokens and the "
        f"{policy.recent} most recent ones. Everything below was measured on this machine.</p>\n"
        f'<dl class="tiles">{body}</dl>\n</header>'
    )


def _gates(report: Report) -> str:
    layers, heads = len(report.alpha), len(report.alpha[0])
    chosen = sorted(
        (m for m in report.methods.values() if m.kind == "duo" and m.policy), key=lambda m: -m.share
    )
    marks = dict(zip(("ring", "dot"), chosen, strict=False))
    kept = {
        mark: frozenset(
            (head, index)
            for index, layer in enumerate(m.policy.layers if m.policy else ())
            for head in layer.retrieval
        )
        for mark, m in marks.items()
    }
    names = {"ring": "Frame", "dot": "dot"}
    legend = ", ".join(
        f"{names[mark]}: among the top {share_name(m.share)} %" for mark, m in marks.items()
    )
    strongest = max(
        (v, i, h) for i, row in enumerate(report.alpha) for h, v in enumerate(row) if v == v
    )
    chart = HeatMap(
        values=[[report.alpha[i][h] for i in range(layers)] for h in range(heads)],
        rows=[str(h) for h in range(heads)],
        columns=[str(i) for i in range(layers)],
        x_label="layer",
        y_label="KV head",
        title="Gate of every KV head",
        description=(
            f"Heat map of {layers} layers by {heads} KV heads, values from 0 to 1. Highest: layer {strongest[1]}, "
            f"head {strongest[2]}, {strongest[0]:.2f}. All values are in the table that follows."
        ),
        kept=kept,
    ).svg()
    table = details_table(
        "Learned gate per layer and KV head; a hyphen means not gated",
        ["layer", *(f"head {h}" for h in range(heads))],
        [
            [str(i), *("-" if v != v else f"{v:.3f}" for v in row)]
            for i, row in enumerate(report.alpha)
        ],
    )
    caption = (
        f"Learned by gradient descent: 1 means the answers need the head's full context. {legend}."
    )
    return card("Gates", caption, chart + colour_key("streaming 0", "1 retrieval") + table)


def _accuracy(report: Report) -> str:
    exact = {name: report.accuracy.mean(method=name) for name in report.methods}
    identified = {m.share: exact[name] for name, m in report.methods.items() if m.kind != "random"}
    ratios = sorted({m.share for m in report.methods.values() if m.kind == "random"}, reverse=True)
    random = {ratio: _rivals(report, ratio) for ratio in ratios}
    said = ", ".join(
        f"{share_name(r)} % of heads: {percent(v)}"
        for r, v in sorted(identified.items(), reverse=True)
    )
    said_random = ", ".join(
        f"{share_name(r)} %: {', '.join(percent(v) for v in d)}" for r, d in random.items()
    )
    chart = share_chart(
        identified,
        random,
        title="Exact match against the share of retrieval heads",
        description=f"Identified heads: {said}. Random heads: {said_random or 'not run'}.",
        x_label="KV heads that keep the whole context",
        y_label="answers exactly right, %",
    )
    row = report.accuracy.rows[0]
    count = sum(r.answers for r in report.accuracy.rows if r.method == row.method)
    caption = (
        f"{count} answers per point, {short_count(row.length)} tokens of context, greedy decoding. "
        "The same questions for every choice of heads; at one share all choices take the same cache bytes."
    )
    return card("Accuracy", caption, chart)


def _needles(report: Report) -> list[str]:
    lengths, depths = report.grid.lengths, report.grid.depths
    row = report.grid.rows[0]
    tasks = list(dict.fromkeys(r.task for r in report.grid.rows))
    per_cell = sum(
        r.answers
        for r in report.grid.rows
        if (r.method, r.length, r.depth) == (row.method, row.length, row.depth)
    )
    cards = []
    for name in ("full", report.chosen):
        grid = report.grid.grid(name)
        title = f"Needle in a haystack, {label(report.methods[name])}"
        mean = report.grid.mean(method=name)
        chart = HeatMap(
            values=grid,
            rows=[f"{100 * d:.0f} %" for d in depths],
            columns=[short_count(n) for n in lengths],
            x_label="context length, tokens",
            y_label="depth of the needle",
            title=title,
            description=(
                f"Share of answers exactly right, by context length {lengths[0]} to {lengths[-1]} tokens and depth "
                f"{100 * depths[0]:.0f} to {100 * depths[-1]:.0f} %. Mean {percent(mean)}. All values are in the table "
                "that follows."
            ),
            cell="{:.0f}",
            percent=True,
        ).svg()
        table = details_table(
            "Answers exactly right, by depth and context length",
            ["depth", *(f"{n:,}" for n in lengths)],
            [
                [f"{100 * d:.0f} %", *(percent(v) for v in values)]
                for d, values in zip(depths, grid, strict=True)
            ],
        )
        caption = (
            f"Answers exactly right, %. Mean {percent(mean)}; {per_cell} per cell, "
            f"format{'s' if len(tasks) > 1 else ''} {', '.join(tasks)}."
        )
        cards.append(card(title, caption, chart + colour_key("0 %", "100 % right") + table))
    return cards


def _sizes(report: Report) -> str:
    lengths = sorted({n for points in report.sizes.values() for n in points})
    last = lengths[-1]
    series = {
        _short(report.methods[name]): {n: b / MIB for n, b in points.items()}
        for name, points in report.sizes.items()
    }
    said = ", ".join(f"{label(report.methods[n])} {mib(p[last])}" for n, p in report.sizes.items())
    chart = line_chart(
        series,
        title="Cache bytes against context length",
        description=f"At {last} tokens: {said}. All values are in the table that follows.",
        x_label="context length, tokens",
        y_label="KV cache, MiB",
        unit="MiB",
    )
    table = details_table(
        "Bytes of the allocated cache",
        ["tokens", *(label(report.methods[n]) for n in report.sizes)],
        [[f"{n:,}", *(f"{points[n]:,}" for points in report.sizes.values())] for n in lengths],
    )
    caption = "Bytes of keys and values in caches that were filled with the prompt, one sequence."
    return card("Memory", caption, chart + table)


def _short(method: Method) -> str:
    return "full" if method.kind == "full" else f"duo {share_name(method.share)} %"


def _example(report: Report) -> str:
    parts = [
        f'<dt>question</dt><dd class="mono">{_lines(report.example.question)}</dd>',
        f'<dt>expected</dt><dd class="mono">{_lines(report.example.expected)}</dd>',
    ]
    for name, reply in report.example.replies.items():
        right = reply.strip() == report.example.expected.strip()
        verdict = "right" if right else "wrong"
        parts.append(
            f'<dt>{escape(label(report.methods[name]))} <span class="verdict {verdict}">{verdict}</span></dt>'
            f'<dd class="mono">{_lines(reply)}</dd>'
        )
    caption = "The end of one prompt and what the model wrote, token by token with model.generate."
    return card("A sample answer", caption, f'<dl class="talk">{"".join(parts)}</dl>')


def _lines(content: str) -> str:
    lines = [escape(line) for line in content.splitlines() if line.strip()]
    return "<br>".join(lines) or "(nothing)"


def _table(report: Report) -> str:
    kinds = [
        {"duo": "one", "random": "two"}.get(method.kind, "") for method in report.methods.values()
    ]
    row = report.accuracy.rows[0]
    caption = f"Task {row.task}, version {row.task_version}, {row.length:,} tokens of context"
    return card(
        "All figures",
        "Exact match: every token of the answer right under greedy decoding. First token: the look-up alone. "
        "Token accuracy: share of answer tokens right when the earlier ones are given.",
        html_table(caption, HEAD, summary(report.methods, report.accuracy), kinds=kinds),
        wide=True,
    )


def _provenance(report: Report) -> str:
    facts = "".join(
        f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in report.provenance.items()
    )
    figures = escape(json.dumps(dict(report.figures), indent=1))
    return card(
        "How it was made",
        "Software, hardware and settings of this run.",
        f'<dl class="facts">{facts}</dl><details><summary>The figures as JSON</summary><pre>{figures}</pre></details>',
        wide=True,
    )

"""The tables of docs/findings.md, as functions from records to Markdown; `tools/readme.py` puts them into the page.

Scores are exact match in percent, means over the tasks named beside them; a range is over seeds. A table that has no
records is one sentence that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from duohead.evaluate.methods import share_name
from tools.finding_records import (
    Records,
    by_model,
    is_of,
    mean,
    models,
    of,
    scores,
    tuned_name,
    values,
)
from tools.speed_tables import NOTHING, machine_line, table

SUMMARY = "evaluate.compare.summary"
OURS = ("optimise", "eliminate", "kvzip", "echo")


def compare(records: Records) -> str:
    """A line per scorer: mean over all tasks and lengths at each share of heads, and what it cost."""
    ranked = [e for e in records if e["op"] == SUMMARY and e["shape"]["scorer"] != "full"]
    if not ranked:
        return NOTHING
    shares = sorted({e["shape"]["retrieval_ratio"] for e in ranked}, reverse=True)
    rows = []
    for scorer in dict.fromkeys(e["shape"]["scorer"] for e in ranked):
        own = [e for e in ranked if e["shape"]["scorer"] == scorer]
        cells = [
            _range(
                [
                    mean(_all_tasks(e) for e in own if is_of(e, retrieval_ratio=share, seed=seed))
                    for seed in sorted({e["shape"]["seed"] for e in own})
                ]
            )
            for share in shares
        ]
        cost = [
            mean(e["numbers"][f"identify_{name}"] for e in own)
            for name in ("seconds", "forward_tokens", "backward_tokens")
        ]
        rows.append([scorer, *cells, f"{cost[0]:.0f} s", _count(cost[1]), _count(cost[2])])
    full = [e for e in records if e["op"] == SUMMARY and e["shape"]["scorer"] == "full"]
    rows.append(
        ["*full attention*", *[f"{mean(map(_all_tasks, full)):.1f}"] * len(shares), *[""] * 3]
    )
    head = [
        "scorer",
        *(f"{share_name(share)} %" for share in shares),
        "time",
        "forward",
        "backward",
    ]
    return table(head, rows) + _line(ranked)


def compare_tasks(records: Records) -> str:
    """Every task at an eighth of the heads: full attention, the paper's gates, ours, and two without training."""
    chosen = [e for e in records if e["op"] == SUMMARY]
    if not chosen:
        return NOTHING
    full = [e for e in chosen if e["shape"]["scorer"] == "full"]
    eighth = [e for e in chosen if is_of(e, retrieval_ratio=0.125)]
    rows = [
        [
            task,
            f"{mean(e['numbers'][task] for e in full):.1f}",
            *(
                f"{mean(e['numbers'][task] for e in eighth if is_of(e, scorer=name)):.1f}"
                for name in OURS
            ),
        ]
        for task in full[0]["shape"]["task_versions"]
    ]
    return table(["task", "full", *OURS], rows) + _line(chosen)


def varied(
    question: str, name: str, *, ratios: Sequence[float] = (0.5, 0.25, 0.125), head: str = ""
) -> Callable[[Records], str]:
    """A table maker: what was varied, by model and share of heads; means over the four tasks."""

    def make(records: Records) -> str:
        own = of(records, question)
        if not own:
            return NOTHING
        found = models(own)
        rows = [
            [
                str(value),
                *(
                    _range(scores(own, model=m, ratio=r, **{name: value}))
                    for m in found
                    for r in ratios
                ),
            ]
            for value in values(own, name)
        ]
        columns = [f"{model}, {share_name(r)} %" for model in found for r in ratios]
        return table([head or name, *columns], rows) + _line(own)

    return make


def windows(records: Records) -> str:
    """Trained with (rows) against deployed with (columns), at an eighth of the heads."""
    own = [e for e in of(records, "windows") if is_of(e, ratio=0.125)]
    if not own:
        return NOTHING
    names = values(own, "trained")
    found = models(own)
    rows = [
        [
            trained,
            *(
                _range(scores(own, model=m, trained=trained, deployed=d))
                for m in found
                for d in names
            ),
        ]
        for trained in names
    ]
    head = ["trained with", *(f"{model}, {name}" for model in found for name in names)]
    return table(head, rows) + _line(own)


def agreement(records: Records) -> str:
    """Rank correlation of the gates that two tasks find, and how many of the best quarter they share."""
    own = of(records, "agreement")
    if not own:
        return NOTHING
    names = values(own, "identified_on")
    rows = []
    for model in models(own):
        for first in names:
            cells = []
            for second in names:
                pair = {"model": model, "identified_on": first, "compared_with": second}
                numbers = next(e["numbers"] for e in own if is_of(e, **pair))
                correlation, shared = numbers["rank_correlation"], numbers["overlap_0.25"]
                cells.append(f"{correlation:.2f}, {100 * shared:.0f} %")
            rows.append([f"{model}, {first}", *cells])
    return table(["identified on", *names], rows) + _line(own)


def tuning(records: Records) -> str:
    """Rankings before and after fine-tuning, and what old and new pattern are worth on the tuned model (passkeys)."""
    own = by_model(of(records, "tuning"), "tuned_on", "rate")
    if not own:
        return NOTHING
    rows = []
    for entry in own:
        shape, numbers = entry["shape"], entry["numbers"]
        found = {name: scores["passkeys"] for name, scores in numbers["accuracy"].items()}
        rows.append(
            [
                f"{shape['model']}, {tuned_name(shape)}",
                f"{numbers['rank_correlation']:.2f}",
                f"{100 * numbers['overlap_0.25']:.0f} %",
                f"{found['full']:.0f}",
                *(f"{found[f'old {r}']:.0f}, {found[f'new {r}']:.0f}" for r in (0.5, 0.25)),
            ]
        )
    head = [
        "model, tuned on", "rank correlation", "best quarter shared", "full",
        "50 %: old, new pattern", "25 %: old, new pattern",
    ]  # fmt: skip
    return table(head, rows) + _line(own)


def errors(records: Records) -> str:
    """Exact match and first tokens, by depth, and the one head whose promotion gives back most."""
    own = by_model(of(records, "errors"), "ratio")
    if not own:
        return NOTHING
    rows = []
    for entry in own:
        shape, numbers = entry["shape"], entry["numbers"]
        head, best = max(numbers["best_promoted"].items(), key=lambda item: item[1])
        rows.append(
            [
                f"{shape['model']}, {shape['task']}, {share_name(shape['ratio'])} %",
                f"{numbers['full']:.0f}",
                f"{numbers['duo']:.0f}",
                f"{numbers['duo_first_token']:.0f}",
                ", ".join(f"{score:.0f}" for score in numbers["by_depth"].values()),
                f"{best:.0f} (layer {head.replace('.', ', head ')})"
                if best > numbers["duo"]
                else "",
            ]
        )
    head_line = ["", "full", "duo", "first tokens", "duo by depth", "with one head more"]
    return table(head_line, rows) + _line(own)


def lengths(records: Records) -> str:
    """Full attention and shares of heads at each length."""
    own = of(records, "lengths")
    if not own:
        return NOTHING
    found = sorted({e["shape"]["length"] for e in own})
    methods = values(own, "method")
    rows = [
        [
            f"{model}, {method if method == 'full' else share_name(float(method)) + ' %'}",
            *(_range(scores(own, model=model, method=method, length=n)) for n in found),
        ]
        for model in models(own)
        for method in methods
    ]
    return table(["", *(f"{n:,}" for n in found)], rows) + _line(own)


def identify_steps(records: Records) -> str:
    """A step of gate training at each length, and the projected run."""
    own = [e for e in records if e["op"] == "identify.step"]
    runs = {e["shape"]["kernels"]: e["numbers"] for e in records if e["op"] == "identify.run"}
    if not own:
        return NOTHING
    found = sorted({e["shape"]["length"] for e in own})
    rows = []
    for kernels in dict.fromkeys(e["shape"]["kernels"] for e in own):
        steps = [
            next(e["numbers"] for e in own if is_of(e, kernels=kernels, length=n)) for n in found
        ]
        rows.append(
            [
                kernels,
                *(f"{n['step_seconds']:.2f} s, {n['peak_bytes'] / 2**30:.0f} GiB" for n in steps),
                f"{steps[-1]['step_seconds'] / steps[-1]['floor_seconds']:.2f} ×",
                f"{runs[kernels]['run_hours']:.2f} h",
            ]
        )
    head = [
        "kernels",
        *(f"{n // 1024}K tokens" for n in found),
        "of the floor, longest",
        "2000 steps",
    ]
    return table(head, rows) + _line(own)


def identify_saved(records: Records) -> str:
    """Shorter trainings against the longest one."""
    own = [e for e in records if e["op"] == "identify.steps_saved"]
    if not own:
        return NOTHING
    ratios = ("0.5", "0.25", "0.125")
    rows = [
        [
            f"{e['shape']['model']}, {e['impl']}",
            str(e["numbers"]["steps_done"]),
            *(
                f"{100 * e['numbers'][f'overlap_{r}']:.0f} %, {100 * e['numbers'][f'exact_match_{r}']:.0f}"
                for r in ratios
            ),
        ]
        for e in own
    ]
    head = ["", "steps", *(f"{share_name(float(r))} %: shared, exact match" for r in ratios)]
    return table(head, rows) + _line(own)


def _all_tasks(entry: Mapping[str, Any]) -> float:
    return mean(entry["numbers"][task] for task in entry["shape"]["task_versions"])


def _range(seeds: Sequence[float]) -> str:
    if not seeds:
        return ""
    middle = f"{mean(seeds):.1f}"
    spread = f"{min(seeds):.0f} – {max(seeds):.0f}"
    return middle if max(seeds) - min(seeds) < 1 else f"{middle} ({spread})"


def _count(tokens: float) -> str:
    if tokens >= 1e6:
        return f"{tokens / 1e6:.1f} M"
    return f"{tokens / 1e3:.0f} K" if tokens else "0"


def _line(records: Records) -> str:
    places = dict.fromkeys(machine_line(entry) for entry in records)
    return f"\n{' And: '.join(places)}\n"

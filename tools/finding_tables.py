"""The tables of docs/findings.md, as functions from records to Markdown; `tools/readme.py` puts them into the page.

Scores are exact match in percent, means over the tasks named beside them; a range is over seeds. A table that has no
records is one sentence that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from duohead.evaluate.methods import share_name
from duohead.evaluate.svg import short_count
from tools.finding_records import (
    Records,
    by_model,
    is_of,
    mean,
    models,
    of,
    of_one_pattern,
    scores,
    tuned_name,
    values,
)
from tools.speed_tables import NOTHING, machine_line, table


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
                    spread(scores(own, model=m, ratio=r, **{name: value}))
                    for m in found
                    for r in ratios
                ),
            ]
            for value in values(own, name)
        ]
        columns = [f"{model}, {share_name(r)} %" for model in found for r in ratios]
        return table([head or name, *columns], rows) + line_of(own)

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
                spread(scores(own, model=m, trained=trained, deployed=d))
                for m in found
                for d in names
            ),
        ]
        for trained in names
    ]
    head = ["trained with", *(f"{model}, {name}" for model in found for name in names)]
    return table(head, rows) + line_of(own)


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
    return table(["identified on", *names], rows) + line_of(own)


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
                *(f"{found[f'old {r}']:.0f}, {found[f'new {r}']:.0f}" for r in (0.5, 0.25, 0.125)),
            ]
        )
    head = [
        "model, tuned on", "rank correlation", "best quarter shared", "full",
        "50 %: old, new pattern", "25 %: old, new pattern", "12.5 %: old, new pattern",
    ]  # fmt: skip
    return table(head, rows) + line_of(own)


def errors(records: Records) -> str:
    """Exact match and first tokens, by depth, and the one head whose promotion gives back most (or that several do)."""
    own = by_model(of(records, "errors"), "ratio")
    if not own:
        return NOTHING
    rows = []
    for entry in own:
        shape, numbers = entry["shape"], entry["numbers"]
        best = max(numbers["best_promoted"].values())
        heads = [head for head, right in numbers["best_promoted"].items() if right == best]
        named = f"layer {heads[0].replace('.', ', head ')}" if len(heads) == 1 else "several do"
        rows.append(
            [
                f"{shape['model']}, {shape['task']}, {share_name(shape['ratio'])} %",
                f"{numbers['full']:.0f}",
                f"{numbers['duo']:.0f}",
                f"{numbers['duo_first_token']:.0f}",
                ", ".join(f"{score:.0f}" for score in numbers["by_depth"].values()),
                f"{best:.0f} ({named})" if best > numbers["duo"] else "",
            ]
        )
    head_line = ["", "full", "duo", "first tokens", "duo by depth", "with one head more"]
    return table(head_line, rows) + line_of(own)


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
            *(spread(scores(own, model=model, method=method, length=n)) for n in found),
        ]
        for model in models(own)
        for method in methods
    ]
    return table(["", *(f"{n:,}" for n in found)], rows) + line_of(own)


def extras(records: Records) -> str:
    """What streaming heads may be more than sinks and a window, and what it takes."""
    own = of(records, "extras")
    cases = extra_cases(own)
    if not cases:
        return NOTHING
    found = sorted(values(own, "length"))
    rows = [
        [
            f"{model}, {heads} heads: {variant}",
            *(
                cell
                for n in found
                for cell in (
                    f"{numbers[n]['slots']:,}",
                    f"{numbers[n]['mean']:.1f}",
                    f"{numbers[n]['loss']:.4f}",
                )
            ),
        ]
        for (model, _, heads, variant), numbers in cases.items()
    ]
    columns = [f"{name}, {short_count(n)}" for n in found for name in ("slots", "exact", "loss")]
    return table(["", *columns], rows) + line_of(own)


def extra_cases(own: Records) -> dict[tuple[str, float, int, str], dict[int, dict[str, Any]]]:
    """Numbers of `extras` by length, of each model, share, number of heads and variant that has every length."""
    among = sorted(values(own, "length"))
    found: dict[tuple[str, float, int, str], list[dict[str, Any]]] = {}
    for entry in by_model(own, "ratio"):
        shape = entry["shape"]
        case = (shape["model"], shape["ratio"], shape["heads"], shape["variant"])
        found.setdefault(case, []).append(entry)
    made = {
        case: {e["shape"]["length"]: e["numbers"] for e in of_one_pattern(entries)}
        for case, entries in found.items()
    }
    return {case: numbers for case, numbers in made.items() if sorted(numbers) == among}


def identify_steps(records: Records) -> str:
    """A step of gate training at each length, and the run projected from all of them; a row for each way to run it."""
    own = [e for e in records if e["op"] == "identify.step"]
    runs = {_run(e): e["numbers"] for e in records if e["op"] == "identify.run"}
    if not own:
        return NOTHING
    found = sorted({e["shape"]["length"] for e in own})
    rows = []
    for run in dict.fromkeys(map(_run, own)):
        steps = {e["shape"]["length"]: e["numbers"] for e in own if _run(e) == run}
        cells = (steps.get(n) for n in found)
        longest = steps[max(steps)]
        rows.append(
            [
                run,
                *(
                    f"{n['step_seconds']:.2f} s, {n['peak_bytes'] / 2**30:.0f} GiB" if n else ""
                    for n in cells
                ),
                f"{longest['step_seconds'] / longest['floor_seconds']:.2f} ×",
                f"{runs[run]['run_hours']:.2f} h" if len(steps) == len(found) else "",
            ]
        )
    head = [
        "kernels",
        *(f"{n // 1024}K tokens" for n in found),
        "of the floor, longest",
        "2000 steps",
    ]
    return table(head, rows) + line_of(own)


def _run(entry: Mapping[str, Any]) -> str:
    """Kernels, and how processes share a sample where there are several; the first records name neither."""
    shape = entry["shape"]
    processes = shape.get("processes", 1)
    shared = f", {processes} GPUs" if processes > 1 else ""
    return shape["kernels"] + shared + (", weights sharded" if shape.get("shard") == "yes" else "")


def spread(seeds: Sequence[float]) -> str:
    """Their mean, with the range where it is a point or more."""
    if not seeds:
        return ""
    middle = f"{mean(seeds):.1f}"
    among = f"{min(seeds):.0f} – {max(seeds):.0f}"
    return middle if max(seeds) - min(seeds) < 1 else f"{middle} ({among})"


def count(tokens: float) -> str:
    """A number of tokens, in millions or thousands."""
    if tokens >= 1e6:
        return f"{tokens / 1e6:.1f} M"
    return f"{tokens / 1e3:.0f} K" if tokens else "0"


def line_of(records: Records) -> str:
    """Where and with what the records were made, each place once."""
    places = dict.fromkeys(machine_line(entry) for entry in records)
    return f"\n{' And: '.join(places)}\n"

"""The figures of docs/findings.md, drawn from the records of its experiments, one small PNG for each question.

A page of numbers hides what a picture shows at once: which rows stand out, where curves part. Run
`python -m tools.finding_figures results/*.jsonl --out docs/figures` after new records; the same records give the same
bytes, and a question without records gives no file.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duohead.evaluate.methods import share_name
from duohead.evaluate.svg import short_count
from tools.figure_parts import (
    EXACT,
    dot_panels,
    first,
    line,
    matrix,
    panels_of,
    run,
    with_legend,
    write_figures,
)
from tools.finding_records import (
    TASKS,
    Records,
    by_model,
    four,
    mean,
    models,
    of,
    scores,
    tuned_name,
    values,
)
from tools.finding_tables import extra_cases
from tools.gate_tables import with_overlaps
from tools.precision_tables import Row, front, rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAINED_LENGTH = 21845
# How much less a way to store heads must diverge than the last one that the figure names, to be named itself.
NAMED = 0.05
# Marks of an axis on which losses stand, nats.
LOSSES = tuple(digit * 10.0**power for power in range(-4, 2) for digit in (1, 2, 3, 5))


def write(folder: str | os.PathLike[str], files: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Draw every figure that ``files`` have records for into ``folder``; the paths written.

    Raises:
        ValueError: matplotlib is missing, a malformed file, or no record is of a question with a figure.
    """
    return write_figures(
        folder,
        files,
        FIGURES,
        lacking=(
            f"no records of a question with a figure ({', '.join(FIGURES)}); make some with python -m tools.findings"
        ),
    )


def varied(question: str, name: str) -> Callable[[Records], Figure | None]:
    """A figure maker: what was varied as rows, a dot for each share of heads, bars over seeds; a panel per model."""

    def draw(records: Records) -> Figure | None:
        own = of(records, question)
        rows = {
            model: {
                str(value): {
                    f"{share_name(ratio)} % of heads": scores(
                        own, model=model, ratio=ratio, **{name: value}
                    )
                    for ratio in sorted(values(own, "ratio"), reverse=True)
                }
                for value in values(own, name)
            }
            for model in models(own)
        }
        return dot_panels(rows) if rows else None

    return draw


def windows(records: Records) -> Figure | None:
    """Trained with (down) against deployed with (across), at an eighth of the heads."""
    own = [entry for entry in of(records, "windows") if entry["shape"]["ratio"] == 0.125]
    if not own:
        return None
    names = values(own, "trained")
    figure, panels = panels_of(models(own), height=3.0)
    for model, axes in panels.items():
        cells = [
            [mean(scores(own, model=model, trained=trained, deployed=one)) for one in names]
            for trained in names
        ]
        matrix(axes, cells, rows=names, columns=names, top=100, form="{:.0f}")
        axes.set_xlabel("deployed with, sinks + recent")
    first(panels).set_ylabel("trained with")
    return figure


def tasks(records: Records) -> Figure | None:
    """How far the rankings of two tasks agree, and what heads found on one (down) are worth on the others."""
    pairs, found = of(records, "agreement"), of(records, "tasks")
    found = [entry for entry in found if entry["shape"]["ratio"] == 0.125]
    if not pairs or not found:
        return None
    names = values(pairs, "identified_on")
    figure, panels = panels_of(models(pairs), rows=2, height=2.7)
    for model in models(pairs):
        alike, worth = panels[model], panels[f"{model} 1"]
        correlation = {
            (e["shape"]["identified_on"], e["shape"]["compared_with"]): e["numbers"]
            for e in pairs
            if e["shape"]["model"] == model
        }
        cells = [[correlation[row, one]["rank_correlation"] for one in names] for row in names]
        matrix(alike, cells, rows=names, columns=names, top=1, form="{:.2f}")
        alike.set_title(f"{model}: rank correlation of gates", fontsize="medium")
        scored = {
            e["shape"]["identified_on"]: e["numbers"] for e in found if e["shape"]["model"] == model
        }
        cells = [[scored[row][one] for one in TASKS] for row in names]
        matrix(worth, cells, rows=names, columns=TASKS, top=100, form="{:.0f}")
        worth.set_title(f"{model}: {EXACT}, 12.5 % of heads", fontsize="medium")
        worth.set_xlabel("scored on")
    for axes in (panels[models(pairs)[0]], panels[f"{models(pairs)[0]} 1"]):
        axes.set_ylabel("identified on")
    return figure


def tuning(records: Records) -> Figure | None:
    """Passkeys that tuned models answer: all heads, the old pattern, and one identified anew."""
    own = by_model(of(records, "tuning"), "tuned_on", "rate")
    rows: dict[str, dict[str, dict[str, list[float]]]] = {model: {} for model in models(own)}
    for entry in own:
        shape, accuracy = entry["shape"], entry["numbers"]["accuracy"]
        found = {name: [part["passkeys"]] for name, part in accuracy.items()}
        rows[shape["model"]][tuned_name(shape)] = {
            "all heads": found["full"],
            "a quarter, old pattern": found["old 0.25"],
            "a quarter, new pattern": found["new 0.25"],
            "an eighth, old pattern": found["old 0.125"],
            "an eighth, new pattern": found["new 0.125"],
        }
    return dot_panels(rows, label="passkeys, %") if rows else None


def errors(records: Records) -> Figure | None:
    """Exact match by depth of the needle (across) and task (down); a row of panels per model, one column a share."""
    own = of(records, "errors")
    if not own:
        return None
    ratios = sorted(values(own, "ratio"), reverse=True)
    places = {
        f"{model}, {share_name(ratio)} % of heads": (model, ratio)
        for model in models(own)
        for ratio in ratios
    }
    figure, panels = panels_of(list(places), columns=len(ratios), height=2.2)
    for name, axes in panels.items():
        model, ratio = places[name]
        mine = [e for e in own if (e["shape"]["model"], e["shape"]["ratio"]) == (model, ratio)]
        if not mine:
            axes.set_visible(False)
            continue
        by_depth = {entry["shape"]["task"]: entry["numbers"]["by_depth"] for entry in mine}
        depths = [f"{100 * float(depth):g}" for depth in next(iter(by_depth.values()))]
        cells = [list(found.values()) for found in by_depth.values()]
        matrix(axes, cells, rows=list(by_depth), columns=depths, top=100, form="{:.0f}")
    figure.supxlabel("depth of the needle, %", fontsize="medium")
    return figure


def lengths(records: Records) -> Figure | None:
    """Full attention and shares of heads over the length of the context."""
    own = of(records, "lengths")
    if not own:
        return None
    figure, panels = panels_of(models(own), height=2.8)
    # Whole tens, with room for the words below the lowest curve.
    bottom = max(0, 10 * (int(min(map(four, own))) // 10 - 1))
    for model, axes in panels.items():
        for number, method in enumerate(values(own, "method")):
            mine = [
                e for e in own if (e["shape"]["model"], e["shape"]["method"]) == (model, method)
            ]
            label = "all heads" if method == "full" else f"{share_name(float(method))} %"
            x = [entry["shape"]["length"] for entry in mine]
            style = ":" if method == "full" else "-"
            line(axes, x, [mean(scores([e])) for e in mine], label, f"C{number}", style)
        axes.axvline(TRAINED_LENGTH, color="0.6", lw=0.8)
        axes.text(
            TRAINED_LENGTH,
            bottom + 2,
            "trained up to here ",
            ha="right",
            fontsize="small",
            color="0.4",
        )
        axes.set_ylim(bottom, 101.5)
        ticks = [n for n in values(own, "length") if n != 28672]
        axes.set_xticks(ticks, [short_count(n) for n in ticks])
        axes.set_xlabel("tokens of context")
    first(panels).set_ylabel(EXACT)
    return with_legend(figure, panels)


def extras(records: Records) -> Figure | None:
    """Loss by variant of streaming heads (down) and length, dotted where it is plain; a panel per model and share."""
    own = of(records, "extras")
    cases = extra_cases(own)
    if not cases:
        return None
    variants = list(dict.fromkeys(variant for *_, variant in cases))
    places = {
        f"{model}, {share_name(ratio)} % of heads": (model, ratio) for model, ratio, *_ in cases
    }
    figure, panels = panels_of(list(places), columns=min(2, len(places)), height=2.3)
    for name, axes in panels.items():
        mine = {case[-1]: numbers for case, numbers in cases.items() if case[:2] == places[name]}
        for number, length in enumerate(values(own, "length")):
            losses = [numbers[length]["loss"] for numbers in mine.values()]
            where = [variants.index(variant) for variant in mine]
            colour = f"C{number}"
            axes.plot(losses, where, "o", ms=5, color=colour, label=f"{short_count(length)} tokens")
            axes.axvline(losses[where.index(0)], ls=":", lw=1, color=colour)
        axes.set_yticks(range(len(variants)), variants)
        axes.set_ylim(len(variants) - 0.5, -0.5)
        axes.set_xscale("log")
        axes.minorticks_off()
        low, high = axes.get_xlim()
        marks = [m for m in LOSSES if low < m < high]
        axes.set_xticks(marks, [f"{mark:g}" for mark in marks])
        axes.grid(axis="x", alpha=0.25)
        axes.set_xlabel("loss per token of the answer")
    return with_legend(figure, panels)


def steps(records: Records) -> Figure | None:
    """Share of a long run's retrieval heads that shorter runs select, over their number of steps."""
    own = [
        e
        for e in with_overlaps([e for e in records if e["op"] == "identify.steps_saved"])
        if "2K-8K" in e["impl"] and not e["impl"].endswith("seed 1")
    ]
    if not own:
        return None
    figure, panels = panels_of(models(own), height=2.6)
    for model, axes in panels.items():
        mine = sorted(
            (e for e in own if e["shape"]["model"] == model),
            key=lambda e: e["numbers"]["steps_done"],
        )
        x = [entry["numbers"]["steps_done"] for entry in mine]
        for number, ratio in enumerate((0.5, 0.25, 0.125)):
            y = [100 * entry["numbers"][f"overlap_{ratio}"] for entry in mine]
            line(axes, x, y, f"{share_name(ratio)} % of heads", f"C{number}")
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, [str(n) for n in x])
        axes.set_ylim(0, 104)
        axes.set_xlabel("steps")
    first(panels).set_ylabel("heads shared, %")
    return with_legend(figure, panels)


def precision(records: Records) -> Figure | None:
    """Divergence and exact match over the bytes of the cache, a colour for each treatment of heads."""
    found = rows(records)
    if not found:
        return None
    names = list(dict.fromkeys(row.model for row in found))
    figure, panels = panels_of(names, rows=2, height=2.9, width=5.2 if len(names) < 3 else 4.0)
    kinds = list(dict.fromkeys(row.family for row in found if row.retrieval))
    for model in names:
        own = [row for row in found if row.model == model]
        _trade(panels[model], panels[f"{model} 1"], own, kinds)
    panels[names[0]].set_ylabel("KL from the full model, nats")
    panels[f"{names[0]} 1"].set_ylabel(f"{EXACT}, mean of tasks")
    return with_legend(figure, panels)


def _trade(top: Axes, below: Axes, own: Sequence[Row], kinds: Sequence[str]) -> None:
    """One model's divergence (top) and exact match (below) over bytes; the line is the front.

    Its points are named, but for those that diverge hardly less than the last one named.
    """
    at = min(row.longest for row in own)
    stored = [row for row in own if row.retrieval]
    whole = next((row for row in own if row.retrieval is None), None)
    base = max(row.per_token[at] for row in stored)
    size = {id(row): 100 * row.per_token[at] / base for row in own}
    for number, kind in enumerate(kinds):
        mine = [row for row in stored if row.family == kind]
        style: dict[str, Any] = {"marker": "o", "ms": 4, "ls": "", "color": f"C{number}"}
        top.plot([size[id(row)] for row in mine], [row.kl[at] for row in mine], label=kind, **style)
        y = [mean(row.exact.values()) for row in mine]
        below.plot([size[id(row)] for row in mine], y, **style)
    best = front(stored, at=at)
    top.plot([size[id(r)] for r in best], [r.kl[at] for r in best], color="0.6", lw=0.8, zorder=0)
    named = float("inf")
    for row in best:
        if row.kl[at] > (1 - NAMED) * named:
            continue
        named = row.kl[at]
        # Below the front, and to the left, there is nothing; turned names do not reach one another.
        top.annotate(
            row.storage,
            (size[id(row)], row.kl[at]),
            xytext=(-3, -3),
            textcoords="offset points",
            fontsize="x-small",
            rotation=40,
            rotation_mode="anchor",
            ha="right",
            va="center",
        )
    if whole:
        below.axhline(mean(whole.exact.values()), color="0.4", ls=":", label="model as it is")
    below.set(title="", ylim=(min(mean(row.exact.values()) for row in own) - 0.5, 100.2))
    below.set_xlabel(f"cache bytes at {short_count(at)} tokens, % of all heads in bf16")
    marks = [
        mark
        for mark in (5, 10, 20, 30, 50, 100)
        if mark > 0.45 * min(size[id(row)] for row in stored)
    ]
    top.set_yscale("log")
    top.margins(y=0.12)
    for axes in (top, below):
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.set_xticks(marks, [str(mark) for mark in marks])
        axes.set_xlim(0.45 * min(size[id(row)] for row in stored), 120)
        axes.grid(visible=True, alpha=0.25)


FIGURES: dict[str, Callable[[Records], Figure | None]] = {
    "sinks": varied("sinks", "window"),
    "windows": windows,
    "objectives": varied("objectives", "objective"),
    "passkeys": varied("passkeys", "variant"),
    "tasks": tasks,
    "tuning": tuning,
    "errors": errors,
    "lengths": lengths,
    "extras": extras,
    "steps": steps,
    "precision": precision,
}


if __name__ == "__main__":
    sys.exit(run("tools.finding_figures", __doc__, write))

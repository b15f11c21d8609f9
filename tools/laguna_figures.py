"""The figures of docs/laguna.md on heads: which are needed, and how their gates moved while they were trained.

As on the adapter's card, but with the model's windows respected: windowed layers have no gate, and the picture says so.
Run `python -m tools.laguna_figures results/gates-pocket-laguna.jsonl --out docs` after new records; the same records
give the same bytes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.figure_parts import first, panels_of, run, with_legend, write_figures
from tools.finding_records import TASKS, Records, mean
from tools.laguna_heads import GATES, WINDOWS
from tools.laguna_tables import of_op

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Alpha = Sequence[Sequence[float | None]]
GREY = "0.87"
LAYERS = ("tab:blue", "tab:orange", "tab:green")


def heads(records: Records) -> Figure | None:
    """Alphas by layer (across) and KV head: trained gates, echo, and echo with the windows ignored."""
    trained = [e for e in of_op(records, GATES, "seed", "target") if not e["shape"]["target"]]
    found = {e["shape"]["windows"]: e for e in of_op(records, WINDOWS, "windows")}
    shown = {
        **{f"trained gates, seed {e['shape']['seed']}": e for e in trained[:1]},
        **{
            f"echo, windows {name}: answers {mean(found[name]['numbers'][t] for t in TASKS):.0f} %": found[
                name
            ]
            for name in ("native", "ignored")
            if name in found
        },
    }
    if len(shown) < 3:
        return None
    figure, panels = panels_of(list(shown), height=2.3)
    for name, axes in panels.items():
        _map(axes, shown[name]["numbers"]["alpha"])
    first(panels).set_ylabel("KV head")
    return figure


def _map(axes: Axes, alpha: Alpha) -> None:
    """One matrix of alphas; layers without gates are grey, with a word that says why."""
    cells = [[float("nan") if a is None else a for a in row] for row in zip(*alpha, strict=True)]
    axes.set_facecolor(GREY)
    axes.imshow(cells, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for head, row in enumerate(cells):
        for layer, value in enumerate(row):
            if value == value:
                colour = "black" if value > 0.6 else "white"
                said = (
                    f"{value:.2f}".removeprefix("0") if 0.005 <= value < 0.995 else f"{value:.0f}"
                )
                axes.text(
                    layer, head, said, ha="center", va="center", color=colour, fontsize="small"
                )
    for start, stop in _gaps(alpha):
        axes.text(
            (start + stop) / 2,
            (len(cells) - 1) / 2,
            "native window,\nno gate",
            ha="center",
            va="center",
            color="0.4",
            fontsize="small",
        )
    axes.set_xticks(range(len(alpha)))
    axes.set_yticks(range(len(cells)))
    axes.set_xlabel("layer")


def _gaps(alpha: Alpha) -> list[tuple[int, int]]:
    """First and last layer of each run of layers without gates."""
    bare = [all(a is None for a in row) for row in alpha]
    starts = [i for i, one in enumerate(bare) if one and not (i and bare[i - 1])]
    return [(i, i + [*bare[i:], False].index(False) - 1) for i in starts]


def training(records: Records) -> Figure | None:
    """Gates over the steps of their training, a panel per run, a line per head, a colour per layer."""
    own = sorted(
        of_op(records, GATES, "seed", "target"),
        key=lambda e: (e["shape"]["target"], e["shape"]["seed"]),
    )
    if not own:
        return None
    figure, panels = panels_of([_run(entry) for entry in own], height=2.9)
    for entry, axes in zip(own, panels.values(), strict=True):
        _lines(axes, entry["numbers"])
    first(panels).set_ylabel("gate: share of full attention")
    return with_legend(figure, panels)


def _run(entry: dict[str, Any]) -> str:
    shape = entry["shape"]
    target = f", target {shape['target']:g}" if shape["target"] else ""
    return f"seed {shape['seed']}{target}"


def _lines(axes: Axes, numbers: dict[str, Any]) -> None:
    """The gates of one run; lines that end apart from the others get the head's name."""
    alpha, steps = numbers["alpha"], numbers["step"]
    places = [(i, h) for i, row in enumerate(alpha) for h, a in enumerate(row) if a is not None]
    layers = sorted({layer for layer, _ in places})
    for (layer, head), gates in zip(places, zip(*numbers["gates"], strict=True), strict=True):
        number = layers.index(layer)
        label = f"layer {layer}" if head == 0 else None
        axes.plot(steps, gates, color=LAYERS[number % len(LAYERS)], lw=1.3, label=label)
        if 0.05 < gates[-1] < 0.9:
            axes.annotate(
                f"{layer}.{head}",
                (steps[-1], gates[-1]),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize="x-small",
            )
    axes.set_xlim(0, steps[-1] * 1.07)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("step")
    axes.grid(visible=True, alpha=0.25)


FIGURES: dict[str, Callable[[Records], Figure | None]] = {
    "laguna-heads": heads,
    "laguna-training": training,
}


def write(folder: str | os.PathLike[str], files: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Draw the figures that ``files`` have records for into ``folder``; the paths written.

    Raises:
        ValueError: matplotlib is missing, a malformed file, or no record that there is a figure for.
    """
    return write_figures(
        folder,
        files,
        FIGURES,
        lacking="no records of gates or windows; make some with python -m tools.laguna_heads",
    )


if __name__ == "__main__":
    sys.exit(run("tools.laguna_figures", __doc__, write))

"""The figures of docs/numbers.md about needles and prose: the paper's grid of each model, and prose by position.

A grid shows at once whether a choice of heads loses a depth or a length, and a curve over positions where eviction
begins to cost. Run `python -m tools.needle_figures results/needle-grid-*.jsonl results/prose.jsonl --out docs/figures`
after new records; the same records give the same bytes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duohead.evaluate import prose_results, results
from duohead.evaluate.svg import short_count
from tools.figure_parts import panels_of, run, with_legend, write_figures
from tools.finding_records import MODELS, Records, models
from tools.needle_tables import called

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS = {"perplexity": "perplexity", "kl_nats": "KL from full attention, nats"}
COLOURS = {"full": "black", "duo": "C0", "random": "C1", "streaming": "C3"}
SAID = {"full": "all heads", "streaming": "no head"}
DASHES = ("-", "--", ":", "-.")


def write(folder: str | os.PathLike[str], files: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Draw every figure that the files have records for into ``folder``; the paths written.

    Raises:
        ValueError: matplotlib is missing, a malformed file, or no records of needle grids or prose.
    """
    lacking = f"no records of {results.OP} or {prose_results.OP}; make some with duohead evaluate"
    return write_figures(folder, files, FIGURES, lacking=lacking)


def grid(model: str) -> Callable[[Records], Figure | None]:
    """A figure maker: exact match over lengths (across) and depths (down), a panel per choice of identified heads."""

    def draw(records: Records) -> Figure | None:
        own = [e for e in _of(records, results.OP, model) if _kind(e) in ("full", "duo")]
        names = list(dict.fromkeys(map(_name, own)))
        if not names:
            return None
        figure, panels = panels_of(names, width=3.1, height=2.6)
        for name, axes in panels.items():
            cells = {
                (e["shape"]["depth"], e["shape"]["length"]): 100 * e["numbers"]["exact_match"]
                for e in own
                if _name(e) == name
            }
            depths, lengths = (sorted({cell[i] for cell in cells}) for i in (0, 1))
            image = axes.imshow(
                [[cells.get((d, n), float("nan")) for n in lengths] for d in depths],
                vmin=0,
                vmax=100,
                cmap="viridis",
                aspect="auto",
            )
            axes.set_title(f"{name}: {sum(cells.values()) / len(cells):.1f} %", fontsize="medium")
            axes.set_xticks(range(len(lengths))[::3], [f"{n / 1000:.1f}" for n in lengths[::3]])
            axes.set_yticks(range(len(depths))[::3], [f"{100 * d:.0f}" for d in depths[::3]])
            axes.set_xticks([i + 0.5 for i in range(len(lengths) - 1)], minor=True)
            axes.set_yticks([i + 0.5 for i in range(len(depths) - 1)], minor=True)
            axes.grid(which="minor", color="white", linewidth=0.6)
            axes.tick_params(which="minor", length=0)
        panels[names[0]].set_ylabel("depth of the needle, %")
        figure.supxlabel("context length, thousands of tokens", fontsize="medium")
        figure.colorbar(image, ax=list(panels.values()), label="exact match, %", pad=0.01)
        return figure

    return draw


def prose(records: Records) -> Figure | None:
    """Perplexity (above) and divergence (below) against position, a column per model, a curve per choice of heads."""
    own = [entry for entry in records if entry["op"] == prose_results.OP]
    if not own:
        return None
    named = models(own)
    figure, panels = panels_of(named, rows=len(METRICS), height=2.7)
    for model in named:
        found = _of(own, prose_results.OP, model)
        longest = max(entry["shape"]["length"] for entry in found)
        found = [entry for entry in found if entry["shape"]["length"] == longest]
        for place, (metric, label) in enumerate(METRICS.items()):
            axes = panels[model if place == 0 else f"{model} {place}"]
            axes.set_title(f"{model}, {longest:,} tokens" if place == 0 else "", fontsize="medium")
            for entry in found:
                parts = entry["numbers"][f"{metric}_by_position"]
                if any(parts) or metric == "perplexity":
                    x = [longest * (i + 0.5) / len(parts) for i in range(len(parts))]
                    axes.plot(
                        x,
                        parts,
                        label=_name(entry),
                        color=COLOURS[_kind(entry)],
                        linestyle=_dashes(entry, found),
                    )
            axes.grid(visible=True, alpha=0.25)
            quarters = [longest * i // 4 for i in range(5)]
            axes.set_xticks(quarters, [short_count(n) for n in quarters])
            if model == named[0]:
                axes.set_ylabel(label)
        axes.set_xlabel("position, tokens")
    return with_legend(figure, panels)


def _of(records: Records, op: str, model: str) -> list[dict[str, Any]]:
    return [e for e in records if e["op"] == op and e["shape"]["model"] == model]


def _kind(entry: dict[str, Any]) -> str:
    return str(entry["impl"]).partition("_")[0]


def _name(entry: dict[str, Any]) -> str:
    return called(entry["impl"], entry["shape"]["retrieval_ratio"], ends=SAID)


def _dashes(entry: dict[str, Any], among: Sequence[dict[str, Any]]) -> str:
    """The same line for the same share, whichever way its heads were chosen."""
    shares = sorted({e["shape"]["retrieval_ratio"] for e in among if _kind(e) == "duo"})[::-1]
    ratio = entry["shape"]["retrieval_ratio"]
    return DASHES[shares.index(ratio) % len(DASHES)] if ratio in shares else "-"


FIGURES: dict[str, Callable[[Records], Figure | None]] = {
    **{f"needle-grid-{model}": grid(model) for model in MODELS},
    "prose-by-position": prose,
}

if __name__ == "__main__":
    sys.exit(run("tools.needle_figures", __doc__, write))

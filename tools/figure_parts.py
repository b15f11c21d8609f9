"""The looks of the figures in docs/figures: panels, dots on lines, matrices, curves, one legend, small files.

Figures of `finding_figures.py` and `laguna_figures.py` are made of these few pieces, so that all look alike and a
number is drawn the same way everywhere. matplotlib is an extra and imported where it is used.
"""

from __future__ import annotations

import argparse
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from duohead.evaluate.plots import require_matplotlib
from duohead.files import replacing
from duohead.record import read_records
from tools.finding_records import Records, mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI, COLOURS = 110, 64
T = TypeVar("T")
EXACT = "exact match, %"
# For each row and series one value per seed.
Dots = Mapping[str, Mapping[str, Sequence[float]]]


def panels_of(
    names: Sequence[str], *, rows: int = 1, columns: int = 0, width: float = 4.2, height: float
) -> tuple[Figure, dict[str, Axes]]:
    """A figure with a titled panel for each name; further rows of the same names are called "NAME 1" and so on."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = columns or len(names)
    down = rows * -(-len(names) // across)
    figure = Figure(figsize=(max(width * across, 5.2), height * down + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(down, across, squeeze=False).ravel()
    titles = [name if row == 0 else f"{name} {row}" for row in range(rows) for name in names]
    panels = dict(zip(titles, grid, strict=True))
    for title, axes in panels.items():
        axes.set_title(title, fontsize="medium")
        axes.tick_params(labelsize="small")
    return figure, panels


def dot_panels(rows: Mapping[str, Dots], *, label: str = EXACT) -> Figure:
    """A panel per model: a line for each row, and on it a dot per series at its mean, a bar over its range."""
    longest = max(len(panel) for panel in rows.values())
    figure, panels = panels_of(list(rows), height=0.34 * longest + 0.8)
    for model, axes in panels.items():
        names = list(rows[model])
        series = list(dict.fromkeys(key for row in rows[model].values() for key in row))
        for number, name in enumerate(series):
            # Dots of equal value would hide one another.
            shift = 0.5 * (number + 0.5) / len(series) - 0.25
            for place, row in enumerate(names):
                found = rows[model][row].get(name)
                if found:
                    y = place + shift
                    axes.plot([min(found), max(found)], [y, y], color=f"C{number}", lw=1.5)
                    axes.plot(mean(found), y, "o", ms=5, color=f"C{number}", label=name)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(-3, 103)
        axes.grid(axis="x", alpha=0.25)
        for place in range(1, len(names)):
            axes.axhline(place - 0.5, color="0.9", lw=0.8)
        axes.set_xlabel(label)
        if axes is not first(panels) and names == list(first(rows)):
            axes.tick_params(labelleft=False)
    return with_legend(figure, panels)


def matrix(
    axes: Axes,
    cells: Sequence[Sequence[float]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    top: float,
    form: str,
) -> None:
    """A heat map with the number written in each cell."""
    axes.imshow(cells, vmin=0, vmax=top, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    for y, line in enumerate(cells):
        for x, value in enumerate(line):
            colour = "black" if value > 0.6 * top else "white"
            axes.text(x, y, form.format(value), ha="center", va="center", color=colour)


def line(
    axes: Axes,
    x: Sequence[float],
    y: Sequence[float],
    label: str,
    colour: str,
    style: str = "-",
) -> None:
    """A curve with a dot at each measurement, over a light grid."""
    axes.plot(x, y, style, marker="o", ms=4, label=label, color=colour)
    axes.grid(visible=True, alpha=0.25)


def first(named: Mapping[str, T]) -> T:
    """The first value of a mapping, such as the leftmost panel."""
    return next(iter(named.values()))


def with_legend(figure: Figure, panels: Mapping[str, Axes]) -> Figure:
    """One legend above all panels, each name once."""
    handles: dict[str, Any] = {}
    for axes in panels.values():
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper center",
        ncols=min(int(figure.get_figwidth() / 1.65), len(handles)),
        fontsize="small",
    )
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a PNG of few colours, which is a third of the size and looks the same."""
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DPI)
    image = Image.open(drawn).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        image.save(temporary, format="PNG", optimize=True)


def write_figures(
    folder: str | os.PathLike[str],
    files: Sequence[str | os.PathLike[str]],
    figures: Mapping[str, Callable[[Records], Figure | None]],
    *,
    lacking: str,
) -> list[Path]:
    """Draw every one of ``figures`` that ``files`` have records for into ``folder``; the paths written.

    Raises:
        ValueError: matplotlib is missing, a malformed file, or no figure has records, with ``lacking`` as the reason.
    """
    require_matplotlib()
    records = [entry for path in files for entry in read_records(path)]
    drawn = {Path(folder) / f"{name}.png": draw(records) for name, draw in figures.items()}
    written = {path: figure for path, figure in drawn.items() if figure is not None}
    if not written:
        raise ValueError(f"{', '.join(map(str, files))}: {lacking}")
    for path, figure in written.items():
        save(figure, path)
    return list(written)


def run(module: str, about: str | None, write: Callable[[str, Sequence[str]], list[Path]]) -> int:
    """The command ``python -m MODULE FILE ... --out FOLDER``: draw, and say what was written."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=about)
    parser.add_argument("files", nargs="+", metavar="FILE", help="records")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the PNGs go")
    args = parser.parse_args()
    for path in write(args.out, args.files):
        print(f"{path}, {path.stat().st_size / 1000:.0f} KB")
    return 0

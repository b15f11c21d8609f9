"""Pictures of evaluations as PNG: needle heat maps, one panel per method, and prose against position.

matplotlib is an extra (`report`), imported only here and only when a picture is asked for. Use
`draw_needles(result, labels, path)` or `draw_prose(result, labels, path)`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from duohead.evaluate.svg import short_count
from duohead.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

    from duohead.evaluate.prose_results import ProseResult
    from duohead.evaluate.results import NeedleResult


def require_matplotlib() -> None:
    """ValueError with the remedy if matplotlib is missing; call it before the work that the picture is of."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "--png needs matplotlib; install it with: pip install 'duohead[report]'"
        ) from error


def draw_needles(
    result: NeedleResult, labels: Mapping[str, str], path: str | os.PathLike[str]
) -> None:
    """Draw exact match of every method in `labels` (method name -> title of its panel) into a PNG at `path`."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(4, len(labels))
    rows = math.ceil(len(labels) / columns)
    wide = max(2.4, 0.55 * len(result.lengths)) + 0.9
    figure = Figure(
        figsize=(columns * wide, rows * max(2.6, 0.3 * len(result.depths) + 1.3)),
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for name, axes in zip(labels, panels, strict=False):
        image = _panel(axes, result, name, labels[name])
    for axes in panels[len(labels) :]:
        axes.set_visible(False)
    figure.supxlabel("context length, tokens", fontsize="medium")
    figure.supylabel("depth of the needle, %", fontsize="medium")
    figure.colorbar(image, ax=panels.tolist(), label="answers exactly right", shrink=0.7)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)


def draw_prose(
    result: ProseResult, labels: Mapping[str, str], path: str | os.PathLike[str]
) -> None:
    """Draw perplexity and divergence from the full model against position into a PNG at `path`, a row per length."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lengths = sorted({row.length for row in result.rows})
    figure = Figure(figsize=(11, 3.4 * len(lengths)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(lengths), 2, squeeze=False)
    for length, (perplexity, divergence) in zip(lengths, panels, strict=True):
        for name, title in labels.items():
            row = result.row(name, length)
            bins = len(row.perplexity_by_position)
            places = [length * (i + 0.5) / bins for i in range(bins)]
            perplexity.plot(places, row.perplexity_by_position, label=title)
            if row.kl_nats:
                divergence.plot(places, row.kl_nats_by_position, label=title)
        perplexity.set(ylabel="perplexity", xlabel=f"position, of {length:,} tokens")
        divergence.set(ylabel="KL from full attention, nats", xlabel="position")
    panels[0][0].legend(fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)


def _panel(axes: Axes, result: NeedleResult, method: str, title: str) -> AxesImage:
    image = axes.imshow(result.grid(method), vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_title(f"{title}\nmean {100 * result.mean(method=method):.1f} %", fontsize="medium")
    axes.set_xticks(range(len(result.lengths)), [short_count(n) for n in result.lengths])
    axes.set_yticks(range(len(result.depths)), [f"{100 * d:.0f}" for d in result.depths])
    return image

"""The heat map of a pattern's alphas, in letters or colours for a terminal and as a PNG.

A glance at it tells whether identification worked: a few bright heads, the rest dark. `heat_map(pattern, policy,
stream=sys.stdout)` gives the lines, `draw(pattern, policy, path)` writes the picture.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from duohead.pattern import HeadPattern
    from duohead.policy import HeadPolicy

SHADES, ASCII_SHADES = "·░▒▓█", ".-+*#"
# Dark blue to yellow in the 256-colour palette, even to the eye and safe for colour-blind readers.
COLOURS = (17, 18, 19, 24, 30, 36, 71, 107, 143, 185, 227)


def heat_map(pattern: HeadPattern, policy: HeadPolicy | None, *, stream: TextIO) -> list[str]:
    """Lines of a map with a row per layer and a cell per KV head, in colour if `stream` is a terminal.

    With a policy, each row ends with its number of retrieval heads; without, with the number of alphas above 0.5.
    """
    colour = stream.isatty()
    shades = SHADES if _can_print(SHADES, stream) else ASCII_SHADES
    layers, heads = pattern.alpha.shape
    counted = "alpha > 0.5" if policy is None else "retrieval"
    lines = [f"layer  {_scale(colour, shades)}   {counted} of {heads}"]
    for layer in range(layers):
        row = pattern.alpha[layer]
        if not pattern.gated[layer].any():
            window = pattern.windows[layer] if pattern.windows else None
            note = "no gates" if window is None else f"native window of {window} tokens"
            lines.append(f"{layer:5}  {'  ' * heads}  not gated: {note}")
            continue
        cells = "".join(_cell(float(alpha), colour, shades) for alpha in row)
        kept = int((row > 0.5).sum()) if policy is None else len(policy.layers[layer].retrieval)
        lines.append(f"{layer:5}  {cells}  {kept:3}")
    return lines


def draw(pattern: HeadPattern, policy: HeadPolicy | None, path: str) -> None:
    """Write the heat map as a PNG; retrieval heads of `policy` are framed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    from duohead import files

    layers, heads = pattern.alpha.shape
    figure = Figure(figsize=(2.2 + 0.28 * heads, 1.6 + 0.2 * layers), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(
        pattern.alpha, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest"
    )
    axes.set(
        xlabel="KV head", ylabel="layer", title=(pattern.base_model or "alpha").rpartition("/")[2]
    )
    axes.set_facecolor("lightgrey")
    figure.colorbar(image, label="alpha")
    for layer, row in enumerate(policy.layers if policy else ()):
        for head in row.retrieval if pattern.gated[layer].any() else ():
            axes.add_patch(Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor="red"))
    with files.replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


def check_png(path: str) -> None:
    """ValueError unless a picture can be drawn and its name is one of a PNG."""
    if not path.lower().endswith(".png"):
        raise ValueError(f"--png must name a .png file, got {path}")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "--png needs matplotlib; install it with: pip install 'duohead[report]'"
        ) from error


def _cell(alpha: float, colour: bool, shades: str) -> str:
    if not colour:
        return shades[min(int(alpha * len(shades)), len(shades) - 1)] * 2
    if math.isnan(alpha):
        return "  "
    return f"\x1b[48;5;{COLOURS[min(int(alpha * len(COLOURS)), len(COLOURS) - 1)]}m  \x1b[0m"


def _scale(colour: bool, shades: str) -> str:
    steps = COLOURS if colour else shades
    return (
        "0 "
        + "".join(_cell(index / len(steps), colour, shades) for index in range(len(steps)))
        + " 1"
    )


def _can_print(text: str, stream: TextIO) -> bool:
    try:
        text.encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True

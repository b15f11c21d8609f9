"""A chart of several measured curves with a legend, as inline SVG: scores against bytes, milliseconds against length.

Up to 16 curves keep apart by colour, dashes and the form of their marks, so that the chart also reads in print and
without colour vision; names stand in a legend under it, because curves that meet leave no room beside their ends. Use
`curve_chart(curves, ...)` and `legend(curves)`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from duohead.evaluate.charts import Frame
from duohead.evaluate.svg import WIDTH, nice_ticks, picture, short_count, tag

STYLES = ("one", "two", "four", "five", "six", "three", "seven", "eight")
REFERENCE = "ref"
_PLUS = (
    *((-0.45, -1.3), (0.45, -1.3), (0.45, -0.45), (1.3, -0.45), (1.3, 0.45), (0.45, 0.45)),
    *((0.45, 1.3), (-0.45, 1.3), (-0.45, 0.45), (-1.3, 0.45), (-1.3, -0.45), (-0.45, -0.45)),
)
# Corners of the marks that are no circles, for a size of one.
FORMS: Mapping[str, Sequence[tuple[float, float]]] = {
    REFERENCE: tuple(((x - y) * math.sqrt(0.5), (x + y) * math.sqrt(0.5)) for x, y in _PLUS),
    "three": _PLUS,
    "two": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    "four": ((0, -1.25), (1.2, 0.95), (-1.2, 0.95)),
    "five": ((0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)),
    "six": ((0, 1.25), (1.2, -0.95), (-1.2, -0.95)),
    "seven": ((-1.3, -0.5), (1.3, -0.5), (1.3, 0.5), (-1.3, 0.5)),
    "eight": ((-0.5, -1.3), (0.5, -1.3), (0.5, 1.3), (-0.5, 1.3)),
}
MARKS = 8  # lines of many points keep about so many marks
TICK = 6.9  # pixels that a digit at a tick takes at most


@dataclass(frozen=True)
class Curve:
    """Measured points (x, y) under a name, and single measurements (`dots`) that a point of theirs is the mean of.

    `style` is one of STYLES, followed by " dash" or not, or "ref" for what the others are held against.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    style: str
    dots: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Axis:
    """An axis: its label, whether values double along it, and how a tick is written ("%" or "tokens" or plain).

    `top` fixes the largest value shown, for shares; by default it follows from the data. Without `zero` the axis starts
    below the smallest value, for what differs little.
    """

    label: str
    unit: str = ""
    doubling: bool = False
    top: float | None = None
    zero: bool = True

    def place(self, value: float) -> float:
        """Where a value lies along the axis."""
        return math.log2(value) if self.doubling else value

    def ticks(self, values: Sequence[float]) -> dict[float, str]:
        """Places of ticks and what stands there."""
        if self.doubling:
            marks = sorted(set(values))
            while len(marks) > 7:
                marks = marks[::2]
            return {self.place(value): self.name(value) for value in marks}
        low, high = min(values), max(values)
        if not self.zero and low == high < 0:
            high = 0.0
        if not self.zero and high > low:
            step = nice_ticks(high - low)[1]
            first = math.floor(low / step) * step
            count = math.ceil((high - first) / step - 1e-9)
            return {v: self.name(v) for v in (first + i * step for i in range(count + 1))}
        return {value: self.name(value) for value in nice_ticks(self.top or high or 1.0)}

    def name(self, value: float) -> str:
        """How a value is written at a tick."""
        if self.unit == "%":
            return f"{100 * value:g}"
        return short_count(int(value)) if self.unit == "tokens" else f"{value:.6g}"


def curve_chart(
    curves: Sequence[Curve],
    *,
    x: Axis,
    y: Axis,
    title: str,
    description: str,
    level: float | None = None,
) -> str:
    """Draw the curves over axes that start at zero (or double), and a dashed line at `level`; nothing is negative."""
    across = [px for curve in curves for px, _ in (*curve.points, *curve.dots)]
    up = [py for curve in curves for _, py in (*curve.points, *curve.dots)]
    x_ticks, y_ticks = x.ticks(across), y.ticks(up)
    low = min(x_ticks)
    high = max(*x_ticks, *(x.place(value) for value in across))
    frame = Frame(
        left=max(46.0, 12 + TICK * max(map(len, y_ticks.values()))),
        x=(low, high if high > low else low + 1),
        y=(min(y_ticks), max(*y_ticks, *(y.place(v) for v in up))),
        top=34.0,
        bottom=226.0,
        right=WIDTH - 18.0,
    )
    parts = frame.axes(x_ticks, y_ticks, x_label=x.label, y_label=y.label)
    if level is not None:
        height = frame.py(y.place(level))
        line = {"x1": frame.left, "x2": frame.right, "y1": height, "y2": height}
        parts.append(tag("line", **line, class_=f"line {REFERENCE}"))
    for curve in curves:
        spots = [(frame.px(x.place(a)), frame.py(y.place(b))) for a, b in sorted(curve.points)]
        corners = " ".join(f"{a:.1f},{b:.1f}" for a, b in spots)
        parts.append(tag("polyline", points=corners, class_=f"line {curve.style}"))
    for curve in curves:  # marks lie over all lines
        for a, b in curve.dots:
            spot = {"cx": frame.px(x.place(a)), "cy": frame.py(y.place(b))}
            parts.append(tag("circle", **spot, r=2.4, class_=f"dots {curve.style}"))
        every = max(1, len(curve.points) // MARKS)
        for a, b in curve.points[::every]:
            parts.append(mark(frame.px(x.place(a)), frame.py(y.place(b)), curve.style))
    return picture(parts, height=268, title=title, description=description)


def mark(x: float, y: float, style: str, *, size: float = 4.0) -> str:
    """The mark of a style at (x, y): each has a form of its own, filled, or hollow where the line is dashed."""
    kind, form = f"mark {style}", FORMS.get(style.partition(" ")[0])
    if form is None:
        return tag("circle", cx=x, cy=y, r=size, class_=kind)
    corners = " ".join(f"{x + size * a:.1f},{y + size * b:.1f}" for a, b in form)
    return tag("polygon", points=corners, class_=kind)


def legend(curves: Sequence[Curve]) -> str:
    """The names of curves beside their marks."""
    items = []
    for curve in curves:
        line = tag("line", x1=1.0, x2=23.0, y1=7.0, y2=7.0, class_=f"line {curve.style}")
        key = tag(
            "svg", line, mark(12.0, 7.0, curve.style), viewBox="0 0 24 14", aria_hidden="true"
        )
        items.append(f"<li>{key}{escape(curve.name)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def styles_of(names: Sequence[str], *, fixed: Mapping[str, str]) -> dict[str, str]:
    """A style for every name in order; `fixed` ones have theirs on every page.

    Names that come after all styles are used have none: no reader would tell their curves apart.
    """
    others = [name for name in dict.fromkeys(names) if name not in fixed]
    every = [*STYLES, *(f"{style} dash" for style in STYLES)]
    free = [style for style in every if style not in fixed.values()]
    return {**fixed, **dict(zip(others, free, strict=False))}


def unstyled(names: Sequence[str], styles: Mapping[str, str]) -> str:
    """A sentence about the names that have no style, to follow a caption; empty if there are none."""
    left = [name for name in dict.fromkeys(names) if name not in styles]
    return f" In the table only: {', '.join(left)}." if left else ""

"""Two charts as inline SVG for the report page: accuracy against the share of retrieval heads, bytes against length.

Series are named beside their marks instead of in a legend, and every dot is a measurement; nothing is interpolated but
the straight line between two dots. Use `share_chart(identified, random, ...)` and `line_chart(series, ...)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from duohead.evaluate.svg import WIDTH, nice_ticks, picture, short_count, tag, text


@dataclass(frozen=True)
class Frame:
    """The plotting area: maps data to pixels. `x` and `y` are (lowest, highest) data values."""

    x: tuple[float, float]
    y: tuple[float, float]
    left: float = 46.0
    top: float = 18.0
    right: float = WIDTH - 14.0
    bottom: float = 222.0

    def px(self, value: float) -> float:
        """Pixels from the left of a data value."""
        return self.left + (value - self.x[0]) / (self.x[1] - self.x[0]) * (self.right - self.left)

    def py(self, value: float) -> float:
        """Pixels from the top of a data value."""
        return self.bottom - (value - self.y[0]) / (self.y[1] - self.y[0]) * (
            self.bottom - self.top
        )

    def axes(
        self,
        x_ticks: Mapping[float, str],
        y_ticks: Mapping[float, str],
        *,
        x_label: str,
        y_label: str,
    ) -> list[str]:
        """Grid lines, tick texts and the two axis labels; the vertical axis has its label above it."""
        parts = []
        for value, name in y_ticks.items():
            y = self.py(value)
            kind = "base" if value == self.y[0] else "rule"
            parts += [
                tag("line", x1=self.left, x2=self.right, y1=y, y2=y, class_=kind),
                text(name, self.left - 7, y + 4, anchor="end"),
            ]
        parts += [text(name, self.px(value), self.bottom + 17) for value, name in x_ticks.items()]
        middle = (self.left + self.right) / 2
        return [
            *parts,
            text(x_label, middle, self.bottom + 37, kind="axis"),
            text(y_label, 2, 12.0, kind="axis", anchor="start"),
        ]


def share_chart(
    identified: Mapping[float, float],
    random: Mapping[float, Sequence[float]],
    *,
    title: str,
    description: str,
    x_label: str,
    y_label: str,
) -> str:
    """Accuracy against the share of retrieval heads: a line for identified heads, hollow dots for random draws.

    Keys are shares in [0, 1], drawn in falling order at equal distances; values are fractions in [0, 1].
    """
    shares = sorted(identified, reverse=True)
    frame = Frame(x=(-0.75, len(shares) - 0.6), y=(0.0, 1.0), top=40.0, bottom=232.0)
    place = {share: float(i) for i, share in enumerate(shares)}
    parts = frame.axes(
        {place[s]: f"{100 * s:g} %" for s in shares},
        {v / 4: f"{25 * v}" for v in range(5)},
        x_label=x_label,
        y_label=y_label,
    )
    points = [(frame.px(place[s]), frame.py(identified[s])) for s in shares]
    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts.append(tag("polyline", points=corners, class_="line one"))
    before = identified[shares[0]]
    for share, (x, y) in zip(shares, points, strict=True):
        # On a steep descent the line itself is above the mark, so the value goes to the right.
        steep = before - identified[share] > 0.1
        spot = (x + 8, min(y + 1, frame.bottom - 5), "start") if steep else (x, y - 9, "middle")
        before = identified[share]
        parts += [
            tag("circle", cx=x, cy=y, r=4.0, class_="mark one"),
            text(f"{100 * before:.1f}", spot[0], spot[1], kind="value halo", anchor=spot[2]),
        ]
    for share, draws in random.items():
        x = frame.px(place[share])
        y = frame.py(sum(draws) / len(draws))
        parts += [tag("circle", cx=x, cy=frame.py(d), r=4.0, class_="hollow two") for d in draws]
        parts += [
            tag("line", x1=x - 11, x2=x + 11, y1=y, y2=y, class_="line two"),
            text(
                f"{100 * sum(draws) / len(draws):.1f}",
                x + 16,
                y + 4,
                kind="value halo",
                anchor="start",
            ),
        ]
    parts += _share_labels(frame, place, identified, random)
    return picture(parts, height=274, title=title, description=description)


def _share_labels(
    frame: Frame,
    place: Mapping[float, float],
    identified: Mapping[float, float],
    random: Mapping[float, Sequence[float]],
) -> list[str]:
    """Name the two series next to their marks instead of in a legend."""
    first = max(identified)
    x, y = frame.px(place[first]) - 8, frame.py(identified[first]) + 20
    parts = [text("identified heads", x, y, kind="label one", anchor="start")]
    if random:
        share = max(random)
        x, y = frame.px(place[share]) - 14, frame.py(sum(random[share]) / len(random[share]))
        parts += [
            text("random heads", x, y - 3, kind="label two", anchor="end"),
            text(f"bar: mean of {len(random[share])}", x, y + 12, kind="tick halo", anchor="end"),
        ]
    return parts


def line_chart(
    series: Mapping[str, Mapping[int, float]],
    *,
    title: str,
    description: str,
    x_label: str,
    y_label: str,
    unit: str,
) -> str:
    """Lines from measured points (dots), each named at its right end with its last value.

    `series` maps a name to {x: y}; styles follow the order: the reference first (grey), then one,
    then two.
    """
    longest = max(max(points) for points in series.values())
    highest = max(max(points.values()) for points in series.values())
    ticks = nice_ticks(highest)
    frame = Frame(
        x=(0.0, float(longest)), y=(0.0, ticks[-1]), top=40.0, bottom=232.0, right=WIDTH - 96.0
    )
    marks = sorted({x for points in series.values() for x in points})
    shown = [x for i, x in enumerate(marks) if i + 1 == len(marks) or 1.6 * x <= marks[i + 1]]
    shown = [x for x in shown if x == marks[-1] or x >= longest / 9]
    parts = frame.axes(
        {float(x): short_count(x) for x in shown},
        {t: f"{t:g}" for t in ticks},
        x_label=x_label,
        y_label=y_label,
    )
    ends = {name: frame.py(points[max(points)]) for name, points in series.items()}
    labels = _spread(ends, gap=30.0, lowest=frame.bottom + 4)
    for style, (name, points) in zip(("ref", "one", "three", "two"), series.items(), strict=False):
        spots = [(frame.px(float(x)), frame.py(points[x])) for x in sorted(points)]
        parts.append(
            tag(
                "polyline",
                points=" ".join(f"{x:.1f},{y:.1f}" for x, y in spots),
                class_=f"line {style}",
            )
        )
        parts += [tag("circle", cx=x, cy=y, r=3.0, class_=f"mark {style}") for x, y in spots]
        x, y = frame.right + 9, labels[name]
        parts += [
            text(name, x, y - 2, kind=f"label {style}", anchor="start"),
            text(f"{points[max(points)]:.2f} {unit}", x, y + 13, kind="value halo", anchor="start"),
        ]
    return picture(parts, height=274, title=title, description=description)


def _spread(wanted: Mapping[str, float], *, gap: float, lowest: float) -> dict[str, float]:
    """Labels at least `gap` pixels apart, none below `lowest`, near where they are wanted (pixels grow downwards)."""
    placed: dict[str, float] = {}
    limit = lowest
    for name in sorted(wanted, key=lambda n: wanted[n], reverse=True):
        placed[name] = min(wanted[name], limit)
        limit = placed[name] - gap
    return placed

"""Heat maps of shares, as inline SVG for the report page: gates by layer and head, scores by length and depth.

One hue from empty to full, because a share has a natural zero and colour-blind readers see lightness; the numbers stand
in the cells wherever there is room. `HeatMap(values, ...).svg()` draws one, `colour_key(low, high)` its scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from duohead.evaluate.svg import WIDTH, picture, tag, text

LETTER = 7.0  # pixels of a letter of 12 pixel text, on average
DIGIT = 5.6  # of a digit of small text


@dataclass(frozen=True)
class HeatMap:
    """A matrix of shares in [0, 1] as cells; NaN means no value and is hatched.

    `columns` and `rows` name the axes' ticks, `cell` says how a value is written when there is room
    for it (times `scale`, or 100 if `percent`), and `kept` lists cells per mark ("dot", "ring") as (row, column).
    """

    values: Sequence[Sequence[float]]
    rows: Sequence[str]
    columns: Sequence[str]
    x_label: str
    y_label: str
    title: str
    description: str
    cell: str = "{:.2f}"
    percent: bool = False
    scale: float = 1.0
    kept: Mapping[str, frozenset[tuple[int, int]]] | None = None

    top = 24.0

    @property
    def left(self) -> float:
        """Room for the longest row name, up to 40 % of the picture."""
        return min(max(52.0, 14.0 + LETTER * max(map(len, self.rows))), 0.4 * WIDTH)

    def svg(self) -> str:
        """Draw it; texts inside cells get small and then are left out, as are ticks, where cells get small."""
        wide = (WIDTH - self.left - 6) / len(self.columns)
        high = min(34.0, max(9.0, 190.0 / len(self.rows)))
        parts = [text(self.y_label, 2, self.top - 11, kind="axis", anchor="start")]
        parts += self._row_ticks(high)
        for r, row in enumerate(self.values):
            for c, value in enumerate(row):
                parts += self._cell(
                    value, self.left + c * wide, self.top + r * high, wide, high, (r, c)
                )
        bottom = self.top + high * len(self.rows)
        ticks, deep = self._column_ticks(wide, bottom)
        middle = (self.left + WIDTH - 6) / 2
        parts += [*ticks, text(self.x_label, middle, bottom + deep + 20, kind="axis")]
        return picture(
            parts, height=bottom + deep + 26, title=self.title, description=self.description
        )

    def _column_ticks(self, wide: float, bottom: float) -> tuple[list[str], float]:
        """Names under the columns and the room they take: numbers are thinned out, words are tilted."""
        places = [self.left + (c + 0.5) * wide for c in range(len(self.columns))]
        longest = LETTER * max(map(len, self.columns))
        words = any(not name[:1].isdigit() for name in self.columns)
        if words and longest > wide:
            names = [_cut(name, 16) for name in self.columns]
            ticks = [
                tag(
                    "text",
                    escape(name),
                    class_="tick",
                    text_anchor="end",
                    transform=f"translate({x + 4:.1f} {bottom + 13:.1f}) rotate(-32)",
                )
                for name, x in zip(names, places, strict=True)
            ]
            return ticks, 16 + 0.55 * LETTER * max(map(len, names))
        every = max(1, math.ceil((longest + 10) / wide))
        return [
            text(name, x, bottom + 16)
            for name, x in list(zip(self.columns, places, strict=True))[::every]
        ], 16.0

    def _row_ticks(self, high: float) -> list[str]:
        every = math.ceil(13.0 / high)
        return [
            text(
                _cut(name, int((self.left - 12) / LETTER)),
                self.left - 7,
                self.top + (r + 0.5) * high + 4,
                anchor="end",
            )
            for r, name in enumerate(self.rows)
            if r % every == 0
        ]

    def _cell(
        self, value: float, x: float, y: float, wide: float, high: float, index: tuple[int, int]
    ) -> list[str]:
        small = min(wide, high)
        gap = min(1.5, 0.06 * small)
        box = {
            "x": x + gap,
            "y": y + gap,
            "width": wide - 2 * gap,
            "height": high - 2 * gap,
            "rx": min(2.0, 0.1 * small),
        }
        if math.isnan(value):
            return [tag("rect", **box, class_="void")]
        share = min(max(value, 0.0), 1.0)
        parts = [
            tag("rect", **box, class_="cell"),
            tag("rect", **box, class_="heat", fill_opacity=round(share, 3)),
        ]
        kept = {mark for mark, cells in (self.kept or {}).items() if index in cells}
        if "ring" in kept:
            parts.append(tag("rect", **box, class_="ring", stroke_width=min(1.5, 0.12 * small)))
        # Where a light page still wants dark digits and a dark page does not.
        over = " over" if share > 0.72 else " mid" if share > 0.51 else ""
        roomy = wide >= 30 and high >= 18
        written = self.cell.format(value * (100 if self.percent else self.scale))
        if roomy:
            parts.append(text(written, x + wide / 2, y + high / 2 + 4, kind="value" + over))
        elif not self.kept and high >= 13 and DIGIT * len(written) + 2 * gap <= wide:
            kind = "value small" + over
            parts.append(text(written, x + wide / 2, y + high / 2 + 3.5, kind=kind))
        if "dot" in kept:
            cx, cy = (x + gap + 6, y + gap + 6) if roomy else (x + wide / 2, y + high / 2)
            parts.append(tag("circle", cx=cx, cy=cy, r=min(2.6, 0.22 * small), class_="dot" + over))
        return parts


def _cut(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def colour_key(low: str, high: str) -> str:
    """The scale of a heat map: five steps from empty to full with a word at each end."""
    boxes = []
    for i in range(5):
        box = {"x": 86.0 + 22 * i, "y": 3.0, "width": 20.0, "height": 11.0, "rx": 2.0}
        boxes += [
            tag("rect", **box, class_="cell"),
            tag("rect", **box, class_="heat", fill_opacity=i / 4),
        ]
    words = [text(low, 79, 13, anchor="end"), text(high, 203, 13, anchor="start")]
    return tag("svg", *boxes, *words, viewBox="0 0 290 18", class_="key", aria_hidden="true")

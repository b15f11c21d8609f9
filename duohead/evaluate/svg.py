"""The few SVG pieces that the report's charts are drawn with: elements, texts, an accessible frame, round ticks.

They are written by hand because a page that opens without a network needs no chart library, stays crisp in print, and
takes every colour from the page's CSS variables, so that light and dark come for free. `style.py` holds the classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape

WIDTH = 380.0


def tag(name: str, *children: str, **attributes: object) -> str:
    """One element. Underscores in attribute names become hyphens; a trailing one (`class_`) is dropped."""
    pairs = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_number(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{pairs}>{''.join(children)}</{name}>" if children else f"<{name}{pairs}/>"


def _number(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def text(content: str, x: float, y: float, *, kind: str = "tick", anchor: str = "middle") -> str:
    """A line of text with its baseline at `y`; `kind` is a CSS class (tick, axis, label, value)."""
    return tag("text", escape(content), x=x, y=y, class_=kind, text_anchor=anchor)


def picture(parts: Iterable[str], *, height: float, title: str, description: str) -> str:
    """Wrap drawing parts in an accessible `<svg>` of the common width."""
    return tag(
        "svg",
        tag("title", escape(title)),
        tag("desc", escape(description)),
        *parts,
        viewBox=f"0 0 {WIDTH:.0f} {height:.0f}",
        role="img",
        aria_label=f"{title}. {description}",
    )


def nice_ticks(high: float, *, about: int = 4) -> list[float]:
    """Round numbers from 0 to just above `high`: roughly `about` steps of 1, 2, 2.5 or 5 x a power of ten."""
    if not high > 0 or not math.isfinite(high):
        raise ValueError(f"high must be a positive finite number, got {high}")
    raw = high / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * power >= raw * (1 - 1e-9))
    return [i * step for i in range(math.ceil(high / step - 1e-9) + 1)]


def short_count(tokens: int) -> str:
    """2048 -> "2K", 1500 -> "1.5K", 512 -> "512": binary thousands, as context lengths are spoken
    of.
    """
    if tokens < 1000:
        return str(tokens)
    base = 1024 if tokens % 1024 == 0 or tokens % 256 == 0 else 1000
    return f"{tokens / base:.3g}K" if tokens < base * 1024 else f"{tokens / base / base:.3g}M"

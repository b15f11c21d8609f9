"""Charts of several curves: marks inside the frame, styles that differ, axes that fit their data."""

from __future__ import annotations

import math
import re

from duohead.evaluate.curves import (
    REFERENCE,
    STYLES,
    Axis,
    Curve,
    curve_chart,
    legend,
    mark,
    styles_of,
    unstyled,
)
from duohead.evaluate.footprint import STYLES as STYLES_OF_METHODS
from duohead.evaluate.heatmap import HeatMap


def test_curves_stay_inside_the_frame_and_apart_in_style() -> None:
    curves = [Curve(name, ((2048, 3.0), (8192, 5.0)), name, ((2048, 9.0),)) for name in STYLES]
    for doubling in (False, True):
        svg = curve_chart(
            curves, x=Axis("x", "tokens", doubling=doubling), y=Axis("y"), title="t", description=""
        )
        width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', svg).groups())
        spots = re.findall(r'cx="([\d.-]+)" cy="([\d.-]+)"', svg)
        spots += [
            pair.split(",")
            for points in re.findall(r'points="([^"]+)"', svg)
            for pair in points.split()
        ]
        assert len(spots) > 40
        for x, y in spots:
            assert 0 <= float(x) <= width
            assert 0 <= float(y) <= height
    assert len(re.findall("<li>", legend(curves))) == 8
    fixed = {"full": "ref", "random": "two"}
    assert styles_of(["a", "full", "b"], fixed=fixed) == {**fixed, "a": "one", "b": "four"}
    names = [str(i) for i in range(16)]
    many = styles_of(names, fixed=fixed)
    assert len(set(many.values())) == len(many) == 17
    assert unstyled(names, many) == " In the table only: 15."


def test_long_ticks_push_the_frame_to_the_right_and_are_not_clipped() -> None:
    curves = [Curve("a", ((1.0, 0.0001), (2.0, 0.0004)), "one")]
    wide, narrow = (
        curve_chart(own, x=Axis("x"), y=Axis("y"), title="t", description="")
        for own in (curves, [Curve("a", ((1.0, 1.0), (2.0, 4.0)), "one")])
    )
    ticks = re.findall(r'<text x="([\d.]+)"[^>]*text-anchor="end">([^<]+)<', wide)
    assert "0.0001" in dict(map(reversed, ticks))
    assert all(float(x) >= 6.5 * len(said) for x, said in ticks)
    assert 'x="39"' in narrow


def test_every_scorer_has_a_mark_that_is_told_without_its_colour() -> None:
    from duohead.identify.scorers import NAMES

    styles = styles_of(["full", *NAMES], fixed=STYLES_OF_METHODS)
    every = {*styles.values(), REFERENCE, *STYLES, *(f"{style} dash" for style in STYLES)}
    forms = {style: (bare(mark(0.0, 0.0, style)), "dash" in style) for style in every}
    assert styles.keys() >= {"full", *NAMES}
    assert len(set(forms.values())) == len(every) == 17


def bare(svg: str) -> str:
    """A mark without the class that colours it."""
    return re.sub(r' class="[^"]*"', "", svg)


def test_a_comparisons_plot_marks_every_scorer_differently() -> None:
    from duohead.evaluate.compare_view import _look
    from duohead.identify.scorers import NAMES

    looks = [_look(number) for number in range(len(NAMES))]
    assert len({look["marker"] for look in looks}) == len(NAMES)


def test_an_axis_without_zero_shows_small_differences() -> None:
    ticks = Axis("perplexity", zero=False).ticks([12.0, 12.3])
    assert min(ticks) <= 12.0 < 12.3 <= max(ticks)
    ticks = Axis("mcc", zero=False).ticks([-0.2, -0.2])
    assert min(ticks) <= -0.2 < max(ticks)
    assert max(ticks) - min(ticks) < 0.5
    assert Axis("y", zero=False).ticks([3.0])  # one value has no differences


def test_long_names_beside_and_under_a_heat_map_keep_out_of_its_cells() -> None:
    names = ["a very long name of a setting", "x", "another long name"]
    svg = HeatMap([[0.1, 0.2, math.nan]] * 3, names, names, "x", "y", "t", "d").svg()
    left = min(float(x) for x in re.findall(r'<rect x="([\d.]+)"', svg))
    assert 100 < left < 160
    assert svg.count("rotate(-32)") == 3
    assert "a very long nam…" in svg

"""The report holds every figure, needs nothing from outside, and looks like something in a browser."""

import dataclasses
import re
from itertools import pairwise

import pytest
import tiny_evaluation as tiny
from pages import Page, assert_fetches_nothing, colours, screenshot

from duohead.evaluate.charts import line_chart, share_chart
from duohead.evaluate.heatmap import HeatMap
from duohead.evaluate.plots import draw_needles
from duohead.evaluate.report import Example, render, write_report
from duohead.evaluate.svg import nice_ticks, short_count
from duohead.evaluate.tables import HEAD, summary, text_table


@pytest.fixture(scope="module")
def report():
    return tiny.report()


@pytest.fixture(scope="module")
def page(report):
    return Page(render(report))


def test_every_tag_is_closed(page):
    assert page.open == []


def test_every_figure_of_the_json_stands_in_the_visible_text(report, page):
    for value in report.figures["accuracy"].values():
        for fraction in value if isinstance(value, list) else [value]:
            assert f"{100 * fraction:.1f} %" in page.text
            assert re.search(rf"\b{re.escape(repr(fraction))}\b", page.text)
    for count in report.figures["kv_bytes"].values():
        assert f"{count:,}" in page.text
    assert str(report.figures["seconds"]) in page.text


def test_every_gate_and_every_needle_score_stands_in_the_visible_text(report, page):
    for row in report.alpha:
        for value in row:
            assert f"{value:.3f}" in page.text
    for row in report.grid.rows:
        assert f"{100 * row.exact_match:.1f} %" in page.text
    for points in report.sizes.values():
        for count in points.values():
            assert f"{count:,}" in page.text


def test_the_page_fetches_nothing(report):
    assert_fetches_nothing(render(report))


def test_every_chart_has_a_text_alternative(page):
    assert len(page.charts) == 5
    for attrs in page.charts:
        assert attrs["role"] == "img"
        assert len(attrs["aria-label"] or "") > 60
    assert len(page.all("title")) == len(page.all("desc")) + 1 == 6


def test_the_page_has_both_palettes_and_a_print_style(report):
    html = render(report)
    for query in ("prefers-color-scheme: dark", "max-width: 760px", "@media print"):
        assert query in html
    assert "color-scheme: light dark" in html


def test_what_a_model_wrote_cannot_become_markup(report):
    evil = Example("<b>?", "<script>alert(1)</script>", {"full": "</dd><script>alert(1)</script>"})
    html = render(
        dataclasses.replace(report, example=evil, model="<i>x</i>", provenance={"<u>": "&amp;"})
    )
    page = Page(html)
    assert page.open == []
    assert not {"script", "b", "i", "u"} & {tag for tag, _ in page.tags}
    assert "</dd><script>alert(1)</script>" in page.text


def test_right_and_wrong_answers_are_told_apart(page):
    verdicts = [
        attrs["class"] for attrs in page.all("span") if "verdict" in (attrs.get("class") or "")
    ]
    assert verdicts == ["verdict right", "verdict wrong"]


def test_the_report_is_written_whole_or_not_at_all(report, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("before")
    broken = dataclasses.replace(report, chosen="nobody")
    with pytest.raises(ValueError, match="no row has"):
        write_report(path, broken)
    assert path.read_text() == "before"
    write_report(path, report)
    assert path.read_text().endswith("</html>\n")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_heat_map_cells_lose_their_numbers_when_they_get_small_but_no_cell_is_lost():
    def draw(rows, columns):
        values = [
            [(r * columns + c) / (rows * columns) for c in range(columns)] for r in range(rows)
        ]
        names = [str(i) for i in range(max(rows, columns))]
        return HeatMap(
            values, names[:rows], names[:columns], "x", "y", "t", "d", cell="{:.0f}", percent=True
        ).svg()

    small, paper, large = draw(4, 8), draw(10, 13), draw(32, 80)
    assert small.count('class="heat"') == 32
    assert small.count('class="value') == 32
    assert "value small" not in small
    assert paper.count('class="value small') == 130
    assert large.count('class="heat"') == 2560
    assert large.count('class="value') == 0


def test_a_missing_value_is_drawn_as_missing():
    svg = HeatMap([[float("nan"), 0.5]], ["0"], ["0", "1"], "x", "y", "t", "d").svg()
    assert svg.count('class="void"') == 1
    assert svg.count('class="heat"') == 1
    assert "nan" not in svg


def test_charts_keep_their_marks_inside_the_frame():
    charts = [
        share_chart(
            {1.0: 1.0, 0.5: 1.0, 0.0: 0.0},
            {0.5: [0.0, 1.0]},
            title="t",
            description="d",
            x_label="x",
            y_label="y",
        ),
        line_chart(
            {"full": {512: 1.0, 8192: 16.0}, "duo": {512: 1.0, 8192: 16.0}},
            title="t",
            description="d",
            x_label="x",
            y_label="y",
            unit="MiB",
        ),
    ]
    for svg in charts:
        width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', svg).groups())
        for x, y in re.findall(r'cx="([\d.-]+)" cy="([\d.-]+)"', svg):
            assert 0 <= float(x) <= width
            assert 0 <= float(y) <= height


def test_labels_of_lines_that_end_together_do_not_overlap():
    same = {512: 1.0, 1024: 2.0}
    svg = line_chart(
        {"a": same, "b": same, "c": same},
        title="t",
        description="d",
        x_label="x",
        y_label="y",
        unit="MiB",
    )
    heights = sorted(float(y) for y in re.findall(r'y="([\d.]+)" class="label', svg))
    assert all(b - a >= 29 for a, b in pairwise(heights))


def test_ticks_are_round_and_cover_the_data():
    assert nice_ticks(128) == [0, 50, 100, 150]
    assert nice_ticks(0.9) == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])
    assert nice_ticks(4) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="high must be a positive finite number, got 0"):
        nice_ticks(0)


def test_lengths_are_written_as_they_are_spoken_of():
    lengths = (512, 1024, 1536, 2048, 10000, 1 << 20)
    assert [short_count(n) for n in lengths] == [
        "512",
        "1K",
        "1.5K",
        "2K",
        "10K",
        "1M",
    ]


def test_the_terminal_table_lines_up(report):
    table = text_table(HEAD, summary(report.methods, report.accuracy)).splitlines()
    assert len(table) == 2 + len(report.methods)
    assert len({len(line) for line in table}) == 1
    assert table[2].startswith("full attention")
    assert table[2].endswith("100.0 %")


def test_the_png_is_a_picture(report, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    draw_needles(
        report.grid,
        {"full": "full attention", "duo_25": "identified heads, 25 %"},
        tmp_path / "needle.png",
    )
    pixels = image.imread(tmp_path / "needle.png")
    assert pixels.shape[0] > 200
    assert pixels.shape[1] > 400
    assert len({tuple(p) for p in pixels[::5, ::5].reshape(-1, pixels.shape[-1]).round(2)}) > 10


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_a_browser_shows_it_without_a_complaint(report, tmp_path, width, dark):
    write_report(tmp_path / "report.html", report)
    pixels = screenshot(tmp_path / "report.html", width=width, dark=dark)
    # Text, rules and both colours of the charts: far more than a blank page or a page without its style has.
    assert colours(pixels) > 60
    assert (pixels[5, 5].mean() < 0.2) == dark
    blue = (pixels[..., 2] - pixels[..., 0] > 0.3).mean()
    orange = (pixels[..., 0] - pixels[..., 2] > 0.3).mean()
    assert blue > 0.005
    assert orange > 0.0005

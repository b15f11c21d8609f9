"""Tables, times and figures of needles: shares are those kept, times are of the same method, grids are whole."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_evaluation as tiny

from duohead.evaluate.methods import comparison
from duohead.evaluate.prose_results import ProseResult, ProseRow
from duohead.evaluate.results import NeedleResult, NeedleRow
from duohead.evaluate.tables import label
from duohead.record import read_records
from tools import needle_figures, needle_tables, needle_times

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is an extra"
)
LENGTHS, DEPTHS = (1024, 2048), (0.0, 1.0)


def rows(**changes: object) -> list[NeedleRow]:
    """Of six heads a quarter is asked for, which is two of them, a third."""
    methods = comparison(tiny.pattern(), ratios=(0.25,), draws=2, seed=0)
    scores = dict(zip(methods, (1.0, 0.75, 0.25, 0.5, 0.0), strict=True))
    return [
        tiny.row(
            name, method, length=n, depth=d, exact_match=scores[name] - 0.1 * (n > 1024), **changes
        )
        for name, method in methods.items()
        for n in LENGTHS
        for d in DEPTHS
    ]


def written(path: Path, made: list[NeedleRow]) -> Path:
    NeedleResult(tuple(made)).write(path, model="pocket", dtype="bfloat16")
    return path


def timed(made: list[NeedleRow]) -> list[NeedleRow]:
    """One row per method and length, with times that tell which."""
    methods = list(dict.fromkeys(row.method for row in made))
    return [
        replace(
            row,
            samples=1,
            ttft_ms=row.length / 256,
            tpot_ms=1.0 + methods.index(row.method),
            engine="graph",
        )
        for row in made
        if row.depth == 0.0
    ]


def test_a_method_is_named_by_the_share_asked_for_and_says_the_share_it_keeps() -> None:
    methods = comparison(tiny.pattern(), ratios=(0.25,), draws=1, seed=0, windows=[(20, 1)])
    assert list(methods)[1:4] == ["duo_25", "random_25_0", "duo@20+1_25"]
    assert {methods[name].share for name in list(methods)[1:4]} == {2 / 6}
    assert label(methods["duo_25"]) == "identified heads, 33.33 %"


def test_tables_name_the_share_that_was_kept(tmp_path: Path) -> None:
    table = needle_tables.needles(written(tmp_path / "a.jsonl", rows()))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert lines[0][1:] == ["1K", "2K", "cache at 2K"]
    assert [line[:2] for line in lines[2:6]] == [
        ["all (full attention)", "100.0 %"],
        ["identified, 33.3 %", "75.0 %"],
        ["random, 33.3 % (2 draws)", "25 – 50 %"],
        ["none (all heads stream)", "0.0 %"],
    ]
    assert lines[2][3].endswith("MiB, 100 %")


def test_times_of_a_run_alone_go_to_every_cell_of_their_method_and_length(tmp_path: Path) -> None:
    scored = written(tmp_path / "scored.jsonl", rows())
    assert needle_tables.times("pocket")(scored) == needle_tables.NOTHING
    with scored.open("a") as file:
        file.write(json.dumps({"op": "evaluate.prose", "shape": {}, "numbers": {}}) + "\n")
    alone = written(tmp_path / "timed.jsonl", timed(rows()))
    assert needle_times.join(scored, alone) == len(rows()) + 1
    found = NeedleResult.read(scored).rows
    assert [replace(row, ttft_ms=None, tpot_ms=None, engine=None) for row in found] == rows()
    assert {(row.length, row.ttft_ms) for row in found} == {(1024, 4.0), (2048, 8.0)}
    assert {row.engine for row in found} == {"graph"}
    table = needle_tables.times("pocket")(scored)
    assert "| identified, 33.3 % | 4 + 16 | 65.0 % |" in table
    assert "| 8.00 ms | 3.00 – 4.00 ms |" in table


@pytest.mark.parametrize("name", ["commit", "dtype", "policy"])
def test_times_of_other_code_or_policies_are_refused(tmp_path: Path, name: str) -> None:
    scored = read_records(written(tmp_path / "scored.jsonl", rows()))
    alone = read_records(written(tmp_path / "timed.jsonl", timed(rows())))
    with pytest.raises(ValueError, match=r"times must be of every method .* none of full .* 1024"):
        needle_times.with_times(scored, [{**entry, name: "other"} for entry in alone])


def test_a_grid_is_told_by_its_mean_and_where_it_is_lowest(tmp_path: Path) -> None:
    table = needle_tables.grid(written(tmp_path / "a.jsonl", rows()))
    assert "| identified, 33.3 % | 70.0 % | 65 % (2,048 tokens) | 70 % (depth 0 %) |" in table


@needs_matplotlib
def test_figures_are_drawn_of_what_there_is_and_the_same_twice(tmp_path: Path) -> None:
    grid = written(tmp_path / "grid.jsonl", rows())
    facts = {"sink": None, "recent": None, "prefill_recent": None, "policy": None, "text": None}
    prose = [
        ProseRow(
            method=name,
            retrieval_ratio=ratio,
            length=2048,
            windows=1,
            tokens=2047,
            perplexity=9.0,
            kl_nats=kl,
            top1_agreement=1.0,
            kv_bytes=1,
            perplexity_by_position=(9.0, 9.0),
            kl_nats_by_position=(kl, kl),
            text_digest="0",
            chunk=512,
            attention="sdpa",
            **facts,
        )
        for name, ratio, kl in (("full", 1.0, 0.0), ("duo_25", 0.25, 0.1), ("streaming", 0.0, 0.2))
    ]
    ProseResult(tuple(prose)).write(tmp_path / "prose.jsonl", model="pocket", dtype="bfloat16")
    files = [grid, tmp_path / "prose.jsonl"]
    first, second = (needle_figures.write(tmp_path / name, files) for name in ("one", "two"))
    assert [path.name for path in first] == ["needle-grid-pocket.png", "prose-by-position.png"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


@needs_matplotlib
def test_records_without_needles_and_prose_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"op": "decode"}\n')
    with pytest.raises(ValueError, match=r"no records of evaluate\.needle or evaluate\.prose"):
        needle_figures.write(tmp_path, [tmp_path / "a.jsonl"])

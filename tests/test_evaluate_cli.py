"""`duohead evaluate`: bundled patterns by name, windows, the paper's grid, prose, and mistakes in one line."""

import json

import pytest
import tiny_evaluation as tiny

from duohead import pocket
from duohead.cli import main
from duohead.cli.common import load_pattern, window
from duohead.evaluate.needle import paper_grid
from duohead.evaluate.prose_results import ProseResult
from duohead.evaluate.results import NeedleResult


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("evaluate"), characters=40000)


def command(folder, kind, **changes):
    options = {
        "--model": folder / "model",
        "--pattern": folder / "pattern",
        "--text": folder / "prose.txt",
        "--random-draws": 0,
        "--retrieval-ratio": 0.5,
        **{f"--{name.replace('_', '-')}": value for name, value in changes.items()},
    }
    words = (str(word) for pair in options.items() for word in pair)
    return ["evaluate", kind, *(part for word in words for part in word.split(" "))]


@pytest.mark.parametrize("name", pocket.NAMES)
def test_a_bundled_pattern_is_known_by_the_name_of_its_model(name):
    assert load_pattern(name) == load_pattern(str(pocket.pattern(name)))


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    tiny.pattern().save(tmp_path / "pocket")
    monkeypatch.chdir(tmp_path)
    assert load_pattern("pocket").alpha.shape == tiny.pattern().alpha.shape


def test_windows_beside_the_pattern_s_own_are_evaluated_with_times(folder, tmp_path, capsys):
    path = tmp_path / "needle.jsonl"
    asked = {"tasks": "number", "lengths": "512", "depths": 1, "samples": 1, "speed_tokens": 3}
    assert main(command(folder, "needle", windows="20+1 0+20", json=path, **asked)) == 0
    result = NeedleResult.read(path)
    assert result.methods == ["full", "duo_50", "duo@20+1_50", "duo@0+20_50", "streaming"]
    assert all(row.ttft_ms > 0 and row.text == "prose.txt" for row in result.rows)
    first = json.loads(path.read_text().splitlines()[0])
    assert (first["impl"], first["numbers"]["engine"]) == ("full", "transformers")
    assert "identified heads, 50 %, 0+20" in capsys.readouterr().out


def test_the_paper_s_grid_is_asked_for_by_name(folder, monkeypatch):
    asked = {}

    def note(*_, **options):
        asked.update(options)
        raise ValueError("noted")

    monkeypatch.setattr("duohead.evaluate.needle.evaluate_needle", note)
    assert main(command(folder, "needle", grid="paper", lengths="512 3600", speed_tokens=0)) == 2
    assert (asked["lengths"], asked["depths"]) == paper_grid(3600)
    assert asked["speed_tokens"] is None


@pytest.mark.parametrize(
    ("given", "depths"),
    [
        ("1", [0.5]),
        ("3", [0.0, 0.5, 1.0]),
        ("0.5", [0.5]),
        ("0.1 0.5 0.9", [0.1, 0.5, 0.9]),
        ("0 1 1", [0.0, 1.0]),
    ],
)
def test_depths_are_a_number_of_them_or_listed(folder, monkeypatch, given, depths):
    asked = {}

    def note(*_, **options):
        asked.update(options)
        raise ValueError("seen")

    monkeypatch.setattr("duohead.evaluate.needle.evaluate_needle", note)
    assert main(command(folder, "needle", depths=given, speed_tokens=0)) == 2
    assert asked["depths"] == depths


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ("0", "--depths must be at least 1, got 0"),
        ("0.5 2", "depths from 0 to 1, got 2 among 0.5 2"),
    ],
)
def test_depths_outside_a_text_are_refused(folder, capsys, given, rule):
    assert main(command(folder, "needle", depths=given)) == 2
    assert rule in capsys.readouterr().err


def test_prose_writes_table_records_and_picture(folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path, picture = tmp_path / "prose.jsonl", tmp_path / "prose.png"
    asked = {"lengths": "100 200 200", "samples": 2, "bins": 4, "json": path, "png": picture}
    assert main(command(folder, "prose", **asked)) == 0
    result = ProseResult.read(path)
    assert result.row("duo_50", 200).kl_nats > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("identified heads, 50 %") == 2


STORED = "retrieval=fp8,streaming=fp8/int4,keep-all"


def test_needles_of_stored_heads_say_so_in_names_records_and_table(folder, tmp_path, capsys):
    path = tmp_path / "needle.jsonl"
    asked = {"tasks": "number", "lengths": "512", "depths": 1, "samples": 1, "speed_tokens": 0}
    stored = {"retrieval_dtype": "fp8", "streaming_dtype": "fp8/int4", "random_draws": 1}
    made = [*command(folder, "needle", json=path, **asked, **stored), "--keep-all"]
    assert main(made) == 0
    full, *others = NeedleResult.read(path).rows
    assert [row.method for row in (full, *others)] == [
        "full", f"duo:{STORED}_50", f"random:{STORED}_50_0", f"streaming:{STORED}",
    ]  # fmt: skip
    assert (full.evict, full.streaming_dtype) == (None, None)
    for row in others:
        assert (row.retrieval_dtype, row.streaming_dtype, row.window_dtype) == (
            "fp8", "fp8/int4", "auto",
        )  # fmt: skip
        assert (row.evict, row.sink, row.recent, row.prefill_recent) == (False, None, None, None)
    sizes = [row.kv_bytes for row in (full, *others)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 3 * sizes[1]
    assert f"identified heads, 50 %, {STORED.replace(',', ', ')}" in capsys.readouterr().out


def test_prose_of_stored_heads_says_so(folder, tmp_path, capsys):
    path = tmp_path / "prose.jsonl"
    asked = {"lengths": "200", "samples": 2, "bins": 4, "json": path, "streaming_dtype": "int8"}
    assert main(command(folder, "prose", **asked)) == 0
    row = ProseResult.read(path).row("duo:streaming=int8_50", 200)
    assert (row.evict, row.sink, row.streaming_dtype) == (True, 4, "int8")
    assert "streaming heads only, streaming=int8" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["needle", "prose"])
def test_windows_mean_nothing_where_every_token_is_kept(folder, capsys, kind):
    assert main([*command(folder, kind, windows="20+1", sink=4), "--keep-all"]) == 2
    assert "--sink, --windows: of no use with --keep-all" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["64", "64+", "a+b", "+4", "4-5"])
def test_a_window_is_two_numbers(text):
    import argparse

    assert window("0+320") == (0, 320)
    with pytest.raises(argparse.ArgumentTypeError, match="must be SINK\\+RECENT"):
        window(text)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("needle", {"windows": "64"}, "must be SINK+RECENT, such as 64+256, got '64'"),
        ("needle", {"batch": 0}, "--batch must be at least 1, got 0"),
        ("needle", {"speed_tokens": 1}, "--speed-tokens must be 0, or 2 and more, got 1"),
        ("needle", {"device": "moon"}, "device 'moon' cannot be used"),
        ("prose", {"lengths": 10}, "--lengths must be at least 17, got 10"),
        ("prose", {"lengths": 99999}, "lengths must not exceed the model's 4096 positions"),
    ],
)
def test_bad_input_ends_in_one_line(folder, capsys, kind, changes, message):
    assert main(command(folder, kind, **changes)) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1] and said[-1].startswith("duohead evaluate: error: ")

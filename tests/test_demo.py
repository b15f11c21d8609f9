"""The demo and `evaluate needle` from the command line: what they write, and how they refuse bad input."""

import json

import pytest
import tiny_evaluation as tiny

from duohead import pocket
from duohead.cli import main
from duohead.evaluate import demo
from duohead.evaluate.demo import DEMO_OPTIONS, DemoPlan, halves, run_demo
from duohead.evaluate.results import NeedleResult
from duohead.identify import IdentifyOptions

PLAN = DemoPlan(
    ratios=(0.5, 0.25),
    draws=2,
    task="number",
    length=640,
    samples=3,
    grid_tasks=("needle",),
    grid_lengths=(400, 512),
    grid_depths=(0.0, 1.0),
    grid_samples=1,
)
OPTIONS = IdentifyOptions(
    steps=3,
    sink=4,
    recent=16,
    context_min=300,
    context_max=400,
    num_passkeys=1,
    passkey_words=2,
    context_lengths=2,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with its tokenizer, and a pattern of it, on disk."""
    path = tiny.save(tmp_path_factory.mktemp("tiny"))
    tiny.pattern(layers=5).save(path / "other")
    (path / "short.txt").write_text("too short to hide anything in")
    (path / "empty.txt").write_text(" \n")
    (path / "binary.bin").write_bytes(b"ab\0cd")
    return path


def test_the_demo_measures_all_that_the_report_shows():
    model = tiny.model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = run_demo(model, tiny.tokenizer(), tiny.TEXT, name="tiny", plan=PLAN, options=OPTIONS)
    assert all((value == before[name]).all() for name, value in model.state_dict().items())
    figures = json.loads(json.dumps(report.figures))
    assert {key: type(value) for key, value in figures["accuracy"].items()} == {
        "full": float, "duo_50": float, "duo_25": float, "random_50": list, "random_25": list, "streaming": float,
    }  # fmt: skip
    assert len(figures["accuracy"]["random_25"]) == 2
    assert all(
        0 <= figures["accuracy"][name] <= 1 for name in ("full", "duo_50", "duo_25", "streaming")
    )
    assert figures["kv_bytes"].keys() == {"full", "duo_50", "duo_25"}
    assert figures["kv_bytes"]["full"] == 3 * 2 * 2 * 8 * 640 * 4
    assert (
        figures["kv_bytes"]["full"] > figures["kv_bytes"]["duo_50"] > figures["kv_bytes"]["duo_25"]
    )
    assert figures["seconds"] > 0
    assert report.sizes.keys() == {"full", "duo_50", "duo_25"}
    assert all(points.keys() == {400, 512} for points in report.sizes.values())
    assert report.example.replies.keys() == {"full", "duo_25", "random_25_0"}
    assert report.grid.methods == ["full", "duo_25"]


def test_the_demo_gives_the_same_figures_for_the_same_seed():
    made = [
        run_demo(
            tiny.model(),
            tiny.tokenizer(),
            tiny.TEXT,
            name="tiny",
            seed=seed,
            plan=PLAN,
            options=OPTIONS,
        )
        for seed in (1, 1, 2)
    ]
    assert made[0].accuracy == made[1].accuracy
    assert made[0].alpha == made[1].alpha
    assert made[0].example == made[1].example
    assert made[0].example != made[2].example


def test_identification_and_evaluation_read_different_halves_of_the_text():
    first, second = halves(tiny.TEXT)
    assert first + second == tiny.TEXT
    assert second.startswith("\n")
    assert abs(len(first) - len(second)) < 2 * 62
    assert halves("abcd") == ("ab", "cd")


def test_the_options_of_the_demo_are_options_of_identify():
    assert IdentifyOptions(**DEMO_OPTIONS, seed=0).context_max <= DemoPlan().longest


def test_the_demo_command_writes_report_and_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "run_demo", lambda *_, **__: tiny.report())
    monkeypatch.setattr(pocket, "load", lambda *_, **__: (tiny.model(), tiny.tokenizer()))
    out, figures = tmp_path / "new" / "report.html", tmp_path / "figures.json"
    assert main(["demo", "--out", str(out), "--json", str(figures)]) == 0
    assert out.read_text().startswith("<!doctype html>")
    assert json.loads(figures.read_text()) == tiny.report().figures
    printed = capsys.readouterr().out
    assert "identified heads, 25 %" in printed
    assert printed.rstrip().endswith(str(out))


@pytest.mark.parametrize(
    "verb",
    ["demo", "generate", "identify", "evaluate needle", "evaluate prose", "evaluate compare", "evaluate lm-eval"],
)  # fmt: skip
def test_help_names_every_bundled_model(verb, capsys):
    with pytest.raises(SystemExit):
        main([*verb.split(), "--help"])
    assert ", ".join(pocket.NAMES) in " ".join(capsys.readouterr().out.split())


def test_evaluate_needle_writes_table_records_and_picture(folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    records, picture = tmp_path / "needle.jsonl", tmp_path / "needle.png"
    command = [
        "evaluate", "needle", "--model", str(folder / "model"), "--pattern", str(folder / "pattern"),
        "--text", str(folder / "prose.txt"), "--tasks", "needle", "number", "--lengths", "400", "512", "--depths", "2",
        "--samples", "1", "--random-draws", "1", "--retrieval-ratio", "0.5",
        "--json", str(records), "--png", str(picture),
    ]  # fmt: skip
    assert main(command) == 0
    result = NeedleResult.read(records)
    assert result.methods == ["full", "duo_50", "random_50_0", "streaming"]
    assert len(result.rows) == 4 * 2 * 2 * 2
    assert result.kv_bytes(method="duo_50", length=512) == result.kv_bytes(
        method="random_50_0", length=512
    )
    record = json.loads(records.read_text().splitlines()[-1])
    assert record["shape"]["sink"] == 4
    assert record["shape"]["task_version"] >= 1
    assert record["hardware"]["cores"] >= 1
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert printed.count("random heads, 50 %, draw 1") == 2


BAD = {
    "missing model": ({"--model": "./no/model"}, "model './no/model' is not a folder"),
    "missing pattern": ({"--pattern": "/no/such/pattern"}, "/no/such/pattern"),
    "pattern of another model": (
        {"--pattern": "{}/other"},
        "pattern has 5 layers but the model has 3",
    ),
    "missing text": ({"--text": "{}/nothing.txt"}, "does not exist"),
    "empty text": ({"--text": "{}/empty.txt"}, "is empty"),
    "binary text": ({"--text": "{}/binary.bin"}, "is binary"),
    "short text": ({"--text": "{}/short.txt"}, "text is too short"),
    "too long a context": (
        {"--lengths": "99999"},
        "lengths must not exceed the model's 4096 positions",
    ),
    "too short a context": ({"--lengths": "20"}, "context_length=20 is too small"),
    "no depths": ({"--depths": "0"}, "--depths must be at least 1, got 0"),
    "ratio above one": ({"--retrieval-ratio": "1.2"}, "retrieval_ratio must lie in"),
    "recent of nothing": ({"--recent": "0"}, "recent must be an integer >= 1"),
    "unknown task": ({"--tasks": "guessing"}, "--tasks must be among passkeys"),
    "unwritable records": ({"--json": "/proc/none/needle.jsonl"}, "cannot be written"),
    "folder as records": ({"--json": "{}"}, "is a folder; name a file in it"),
    "picture of another kind": ({"--png": "needle.jpg"}, "must end in .png"),
}


@pytest.mark.parametrize("case", BAD)
def test_evaluate_needle_refuses_bad_input_in_one_line(folder, tmp_path, capsys, case):
    changes, message = BAD[case]
    options = {
        "--model": str(folder / "model"),
        "--pattern": str(folder / "pattern"),
        "--text": str(folder / "prose.txt"),
        "--lengths": "400",
        "--samples": "1",
        "--json": str(tmp_path / "needle.jsonl"),
        **{flag: value.format(folder) for flag, value in changes.items()},
    }
    assert main(["evaluate", "needle", *(word for pair in options.items() for word in pair)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1]
    assert said[-1].startswith("duohead evaluate: error: ")
    assert not any(line.startswith("Traceback") for line in said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--text": "{}/nothing.txt"}, "does not exist"),
        ({"--text": "{}/empty.txt"}, "is empty"),
        ({"--text": "{}/binary.bin"}, "is binary"),
        ({"--text": "{}/short.txt"}, "text is too short: one half of it finds the heads"),
        ({"--out": "/proc/none/report.html"}, "cannot be written"),
        ({"--out": "{}"}, "is a folder; name a file in it"),
        ({"--json": "/dev/null/figures.json"}, "cannot be written"),
        ({"--model": "./no/model"}, "model './no/model' is not a folder"),
        ({"--model": "{}/prose.txt"}, "is not a folder"),
    ],
)
def test_the_demo_refuses_bad_input_in_one_line(folder, tmp_path, capsys, changes, message):
    options = {
        "--model": str(folder / "model"),
        "--out": str(tmp_path / "report.html"),
        "--json": str(tmp_path / "figures.json"),
        **{flag: value.format(folder) for flag, value in changes.items()},
    }
    assert main(["demo", *(word for pair in options.items() for word in pair)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1]
    assert list(tmp_path.iterdir()) == []


def test_the_demo_refuses_one_file_for_two_outputs(tmp_path, capsys):
    path = str(tmp_path / "both")
    assert main(["demo", "--out", path, "--json", path]) == 2
    assert "--out and --json must be different files" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_demo_finds_the_heads_of_the_pocket_model(tmp_path):
    try:
        pocket.folder("pocket")
    except ValueError as error:
        pytest.skip(f"no bundled model: {error}")
    out, path = tmp_path / "report.html", tmp_path / "figures.json"
    assert main(["demo", "--out", str(out), "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    accuracy = figures["accuracy"]
    assert accuracy["full"] > 0.85
    assert accuracy["duo_50"] >= accuracy["full"] - 0.01
    assert accuracy["duo_25"] >= accuracy["full"] - 0.02
    assert max(accuracy["random_25"]) < accuracy["duo_25"] - 0.2
    assert accuracy["streaming"] < 0.2
    assert figures["kv_bytes"]["duo_25"] < 0.5 * figures["kv_bytes"]["full"]
    assert figures["seconds"] < 180

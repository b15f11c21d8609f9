"""`duohead identify`: the function's result from the shell, and one line for everything that can go wrong."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from tiny_identification import OPTIONS, TEXT, run, tiny, tokenizer

from duohead.cli import build_parser, main
from duohead.cli.identify import FLAGS
from duohead.identify import IdentifyOptions, train
from duohead.identify.checkpoint import CHECKPOINT, LOG
from duohead.identify.scorers import NAMES, load
from duohead.identify.scorers.cost import COST
from duohead.pattern import HeadPattern


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A model folder and a text file."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    return str(folder / "model"), str(folder / "text.txt")


def command(model: str, text: str, out: Path, *more: str) -> list[str]:
    values = {field.name: getattr(OPTIONS, field.name) for field in fields(OPTIONS)}
    flags = [
        word
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    return ["identify", model, "--text", text, "--out", str(out), *flags, *more]


def test_the_command_finds_what_the_function_finds(
    saved: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(*saved, tmp_path / "heads", "--device", "cpu")) == 0
    shown = capsys.readouterr()
    assert "4 gates, mean" in shown.out
    assert "12/12" in shown.err
    assert "% above 0.5" in shown.err
    pattern = HeadPattern.load(tmp_path / "heads")
    assert pattern.alpha.tobytes() == run().alpha.tobytes()
    assert pattern.base_model == saved[0]


def interrupt_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """Have Ctrl-C come in that step, from 0."""
    original, calls = train.distillation, iter(range(100))

    def interrupted(*arguments: Any) -> Any:
        if next(calls) == step:
            raise KeyboardInterrupt
        return original(*arguments)

    patch.setattr(train, "distillation", interrupted)


def test_ctrl_c_leaves_a_checkpoint_and_one_line(
    saved: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "heads"
    with monkeypatch.context() as patch:
        interrupt_at(7, patch)
        assert main(command(*saved, out)) == 130
    assert "interrupted" in capsys.readouterr().err.splitlines()[-1]
    assert sorted(path.name for path in out.iterdir()) == sorted([LOG, COST, CHECKPOINT])
    assert main(command(*saved, out)) == 0
    assert HeadPattern.load(out).alpha.tobytes() == run().alpha.tobytes()


def test_ctrl_c_before_the_first_checkpoint_says_that_there_is_none(
    saved: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "heads"
    interrupt_at(2, monkeypatch)
    assert main(command(*saved, out)) == 130
    assert "there is no checkpoint yet; run the same command" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == [LOG]


def test_every_bad_input_ends_in_one_line_and_writes_nothing(
    saved: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, text = saved
    out = tmp_path / "heads"
    binary, empty = tmp_path / "binary.txt", tmp_path / "empty.txt"
    binary.write_bytes(b"\0\1\2")
    empty.write_text("  \n")
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in Path(model).iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "model.safetensors").write_bytes(b"\0" * 20)
    cases = {
        "is not a folder; give a folder with config.json": command("./nowhere", text, out),
        "cannot be loaded": command(str(broken), text, out),
        "text file 'nowhere.txt' does not exist": command(model, "nowhere.txt", out),
        "is binary": command(model, str(binary), out),
        "is empty": command(model, str(empty), out),
        "recent must be above 0": command(model, text, out, "--recent", "0"),
        "the model's 512 positions, got 9999": command(model, text, out, "--context-max", "9999"),
        "device 'warp' cannot be used": command(model, text, out, "--device", "warp"),
        "the following arguments are required: --out": ["identify", model],
        "invalid int value: 'many'": command(model, text, out, "--steps", "many"),
    }
    for message, words in cases.items():
        assert main(words) == 2, message
        error = capsys.readouterr().err.strip().splitlines()
        assert message in error[-1]
        assert not any("Traceback" in line for line in error)
        assert not out.exists()


def test_restarting_is_as_safe_as_not_to_start(
    saved: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "heads"
    assert main(command(*saved, out)) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with monkeypatch.context() as patch:
        interrupt_at(0, patch)
        assert main(command(*saved, out, "--restart")) == 130
    assert f"{out} is as it was" in capsys.readouterr().err.splitlines()[-1]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("place", ["before", "after", "joined"])
def test_a_scorer_is_named_anywhere_and_its_flags_are_its_own(
    place: str, saved: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, text = saved
    named = ["--scorer=echo"] if place == "joined" else ["--scorer", "echo"]
    flags = ["--tokens", "60", "--copies", "3", "--sink", "4", "--recent", "8"]
    words = [*named, *flags] if place == "before" else [*flags, *named]
    out = tmp_path / "heads"
    assert main(["identify", model, "--text", text, "--out", str(out), *words]) == 0
    shown = capsys.readouterr()
    assert "4 heads ranked" in shown.out
    assert "180 tokens forward and 0 backward" in shown.out
    pattern = HeadPattern.load(out)
    assert pattern.training["options"] == {
        "sink": 4, "recent": 8, "seed": 0, "tokens": 60, "copies": 3, "samples": 1
    }  # fmt: skip
    assert (pattern.sink, pattern.recent) == (4, 8)


def test_a_flag_of_another_scorer_is_refused(
    saved: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "heads"
    given = ["identify", saved[0], "--out", str(out)]
    cases = {
        "--copies is a flag of scorer echo, not of kvzip": ["--scorer", "kvzip", "--copies", "3"],
        "--reg-weight is a flag of scorer optimise, not of echo": [
            "--scorer=echo",
            "--reg-weight=0.1",
        ],
        "--tokens is a flag of scorer echo, not of optimise": ["--tokens", "3"],
        "invalid choice: 'magic'": ["--scorer", "magic"],
        "invalid choice: 'sum'": ["--scorer", "kvzip", "--pool", "sum"],
        "unrecognized arguments: --log": ["--scorer", "kvzip", "--log", "wandb"],
        "unrecognized arguments: --nothing": ["--nothing"],
    }
    for message, more in cases.items():
        assert main([*given, *more]) == 2
        assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("name", NAMES)
def test_help_has_the_flags_of_the_scorer_that_is_named(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["identify", "--scorer", name, "--help"])
    assert leaving.value.code == 0
    shown = capsys.readouterr().out
    own = {field.name.replace("_", "-") for field in fields(load(name).options)}
    for flag in own:
        assert f"--{flag} " in shown or f"--no-{flag} " in shown or f"--{flag}\n" in shown
    for other in NAMES:
        foreign = {field.name.replace("_", "-") for field in fields(load(other).options)} - own
        assert not any(f"--{flag} " in shown for flag in foreign)


def test_the_flags_are_the_fields_of_the_options() -> None:
    parser = build_parser("identify")
    own = {"--scorer", "--text", "--dataset", "--out", "--restart", "--log", "--dtype"}
    own |= {"--device", "--revision"}
    defaults = IdentifyOptions()
    names = {
        f"--{'no-' if field.default is True else ''}{field.name.replace('_', '-')}"
        for field in fields(defaults)
    }
    assert set(FLAGS) - own == names
    given = parser.parse_args(["identify", "pocket", "--out", "x"])
    assert all(
        getattr(given, field.name) == getattr(defaults, field.name) for field in fields(defaults)
    )


def test_phrases_and_shares_come_from_the_command_line(tmp_path: Path) -> None:
    phrases = tmp_path / "phrases.toml"
    phrases.write_text('answer = "It was:"')
    words = ["--wording", str(phrases), "--patience-ratios", "0.5", "0.125", "--no-deterministic"]
    given = build_parser("identify").parse_args(["identify", "pocket", "--out", "x", *words])
    assert given.wording.answer == "It was:"
    assert given.patience_ratios == [0.5, 0.125]
    assert given.deterministic is False

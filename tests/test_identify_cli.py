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
    flags = [
        word
        for field in fields(OPTIONS)
        if not isinstance(value := getattr(OPTIONS, field.name), bool)
        for word in (f"--{field.name.replace('_', '-')}", str(value))
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


def test_ctrl_c_leaves_a_checkpoint_and_one_line(
    saved: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original, calls = train.distillation, iter(range(100))

    def interrupted(*arguments: Any) -> Any:
        if next(calls) == 7:
            raise KeyboardInterrupt
        return original(*arguments)

    out = tmp_path / "heads"
    with monkeypatch.context() as patch:
        patch.setattr(train, "distillation", interrupted)
        assert main(command(*saved, out)) == 130
    assert "interrupted" in capsys.readouterr().err.splitlines()[-1]
    assert sorted(path.name for path in out.iterdir()) == [LOG, CHECKPOINT]
    assert main(command(*saved, out)) == 0
    assert HeadPattern.load(out).alpha.tobytes() == run().alpha.tobytes()


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


def test_the_flags_are_the_fields_of_the_options() -> None:
    parser = build_parser("identify")
    known = {flag for flag in FLAGS if flag.startswith("--")}
    own = {"--text", "--out", "--restart", "--dtype", "--device", "--revision"}
    assert known - own == {f"--{field.name.replace('_', '-')}" for field in fields(IdentifyOptions)}
    given = parser.parse_args(["identify", "pocket", "--out", "x"])
    defaults = IdentifyOptions()
    assert all(
        getattr(given, field.name) == getattr(defaults, field.name) for field in fields(defaults)
    )

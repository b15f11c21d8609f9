"""Bad input on the command line: one clear line, an exit code, nothing half-written."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from duohead.cli import main
from duohead.pattern import HeadPattern

TSV, CONFIG, TENSORS = "full_attention_heads.tsv", "config.json", "duohead.safetensors"


@pytest.fixture
def refused(capsys, monkeypatch):
    """Run a command that must fail in one line, which is returned."""
    monkeypatch.delenv("DUOHEAD_DEBUG", raising=False)

    def run(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        (line,) = printed.err.splitlines()
        return line

    return run


@pytest.fixture
def pattern(tmp_path: Path) -> Path:
    alpha = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    HeadPattern(alpha, sink=16, recent=64).save(tmp_path / "heads")
    return tmp_path / "heads"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: VERB"),
        (["fly"], "invalid choice: 'fly'"),
        (["inspect"], "FOLDER is needed, a pattern"),
        (["inspect", "x", "--speed"], "unrecognized arguments: --speed"),
        (["inspect", "x", "--tokens", "many"], "argument --tokens: invalid int value: 'many'"),
        (
            ["inspect", "x", "--kv-budget", "1", "--threshold", "1"],
            "--threshold: not allowed with argument --kv-budget",
        ),
    ],
)
def test_a_wrong_command_line(refused, arguments, message) -> None:
    line = refused(*arguments)
    assert message in line
    assert "--help" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--retrieval-ratio", "1.2"], "retrieval_ratio must lie in [0, 1], got 1.2"),
        (["--retrieval-ratio", "nan"], "retrieval_ratio must lie in [0, 1], got nan"),
        (["--kv-budget", "-1"], "kv_budget must lie in [0, 1], got -1"),
        (["--kv-budget", "0.0001"], "kv_budget must be at least"),
        (["--threshold", "2"], "threshold must lie in [0, 1], got 2"),
        (["--recent", "0"], "recent must be an integer >= 1"),
        (["--sink", "-1"], "sink must be an integer >= 0"),
        (["--tokens", "0"], "--tokens must be at least 1, got 0"),
        (["--head-dim", "-8"], "--head-dim must be at least 1, got -8"),
        (["--png", "heads.jpg"], "--png must name a .png file, got heads.jpg"),
    ],
)
def test_a_wrong_value(
    refused, pattern: Path, tmp_path: Path, monkeypatch, arguments, message
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused("inspect", pattern, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["heads"]


def test_a_place_without_a_pattern(refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "no such folder" in refused("inspect", tmp_path / "missing")
    assert "is a file; name the folder" in refused("inspect", tmp_path / "file")
    assert "holds no head pattern" in refused("inspect", tmp_path)
    assert "cannot be had from the hub" in refused("inspect", "nobody/nothing")


@pytest.mark.parametrize("name", [TSV, CONFIG, TENSORS])
@pytest.mark.parametrize("keep", [0.0, 0.2, 0.5, 0.9])
def test_a_truncated_file(refused, pattern: Path, name: str, keep: float) -> None:
    data = (pattern / name).read_bytes()
    (pattern / name).write_bytes(data[: int(len(data) * keep)])
    assert name in refused("inspect", pattern)


@pytest.mark.parametrize("name", [TSV, CONFIG, TENSORS])
def test_a_missing_file(refused, pattern: Path, name: str) -> None:
    (pattern / name).unlink()
    assert f"{name} is missing" in refused("inspect", pattern)


@pytest.mark.parametrize(
    ("value", "message"), [("nan", "is nan, which only"), ("3.5", "got 3.5"), ("-inf", "got -inf")]
)
def test_a_table_of_the_reference_code_with_a_wrong_alpha(
    refused, tmp_path: Path, value: str, message: str
) -> None:
    (tmp_path / TSV).write_text(f"0.5\t{value}\n")
    (tmp_path / CONFIG).write_text(json.dumps({"sink_size": 128, "recent_size": 256}))
    assert message in refused("inspect", tmp_path)


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_that_tries_to_run_code(refused, tmp_path: Path) -> None:
    folder = tmp_path / "adapter" / "duo_attention"
    folder.mkdir(parents=True)
    torch.save(Hostile(tmp_path / "ran"), folder / "full_attention_heads.pt")
    (folder / CONFIG).write_text(json.dumps({"sink_size": 64, "recent_size": 256}))
    assert "full_attention_heads.pt: refused" in refused("inspect", folder.parent)
    assert not (tmp_path / "ran").exists()


def test_a_picture_without_matplotlib(refused, pattern: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    line = refused("inspect", pattern, "--png", tmp_path / "x.png")
    assert "--png needs matplotlib; install it with: pip install 'duohead[report]'" in line
    assert not (tmp_path / "x.png").exists()

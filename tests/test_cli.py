"""The command: which flags there are, how mistakes end, what `inspect` shows."""

import argparse
import importlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from duohead import __version__
from duohead.bench.models import any_config
from duohead.cli import VERBS, build_parser, main
from duohead.cli.common import load_pattern
from duohead.cli.inspect_map import heat_map
from duohead.pattern import HeadPattern

# Every flag that there is. A new one is a decision: it goes here and into the FLAGS of its module.
PERMITTED = {
    "demo": "text out json model seed",
    "identify": "scorer text dataset out restart log dtype device revision steps learning-rate learning-rate-floor "
    "warmup reg-weight initial sink recent context-min context-max context-lengths tasks num-passkeys passkey-words "
    "depth-min depth-max depth-steps teacher-full gradient-checkpointing no-deterministic patience "
    "patience-ratios patience-slack wording chat sequence-parallel shard save-every seed target",
    "inspect": "retrieval-ratio kv-budget threshold sink recent tokens head-dim png capacity model weights memory "
    "chunk retrieval-dtype streaming-dtype window-dtype keep-all",
    "evaluate": "model pattern retrieval-ratio sink recent prefill-recent windows random-draws retrieval-dtype "
    "streaming-dtype window-dtype keep-all dtype device tasks grid "
    "lengths depths samples text chunk batch speed-tokens json png seed "  # needle
    "model pattern retrieval-ratio sink recent prefill-recent windows random-draws retrieval-dtype "
    "streaming-dtype window-dtype keep-all dtype device lengths samples bins text chunk json png seed "  # prose
    "model scorers set seeds retrieval-ratio sink recent tasks lengths depths samples text haystack chunk "
    "batch out workers dtype device json png seed "  # compare
    "model pattern retrieval-ratio sink recent prefill-recent retrieval-dtype streaming-dtype window-dtype keep-all "
    "methods random-draws tasks num-fewshot limit batch-size max-length "
    "chunk include-path metadata gen-kwargs apply-chat-template fewshot-as-multiturn "
    "no-fewshot-as-multiturn system-instruction confirm-run-unsafe-code dtype device revision json seed",  # lm-eval
    "generate": "policy pattern retrieval-ratio kv-budget threshold sink recent prefill-recent retrieval-dtype "
    "streaming-dtype window-dtype keep-all prompt-file max-new-tokens chunk engine max-length temperature top-p seed "
    "dtype device",
    "bench": "op preset lengths retrieval-ratio baselines seconds heads kv-heads head-dim batch sink recent "
    "queries past retrieval-dtype streaming-dtype impl dtype device json "  # kernels
    "measure methods model preset lengths chunks retrieval-ratio weights compile seconds batch sink "
    "recent retrieval-dtype streaming-dtype impl dtype device json "  # model
    "model tokens prefill chunk memory retrieval-ratio weights compile batch sink recent retrieval-dtype "
    "streaming-dtype impl dtype device json "  # capacity
    "model lengths kernels checkpointing shard runs steps sink recent dtype device json "  # identify
    "preset model lengths decode retrieval-ratio keep-all window-dtype batch sink recent retrieval-dtype "
    "streaming-dtype dtype device json "  # footprint
    "out png",  # report
    "report": "out",
    "export": "base base-revision out name retrieval-ratio kv-budget threshold tokens sink recent prefill-recent "
    "retrieval-dtype streaming-dtype window-dtype keep-all results",
}


def flags(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from flags(child)
        elif not isinstance(action, argparse._HelpAction):
            yield from action.option_strings


def verb_parser(verb: str) -> argparse.ArgumentParser:
    (verbs,) = (a for a in build_parser(verb)._actions if isinstance(a, argparse._SubParsersAction))
    return verbs.choices[verb]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    alpha = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4).copy()
    alpha[1] = np.nan
    HeadPattern(alpha, sink=16, recent=64, base_model="org/model", windows=(None, 512, None)).save(
        tmp_path / "heads"
    )
    return str(tmp_path / "heads")


def test_the_verbs_are_the_ones_we_have_decided_on() -> None:
    assert set(VERBS) == set(PERMITTED)


@pytest.mark.parametrize("verb", PERMITTED)
def test_a_verb_has_the_permitted_flags_and_no_others(verb: str) -> None:
    permitted = [f"--{name}" for name in PERMITTED[verb].split()]
    assert sorted(flags(verb_parser(verb))) == sorted(permitted)
    assert sorted(importlib.import_module(f"duohead.cli.{verb}").FLAGS) == sorted(permitted)


def test_flags_cannot_be_abbreviated(folder: str, capsys) -> None:
    assert main(["inspect", folder, "--tok", "1"]) == 2
    assert "unrecognized arguments: --tok 1" in capsys.readouterr().err


def test_version_and_help_are_given(capsys) -> None:
    for argument, text in (("--version", __version__), ("--help", "inspect")):
        with pytest.raises(SystemExit) as leaving:
            main([argument])
        assert leaving.value.code == 0
        assert text in capsys.readouterr().out


def test_the_module_runs_as_the_command(folder: str) -> None:
    command = [sys.executable, "-m", "duohead", "inspect", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("org/model: 3 layers x 4 KV heads, 8 gated")
    done = subprocess.run([*command, "--tokens", "0"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")


def arrange(monkeypatch, error: BaseException) -> list[str]:
    def run(_: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr("duohead.cli.inspect.run", run)
    return ["inspect", "folder"]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("ratio must\n  be small"), 2, "error: ratio must be small"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), 2, "error: a.txt: No such file or directory"),
        (OSError(28, "No space left on device", "out"), 2,
         "error: out: No space left on device; free some space or write elsewhere"),
        (OSError("cannot\nload"), 2, "error: cannot load"),
        (ValueError(), 2, "error: ValueError"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyboardInterrupt("run it again to go on"), 130, "interrupted; run it again to go on"),
    ],
)  # fmt: skip
def test_a_mistake_ends_in_one_line(monkeypatch, capsys, error, code: int, line: str) -> None:
    assert main(arrange(monkeypatch, error)) == code
    assert capsys.readouterr().err.strip() == f"duohead inspect: {line}"


def test_a_bug_keeps_its_traceback(monkeypatch) -> None:
    with pytest.raises(TypeError, match="a bug"):
        main(arrange(monkeypatch, TypeError("a bug")))


def test_debugging_keeps_every_traceback(monkeypatch) -> None:
    monkeypatch.setenv("DUOHEAD_DEBUG", "1")
    with pytest.raises(ValueError, match="a mistake"):
        main(arrange(monkeypatch, ValueError("a mistake")))


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
def test_a_reader_that_leaves_is_no_error(folder: str) -> None:
    command = [
        sys.executable,
        "-c",
        "import sys; from duohead.cli import main; sys.exit(main())",
        "inspect",
        folder,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_inspect_shows_heads_counts_and_bytes(folder: str, capsys) -> None:
    assert (
        main(
            ["inspect", folder, "--retrieval-ratio", "0.25", "--tokens", "4096", "--head-dim", "64"]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "org/model: 3 layers x 4 KV heads, 8 gated, mean alpha 0.50, 50% above 0.5" in out
    assert "identified with sink 16, recent 64" in out
    rows = {int(m[1]): m[2] for m in re.finditer(r"^ {4}(\d)  (.*)$", out, re.M)}
    assert [rows[i].split()[-1] for i in (0, 2)] == ["0", "2"]
    assert "not gated: native window of 512 tokens" in rows[1]
    pattern = HeadPattern.load(folder)
    policy = pattern.policy(retrieval_ratio=0.25)
    share = policy.kv_bytes(4096, head_dim=64) / policy.dense_kv_bytes(4096, head_dim=64)
    selected = next(
        line.split() for line in out.splitlines() if line.strip().startswith("selected")
    )
    assert selected[1] == "2"
    assert selected[4] == f"{share:.1%}"
    assert selected[5] == f"{pattern.alpha[2, 2]:.4f}"


@pytest.mark.parametrize("selector", [[], ["--kv-budget", "0.9"], ["--threshold", "0.5"]])
def test_inspect_takes_any_selector(folder: str, capsys, selector: list[str]) -> None:
    assert main(["inspect", folder, "--sink", "0", "--recent", "32", *selector]) == 0
    out = capsys.readouterr().out
    assert "sink 0, recent 32): " in out
    assert ("selected" in out) == bool(selector)


def test_inspect_counts_with_the_heads_of_the_model_where_it_is_known(capsys) -> None:
    assert main(["inspect", "pocket-laguna", "--tokens", "4096"]) == 0
    out = capsys.readouterr().out
    policy = load_pattern("pocket-laguna").policy(retrieval_ratio=0.5)
    bound = policy.bind(any_config("pocket-laguna"), dtype="bfloat16")
    half = next(line.split() for line in out.splitlines() if line.strip().startswith("0.5 "))
    assert half[2:5] == [
        f"{bound.kv_bytes(4096) / 2**20:.1f}", "MiB",
        f"{bound.kv_bytes(4096) / bound.dense_kv_bytes(4096):.1%}",
    ]  # fmt: skip
    assert "(head size 64, 16 bit" in out
    assert "assumed" not in out


def test_inspect_says_which_head_size_it_assumes(folder: str, capsys) -> None:
    assert main(["inspect", folder]) == 0
    out = capsys.readouterr().out
    assert "(head size 128, assumed, 16 bit" in out
    assert out.rstrip().endswith("the model's config is not here; give it with --head-dim")
    assert main(["inspect", folder, "--head-dim", "128"]) == 0
    assert "assumed" not in capsys.readouterr().out


class Stream(io.StringIO):
    def __init__(self, *, tty: bool, encoding: str) -> None:
        super().__init__()
        self.tty, self.named = tty, encoding

    def isatty(self) -> bool:
        return self.tty

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.named


def test_the_heat_map_suits_the_terminal(folder: str) -> None:
    pattern = HeadPattern.load(folder)
    plain = "\n".join(heat_map(pattern, None, stream=Stream(tty=False, encoding="utf-8")))
    assert "██" in plain
    assert "\x1b" not in plain
    old = "\n".join(heat_map(pattern, None, stream=Stream(tty=False, encoding="ascii")))
    assert old.isascii()
    colour = "\n".join(heat_map(pattern, None, stream=Stream(tty=True, encoding="utf-8")))
    assert colour.count("\x1b[48;5;") >= 8


def test_inspect_draws_a_picture(folder: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "pictures" / "heads.png"
    assert main(["inspect", folder, "--png", str(path), "--retrieval-ratio", "0.5"]) == 0
    assert f"wrote {path}" in capsys.readouterr().out
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in path.parent.iterdir()] == ["heads.png"]

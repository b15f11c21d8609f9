"""Flags that would be ignored are refused: what was typed is known, whatever its value."""

import argparse

import pytest

from duohead.cli import main
from duohead.cli.given import Given, given, refuse, refuse_unless


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", action=Given, type=int, default=3)
    parser.add_argument("--names", action=Given, nargs="+", default=["a"])
    parser.add_argument("files", action=Given, nargs="*")
    return parser.parse_args(words)


def test_a_default_that_is_typed_counts_as_typed() -> None:
    args = parsed("f", "--size", "3")
    assert (args.size, args.names, args.files) == (3, ["a"], ["f"])
    assert given(args) == ("--size",)
    assert given(parsed("f")) == ()


def test_what_was_typed_in_vain_is_named() -> None:
    args = parsed("--names", "a", "b", "--size", "4", "--size", "5")
    assert (args.size, args.names) == (5, ["a", "b"])
    refuse(args, ("--files",), "never")
    with pytest.raises(ValueError, match="^--names, --size: no use$"):
        refuse(args, ("--size", "--names"), "no use")


def test_one_value_that_a_flag_suits_is_enough() -> None:
    args = parsed("--size", "4")
    refuse_unless(args, "--size", chosen=["a", "b"], suits=("b", "c"), by="--names")
    refuse_unless(args, "--other", chosen=["a"], suits=("b",), by="--names")
    with pytest.raises(ValueError, match="--size: of no use here, only with --names b or c"):
        refuse_unless(args, "--size", chosen=["a"], suits=("b", "c"), by="--names")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("model --preset decode-table --model tiny", "--model: a --preset has its own"),
        (
            "model --preset decode-table --lengths 9 --weights bf16",
            "--lengths, --weights: a --preset has its own",
        ),
        (
            "model --measure decode --chunks 64",
            "--chunks: of no use here, only with --measure prefill or share",
        ),
        (
            "model --methods full --retrieval-ratio 0.5",
            "--retrieval-ratio: of no use here, only with --methods duo",
        ),
        (
            "model --measure prefill share --methods full transformers",
            "--measure share is about streaming heads, which --methods full transformers has none of",
        ),
        (
            "kernels --preset shapes --heads 8 --recent 4",
            "--heads, --recent: a --preset has its own",
        ),
    ],
)
def test_bench_ignores_nothing(capsys, command: str, message: str) -> None:
    assert main(["bench", *command.split()]) == 2
    assert message in capsys.readouterr().err

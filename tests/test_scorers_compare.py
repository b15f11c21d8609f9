"""Comparing scorers: one command, the same samples for all, continued where it stopped, shared by processes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_evaluation import TEXT, model, tokenizer

from duohead.cli import evaluate_compare
from duohead.evaluate import compare
from duohead.evaluate.compare_view import draw, footprint, table
from duohead.evaluate.scores import scored
from duohead.record import read_records

NAMES = ("optimise", "profile", "random")
SETTINGS = (
    "optimise.steps=2 optimise.context_min=600 optimise.context_max=700 optimise.num_passkeys=1 "
    "optimise.passkey-words=2 profile.context=200 profile.samples=1 profile.queries=32"
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A model folder and a text file."""
    folder = tmp_path_factory.mktemp("tiny")
    model().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    return str(folder / "model"), str(folder / "text.txt")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    yield
    compare._load.cache_clear()


def words(saved: tuple[str, str], out: Path, *more: str) -> list[str]:
    return (
        f"compare --model {saved[0]} --text {saved[1]} --out {out} --scorers optimise profile random --seeds 0 1 "
        f"--set {SETTINGS} --retrieval-ratio 0.5 0.25 --sink 4 --recent 16 --tasks needle --lengths 300 --depths 1 "
        f"--samples 1 --device cpu {' '.join(more)}"
    ).split()


def run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser()
    evaluate_compare.add_arguments(parser.add_subparsers(dest="kind"))
    return evaluate_compare.run(parser.parse_args(arguments))


def without_time(path: Path) -> list[dict[str, Any]]:
    found = read_records(path)
    for entry in found:
        del entry["time"], entry["hardware"]["threads"]
        entry["numbers"].pop("identify_seconds", None)
    return found


def test_one_command_gives_records_a_table_and_a_picture(
    saved: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "compare.jsonl", tmp_path / "compare.png"
    out = tmp_path / "work"
    assert run(words(saved, out, f"--json {file} --png {picture}")) == 0
    shown = capsys.readouterr().out
    records = read_records(file)
    assert len(records) == 1 + 3 * 2 * 2
    full, *others = records
    assert full["shape"]["scorer"] == "full"
    assert {e["shape"]["retrieval_ratio"] for e in others} == {0.5, 1 / 3}  # 2 of 6 heads
    assert {e["shape"]["seed"] for e in others} == {0, 1}
    assert {e["shape"]["text_digest"] for e in records} == {full["shape"]["text_digest"]}
    trained = next(e for e in others if e["shape"]["scorer"] == "optimise")
    assert trained["numbers"]["identify_backward_passes"] == 2
    assert json.loads(trained["shape"]["options"])["steps"] == 2
    assert 0 < footprint(others, [full]) < 1
    assert [line.split()[0] for line in shown.splitlines()[3:6]] == [
        "optimise",
        "profile",
        "random",
    ]
    assert table(records) in shown
    assert picture.read_bytes().startswith(b"\x89PNG")
    draw(records, picture)


def test_records_are_what_the_report_reads(saved: tuple[str, str], tmp_path: Path) -> None:
    from duohead.evaluate.collect import collect

    file = tmp_path / "compare.jsonl"
    run(words(saved, tmp_path / "work", f"--json {file}"))
    scores = scored(collect([file]).entries)
    assert {score.method for score in scores} == {"full", "optimise", "profile", "random"}
    assert {score.metric for score in scores} == {"exact_match"}
    assert len({score.draw for score in scores if score.method == "random"}) == 4


def test_an_interrupted_comparison_continues(
    saved: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    run(words(saved, tmp_path / "whole", f"--json {whole}"))
    original, made, stop = compare._evaluate, [], [True]

    def interrupted(comparison: Any, unit: tuple[str, int], folder: Path) -> Any:
        if stop and unit == ("profile", 0):
            raise KeyboardInterrupt
        made.append(unit)
        return original(comparison, unit, folder)

    monkeypatch.setattr(compare, "_evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(words(saved, tmp_path / "parts"))
    stop.clear()
    assert made == [("full", 0), ("optimise", 0)]
    run(words(saved, tmp_path / "parts", f"--json {parts}"))
    assert made[2:] == [(name, seed) for seed in (0, 1) for name in NAMES][1:]
    assert without_time(parts) == without_time(whole)


def test_what_is_finished_can_be_read_at_any_time(
    saved: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[compare.Comparison] = []
    original = compare.run

    def keep(comparison: compare.Comparison, **more: Any) -> Any:
        seen.append(comparison)
        return original(comparison, **more)

    monkeypatch.setattr(compare, "run", keep)
    run(words(saved, tmp_path))
    assert len(compare.finished(seen[0], folder=tmp_path)) == 1 + 3 * 2 * 2
    unit = next(tmp_path.glob("*/random-1"))
    next(unit.glob("*.jsonl")).unlink()
    left = compare.finished(seen[0], folder=tmp_path)
    assert len(left) == 1 + 5 * 2
    assert "random" in table(left)


def test_a_pattern_made_otherwise_is_refused(saved: tuple[str, str], tmp_path: Path) -> None:
    run(words(saved, tmp_path))
    changed = [
        word.replace("profile.queries=32", "profile.queries=8") for word in words(saved, tmp_path)
    ]
    changed[changed.index("--lengths") + 1] = "320"
    with pytest.raises(
        ValueError, match="heads of .*profile-0.* made with other options; compare in another"
    ):
        run(changed)


def test_scores_made_otherwise_are_not_taken_for_new_ones(
    saved: tuple[str, str], tmp_path: Path
) -> None:
    few = "--scorers profile --seeds 0 --set profile.samples=1 profile.context="
    run(words(saved, tmp_path / "one", f"{few}200"))
    with pytest.raises(ValueError, match="scores .*profile-0.* made with other options; compare"):
        run(words(saved, tmp_path / "one", f"{few}210"))
    # Another text in a file of the same name, and other weights in a model of the same name.
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    arguments = words((saved[0], str(file)), tmp_path / "two", f"{few}200")
    run(arguments)
    file.write_text(TEXT[100:])
    compare._load.cache_clear()
    with pytest.raises(ValueError, match="scores .*full.* made with other haystack_digest"):
        run(arguments)
    file.write_text(TEXT)
    compare._load.cache_clear()
    loaded = compare._load(saved[0], "auto", "cpu", (str(file),), None)
    with torch.no_grad():
        next(loaded.model.parameters()).add_(1)
    with pytest.raises(ValueError, match="scores .*full.* made with other model_digest"):
        run(arguments)


def test_processes_share_the_work_and_find_the_same(saved: tuple[str, str], tmp_path: Path) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    few = "--scorers profile random --seeds 0 --set profile.context=200 profile.samples=1".split()
    run([*words(saved, tmp_path / "one", f"--json {one}"), *few])
    run([*words(saved, tmp_path / "two", f"--json {two} --workers 2"), *few])
    assert without_time(one) == without_time(two)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--set profile.depth=3", "options of profile are sink, .*got 'depth'"),
        ("--set magic.steps=3", "must be NAME.OPTION=VALUE with a name among optimise"),
        ("--set optimise.steps", "must be NAME.OPTION=VALUE"),
        ("--set optimise.steps=many", "expected a value of type int, got 'many'"),
        ("--set optimise.teacher_full=2", "expected a value of type bool, got '2'"),
        ("--set echo.copies=3", "echo must be among --scorers, got optimise profile random"),
        ("--set profile.seed=3", "seed must be the same for all scorers.*use --seeds"),
        ("--set profile.sink=3", "sink must be the same for all scorers.*use --sink"),
        ("--set optimise.wording=no.toml", "wording file 'no.toml' cannot be read"),
        ("--sink 700", "context_min must exceed sink . recent"),
        ("--tasks magic", "--tasks must be all or among passkeys, .*got magic"),
        ("--retrieval-ratio 0", "--retrieval-ratio must be above 0 and at most 1, got 0.0"),
        ("--workers 0", "--workers must be at least 1, got 0"),
        ("--lengths 99999", "must not exceed the model's 4096 positions, got 99999"),
    ],
)
def test_mistakes_end_before_any_work(
    saved: tuple[str, str], tmp_path: Path, more: str, message: str
) -> None:
    out = tmp_path / "work"
    with pytest.raises(ValueError, match=message):
        run([*words(saved, out), *more.split()])
    assert not out.exists()


def test_settings_take_the_types_of_the_options() -> None:
    made = evaluate_compare._options(
        "optimise",
        ["optimise.teacher-full=true", "optimise.patience_ratios=0.5,0.125", "echo.copies=3"],
    )
    assert made.teacher_full is True
    assert made.patience_ratios == (0.5, 0.125)

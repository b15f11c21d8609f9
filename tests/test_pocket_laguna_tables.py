"""Tables and figures on the heads of pocket-laguna say what records say; widening windows changes nothing else."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_evaluation as tiny
import torch

from duohead.evaluate.methods import comparison
from duohead.evaluate.prose_results import ProseResult, ProseRow
from duohead.evaluate.results import NeedleResult
from duohead.pattern import HeadPattern
from duohead.record import read_records
from tools import laguna_figures, laguna_heads, laguna_tables
from tools.finding_records import TASKS

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is an extra"
)
NATIVE = [[0.9, 0.2], [None, None], [0.4, 0.1]]
WIDENED = [[0.9, 0.1], [0.8, 0.3], [0.4, 0.2]]


def entry(op: str, numbers: dict[str, Any], *, time: str = "2026-01-01", **shape: object) -> Any:
    return {
        "op": op,
        "impl": "echo",
        "shape": {"model": "pocket-laguna", **shape},
        "numbers": numbers,
        "time": time,
        "hardware": {"cpu": "a CPU", "cores": 2},
        "versions": {"torch": "2", "transformers": "5"},
    }


def windows(name: str, right: float, alpha: Any, *, time: str = "2026-01-01") -> Any:
    return entry(
        laguna_heads.WINDOWS,
        {**dict.fromkeys(TASKS, right), "perplexity": 30.0, "alpha": alpha},
        windows=name,
        time=time,
    )


def gates(seed: int, target: float = 0.0) -> Any:
    moved = {"step": [0, 10], "gates": [[1.0, 1.0, 1.0, 1.0], [0.9, 0.2, 0.4, 0.1]]}
    return entry(laguna_heads.GATES, {**moved, "alpha": NATIVE}, seed=seed, target=target)


def written(path: Path, *entries: Any) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in entries))
    return path


def test_needles_that_every_head_sees_do_not_count_and_rows_say_what_was_kept(
    tmp_path: Path,
) -> None:
    methods = comparison(tiny.pattern(), ratios=(0.25, 0.5), draws=2, seed=0)
    right = {"random_50_0": 0.2, "random_50_1": 0.6, "streaming": 0.0}
    rows = [
        tiny.row(name, method, task=task, depth=depth, exact_match=score, retrieval_ratio=kept)
        for name, method in methods.items()
        for kept in (1 / 3 if "_25" in name else method.share,)  # two heads of six
        for task in TASKS
        for depth, score in ((0.0, 1.0), (0.5, right.get(name, 0.75)))
    ]
    path = tmp_path / "needle.jsonl"
    NeedleResult(tuple(rows)).write(path, model="m", dtype="float32")
    prose = dict.fromkeys(("sink", "recent", "prefill_recent", "policy", "text"))
    row = ProseRow(
        **prose,
        method="full",
        retrieval_ratio=1.0,
        length=8192,
        windows=1,
        tokens=8191,
        perplexity=30.0,
        kl_nats=0.0,
        top1_agreement=1.0,
        kv_bytes=1,
        perplexity_by_position=(30.0,),
        kl_nats_by_position=(0.0,),
        text_digest="x",
        chunk=512,
        attention="sdpa",
    )
    other = tmp_path / "prose.jsonl"
    ProseResult((row,)).write(other, model="m", dtype="float32")
    path.write_text(path.read_text() + other.read_text())
    lines = laguna_tables.accuracy(path).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:8]] == [
        "| all (full attention)",
        "| identified, 50 %",
        "| random, 50 % (2 draws)",
        "| identified, 33.3 %",
        "| random, 33.3 % (2 draws)",
        "| none (all heads stream)",
    ]
    assert "| 75.0 % |" in lines[3] and "| 20 – 60 % |" in lines[4] and "| 0.0 % |" in lines[7]
    assert "| 30.00 | 0.000 |" in lines[2] and lines[2].endswith("100 % |")


def test_the_table_of_windows_counts_heads_that_a_ranking_would_waste_on_windowed_layers() -> None:
    old = windows("ignored", 90.0, NATIVE, time="2025-01-01")
    records = [windows("native", 100.0, NATIVE), windows("ignored", 0.0, WIDENED), old, gates(0)]
    native, ignored = laguna_tables.windows(records).splitlines()[2:4]
    assert "| 100 % |" in native and "2 in global layers, 0 in windowed ones" in native
    assert "| 0 % |" in ignored and "1 in global layers, 1 in windowed ones" in ignored
    assert laguna_tables.windows(records[:1]) == laguna_tables.NOTHING


@needs_matplotlib
def test_the_figures_are_drawn_and_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    records = [gates(0), gates(1), gates(0, target=0.04)]
    path = written(
        tmp_path / "gates.jsonl",
        *records,
        windows("native", 100.0, NATIVE),
        windows("ignored", 0.0, WIDENED),
    )
    drawn = [laguna_figures.write(tmp_path / name, [path]) for name in "ab"]
    assert [file.name for file in drawn[0]] == ["laguna-heads.png", "laguna-training.png"]
    for one, again in zip(*drawn, strict=True):
        assert one.read_bytes() == again.read_bytes()
    alone = written(tmp_path / "alone.jsonl", gates(0))
    assert [p.stem for p in laguna_figures.write(tmp_path / "c", [alone])] == ["laguna-training"]
    with pytest.raises(ValueError, match="no records of gates or windows; make some with"):
        laguna_figures.write(tmp_path / "d", [written(tmp_path / "none.jsonl")])


def test_neighbouring_layers_without_gates_get_one_label() -> None:
    bare, own = [None, None], [0.5, 0.5]
    assert laguna_figures._gaps([own, bare, bare, own, bare]) == [(1, 2), (4, 4)]
    assert laguna_figures._gaps([own]) == []


def test_a_training_is_kept_as_every_tenth_step_and_its_last(tmp_path: Path) -> None:
    alpha = np.array([[0.9, 0.2], [np.nan, np.nan]], dtype=np.float32)
    options = {"seed": 3, "target": 0.0, "sink": 4, "recent": 16, "context_max": 400, "steps": 26}
    facts = {
        "scorer": "optimise",
        "options": options,
        "samples_per_step": 1,
        "cost": {"seconds": 1.5},
    }
    folder = tmp_path / "heads"
    HeadPattern.from_alpha(alpha, sink=4, recent=16, training=facts).save(folder)
    steps = [{"step": i, "distill": i / 100, "gates": [1 - i / 100, 0.5]} for i in range(0, 26, 5)]
    written(folder / laguna_heads.LOG, *steps)
    laguna_heads.kept(folder, tmp_path / "gates.jsonl")
    (record,) = read_records(tmp_path / "gates.jsonl")
    assert record["numbers"]["step"] == [0, 10, 20, 25]
    assert record["numbers"]["gates"][1] == [0.9, 0.5]
    assert record["numbers"]["alpha"][1] == [None, None]
    assert (record["op"], record["impl"], record["shape"]["seed"]) == (
        "laguna.gates",
        "optimise",
        3,
    )


def test_widened_windows_change_nothing_but_what_lies_beyond_them() -> None:
    from tools.pocket_shapes import SHAPES

    torch.manual_seed(0)
    shape = SHAPES["tiny-laguna"]
    training: Any = shape.model(compute=torch.float32, compiled=False)
    with torch.no_grad():
        for parameter in training.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model = training.to_transformers().eval()
    widened = laguna_heads._without_windows(model)
    assert model.config.sliding_window == 16 and widened.config.sliding_window == 32768
    ids = torch.randint(2, shape.vocabulary, (1, 40))
    with torch.no_grad():
        before, after = model(ids).logits, widened(ids).logits
    torch.testing.assert_close(after[:, :16], before[:, :16], atol=1e-5, rtol=1e-5)
    assert (after[:, 16:] - before[:, 16:]).abs().max() > 1e-2

"""Identification from samples to pattern: reproducible, resumable, honest about bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_identification import OPTIONS, TEXT, run, tiny

from duohead.identify import IdentifyOptions, Step, train
from duohead.identify.checkpoint import CHECKPOINT, LOG, fingerprint, history, written_at
from duohead.pattern import HeadPattern


def test_a_short_run_follows_the_recorded_trajectory() -> None:
    """A change that should not change the numbers keeps these; one that should records them anew.

    The tolerance: the same run in an fp32 model, whose rounding is 1e9 times that of this fp64 one, ends within
    2e-7 of these numbers; the norms and the gates are fp32 in both. 1e-5 leaves room for other machines.
    """
    steps: list[Step] = []
    options = replace(OPTIONS, learning_rate=0.1, reg_weight=2.0)
    pattern = run(model=tiny().double(), options=options, on_step=steps.append)
    losses = [2.0, 1.9818166, 1.926935, 1.8157705, 1.8364382, 1.6761158]
    losses += [1.630657, 1.5292495, 1.5583325, 1.4906938, 1.5128132, 1.3753793]
    gates = [0.99, 0.936014, 0.868246, 0.810206, 0.773482, 0.741175]
    gates += [0.708393, 0.666082, 0.614829, 0.561052, 0.529159, 0.523237]
    alpha = [[0.9189687, 0.9193996], [0.1211241, 0.1334566]]
    assert [step.step for step in steps] == list(range(12))
    assert [step.loss for step in steps] == pytest.approx(losses, abs=1e-5)
    assert [step.mean_gate for step in steps] == pytest.approx(gates, abs=1e-5)
    assert pattern.alpha == pytest.approx(np.array(alpha), abs=1e-5)


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_run() -> None:
    one, two = run(), run()
    other = run(options=replace(OPTIONS, seed=1))
    assert one.alpha.tobytes() == two.alpha.tobytes()
    assert one.alpha.tobytes() != other.alpha.tobytes()


def test_the_pattern_says_how_it_was_made(tmp_path: Path) -> None:
    pattern = run(tmp_path / "heads")
    loaded = HeadPattern.load(tmp_path / "heads").validate(tiny())
    assert loaded.alpha.tobytes() == pattern.alpha.tobytes()
    assert (loaded.sink, loaded.recent) == (4, 8)
    assert loaded.training["steps"] == 12
    assert loaded.training["context_max"] == 400
    records = [json.loads(line) for line in (tmp_path / "heads" / LOG).read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(12))
    assert set(records[0]) == {*Step._fields, "gates"}
    assert records[-1]["mean_gate"] == pytest.approx(float(np.nanmean(pattern.alpha)))


def test_a_head_that_retrieves_keeps_its_gate_and_useless_heads_lose_theirs() -> None:
    """Planted: only head 2 of four reaches the output; the others' output weights are zero."""
    model = tiny(num_hidden_layers=1, num_key_value_heads=4)
    weight = model.model.layers[0].self_attn.o_proj.weight
    with torch.no_grad():
        kept = weight[:, 16:24].clone()
        weight.zero_()
        weight[:, 16:24] = 4 * kept
    options = replace(OPTIONS, steps=60, learning_rate=0.05)
    alpha = run(model=model, options=options).alpha[0]
    assert alpha[2] > 0.8
    assert alpha[[0, 1, 3]].max() < 0.05


def test_gates_stay_in_range_at_every_step() -> None:
    seen: list[Step] = []
    pattern = run(options=replace(OPTIONS, learning_rate=0.9), on_step=seen.append)
    assert pattern.alpha.min() >= 0
    assert pattern.alpha.max() <= 1
    assert all(0 <= step.mean_gate <= 1 for step in seen)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10, 2000])
def test_the_learning_rate_rises_stays_and_falls(steps: int) -> None:
    options = IdentifyOptions(steps=steps)
    rates = [options.learning_rate_at(step) for step in range(steps)]
    assert rates[0] == pytest.approx(0.002)
    assert rates[-1] == pytest.approx(0.002)
    assert max(rates) <= 0.02
    assert rates == pytest.approx(rates[::-1])
    if steps == 2000:
        assert rates[200] == pytest.approx(0.011)
        assert rates[400:1600] == pytest.approx([0.02] * 1200)


def test_identification_leaves_the_model_trainable_and_unchanged() -> None:
    model = tiny().train()
    before = fingerprint(model)
    run(model=model)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.config._attn_implementation != "duohead_gates"
    assert fingerprint(model) == before


class _Interrupt:
    """Raises at one step, as Ctrl-C would."""

    def __init__(self, step: int) -> None:
        self._step = step

    def __call__(self, step: Step) -> None:
        if step.step == self._step:
            raise KeyboardInterrupt


# Any selection will do, so patience runs out as soon as it may.
IMPATIENT = replace(OPTIONS, steps=40, warmup=0.1, patience=3, patience_slack=1.0)


@pytest.mark.parametrize("moment", [0, 4, 5, 7, 11])
def test_an_interrupted_run_continues_bit_for_bit(tmp_path: Path, moment: int) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = run(whole)
    with pytest.raises(KeyboardInterrupt):
        run(parts, on_step=_Interrupt(moment))
    assert not (parts / "config.json").exists()
    again: list[Step] = []
    pattern = run(parts, on_step=again.append)
    lost = moment + 1 - (again[0].step if again else 12)
    assert 0 <= lost < OPTIONS.save_every
    assert pattern.alpha.tobytes() == expected.alpha.tobytes()
    assert sorted(path.name for path in parts.iterdir()) == sorted(p.name for p in whole.iterdir())
    for name in (LOG, CHECKPOINT, "duohead.safetensors"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("moment", [5, 7, 9])
def test_an_interrupted_run_of_little_patience_ends_where_it_would_have(
    tmp_path: Path, moment: int
) -> None:
    taken: list[Step] = []
    expected = run(options=IMPATIENT, on_step=taken.append)
    assert len(taken) == expected.training["steps_done"] == 11
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, options=IMPATIENT, on_step=_Interrupt(moment))
    assert run(tmp_path, options=IMPATIENT).alpha.tobytes() == expected.alpha.tobytes()
    again: list[Step] = []
    run(tmp_path, options=IMPATIENT, on_step=again.append)
    assert again == []


def killed_run(out: str, moment: str) -> None:
    """For a subprocess: a run that is killed after step 7, or while its second checkpoint is written."""

    def kill(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "step":
        run(Path(out), on_step=lambda step: kill() if step.step == 7 else None)
    if moment == "write":
        write, writes = Path.write_bytes, iter(range(100))

        def write_half(path: Path, data: bytes) -> None:
            late = next(writes)
            write(path, data[: len(data) // 2] if late else data)
            if late:
                kill()

        Path.write_bytes = write_half  # type: ignore[method-assign, assignment]
    replace_file, calls = os.replace, iter(range(100))
    os.replace = lambda *paths: kill() if next(calls) else replace_file(*paths)  # type: ignore[assignment]
    run(Path(out))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("moment", ["step", "write", "save"])
def test_a_killed_run_continues_bit_for_bit(tmp_path: Path, moment: str) -> None:
    code = f"import test_identify as t; t.killed_run({str(tmp_path / 'heads')!r}, {moment!r})"
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    again: list[Step] = []
    pattern = run(tmp_path / "heads", on_step=again.append)
    assert again[0].step == 5
    assert pattern.alpha.tobytes() == run().alpha.tobytes()


def test_a_finished_run_is_not_done_again(tmp_path: Path) -> None:
    first = run(tmp_path)
    again: list[Step] = []
    second = run(tmp_path, on_step=again.append)
    assert again == []
    assert second.alpha.tobytes() == first.alpha.tobytes()


def test_another_run_in_the_same_folder_is_refused_until_restarted(tmp_path: Path) -> None:
    run(tmp_path)
    faster = replace(OPTIONS, learning_rate=0.3)
    with pytest.raises(
        ValueError, match=r"different options \(learning_rate 0.05, now 0.3\); give another"
    ):
        run(tmp_path, options=faster)
    with pytest.raises(ValueError, match="holds a run with different model;"):
        run(tmp_path, model=tiny(intermediate_size=40))
    with pytest.raises(ValueError, match="holds a run with different text;"):
        run(tmp_path, text=TEXT[100:])
    restarted = run(tmp_path, options=faster, restart=True)
    assert restarted.training["learning_rate"] == 0.3
    # What only trades memory or time may change between one half of a run and the other.
    run(tmp_path, options=replace(faster, save_every=3, gradient_checkpointing=True))


def test_a_restarted_run_replaces_the_old_one_with_its_first_checkpoint(tmp_path: Path) -> None:
    run(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    written = written_at(tmp_path)
    faster = replace(OPTIONS, learning_rate=0.3)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, options=faster, restart=True, on_step=_Interrupt(3))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert written_at(tmp_path) == written
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, options=faster, restart=True, on_step=_Interrupt(7))
    assert written_at(tmp_path) != written
    lines = (tmp_path / LOG).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(8))
    expected = run(options=faster)
    assert run(tmp_path, options=faster).alpha.tobytes() == expected.alpha.tobytes()
    assert written_at(tmp_path / "elsewhere") is None


def test_the_folder_remembers_how_the_gates_moved(tmp_path: Path) -> None:
    pattern = run(tmp_path)
    steps, alpha = history(tmp_path)
    assert steps.tolist() == list(range(12))
    assert alpha.shape == (12, *pattern.alpha.shape)
    assert alpha[-1] == pytest.approx(pattern.alpha, abs=1e-4)
    assert (alpha[0] > alpha[-1]).any()
    (tmp_path / LOG).unlink()
    with pytest.raises(ValueError, match="has no gates in it"):
        history(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0\0\0\0\0{broken", b"x" * 100])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / CHECKPOINT).write_bytes(content)
    with pytest.raises(
        ValueError, match=r"identify.safetensors' is damaged .*restart \(--restart\)"
    ):
        run(tmp_path)
    run(tmp_path, restart=True)


def test_a_foreign_safetensors_file_is_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"gates": torch.ones(4)}, tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match="must have format 'duohead-identify-2', got None"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be above 0, got 0"),
        ({"recent": 0}, "recent must be above 0, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0, got nan"),
        ({"sink": -1}, "sink must not be negative, got -1"),
        ({"initial": 1.5}, "initial must be between 0 and 1, got 1.5"),
        ({"warmup": 0.6}, "warmup must be between 0 and 0.5, got 0.6"),
        ({"depth_min": 0.9, "depth_max": 0.1}, "depth_min must not exceed depth_max, got 0.9"),
        ({"context_min": 384}, r"context_min must exceed sink \+ recent = 384, .* got 384"),
        ({"patience": -1}, "patience must not be negative, got -1"),
        ({"target": 1.5}, "target must be between 0 and 1, got 1.5"),
        ({"target": 0.1, "reg_weight": 0.1}, "reg_weight must be left alone with a target, .* 0.1"),
        ({"target": 0.1, "patience": 9}, "patience must be 0 with a target, .* got 9"),
        ({"patience_slack": 1.5}, "patience_slack must be between 0 and 1, got 1.5"),
        ({"patience_ratios": (0.5, 1.0)}, "patience_ratios must be shares between 0 and 1"),
        ({"patience_ratios": ()}, "patience_ratios must be shares between 0 and 1"),
        ({"chat": "maybe"}, "chat must be one of auto, yes, no, got maybe"),
        ({"context_max": 1000}, "context_max must be at least context_min = 2000, got 1000"),
    ],
)
def test_options_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IdentifyOptions(**change)


def test_contexts_that_do_not_fit_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "train_gates", lambda *_, **__: pytest.fail("work was done"))
    out = tmp_path / "heads"
    with pytest.raises(
        ValueError, match="context_max must not exceed the model's 512 positions, got 600"
    ):
        run(out, options=replace(OPTIONS, context_max=600))
    with pytest.raises(
        ValueError, match="context_min must not exceed the model's 512 positions, got 2000"
    ):
        run(out, options=IdentifyOptions())
    with pytest.raises(ValueError, match="text is too short: 400 tokens are needed"):
        run(out, text="too short")
    with pytest.raises(ValueError, match="context_length=300 is too small"):
        run(out, options=replace(OPTIONS, passkey_words=100))
    assert not out.exists()


def test_the_longest_context_defaults_to_what_the_model_can_take() -> None:
    options = IdentifyOptions(context_min=500)
    assert options.longest(1000) == 1000
    assert options.longest(500_000) == options.longest(None) == 32_000
    assert replace(options, context_max=700).longest(1000) == 700


def test_nothing_that_is_not_ours_is_overwritten(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "model")
    before = (tmp_path / "model" / "config.json").read_bytes()
    for restart in (False, True):
        with pytest.raises(ValueError, match="holds the config.json of something else"):
            run(tmp_path / "model", restart=restart)
    assert (tmp_path / "model" / "config.json").read_bytes() == before
    HeadPattern.from_alpha([[0.5, 0.5]] * 2).save(tmp_path / "heads")
    with pytest.raises(
        ValueError, match="already holds a pattern; give another folder, or restart"
    ):
        run(tmp_path / "heads")
    assert run(tmp_path / "heads", restart=True).training["steps"] == 12


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "heads").write_text("mine")
    with pytest.raises(ValueError, match="out must be a folder, got the file"):
        run(tmp_path / "heads")
    with pytest.raises(ValueError, match="out must be a folder, got one below the file '.*/heads'"):
        run(tmp_path / "heads" / "deep" / "out")
    assert (tmp_path / "heads").read_text() == "mine"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_on_a_gpu_the_same_seed_gives_the_same_bits(dtype: torch.dtype) -> None:
    before = torch.are_deterministic_algorithms_enabled()
    alphas = [run(model=tiny().to("cuda", dtype)).alpha.tobytes() for _ in range(3)]
    assert alphas[0] == alphas[1] == alphas[2]
    recomputed = run(
        model=tiny().to("cuda", dtype), options=replace(OPTIONS, gradient_checkpointing=True)
    )
    assert recomputed.alpha.tobytes() == alphas[0]
    assert torch.are_deterministic_algorithms_enabled() == before


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_on_a_gpu_an_interrupted_run_continues_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    expected = run(tmp_path / "whole", model=tiny().to("cuda", dtype))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", model=tiny().to("cuda", dtype), on_step=_Interrupt(7))
    again: list[Step] = []
    pattern = run(tmp_path / "parts", model=tiny().to("cuda", dtype), on_step=again.append)
    assert again[0].step == OPTIONS.save_every
    assert pattern.alpha.tobytes() == expected.alpha.tobytes()

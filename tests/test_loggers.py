"""Logs elsewhere: the same numbers in Weights & Biases and TensorBoard, which are missed with one clear line."""

from __future__ import annotations

import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
from tiny_identification import run

from duohead.identify import Step
from duohead.identify.loggers import loggers

NUMBERS = [name for name in Step._fields if name != "step"]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    held = types.SimpleNamespace(inits=[], logged=[], finished=0)

    class Run:
        def log(self, numbers: dict[str, float], step: int) -> None:
            held.logged.append((step, numbers))

        def finish(self) -> None:
            held.finished += 1

    def init(**given: Any) -> Run:
        held.inits.append(given)
        return Run()

    module = types.ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None)  # other libraries look whether it is installed
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return held


@pytest.fixture
def tensorboard(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    held = types.SimpleNamespace(folders=[], starts=[], scalars=[], closed=0)

    class SummaryWriter:
        def __init__(self, log_dir: str, purge_step: int) -> None:
            held.folders.append(log_dir)
            held.starts.append(purge_step)

        def add_scalar(self, name: str, number: float, step: int) -> None:
            held.scalars.append((name, number, step))

        def close(self) -> None:
            held.closed += 1

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return held


def test_wandb_gets_every_step_and_the_options(
    wandb: types.SimpleNamespace, tmp_path: Path
) -> None:
    taken: list[Step] = []
    run(tmp_path / "heads", log=["wandb"], on_step=taken.append)
    assert [step for step, _ in wandb.logged] == list(range(12))
    assert sorted(wandb.logged[0][1]) == sorted(NUMBERS)
    assert [numbers["loss"] for _, numbers in wandb.logged] == [step.loss for step in taken]
    assert wandb.inits[0]["config"]["steps"] == 12
    assert wandb.inits[0]["name"] == "heads"
    assert wandb.finished == 1


def interrupted(folder: Path, *, after: int, **arguments: Any) -> None:
    def stop(step: Step) -> None:
        if step.step == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(folder, log=["wandb"], on_step=stop, **arguments)


def test_a_continued_run_continues_its_log_and_a_new_one_has_one_of_its_own(
    wandb: types.SimpleNamespace, tmp_path: Path
) -> None:
    interrupted(tmp_path / "a", after=7)
    run(tmp_path / "a", log=["wandb"])
    run(tmp_path / "b", log=["wandb"])
    with loggers(["wandb"], None, config={}):
        pass
    first, same, other, free = wandb.inits
    assert first["id"] == same["id"]
    assert (first["resume"], same["resume"]) == (None, "allow")
    assert len({first["id"], other["id"], free["id"]}) == 3


def test_a_restarted_run_has_a_log_of_its_own(wandb: types.SimpleNamespace, tmp_path: Path) -> None:
    run(tmp_path, log=["wandb"])
    interrupted(tmp_path, after=7, restart=True)
    run(tmp_path, log=["wandb"])
    old, new, continued = (given["id"] for given in wandb.inits)
    assert old != new == continued


def test_a_restart_without_a_checkpoint_leaves_the_log_of_the_run_that_it_left(
    wandb: types.SimpleNamespace, tmp_path: Path
) -> None:
    interrupted(tmp_path, after=7)
    interrupted(tmp_path, after=2, restart=True)
    run(tmp_path, log=["wandb"])
    old, dropped, continued = (given["id"] for given in wandb.inits)
    assert dropped != old == continued


def test_a_run_that_left_no_checkpoint_begins_another_log(
    wandb: types.SimpleNamespace, tmp_path: Path
) -> None:
    interrupted(tmp_path, after=2)
    run(tmp_path, log=["wandb"])
    assert wandb.inits[0]["id"] != wandb.inits[1]["id"]


def test_tensorboard_gets_every_step_beside_the_pattern(
    tensorboard: types.SimpleNamespace, tmp_path: Path
) -> None:
    run(tmp_path / "heads", log=["tensorboard"])
    assert tensorboard.folders == [str(tmp_path / "heads" / "tensorboard")]
    assert len(tensorboard.scalars) == 12 * len(NUMBERS)
    assert {name for name, _, _ in tensorboard.scalars} == {f"identify/{name}" for name in NUMBERS}
    run(tmp_path / "heads", log=["tensorboard"])
    assert tensorboard.starts == [0, 12]
    assert tensorboard.closed == 2


def test_logs_are_closed_when_a_run_fails(
    wandb: types.SimpleNamespace, tensorboard: types.SimpleNamespace, tmp_path: Path
) -> None:
    def fail(_: Step) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        run(tmp_path, log=["wandb", "tensorboard"], on_step=fail)
    assert (wandb.finished, tensorboard.closed) == (1, 1)


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_what_is_not_installed_is_missed_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=f"log='{name}' needs the package {name}, .*pip install"):
        run(tmp_path / "heads", log=[name])
    assert not (tmp_path / "heads").exists()


def test_unknown_logs_and_tensorboard_without_a_folder_are_refused() -> None:
    with pytest.raises(ValueError, match="log must name wandb or tensorboard, got mlflow"):
        run(log=["mlflow"])
    with pytest.raises(ValueError, match="writes into the folder of the run; give out, too"):
        run(log=["tensorboard"])

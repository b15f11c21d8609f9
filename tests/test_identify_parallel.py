"""Several processes, one identification: gradients, gates and files as from one process, and one failure for all."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_gates import gates_of, llama, sample
from tiny_identification import OPTIONS, TEXT, run, tiny, tokenizer

from duohead.cli import identify
from duohead.fingerprint import TOKENS
from duohead.identify import Step
from duohead.identify.checkpoint import LOG
from duohead.identify.gates import Gates, distillation, installed
from duohead.identify.haystack import tokens
from duohead.identify.options import IdentifyOptions
from duohead.identify.parallel import Ranks, joined, shard
from duohead.identify.samples import training_samples
from duohead.identify.scorers import score
from duohead.pattern import HeadPattern
from duohead.shapes import LayerShape

# Odd, so that processes share it unevenly; and no answer lies in the first half.
SAMPLE = sample(47, answers=((36, 40), (43, 47)))
# Query heads, KV heads, and whether the weights are spread and activations recomputed.
DTYPES = ("float64", "float32")
PAIRS = replace(OPTIONS, steps=2, initial=0.5, sequence_parallel=1)
CASES = [(4, 2, False), (4, 4, False), (4, 1, False), (4, 2, True)]


def launch(out: Path, device: str, *, processes: int = 2) -> Path:
    """Run `everything` under torchrun; the folder with what it found."""
    here = Path(__file__)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(here.parent), str(here.parents[1])]),
        "OMP_NUM_THREADS": "1",
    }
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *torchrun, str(here), str(out), device]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes on the CPU found."""
    return launch(tmp_path_factory.mktemp("two"), "cpu")


def everything(out: Path, device: str) -> None:
    """Each of two processes: the gradients; on a CPU then runs, one of them interrupted, one a mistake."""
    with joined(device) as ranks:
        place = f"cuda:{torch.cuda.current_device()}" if device == "cuda" else "cpu"
        found = {dtype: gradients(ranks, place, dtype) for dtype in DTYPES}
        if ranks.first:
            (out / "gradients.json").write_text(json.dumps(found))
            (out / "file").write_text("a file")
        if device == "cuda":
            return
        with suppress(KeyboardInterrupt):
            run(out / "stopped", on_step=stop)
        run(out / "stopped")
        run(out / "pairs", options=replace(PAIRS, shard=True))
        score(
            "optimise", tiny(), tokenizer(), TEXT, out=out / "cost", options=PAIRS, progress=False
        )
        for name, attempt in MISTAKES.items():
            try:
                attempt(out)
            except ValueError as error:
                (out / f"{name}{ranks.rank}").write_text(str(error))


def command(out: Path) -> None:
    """What `duohead identify` does, with a log that is not installed on the machine of the first process."""
    if Ranks.of().first:
        sys.modules["wandb"] = None  # type: ignore[assignment]
    else:
        sys.modules["wandb"] = ModuleType("wandb")
    parser = argparse.ArgumentParser()
    identify.add_arguments(parser)
    args = parser.parse_args(["model", "--out", str(out / "log"), "--log", "wandb"])
    identify._score(args, OPTIONS, Ranks.of())


MISTAKES = {"error": lambda out: run(out / "file"), "log": command}


def stop(step: Step) -> None:
    if step.step == 7:
        raise KeyboardInterrupt


def gradients(ranks: Ranks, device: str, dtype: str) -> list[dict[str, Any]]:
    """Loss and gate gradients of every case, summed over the processes."""
    found = []
    for heads, kv_heads, spread in CASES:
        model = llama(num_attention_heads=heads, num_key_value_heads=kv_heads)
        model = model.to(device, getattr(torch, dtype))
        if spread and ranks.world > 1:
            shard(model, device=torch.device(device))
        gates = gates_of(model, initial=0.5, ranks=ranks)
        with installed(model, gates, gradient_checkpointing=spread) as backbone:
            loss = distillation(backbone, gates, SAMPLE)
            loss.backward()
        assert gates.values.grad is not None
        slopes, loss = ranks.sum_(gates.values.grad), ranks.sum_(loss.detach().clone())
        found.append({"loss": loss.item(), "slopes": slopes.tolist()})
    return found


def off(found: list[dict[str, Any]], exact: list[dict[str, Any]]) -> float:
    """The largest error of a gradient, relative to the largest gradient of its case."""
    pairs = zip(found, exact, strict=True)
    return max(
        float((torch.tensor(one["slopes"]) - torch.tensor(two["slopes"])).abs().max())
        / max(map(abs, two["slopes"]))
        for one, two in pairs
    )


def check_gradients(out: Path, device: str) -> None:
    """fp64 to its rounding; fp32 within twice what one process loses against fp64, and a few roundings."""
    exact = gradients(Ranks(), "cpu", "float64")
    for dtype, found in json.loads((out / "gradients.json").read_text()).items():
        one = gradients(Ranks(), device, dtype)
        eps = torch.finfo(getattr(torch, dtype)).eps
        assert off(found, exact) <= 2 * (off(one, exact) + 8 * eps)
        for ours, theirs in zip(found, one, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=64 * eps)


def test_gradients_of_two_processes_are_those_of_one(two: Path) -> None:
    check_gradients(two, "cpu")


@pytest.mark.gpu
def test_gradients_of_two_gpus_are_those_of_one(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    check_gradients(launch(tmp_path, "cuda"), "cuda")


def test_two_processes_identify_what_one_does_also_when_interrupted(
    two: Path, tmp_path: Path
) -> None:
    """The last bits differ, since sums are split; the files are those of one process."""
    one = run(tmp_path / "one")
    assert HeadPattern.load(two / "stopped").alpha == pytest.approx(one.alpha, abs=1e-5)
    logs = [
        (folder / LOG).read_text().splitlines() for folder in (two / "stopped", tmp_path / "one")
    ]
    steps = [[json.loads(line)["step"] for line in log] for log in logs]
    assert steps[0] == steps[1] == list(range(12))
    names = [
        sorted(p.name for p in folder.iterdir()) for folder in (two / "stopped", tmp_path / "one")
    ]
    assert names[0] == names[1]


def test_processes_with_a_sample_each_take_the_mean_over_samples(two: Path) -> None:
    assert HeadPattern.load(two / "pairs").training["samples_per_step"] == 2
    ids = tokens(TEXT, tokenizer(), at_least=400, at_most=6400)
    samples = training_samples(tokenizer(), ids, PAIRS, 400)
    gates = Gates.of(model := tiny(), sink=OPTIONS.sink, recent=OPTIONS.recent, initial=0.5)
    with torch.no_grad(), installed(model, gates) as backbone:
        losses = [distillation(backbone, gates, samples[index]).item() for index in range(2)]
    first = json.loads((two / "pairs" / LOG).read_text().splitlines()[0])
    assert first["distill"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    with pytest.raises(ValueError, match="samples_per_step 2, now 1"):
        run(two / "pairs", options=PAIRS)


def test_the_cost_is_that_of_all_processes(two: Path) -> None:
    ids = tokens(TEXT, tokenizer(), at_least=400, at_most=6400)
    samples = training_samples(tokenizer(), ids, PAIRS, 400)
    whole = sum(len(samples[index].input_ids) for index in range(2 * PAIRS.steps))
    cost = HeadPattern.load(two / "cost").training["cost"]
    # In the end each process takes the model's fingerprint, one pass of a few tokens.
    tokens_read = 2 * whole + 2 * len(TOKENS)
    assert (cost["forward_tokens"], cost["backward_tokens"]) == (tokens_read, whole)
    assert (cost["forward_passes"], cost["backward_passes"]) == (2 * PAIRS.steps + 1, PAIRS.steps)


def test_bad_input_fails_in_all_processes_at_once(two: Path) -> None:
    assert (two / "error0").read_text().startswith("out must be a folder, got the file")
    assert "process 0 failed (ValueError: out must be a folder" in (two / "error1").read_text()


def test_a_log_that_is_not_installed_is_missed_in_all_processes_before_any_work(two: Path) -> None:
    assert (two / "log0").read_text().startswith("log='wandb' needs the package wandb")
    assert "process 0 failed (ValueError: log='wandb' needs" in (two / "log1").read_text()
    assert not (two / "log").exists()


def test_what_processes_cannot_share_is_refused() -> None:
    with pytest.raises(
        ValueError, match="sequence_parallel must divide the number of processes, 1, got 2"
    ):
        Ranks.of(2)
    four = Ranks(world=4, sequence=4)
    rope: dict[str, Any] = {"rope_type": "default"}
    config = SimpleNamespace(num_attention_heads=8, rope_parameters=rope)
    with pytest.raises(
        ValueError, match="layer 0 has 8 query heads and 3 KV heads, which 4 processes"
    ):
        four.check([LayerShape(3, 8, 8)], config)
    with pytest.raises(ValueError, match="layer 1 mixes tokens without KV heads"):
        four.check([LayerShape(4, 8, 8), LayerShape(0, 0, 0)], config)
    four.check([LayerShape(2, 8, 8), LayerShape(8, 8, 8)], config)
    config.rope_parameters = {"full_attention": {"rope_type": "longrope"}}
    with pytest.raises(ValueError, match="rotary positions of type longrope follow the length"):
        four.check([LayerShape(4, 8, 8)], config)
    with pytest.raises(ValueError, match="shard needs several processes"):
        shard(tiny(), device=torch.device("cpu"))
    with pytest.raises(ValueError, match="sequence_parallel must be above 0, got 0"):
        IdentifyOptions(sequence_parallel=0)


def test_a_sample_is_dealt_out_whole_and_filled_up_at_its_end() -> None:
    ids = torch.arange(10, 17)
    parts = [Ranks(rank=rank, world=3, sequence=3).part(ids) for rank in range(3)]
    assert torch.cat([part for part, _ in parts]).tolist() == [*range(10, 17), 16, 16]
    assert torch.cat([places for _, places in parts]).tolist() == list(range(9))
    alone, places = Ranks().part(ids)
    assert torch.equal(alone, ids)
    assert places.tolist() == list(range(7))


def test_without_torchrun_there_is_one_process() -> None:
    with joined() as ranks:
        assert (ranks.first, ranks.world, ranks.samples, ranks.row, ranks.place) == (
            True,
            1,
            1,
            0,
            0,
        )
        with ranks.together():
            assert ranks.share("given") == "given"
        with pytest.raises(ValueError, match="bad"), ranks.together():
            raise ValueError("bad")


@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda:1", "device must be cpu or cuda under torchrun"), ("cuda", "needs a GPU of its own")],
)
def test_a_device_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, device: str, message: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "99")
    monkeypatch.setenv("LOCAL_RANK", "98")
    with pytest.raises(ValueError, match=message), joined(device):
        pass


if __name__ == "__main__":
    everything(Path(sys.argv[1]), sys.argv[2])

"""`duohead bench capacity` and `duohead inspect --capacity`: what fits is estimated as it is allocated."""

import json
from pathlib import Path

import pytest
import torch

from duohead import HeadPattern
from duohead.bench import capacity
from duohead.bench.capacity import measure_capacity
from duohead.bench.card import capacity_lines
from duohead.bench.ceilings import Ceilings
from duohead.bench.fitting import (
    MOST_TOKENS,
    RUNTIME_BYTES,
    activation_bytes,
    estimate,
    gib,
    tokens_within,
)
from duohead.bench.footprint_cases import Kept
from duohead.bench.jobs import Job
from duohead.bench.model import ModelBench
from duohead.bench.models import build, config, estimated_weight_bytes
from duohead.cache import DuoCache
from duohead.cli import main

CPU = torch.device("cpu")
LIMITS = Ceilings(3000.0, "sum", 700.0, "bfloat16", 50 << 20)
GIB = 2**30
JOB = Job(
    "decode", "duo", "llama-3-8b", 1, retrieval_dtype="int4", streaming_dtype="int4", weights="int8"
)
TINY = Job("decode", "duo", "tiny", 1, recent=32, retrieval_dtype="int4", streaming_dtype="int4")


@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("free", [10**6, 123_456_789, 64 * GIB])
def test_the_tokens_fit_and_one_more_does_not(ratio: float, free: int) -> None:
    job = Job("decode", "duo", "llama-3-8b", 1, retrieval_ratio=ratio)
    policy = job.policy().bind(config("llama-3-8b"), dtype=torch.bfloat16)
    tokens = tokens_within(policy, free, batch=2)
    assert policy.kv_bytes(tokens, 2) <= free < policy.kv_bytes(tokens + 1, 2)


def test_without_retrieval_heads_any_length_fits() -> None:
    job = Job("decode", "duo", "tiny", 1, retrieval_ratio=0.0)
    policy = job.policy().bind(config("tiny"), dtype=torch.bfloat16)
    assert tokens_within(policy, 10**9) == MOST_TOKENS


def test_the_estimate_equals_what_is_allocated() -> None:
    made = build("tiny", device=CPU)
    memory = RUNTIME_BYTES + estimated_weight_bytes(made.config) + 30 * 2**20
    found = estimate(made.config, TINY.policy(), memory_bytes=memory)
    cache = DuoCache(TINY.policy(), made, max_length=found.tokens)
    cache.allocate(1, dtype=torch.bfloat16, device=CPU)
    assert cache.kv_bytes() == found.kv_bytes
    parts = found.weight_bytes + found.kv_bytes + found.activation_bytes + found.runtime_bytes
    assert 0 <= memory - parts < found.kv_bytes / 8


def test_four_million_tokens_are_expected_on_an_80_gb_card() -> None:
    found = estimate(
        config("llama-3-8b"), JOB.policy(), memory_bytes=int(79.1 * GIB), weights="int8"
    )
    assert found.tokens > 4_000_000
    parts = found.weight_bytes + found.kv_bytes + found.activation_bytes + found.runtime_bytes
    assert parts <= found.memory_bytes


def test_longer_forwards_leave_less_room() -> None:
    made = config("llama-3-8b")
    sizes = [activation_bytes(made, chunk=chunk) for chunk in (8192, 16384, 32768)]
    assert sizes == sorted(sizes)
    assert activation_bytes(made, chunk=1) == activation_bytes(made, chunk=4096)
    assert activation_bytes(made, chunk=1, weights="int8") > activation_bytes(made, chunk=1)


def test_a_card_that_is_too_small_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"--memory must exceed weights, activations and runtime \(.* GiB\), got 8"
    ):
        estimate(config("llama-3-8b"), JOB.policy(), memory_bytes=8 * GIB, weights="int8")


def test_the_measurement_fills_and_decodes_and_reads_a_prompt() -> None:
    memory = RUNTIME_BYTES + 2**20 * 90
    bench = ModelBench(CPU, torch.bfloat16)
    *stages, result = measure_capacity(bench, TINY, memory_bytes=memory, tokens=900, prefill=400)
    assert [stage.prefill_seconds for stage in stages] == [None]
    numbers = result.numbers(LIMITS)
    json.dumps(numbers, allow_nan=False)
    assert numbers["tokens"] == 900
    assert result.kv_bytes == result.policy.kv_bytes(900)
    assert numbers["over_floor"] == pytest.approx(numbers["decode_median_ms"] / numbers["floor_ms"])
    assert numbers["prefill_tokens"] == 400
    assert numbers["prefill_seconds"] > 0
    assert numbers["kernels"] == numbers["prefill_kernels"] == "tiled"
    assert numbers["logits_error"] <= numbers["logits_error_budget"]
    lines = capacity_lines(result, LIMITS)
    assert "tokens estimated in" in lines[0]
    assert "prefill of 400 tokens" in lines[-1]


def test_too_little_memory_is_written_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(capacity, "EngineRunner", full)
    memory = RUNTIME_BYTES + 2**20 * 30
    (result,) = measure_capacity(
        ModelBench(CPU, torch.bfloat16), TINY, memory_bytes=memory, tokens=900
    )
    assert result.numbers(LIMITS)["decode_median_ms"] == "out of memory"
    assert capacity_lines(result, LIMITS)[-1] == "at 900 tokens: out of memory"


def test_an_estimate_that_is_too_high_is_lowered_by_a_few_per_cent(monkeypatch) -> None:
    right, tried = capacity._decoded, []

    def decoded(result, *rest):
        tried.append(result.tokens)
        if len(tried) < 3:
            raise torch.OutOfMemoryError("no")
        return right(result, *rest)

    monkeypatch.setattr(capacity, "_decoded", decoded)
    memory = RUNTIME_BYTES + estimated_weight_bytes(config("tiny")) + 8 * 2**20
    (result,) = measure_capacity(ModelBench(CPU, torch.bfloat16), TINY, memory_bytes=memory)
    whole = result.estimate.tokens
    assert tried == [whole, int(0.99 * whole), int(0.98 * whole)]
    assert result.tokens == tried[-1]
    assert result.kv_bytes == result.policy.kv_bytes(result.tokens)


def test_a_prefill_that_fails_does_not_take_the_rest_along(monkeypatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise RuntimeError("a kernel died")

    monkeypatch.setattr(capacity.EngineRunner, "prefill", broken)
    memory = RUNTIME_BYTES + 2**20 * 90
    first, result = measure_capacity(
        ModelBench(CPU, torch.bfloat16), TINY, memory_bytes=memory, tokens=900, prefill=400
    )
    assert result.timing == first.timing
    assert result.prefill_seconds == "failed: RuntimeError: a kernel died"
    json.dumps(result.numbers(LIMITS), allow_nan=False)
    assert "a kernel died" in capacity_lines(result, LIMITS)[-1]


def test_the_command_measures_and_records(tmp_path: Path, capsys) -> None:
    target = tmp_path / "capacity.jsonl"
    command = "bench capacity --tokens 700 --memory 1 --retrieval-dtype int4 --streaming-dtype int4 --device cpu"
    assert main([*command.split(), "--dtype", "bfloat16", "--json", str(target)]) == 0
    assert "at 700 tokens" in capsys.readouterr().out
    (entry,) = [json.loads(line) for line in target.read_text().splitlines()]
    assert (entry["op"], entry["shape"]["length"], entry["shape"]["model"]) == (
        "capacity",
        700,
        "tiny",
    )
    assert entry["numbers"]["estimated_tokens"] > 700


def test_what_was_measured_is_on_the_disk_before_the_long_prompt_starts(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    target = tmp_path / "capacity.jsonl"
    command = "bench capacity --tokens 700 --memory 1 --device cpu --dtype bfloat16 --prefill 300 --chunk 128"
    seen: list[int] = []
    right = capacity._with_prefill

    def watched(*args):
        seen.append(len(target.read_text().splitlines()))
        return right(*args)

    monkeypatch.setattr(capacity, "_with_prefill", watched)
    assert main([*command.split(), "--json", str(target)]) == 0
    first, last = (json.loads(line) for line in target.read_text().splitlines())
    assert seen == [1]
    assert first["numbers"]["decode_median_ms"] == last["numbers"]["decode_median_ms"] > 0
    assert "prefill_seconds" not in first["numbers"]
    assert last["numbers"]["prefill_seconds"] > 0
    assert first["shape"] == last["shape"]
    assert (first["shape"]["attention"], first["shape"]["chunk"]) == ("tiled", 128)
    told = [line for line in capsys.readouterr().err.splitlines() if " s  " in line]
    assert [line.split(" s  ")[1].split(" ")[0] for line in told] == [
        "measuring", told[1].split(" s  ")[1].split(" ")[0], "comparing", "allocating", "filling", "decoding",
        "recorded", "a", "rehearsed;", "read", "read", "read", "decoding", "recorded",
    ]  # fmt: skip
    assert [line.split("read ")[1] for line in told if " read " in line] == [
        f"{done} of 300 tokens" for done in (128, 256, 300)
    ]
    seconds = [float(line.split(" s  ")[0]) for line in told]
    assert seconds == sorted(seconds)


def test_without_a_prompt_there_is_no_prefill(monkeypatch) -> None:
    monkeypatch.setattr(capacity, "_with_prefill", None)
    memory = RUNTIME_BYTES + 2**20 * 90
    found = measure_capacity(
        ModelBench(CPU, torch.bfloat16), TINY, memory_bytes=memory, tokens=200, prefill=0
    )
    assert [result.prefill_seconds for result in found] == [None]


def test_inspect_says_what_fits_for_a_shape(capsys) -> None:
    command = "inspect --capacity --model llama-3-8b --weights int8 --memory 79.1 --chunk 1"
    stored = ["--retrieval-dtype", "int4", "--streaming-dtype", "int4"]
    assert main([*command.split(), *stored, "--retrieval-ratio", "0.5"]) == 0
    out = capsys.readouterr().out
    found = estimate(
        config("llama-3-8b"), JOB.policy(), memory_bytes=int(79.1 * GIB), weights="int8"
    )
    assert f"50.0%  {found.tokens:15,}" in out
    assert f"int8 weights {gib(found.weight_bytes)}" in out
    assert main([*command.split(), *stored]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]] == [
        "100.0%", "50.0%", "25.0%",
    ]  # fmt: skip
    assert main([*command.split(), *stored, "--retrieval-ratio", "0"]) == 0
    assert "0.0%       any number" in capsys.readouterr().out


def test_inspect_spreads_heads_over_the_layers_without_a_window(capsys) -> None:
    command = "inspect --capacity --model laguna-xs.2 --memory 80 --chunk 1 --retrieval-ratio 0.4"
    assert main(command.split()) == 0
    (row,) = capsys.readouterr().out.splitlines()[2:]
    made = config("laguna-xs.2")
    policy = Kept(0.4).policy(made, torch.bfloat16)
    found = estimate(made, policy, memory_bytes=80 * GIB, weights="bf16", chunk=1)
    assert row.split()[:2] == ["40.0%", f"{found.tokens:,}"]


def test_inspect_says_what_fits_for_a_pattern(tmp_path: Path, capsys) -> None:
    alpha = [[0.1, 0.9], [0.8, 0.2]]
    HeadPattern.from_alpha(alpha).save(tmp_path / "heads")
    command = ["inspect", str(tmp_path / "heads"), "--capacity", "--model", "tiny", "--memory", "1"]
    assert main([*command, "--threshold", "0.5"]) == 0
    (row,) = capsys.readouterr().out.splitlines()[2:]
    assert row.split()[0] == "50.0%"
    assert main(command) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("inspect", "FOLDER is needed"),
        ("inspect --capacity", "--capacity needs --model"),
        ("inspect --capacity --model tiny --memory 0", "--memory must lie between 0 and 1000000 GiB, got 0.0"),
        ("inspect --capacity --model tiny --memory 1 --chunk 0", "--chunk must be >= 1, got 0"),
        ("inspect --capacity --model tiny --memory 1 --threshold 0.5", "--kv-budget and --threshold select heads"),
        ("inspect --capacity --model tiny --memory 1 --weights fp4", "--weights must be one of bf16, int8, int4"),
        ("inspect --capacity --model tiny --memory 1 --retrieval-dtype int3", "retrieval_dtype must be one of"),
        ("inspect --capacity --model ./nowhere --memory 1", "--model must be llama-3-8b"),
        ("inspect --model tiny --chunk 8 heads", "--model, --chunk: of use with --capacity alone"),
        ("inspect --capacity --model tiny --memory 1 --keep-all --sink 4", "--sink: of no use with --keep-all"),
        ("inspect --capacity --model tiny --png a.png --head-dim 128", "--png, --head-dim: of no use with --capacity"),
        ("inspect --capacity --model tiny --tokens 9", "--tokens: --capacity finds the tokens itself"),
        ("bench capacity --chunk 32768", "--chunk: counts for --prefill alone"),
        ("bench capacity --tokens 0", "--tokens must be at least 1, got 0"),
        ("bench capacity --prefill -1", "--prefill must be at least 0, got -1"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_one_line(capsys, command: str, message: str) -> None:
    assert main(command.split()) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("duohead")]
    assert len(lines) == 1
    assert message in lines[0]

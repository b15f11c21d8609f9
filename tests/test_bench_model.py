"""`duohead bench model`: the jobs of the tables, floors and bytes that are what they say, failures that are told."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from duohead.bench import model as model_bench
from duohead.bench import runners, verify
from duohead.bench.card import describe_job, model_line
from duohead.bench.cases import Case
from duohead.bench.ceilings import Ceilings
from duohead.bench.chosen import kernels_of
from duohead.bench.filling import fill, fill_layer
from duohead.bench.jobs import METHODS, PRESETS, Job, K, preset, read_bytes, spread
from duohead.bench.kernels import Place
from duohead.bench.model import ModelBench, ModelResult, ShareResult
from duohead.bench.models import SHAPES, build, config, estimated_weight_bytes, weight_bytes
from duohead.bench.shares import attention_share
from duohead.bench.timing import Timing
from duohead.cache import DuoCache, DuoLayer
from duohead.cli import main
from duohead.policy import HeadPolicy

CPU = torch.device("cpu")
LIMITS = Ceilings(3000.0, "sum", 700.0, "bfloat16", 50 << 20)
TINY = Job("decode", "duo", "tiny", 300, chunk=128, sink=8, recent=32)


@pytest.fixture(scope="module")
def bench() -> ModelBench:
    return ModelBench(CPU, torch.float32, seconds=0.0)


# --- models


def test_the_shapes_are_the_published_ones() -> None:
    parameters = {
        "llama-3-8b": 8.03e9,
        "llama-2-7b": 6.74e9,
        "qwen2.5-7b": 7.62e9,
        "mistral-7b": 7.25e9,
    }
    for name, count in parameters.items():
        assert estimated_weight_bytes(config(name)) == pytest.approx(2 * count, rel=0.002)
    assert set(SHAPES) == {*parameters, "tiny"}
    with pytest.raises(ValueError, match="--model must be one of llama-3-8b, .* got 'gpt-9'"):
        config("gpt-9")


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_weight_bytes_are_estimated_as_they_are(weights: str) -> None:
    if weights == "int8":
        pytest.importorskip("torchao")
    made = build("tiny", device=CPU, weights=weights)
    whole, read = weight_bytes(made)
    assert estimated_weight_bytes(made.config, weights) == whole
    table = made.get_input_embeddings().weight
    assert whole - read == table.nbytes
    assert made.dtype == torch.bfloat16
    assert made(torch.zeros(1, 3, dtype=torch.int64)).logits.isfinite().all()


def test_a_tied_table_is_read_by_every_step() -> None:
    made = build("tiny", device=CPU)
    made.lm_head.weight = made.get_input_embeddings().weight
    whole, read = weight_bytes(made)
    assert whole == read


def test_unknown_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="--weights must be one of bf16, int8, got 'fp4'"):
        build("tiny", device=CPU, weights="fp4")


# --- caches without a text


@pytest.mark.parametrize("max_length", [None, 500])
@pytest.mark.parametrize("stored", ["auto", "fp8", "int8", "int4", "int4-hadamard"])
def test_a_filled_layer_holds_finite_random_tokens(max_length: int | None, stored: str) -> None:
    policy = HeadPolicy.from_heads(
        retrieval=[[1]], num_kv_heads=2, sink=4, recent=16, retrieval_dtype=stored, streaming_dtype=stored
    )  # fmt: skip
    layer = DuoLayer(policy, 0, max_length=max_length)
    new = torch.randn(2, 2, 1, 32)
    with pytest.raises(ValueError, match="layer has no stores yet"):
        fill_layer(layer, 10)
    layer.lazy_initialization(new[:, :, :0], new[:, :, :0])
    fill_layer(layer, 400)
    assert int(layer.get_seq_length()) == 400
    handle, _ = layer.update(new, new)
    retrieval, streaming = handle.open(None)
    keys, _, _, _ = zip(*retrieval.reads(0, 1), strict=True)
    past = torch.cat(keys, 2)
    assert past.shape[2] == 401
    assert past.isfinite().all()
    assert 0.8 < past[:, :, :400].std() < 1.2
    positions = [p for _, _, position, _ in streaming.reads(0, 1) for p in position[0].tolist()]
    assert sorted(p for p in positions if p >= 0) == [0, 1, 2, 3, *range(384, 401)]
    if max_length is not None:
        with pytest.raises(ValueError, match="tokens must be at most the 500"):
            fill_layer(layer, 501)


def test_a_filled_cache_has_that_length_in_every_layer() -> None:
    made = build("tiny", device=CPU, dtype=torch.float32)
    cache = DuoCache(TINY.policy(), made, max_length=200)
    cache.allocate(1, dtype=torch.float32, device=CPU)
    fill(cache, 150)
    assert [int(layer.get_seq_length()) for layer in cache.duo_layers] == [150, 150]


# --- jobs


@pytest.mark.parametrize("ratio", [0.0, 0.125, 0.25, 0.4, 0.5, 1.0])
@pytest.mark.parametrize(("layers", "heads"), [(4, 4), (32, 8), (3, 5)])
def test_retrieval_heads_are_spread_evenly(ratio: float, layers: int, heads: int) -> None:
    found = spread(ratio, layers, heads)
    counts = [len(set(row)) for row in found]
    assert sum(counts) == round(ratio * layers * heads)
    assert max(counts) - min(counts) <= 1
    assert all(0 <= head < heads for row in found for head in row)


def test_the_presets_hold_what_the_tables_need() -> None:
    jobs = {name: preset(name) for name in PRESETS}
    assert all(len(set(found)) == len(found) for found in jobs.values())
    decode = {(job.model, job.method, job.length // K, job.ratio) for job in jobs["decode-table"]}
    assert decode == {
        ("llama-3-8b", "transformers", 128, 1.0), ("llama-3-8b", "full", 128, 1.0), ("llama-3-8b", "duo", 128, 0.5),
        ("llama-3-8b", "full", 400, 1.0), ("llama-3-8b", "duo", 400, 0.5), ("llama-3-8b", "duo", 512, 0.5),
        ("llama-2-7b", "full", 100, 1.0), ("llama-2-7b", "duo", 100, 0.25),
    }  # fmt: skip
    prefill = {(j.model, j.method, j.length // K, j.chunk // K) for j in jobs["prefill-table"]}
    assert prefill >= {("llama-3-8b", method, 128, 32) for method in METHODS}
    assert prefill >= {("llama-2-7b", m, 100, c) for m in ("full", "duo") for c in (10, 100)}
    long = {(j.method, j.length // K, j.chunk // K) for j in jobs["long-prefill"]}
    assert long == {(m, 320, c) for m in ("full", "duo") for c in (32, 128)}
    paper = {(j.model, j.length // K) for j in jobs["paper-decode"]}
    assert paper >= {
        ("llama-2-7b", 20),
        ("llama-2-7b", 200),
        ("llama-3-8b", 100),
        ("llama-3-8b", 1000),
    }
    assert {j.ratio for j in jobs["paper-ratio"]} == {1.0, 0.75, 0.5, 0.25, 0.125, 0.0}
    with pytest.raises(ValueError, match="--preset must be one of decode-table"):
        preset("shapes")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"measure": "train"}, "--measure must be one of prefill, decode, share, got 'train'"),
        ({"method": "vllm"}, "--methods must be one of full, duo, transformers, got 'vllm'"),
        ({"model": "gpt"}, "--model must be one of"),
        ({"length": 0}, "--lengths must be at least 1, got 0"),
        ({"chunk": 0}, "--chunks must be at least 1, got 0"),
        ({"batch": 0}, "--batch must be at least 1, got 0"),
        ({"retrieval_ratio": -0.1}, r"--retrieval-ratio must lie in \[0, 1\], got -0.1"),
        ({"weights": "fp4"}, "--weights must be one of"),
        ({"recent": 0}, "recent must be an integer >= 1"),
        ({"measure": "share", "method": "full"}, "--measure share needs heads of both kinds"),
    ],
)
def test_a_senseless_job_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)  # type: ignore[arg-type]


def test_the_bytes_of_a_step_are_those_that_its_heads_see() -> None:
    job = Job("decode", "duo", "llama-3-8b", 1000, retrieval_dtype="fp8", streaming_dtype="int4")
    policy = job.policy().bind(config("llama-3-8b"), dtype=torch.bfloat16)
    assert read_bytes(policy, 1000, 2) == 2 * 32 * 4 * 2 * (1000 * 130 + 320 * 68)
    full = replace(job, method="full", retrieval_dtype="auto", streaming_dtype="auto").policy()
    bound = full.bind(config("llama-3-8b"), dtype=torch.bfloat16)
    assert read_bytes(bound, 1000) == bound.dense_kv_bytes(1000)


# --- results


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("measure", ["prefill", "decode"])
def test_every_method_is_timed_and_its_bytes_are_counted(
    bench: ModelBench, method: str, measure: str
) -> None:
    job = replace(TINY, method=method, measure=measure)
    result = bench.run(job)
    assert isinstance(result, ModelResult) and isinstance(result.timing, Timing)
    numbers = result.numbers(LIMITS)
    json.dumps(numbers, allow_nan=False)
    if method == "transformers":
        assert numbers["kernels"] == "sdpa"
        assert result.error is None
        assert result.kv_bytes == result.policy.dense_kv_bytes(job.length)
    else:
        assert numbers["kernels"] == "tiled"
        assert result.error is not None and result.budget is not None
        assert 0 <= result.error <= result.budget
        assert result.kv_bytes == result.policy.kv_bytes(job.length)
    if measure == "decode":
        floor = (result.weight_bytes_read + read_bytes(result.policy, 300 - 28)) / 3000e6
        assert numbers["floor_ms"] == pytest.approx(floor)
        assert numbers["over_floor"] == pytest.approx(numbers["decode_median_ms"] / floor)
        assert numbers["decode_runs"] == model_bench.BURSTS - 1
        assert "x floor" in model_line(result, LIMITS)
    else:
        assert numbers["tokens_per_s"] == pytest.approx(3e5 / numbers["prefill_median_ms"])
    assert describe_job(job) in model_line(result, LIMITS)


@pytest.mark.parametrize(
    ("tokens", "impl", "names"),
    [
        (1, "triton", "triton_decode"),
        (20, "triton", "retrieval triton_prefill, streaming triton_prefill"),
        (20, "reference", "retrieval reference, streaming reference"),
        (1, "tiled", "tiled"),
    ],
)
def test_a_record_names_the_kernels_that_attend(tokens: int, impl: str, names: str) -> None:
    made = build("tiny", device=CPU, dtype=torch.float32)
    cache = DuoCache(TINY.policy(), made, max_length=200)
    cache.allocate(1, dtype=torch.float32, device=CPU)
    fill(cache, 150)
    heads = made.config.num_attention_heads
    assert kernels_of(cache, heads=heads, tokens=tokens, impl=impl) == names


def test_streaming_heads_that_keep_every_token_are_called_streaming() -> None:
    made = build("tiny", device=CPU, dtype=torch.float32)
    cache = DuoCache(replace(TINY.policy(), evict=False), made, max_length=200)
    cache.allocate(1, dtype=torch.float32, device=CPU)
    fill(cache, 150)
    found = kernels_of(cache, heads=made.config.num_attention_heads, tokens=20, impl="reference")
    assert found == "retrieval reference, streaming reference"


def test_jobs_that_allow_it_share_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    right = model_bench.runner

    def counted(*args, **options):
        made.append(options["max_length"])
        return right(*args, **options)

    monkeypatch.setattr(model_bench, "runner", counted)
    bench = ModelBench(CPU, torch.float32, seconds=0.0)
    results = [bench.run(replace(TINY, length=length, room=400)) for length in (200, 400)]
    assert made == [400]
    assert [result.kv_bytes for result in results] == [results[0].policy.kv_bytes(400)] * 2
    assert results[0].kv_bytes_read < results[1].kv_bytes_read
    prefills = [bench.run(replace(TINY, measure="prefill", chunk=chunk)) for chunk in (100, 300)]
    assert made == [400, 300]
    assert prefills[0].timing.first_ms == prefills[1].timing.first_ms
    bench.run(replace(TINY, measure="prefill", method="full"))
    bench.run(replace(TINY, method="transformers", length=100))
    assert made == [400, 300, 300, 100]
    assert bench._kept is None
    # The model is as it was, so it takes a policy again.
    bench.run(replace(TINY, room=500))
    bench.drop()


def test_the_part_of_the_streaming_heads_is_measured(bench: ModelBench) -> None:
    result = bench.run(replace(TINY, measure="share"))
    assert isinstance(result, ShareResult)
    numbers = result.numbers(LIMITS)
    both = numbers["streaming_attention_ms"] + numbers["retrieval_attention_ms"]
    assert numbers["streaming_share"] == pytest.approx(numbers["streaming_attention_ms"] / both)
    assert 0 <= numbers["error"] <= numbers["error_budget"]
    assert numbers["kernels"] == "retrieval tiled, streaming tiled"
    assert "streaming heads" in model_line(result, LIMITS)


def test_a_share_that_is_wrong_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    from duohead.bench import shares

    right = shares.attention.prefill
    monkeypatch.setattr(shares.attention, "prefill", lambda *a, **k: right(*a, **k) * 1.01)
    case = Case("prefill", 200, 4, 2, 32, recent=32, retrieval_ratio=0.5)
    with pytest.raises(ValueError, match="prefill at 100 tokens is off by"):
        attention_share(case, Place(CPU, torch.float32, 0.0), chunk=100)
    with pytest.raises(ValueError, match="chunk must be at least 1 token"):
        attention_share(case, Place(CPU, torch.float32, 0.0), chunk=0)


def test_a_wrong_model_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = verify._logits

    def wrong(model, policy, tokens, impl):
        return right(model, policy, tokens, "tiled") * (1.1 if impl == "tiled" else 1.0)

    made = build("tiny", device=CPU, dtype=torch.float32)
    error, budget = verify.verify(made, TINY.policy())
    assert error <= budget
    monkeypatch.setattr(verify, "_logits", wrong)
    monkeypatch.setattr(verify, "choose", lambda *_, **__: "triton")
    verify.verify(made, TINY.policy(), impl="triton")
    monkeypatch.setattr(
        verify,
        "_logits",
        lambda m, p, t, i: right(m, p, t, "tiled") * (1.1 if i == "triton" else 1),
    )
    with pytest.raises(ValueError, match="logits under triton are off by .* no speed is reported"):
        verify.verify(made, TINY.policy(), impl="triton")


def test_too_little_memory_is_written_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(runners, "Engine", full)
    result = ModelBench(CPU, torch.float32).run(TINY)
    assert isinstance(result, ModelResult)
    assert result.timing == "out of memory"
    assert not result.failed
    assert result.numbers(LIMITS)["decode_median_ms"] == "out of memory"
    assert model_line(result, LIMITS).endswith("out of memory")


def test_a_failure_is_told_unless_it_must_not_happen(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise RuntimeError("a kernel\n died")

    monkeypatch.setattr(runners, "Engine", broken)
    bench = ModelBench(CPU, torch.float32)
    result = bench.run(TINY, strict=False)
    assert result.failed
    assert isinstance(result, ModelResult)
    assert result.timing == "failed: RuntimeError: a kernel died"
    with pytest.raises(RuntimeError, match="a kernel"):
        bench.run(TINY)


# --- the command


def test_the_command_reports_and_records(tmp_path: Path, capsys) -> None:
    target = tmp_path / "model.jsonl"
    command = "bench model --lengths 300 --chunks 128 --measure decode share --seconds 0 --device cpu --recent 32"
    assert main([*command.split(), "--json", str(target)]) == 0
    out = capsys.readouterr().out
    assert "x floor" in out and "streaming heads" in out and "ceilings here" in out
    entries = [json.loads(line) for line in target.read_text().splitlines()]
    assert [(entry["op"], entry["impl"]) for entry in entries] == [
        ("model.decode", "full"), ("model.decode", "duo"), ("model.decode", "transformers"), ("model.share", "duo"),
    ]  # fmt: skip
    assert entries[1]["shape"]["retrieval_ratio"] == 0.5
    assert entries[0]["shape"]["retrieval_ratio"] == 1.0
    assert entries[0]["shape"]["attention"] == "tiled"
    assert entries[2]["shape"]["attention"] == "sdpa"
    assert entries[0]["policy"] != entries[1]["policy"]


def test_a_preset_ends_with_an_error_if_a_job_failed(monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setitem(PRESETS, "paper-ratio", lambda: iter([TINY, replace(TINY, length=200)]))
    monkeypatch.setattr(
        model_bench, "verify", lambda *_, **__: (_ for _ in ()).throw(ValueError("off"))
    )
    target = tmp_path / "model.jsonl"
    command = [
        "bench",
        "model",
        "--preset",
        "paper-ratio",
        "--device",
        "cpu",
        "--json",
        str(target),
    ]
    assert main(command) == 1
    capsys.readouterr()
    told = [json.loads(x)["numbers"]["decode_median_ms"] for x in target.read_text().splitlines()]
    assert told == ["failed: ValueError: off"] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--methods", "vllm"], "--methods must be one of"),
        (["--model", "gpt"], "--model must be one of"),
        (["--impl", "magic"], "impl must be one of"),
        (["--preset", "shapes"], "--preset must be one of"),
        (["--weights", "fp4"], "--weights must be one of"),
        (["--device", "nowhere"], "device 'nowhere' cannot be used"),
    ],
)
def test_a_wrong_argument_is_one_line(capsys, change: list[str], message: str) -> None:
    assert main(["bench", "model", "--lengths", "20", *change]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("duohead")]
    assert len(lines) == 1
    assert message in lines[0]

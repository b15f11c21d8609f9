"""`duohead bench kernels`: what is timed is right, what is recorded is whole, what cannot run is told."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from duohead.bench import baselines, kernels, timing
from duohead.bench.card import describe, kernel_line
from duohead.bench.cases import OPERATIONS, PRESETS, Case, preset
from duohead.bench.ceilings import Ceilings, ceilings
from duohead.bench.kernels import OUT_OF_MEMORY, Place, Result, run_baselines, run_case
from duohead.bench.timing import Timing, input_sets, measure, measure_rotated
from duohead.cli import main

CPU = torch.device("cpu")
PLACE = Place(CPU, torch.float32, seconds=0.0)
LIMITS = Ceilings(3000.0, "sum", 700.0, "bfloat16", 50 << 20)
SMALL = {"heads": 4, "kv_heads": 2, "head_dim": 32, "recent": 24, "sink": 4}


def small(op: str, length: int = 200, **changes: object) -> Case:
    return Case(op, length, **{**SMALL, **changes})  # type: ignore[arg-type]


def test_measure_counts_the_warm_up_apart() -> None:
    calls: list[int] = []
    found = measure(lambda: calls.append(1), device=CPU, seconds=0, least=5)
    assert (found.runs, len(calls), found.graph_calls) == (5, 6, 0)
    assert found.p20_ms <= found.median_ms <= found.p80_ms


def test_calls_are_taken_in_turn() -> None:
    order: list[int] = []
    calls = [lambda i=i: order.append(i) for i in range(3)]
    found = measure_rotated(calls, device=CPU, seconds=0, least=6)
    assert order[4:] == [0, 1, 2, 0, 1, 2]
    assert found.runs == 6


def test_a_summary_of_times_is_the_median_with_its_spread() -> None:
    found = timing.timing_of([5.0, 1.0, 3.0, 2.0, 4.0], first_ms=9.0, graph_calls=2)
    assert found == Timing(3.0, 1.8, 4.2, 9.0, 5, 2)
    assert timing.timing_of([2.0], first_ms=1.0).p80_ms == 2.0


def test_inputs_are_rotated_until_twice_the_cache_has_passed() -> None:
    assert input_sets(200, 50) == 2
    assert input_sets(30, 50) == 5
    assert all((input_sets(size, 50) - 1) * size >= 100 for size in (7, 20, 99, 100, 101))
    assert input_sets(1, 50) == 16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: measure(lambda: None, device=CPU, least=0), "least must be at least 1 run, got 0"),
        (lambda: measure_rotated([], device=CPU), "calls must hold at least one call"),
    ],
)
def test_senseless_measurements_are_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_the_ceilings_of_this_machine_are_measured_once() -> None:
    found = ceilings(CPU)
    assert found is ceilings(CPU)
    assert found.read_gb_per_s > 0.1
    assert found.matmul_tflop_per_s > 1e-4
    assert set(found.numbers()) == {
        "read_ceiling_gb_per_s", "read_ceiling_by", "matmul_ceiling_tflop_per_s", "matmul_ceiling_dtype",
    }  # fmt: skip


def test_bytes_and_operations_are_those_that_a_mask_counts() -> None:
    from duohead.mask import dense_mask

    for case in (
        small("prefill", retrieval_ratio=0.5),
        small("prefill", retrieval_ratio=0.5, past=77),
        small("streaming", length=20),
        small("streaming", past=3),
    ):
        policy = case.policy()
        mask = dense_mask(case.length, policy.layers[0], sink=case.sink, recent=case.recent)
        pairs = int(mask[:, case.past :].sum()) * case.heads // case.kv_heads
        assert case.flops() == 4 * pairs * case.head_dim
    case = small("decode", retrieval_ratio=0.5, batch=3, streaming_dtype="int4")
    assert case.kv_bytes(torch.bfloat16) == 3 * 2 * (200 * 32 * 2 + 28 * (16 + 4))
    assert case.full_kv_bytes(torch.bfloat16) == 3 * 2 * 2 * 200 * 32 * 2


def test_retrieval_heads_are_as_many_as_asked_and_spread() -> None:
    case = Case("decode", 64, retrieval_ratio=0.5)
    assert case.policy().layers[0].retrieval == (0, 2, 4, 6)
    assert Case("streaming", 64).policy().layers[0].retrieval == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"op": "attend"}, "--op must be one of streaming, prefill, decode, append, got 'attend'"),
        ({"length": 0}, "--lengths must be at least 1, got 0"),
        ({"kv_heads": 0}, "--kv-heads must be at least 1, got 0"),
        ({"sink": -1}, "--sink must be at least 0, got -1"),
        ({"heads": 5}, "--heads must be a multiple of --kv-heads, got 5 and 2"),
        ({"retrieval_ratio": 1.5}, r"--retrieval-ratio must lie in \[0, 1\], got 1.5"),
        ({"op": "prefill", "past": 200}, "the new tokens must be at least 1 and fit --lengths 200"),
        ({"op": "decode", "queries": 201}, "got --past 0 and --queries 201"),
        ({"streaming_dtype": "int3"}, "streaming_dtype must be one of"),
    ],
)
def test_a_senseless_case_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Case(**{"op": "streaming", "length": 200, **SMALL, **changes})  # type: ignore[arg-type]


def test_the_presets_hold_the_shapes_of_their_tables() -> None:
    cases = {name: preset(name) for name in PRESETS}
    assert all(len(set(found)) == len(found) for found in cases.values())
    decode = cases["decode-table"]
    assert {case.length for case in decode} == {8192, 32768, 131072, 524288}
    assert {(case.heads, case.kv_heads, case.head_dim) for case in decode} == {(32, 8, 128)}
    assert {(case.retrieval_ratio, case.retrieval_dtype) for case in decode} >= {
        (1.0, "auto"), (0.5, "auto"), (1.0, "fp8"), (1.0, "int4"),
    }  # fmt: skip
    streaming = [case for case in cases["prefill-table"] if case.op == "streaming"]
    assert {(case.length, case.sink, case.recent) for case in streaming if not case.past} == {
        (length, 128, 256) for length in (8192, 32768, 131072)
    }
    rotated = [case for case in cases["rotation"] if case.retrieval_dtype == "int4-hadamard"]
    plain = [replace(case, retrieval_dtype="int4", streaming_dtype="int4") for case in rotated]
    assert {*rotated, *plain} == {*cases["rotation"]}
    shapes = cases["shapes"]
    assert any(case.batch == 8 and case.length == 65536 for case in shapes)
    assert {case.heads // case.kv_heads for case in shapes} >= {1, 4, 7}
    assert {case.sink for case in shapes} >= {0, 4, 64, 128}
    assert {case.recent for case in shapes} >= {64, 256, 1024, 8192}
    assert {case.head_dim for case in shapes} == {64, 128}
    with pytest.raises(ValueError, match="--preset must be one of decode-table, prefill-table"):
        preset("paper")


@pytest.mark.parametrize("op", [op for op in OPERATIONS if op != "append"])
@pytest.mark.parametrize("impl", ["tiled", "reference"])
def test_every_operation_passes_the_oracle_and_gets_a_time(op: str, impl: str) -> None:
    case = small(op, retrieval_ratio=0.5, streaming_dtype="int8")
    result = run_case(case, PLACE, impl=impl, rivals=run_baselines(case, ["sdpa"], PLACE))
    assert isinstance(result.outcome, Timing)
    assert result.error is not None and result.budget is not None
    assert 0 <= result.error <= result.budget
    numbers = result.numbers(LIMITS)
    json.dumps(numbers, allow_nan=False)
    assert numbers["speedup"] == numbers["causal_sdpa_median_ms"] / numbers[f"{op}_median_ms"]
    share = "share_of_read_ceiling" if op == "decode" else "share_of_matmul_ceiling"
    assert numbers[share] > 0
    assert f"{op} 200 tokens" in kernel_line(result, LIMITS)


def test_a_record_names_the_kernels_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    case = small("prefill", retrieval_ratio=0.5)
    query, views, _ = kernels.case_inputs(case, PLACE, 0)
    assert kernels.what_runs(case, query, views, "auto") == "tiled"
    assert kernels.what_runs(case, query, views, "reference") == "reference"
    made = {True: "cute_prefill", False: "hopper_prefill"}
    monkeypatch.setattr(kernels, "kernel_name", lambda query, view, impl: made[view.retrieval])
    assert kernels.what_runs(case, query, views, "auto") == "cute+hopper"
    made[True] = "hopper_prefill"
    assert kernels.what_runs(case, query, views, "auto") == "hopper"
    made[True] = "tiled"
    assert kernels.what_runs(case, query, views, "auto") == "tiled"
    monkeypatch.setattr(kernels.attention, "reads_storage", lambda *_, **options: True)
    assert kernels.what_runs(small("decode"), query, views, "auto") == "triton"


def test_several_queries_and_a_past_pass_too() -> None:
    for case in (
        small("decode", queries=5, retrieval_ratio=0.5),
        small("prefill", past=120, retrieval_ratio=0.5, retrieval_dtype="fp8"),
        small("streaming", past=120),
        small("decode", length=1),
    ):
        assert isinstance(run_case(case, PLACE, impl="tiled").outcome, Timing)


def test_a_wrong_result_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.attention.prefill
    monkeypatch.setattr(
        kernels.attention, "prefill", lambda *args, **options: right(*args, **options) * 1.01
    )
    with pytest.raises(ValueError, match="streaming by tiled is off by .* no speed is reported"):
        run_case(small("streaming"), PLACE, impl="tiled")
    result = run_case(small("streaming"), PLACE, impl="tiled", strict=False)
    assert str(result.outcome).startswith("failed: ValueError: streaming by tiled is off by")
    assert result.numbers(LIMITS)["streaming_median_ms"] == result.outcome


def test_a_wrong_baseline_has_no_time_either(monkeypatch: pytest.MonkeyPatch) -> None:
    right = baselines.attend
    monkeypatch.setattr(
        kernels.baselines, "attend", lambda *args, **options: right(*args, **options) * 1.01
    )
    assert str(run_baselines(small("prefill"), ["sdpa"], PLACE)["sdpa"]).startswith(
        "not available: off by"
    )


def test_a_baseline_that_breaks_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise TypeError("no such\n argument")

    monkeypatch.setattr(kernels, "_timed_baseline", broken)
    assert run_baselines(small("prefill"), ["fa4"], PLACE) == {
        "fa4": "not available: TypeError: no such argument"
    }
    monkeypatch.setattr(baselines, "_sdpa", broken)
    x = torch.zeros(1, 2, 8, 16)
    with pytest.raises(baselines.Unavailable, match="TypeError: no such argument"):
        baselines.attend("sdpa", x, x, x, scale=1.0)


def test_too_little_memory_is_written_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(kernels.attention, "prefill", full)
    monkeypatch.setattr(kernels.baselines, "attend", full)
    case = small("prefill")
    rivals = run_baselines(case, ["sdpa", "sdpa-flash"], PLACE)
    result = run_case(case, PLACE, rivals=rivals)
    assert result.outcome == OUT_OF_MEMORY == "out of memory"
    numbers = result.numbers()
    assert numbers["prefill_median_ms"] == numbers["sdpa_flash_median_ms"] == "out of memory"
    assert "speedup" not in numbers and "error" not in numbers
    assert result.fastest is None
    assert kernel_line(result, None).endswith("out of memory")


def test_the_fastest_baseline_is_the_one_to_beat() -> None:
    slow, fast = Timing(2.0, 2.0, 2.0, 2.0, 5), Timing(1.5, 1.5, 1.5, 1.5, 5)
    rivals = {"sdpa-flash": slow, "sdpa-cudnn": fast, "fa4": "not available: no GPU"}
    result = Result(
        small("decode"), "triton", torch.bfloat16, Timing(0.5, 0.5, 0.5, 9.0, 5, 40), rivals
    )
    assert result.fastest == ("sdpa-cudnn", fast)
    assert result.numbers()["speedup"] == 3.0
    assert "3.00 times faster than sdpa-cudnn 1.50 ms" in kernel_line(
        replace(result, error=1e-4, budget=2e-4), LIMITS
    )


@pytest.mark.parametrize(
    ("name", "window", "message"),
    [
        ("sdpa-cudnn", None, "backend"),
        ("fa4", None, "flash-attn-4 is not installed|CUDA"),
        ("sdpa", (4, 16), "sdpa knows no mask of streaming heads"),
    ],
)
def test_a_baseline_that_cannot_run_says_why(name: str, window, message: str) -> None:
    x = torch.zeros(1, 2, 8, 16)
    with pytest.raises(baselines.Unavailable, match=message):
        baselines.attend(name, x, x, x, scale=1.0, window=window)


def test_cases_of_the_same_size_share_their_baselines() -> None:
    case = small("decode")
    same = [replace(case, retrieval_ratio=0.5, sink=9), replace(case, streaming_dtype="int4")]
    assert {kernels.baseline_key(other) for other in [case, *same]} == {kernels.baseline_key(case)}
    other = replace(small("streaming"), sink=9)
    assert kernels.baseline_key(other) != kernels.baseline_key(small("streaming"))


def test_a_case_is_described_by_what_is_special() -> None:
    case = Case(
        "decode", 131072, retrieval_ratio=0.5, retrieval_dtype="fp8", streaming_dtype="int4"
    )
    assert describe(case) == "decode 131,072 tokens H32/8 D128 50% 64+256 fp8/int4"
    assert describe(Case("streaming", 8, batch=2)) == "streaming 8 tokens B2 H32/8 D128 64+256"


def test_the_command_reports_and_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "made" / "prefill.jsonl"
    few = ["--lengths", "300", "600", "--recent", "64", "--seconds", "0", "--json", str(target)]
    assert main(["bench", "kernels", *few, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "times" in out and "than sdpa" in out and "ceilings here: read" in out
    entries = [json.loads(line) for line in target.read_text().splitlines()]
    assert [entry["shape"]["length"] for entry in entries] == [300, 600]
    for entry in entries:
        assert (entry["op"], entry["impl"]) == ("prefill.streaming", "tiled")
        assert entry["policy"] is not None
        numbers = entry["numbers"]
        assert 0 <= numbers["error"] <= numbers["error_budget"]
        assert (
            numbers["speedup"] == numbers["causal_sdpa_median_ms"] / numbers["streaming_median_ms"]
        )


def test_a_preset_goes_on_after_a_failure_and_ends_with_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PRESETS, "shapes", lambda: iter([small("decode"), small("prefill")]))
    target = tmp_path / "r.jsonl"
    command = [
        "bench",
        "kernels",
        "--preset",
        "shapes",
        "--impl",
        "tiled",
        "cute",
        "--device",
        "cpu",
    ]
    assert main([*command, "--seconds", "0", "--json", str(target)]) == 1
    capsys.readouterr()
    entries = [json.loads(line) for line in target.read_text().splitlines()]
    assert [(entry["op"], entry["impl"]) for entry in entries] == [
        ("decode", "tiled"), ("decode", "cute"), ("prefill", "tiled"), ("prefill", "cute"),
    ]  # fmt: skip
    assert entries[1]["numbers"]["decode_median_ms"].startswith("failed: ValueError: impl='cute'")
    assert entries[2]["numbers"]["prefill_median_ms"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--op", "attend"], "--op must be one of"),
        (["--impl", "magic"], "impl must be one of"),
        (["--impl", "cute", "--device", "cpu"], "impl='cute' cannot run here"),
        (["--baselines", "fa9"], "--baselines must be among sdpa, sdpa-flash"),
        (["--preset", "paper"], "--preset must be one of"),
        (["--lengths", "0"], "--lengths must be at least 1, got 0"),
        (["--preset", "shapes"], "--lengths: a --preset has its own; leave one of the two out"),
        (["--queries", "1"], "--queries: of no use here, only with --op decode or append"),
        (["--op", "decode", "append", "--past", "9"], "--past: of no use here, only with --op streaming or prefill"),
        (["--retrieval-ratio", "0.5"], "--retrieval-ratio: of no use here, only with --op prefill or"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_one_line(
    capsys: pytest.CaptureFixture[str], change: list[str], message: str
) -> None:
    assert main(["bench", "kernels", "--lengths", "20", "--seconds", "0", *change]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("duohead")]
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.parametrize("window", [None, (4, 100), (200, 64), (0, 300)])
@pytest.mark.parametrize("past", [0, 128, 77])
def test_the_block_mask_of_flex_attention_is_the_mask(window, past: int) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    made = baselines._block_mask(640, 640 + past, window, "cpu")
    exact = create_block_mask(made.mask_mod, None, None, 640, 640 + past, device="cpu")
    # A block may be visited that shows nothing, but none may be missing or called full that is not.
    ours, theirs = made.to_dense()[0, 0].bool(), exact.to_dense()[0, 0].bool()
    assert not (theirs & ~ours).any()
    if past % 128 == 0:
        assert torch.equal(ours, theirs)
    whole = torch.zeros_like(ours)
    for row, count in enumerate(made.full_kv_num_blocks[0, 0]):
        whole[row, made.full_kv_indices[0, 0, row, :count].long()] = True
    dense = torch.nn.functional.pad(
        made.mask_mod(None, None, torch.arange(640)[:, None], torch.arange(640 + past)[None]),
        (0, -past % 128),
    )
    blocks = dense.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).all(3).all(1)
    assert not (whole & ~blocks).any()


def test_a_checkout_without_its_history_names_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    from duohead import record

    monkeypatch.setattr(record, "_output", lambda *_: None)
    monkeypatch.setenv("DUOHEAD_COMMIT", "0123abc")
    assert record._commit.__wrapped__() == "0123abc"
    monkeypatch.setenv("DUOHEAD_COMMIT", "")
    assert record._commit.__wrapped__() is None

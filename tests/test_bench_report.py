"""Pictures and tables from benchmark records: every point is a record, what ran out of memory is told."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from duohead.bench.figures import figures, newest
from duohead.bench.plots import write_page
from duohead.cli import main

K = 1024
MACHINE = {"gpus": ["Test GPU 80GB"], "cpu": "c", "cores": 2}
LIMITS = {"read_ceiling_gb_per_s": 3000.0, "matmul_ceiling_tflop_per_s": 700.0}


def entry(op: str, impl: str, shape: dict[str, Any], numbers: dict[str, Any]) -> dict[str, Any]:
    return {
        "op": op, "impl": impl, "shape": shape, "dtype": "bfloat16", "policy": "feed", "numbers": {**numbers, **LIMITS},
        "hardware": MACHINE, "versions": {"torch": "2.11.0", "transformers": "5.17.0", "triton": None},
        "commit": "abc", "time": "2026-11-21T06:00:00+00:00",
    }  # fmt: skip


def kernel(op: str, length: int, ms: float | str, **shape: Any) -> dict[str, Any]:
    usual = {
        "length": length, "heads": 32, "kv_heads": 8, "head_dim": 128, "batch": 1, "sink": 64, "recent": 256,
        "retrieval_ratio": 1.0, "queries": 1, "past": 0, "retrieval_dtype": "auto", "streaming_dtype": "auto",
    }  # fmt: skip
    name = op.rpartition(".")[2]
    numbers: dict[str, Any] = {
        f"{name}_median_ms": ms,
        "sdpa_cudnn_median_ms": 0.2,
        "flex_median_ms": 0.9,
    }
    if isinstance(ms, float):
        numbers |= {
            "speedup": 0.2 / ms, "fastest_baseline": "sdpa-cudnn", "share_of_read_ceiling": 0.9,
            "read_gb_per_s": 2700.0, "share_of_matmul_ceiling": 0.5,
        }  # fmt: skip
    return entry(op, shape.pop("impl", "triton"), usual | shape, numbers)


def model(measure: str, impl: str, length: int, ms: float | str, **shape: Any) -> dict[str, Any]:
    usual = {
        "model": "llama-3-8b", "length": length, "retrieval_ratio": 0.5 if impl == "duo" else 1.0, "sink": 64,
        "recent": 256, "retrieval_dtype": "auto", "streaming_dtype": "auto", "batch": 1, "weights": "bf16",
        "compile": "auto", "attention": "triton",
    }  # fmt: skip
    numbers: dict[str, Any] = {f"{measure}_median_ms": ms}
    if not isinstance(ms, str):
        numbers |= {"peak_bytes": 30 << 30, "weight_bytes": 16 << 30, "kv_bytes": 8 << 30}
        if measure == "decode":
            numbers |= {"floor_ms": 0.9 * ms, "over_floor": 1 / 0.9}
    return entry(f"model.{measure}", impl, usual | shape, numbers)


def records() -> list[dict[str, Any]]:
    found = []
    for length in (8 * K, 32 * K, 128 * K):
        found += [
            kernel("decode", length, length / 1e6),
            kernel("decode", length, length / 2e6, retrieval_ratio=0.5),
        ]
        found.append(
            kernel("decode", length, length / 2e6, retrieval_dtype="fp8", streaming_dtype="fp8")
        )
        found += [
            kernel("prefill.streaming", length, length / 1e5, impl=impl, sink=128)
            for impl in ("triton", "cute")
        ]
        found += [
            model("decode", method, length, 10.0) for method in ("full", "duo", "transformers")
        ]
    found.append(model("decode", "full", 512 * K, "out of memory"))
    found += [
        model("decode", "duo", 128 * K, 5 + 10 * r, retrieval_ratio=r) for r in (0.0, 0.25, 0.75)
    ]
    for chunk in (10 * K, 100 * K):
        found += [
            model("prefill", method, 100 * K, 5000.0, chunk=chunk) for method in ("full", "duo")
        ]
    share = {"streaming_share": 0.04, "streaming_attention_ms": 4.0, "retrieval_attention_ms": 96.0}
    found.append(
        entry(
            "model.share", "duo", {"model": "llama-3-8b", "length": 128 * K, "chunk": 32 * K}, share
        )
    )
    numbers = {
        "tokens": 4_200_000, "estimated_tokens": 4_200_000, "decode_median_ms": 30.0, "floor_ms": 26.0,
        "over_floor": 30 / 26, "kv_bytes": 70 << 30, "weight_bytes": 8 << 30, "peak_bytes": 79 << 30,
        "beyond_tokens": 4_326_000, "beyond": "out of memory", "prefill_tokens": 524288, "prefill_seconds": 90.0,
        "prefill_peak_bytes": 20 << 30,
    }  # fmt: skip
    shape = {"model": "llama-3-8b", "length": 4_200_000, "weights": "int8", "retrieval_dtype": "int4",
             "streaming_dtype": "int4", "retrieval_ratio": 0.5}  # fmt: skip
    found.append(entry("capacity", "duo", shape, numbers))
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in records()))
    return path


def test_every_point_of_a_picture_is_a_record() -> None:
    found = {figure.name: figure for figure in figures(records())}
    assert set(found) == {
        "decode-kernels", "streaming-kernels", "decode-time-llama-3-8b", "decode-memory-llama-3-8b",
        "prefill-llama-3-8b-102400", "ratio-llama-3-8b-131072",
    }  # fmt: skip
    kernels = found["decode-kernels"].series
    assert set(kernels) == {"100% bf16", "50% bf16", "100% fp8"}
    assert kernels["100% bf16"][8 * K] == pytest.approx(0.2 / (8 * K / 1e6))
    time = found["decode-time-llama-3-8b"]
    assert time.series["full"] == {8 * K: 10.0, 32 * K: 10.0, 128 * K: 10.0}
    assert time.missing == ["full at 512K: out of memory"]
    assert found["decode-memory-llama-3-8b"].series["duo"][8 * K] == 30.0
    ratios = found["ratio-llama-3-8b-131072"].series["measured"]
    assert sorted(ratios) == [0, 25, 50, 75, 100]
    assert found["prefill-llama-3-8b-102400"].series["duo"] == {10 * K: 5.0, 100 * K: 5.0}


def test_the_newest_record_of_a_shape_counts() -> None:
    old, new = model("decode", "duo", 8 * K, 9.0), model("decode", "duo", 8 * K, 8.0)
    other = model("decode", "duo", 8 * K, 7.0, batch=2)
    assert newest([old, other, new], "model.decode") == [other, new]


def test_machines_are_not_mixed() -> None:
    here, there = model("decode", "duo", 8 * K, 9.0), model("decode", "duo", 16 * K, 8.0)
    there["hardware"] = {**MACHINE, "gpus": ["Another GPU"]}
    assert newest([here, there], "model.decode") == [there]
    assert newest([there, here], "model.decode") == [here]


def test_other_storage_is_a_line_of_its_own_and_in_no_table_of_models(root: Path) -> None:
    tables = readme(root).speed_tables
    lines = [line for line in records() if line["op"].startswith("model.")]
    stored = {"retrieval_dtype": "int4", "streaming_dtype": "int4"}
    more = [
        model("decode", "duo", 128 * K, 1.0, **stored),
        model("decode", "full", 128 * K, 1.0, **stored),
        model("prefill", "full", 100 * K, 1.0, chunk=10 * K, **stored),
        model("decode", "full", 128 * K, 1.0, weights="int8"),
    ]
    for name in ("model_decode", "model_prefill"):
        assert getattr(tables, name)(lines) == getattr(tables, name)([*lines, *more])
    found = {figure.name: figure for figure in figures([*lines, *more])}
    plain = {figure.name: figure for figure in figures(lines)}
    assert found["ratio-llama-3-8b-131072"].series == plain["ratio-llama-3-8b-131072"].series
    time = found["decode-time-llama-3-8b"].series
    assert time.pop("duo int4") == time.pop("full int4") == {128 * K: 1.0}
    assert time == plain["decode-time-llama-3-8b"].series


def test_the_price_of_a_rotation_is_told_where_both_were_measured(
    root: Path, tmp_path: Path, monkeypatch
) -> None:
    def twice(make: Any, *given: Any, times: tuple[float, float], **shape: Any) -> list[Any]:
        return [
            make(*given, ms, retrieval_dtype=name, streaming_dtype=name, **shape)
            for name, ms in zip(("int4", "int4-hadamard"), times, strict=True)
        ]

    tool = readme(root)
    monkeypatch.setattr(tool, "RESULTS", tmp_path)
    kernels = [
        *twice(kernel, "decode", 32 * K, times=(0.02, 0.021)),
        *twice(kernel, "append", 32 * K, times=(0.002, 0.003)),
        kernel("decode", 8 * K, 0.01, retrieval_dtype="int4", streaming_dtype="int4"),
        kernel("decode", 8 * K, 0.01, retrieval_dtype="int4-hadamard", streaming_dtype="int8"),
        *twice(kernel, "decode", 64 * K, times=("out of memory", 1.0)),  # type: ignore[arg-type]
    ]
    models = twice(model, "decode", "duo", 128 * K, times=(7.0, 7.07), retrieval_ratio=1.0)
    for name, lines in (("kernels", kernels), ("model", models)):
        content = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{name}-h100.jsonl").write_text(content)
    assert tool.made("rotation_cost").splitlines()[2:5] == [
        "| decode attention of a layer, 32K | 20.0 µs | 21.0 µs | +5 % |",
        "| storing a token in a layer, 32K | 2.00 µs | 3.00 µs | +50 % |",
        "| a decode step of Llama-3-8B, 128K | 7.00 ms | 7.07 ms | +1 % |",
    ]


def test_shapes_beside_the_table_do_not_mix_in() -> None:
    lines = [
        kernel("decode", 8 * K, 1.0),
        kernel("decode", 32 * K, 1.0),
        kernel("decode", 32 * K, 9.0, batch=8),
    ]
    (picture,) = figures(lines)
    assert picture.series["100% bf16"][32 * K] == pytest.approx(0.2)


def test_the_page_stands_alone_and_tells_what_ran_out_of_memory(file: Path, tmp_path: Path) -> None:
    write_page(tmp_path / "bench.html", [file])
    page = (tmp_path / "bench.html").read_text()
    assert page.startswith("<!doctype html>")
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert page.count("<svg") == 6
    assert "full at 512K: out of memory" in page
    assert "Test GPU 80GB" in page and "abc" in page
    assert "nan" not in page.lower().replace("nance", "")


def test_pictures_are_drawn(file: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib")
    command = [
        "bench",
        "report",
        str(file),
        "--png",
        str(tmp_path / "png"),
        "--out",
        str(tmp_path / "b.html"),
    ]
    assert main(command) == 0
    assert "wrote" in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "png").iterdir())
    assert len(names) == 6
    assert (tmp_path / "png" / names[0]).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("", ["--out", "x.html"], "no records; make some with --json"),
        ("{}", [], "report needs --out FILE or --png FOLDER"),
        (json.dumps(kernel("decode", 8 * K, 1.0)), ["--png", "p"], "no two points of one line"),
        ("{", ["--out", "x.html"], "line 1: expected one JSON object"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    tmp_path: Path, capsys, monkeypatch, content: str, options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.jsonl").write_text(content)
    assert main(["bench", "report", "r.jsonl", *options]) == 2
    assert message in capsys.readouterr().err


# --- the README's tables


def readme(root: Path) -> Any:
    spec = importlib.util.spec_from_file_location("readme_tool", root / "tools" / "readme.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_of_the_readme_come_from_records(root: Path, tmp_path: Path, monkeypatch) -> None:
    tool = readme(root)
    for name in ("kernels-h100", "model-h100", "capacity-h100"):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in records())
        )
    monkeypatch.setattr(tool, "RESULTS", tmp_path)
    decode = tool.made("decode_kernels")
    assert "| 8K | 0.200 ms (cuDNN) | 0.008 ms, 90 % | 0.004 ms, 90 % |" in decode
    assert "Test GPU 80GB; torch 2.11.0, transformers 5.17.0." in decode
    streaming = tool.made("streaming_kernels")
    assert streaming.splitlines()[2].startswith(
        "| 8K | 0.200 ms (cuDNN) | 0.900 ms | 0.082 ms | 0.082 ms |"
    )
    steps = tool.made("model_decode")
    assert "| Llama-3-8B, 512K |  | out of memory |  |  |" in steps
    assert "Llama-3-8B, 100K in 10K chunks" in tool.made("model_prefill")
    room = tool.made("capacity")
    assert "4,200,000" in room and "out of memory" in room


def test_a_table_without_records_says_so_and_an_unknown_one_is_an_error(
    root: Path, tmp_path: Path, monkeypatch
) -> None:
    tool = readme(root)
    monkeypatch.setattr(tool, "RESULTS", tmp_path)
    page = "<!-- table: capacity -->\nold\n<!-- end -->"
    assert (
        tool.rendered(page) == "<!-- table: capacity -->\nNothing was measured yet.\n<!-- end -->"
    )
    for file in ("kernels-h100", "model-h100", "capacity-h100"):
        (tmp_path / f"{file}.jsonl").write_text("")
    for name, (file, _) in tool.SOURCES.items():
        if "h100" in file:
            assert tool.made(name) == "Nothing was measured yet.\n"
    assert tool.rendered("no table") == "no table"
    with pytest.raises(ValueError, match="table 'speed' must be one of needles"):
        tool.rendered("<!-- table: speed -->\n<!-- end -->")


def test_prefills_stand_in_the_table_of_their_model_and_length(root: Path) -> None:
    tables = readme(root).speed_tables
    found = [
        model("prefill", impl, length, ms, model=name, chunk=chunk, compile=True, retrieval_ratio=r)
        for name, length, ratio in (("llama-3-8b", 320 * K, 0.5), ("llama-2-7b", 100 * K, 0.25))
        for chunk in (32 * K, 128 * K)
        for impl, ms, r in (("full", 33000.0, 1.0), ("duo", 20000.0, ratio))
    ]
    long, mha = tables.long_prefill(found), tables.mha_prefill(found)
    assert "| Llama-3-8B, 320K in 32K chunks | 33.00 s | 20.00 s, 50 % | 1.65 × |" in long
    assert "| Llama-3-8B, 320K in 128K chunks | 33.00 s | 20.00 s, 50 % | 1.65 × |" in long
    assert "Llama-2-7B" not in long
    assert "| Llama-2-7B, 100K in 32K chunks | 33.00 s | 20.00 s, 25 % | 1.65 × |" in mha
    assert tables.model_prefill(found) == tables.NOTHING
    eager = model("prefill", "duo", 320 * K, 30000.0, chunk=32 * K, compile=False)
    assert "| Llama-3-8B, 320K in 32K chunks |  | 30.00 s, 50 % |  |" in tables.long_prefill(
        [*found, eager]
    ), "compiled and other times are not divided"


def test_the_table_of_shapes_finds_cliffs(root: Path) -> None:
    from duohead.bench.cases import preset

    tables = readme(root).speed_tables
    found = []
    for case in preset("shapes"):
        op = "prefill.streaming" if case.op == "streaming" else case.op
        made = kernel(
            op,
            case.length,
            1.0,
            **{k: v for k, v in vars(case).items() if k not in ("op", "length")},
        )
        if case.batch == 8 and case.retrieval_dtype == "int4":
            made["numbers"]["share_of_read_ceiling"] = 0.6
        if case.head_dim == 64 and case.retrieval_dtype == "fp8":
            made["numbers"]["decode_median_ms"] = "out of memory"
        found.append(made)
    lines = tables.shapes(found).splitlines()
    assert lines[2] == "| of the tables | 90 % | 90 % | 90 % | 90 % | 50 % |  |"
    assert "| batch 8 | 90 % | 90 % | 60 % |  | 50 % | int4 |" in lines
    assert "| kv heads 32 | 90 % | 90 % | 90 % |  | 50 % | none |" in lines
    assert "| head dim 64 | 90 % | out of memory | 90 % |  | 50 % | fp8 |" in lines
    assert "| recent 8192 |  |  |  | 90 % | 50 % | none |" in lines
    assert "| queries 8 |  |  |  | 90 % |  | none |" in lines
    assert "| queries 8 " not in tables.decode_kernels(found), "neighbours have no row there"

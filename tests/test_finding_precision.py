"""The experiment on precision: its cases, the rotation it measures, and the records it leaves."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from duohead import HeadPattern, codec
from tools.findings import precision
from tools.findings.lab import SMALL, Lab
from tools.findings.precision import RATIOS, Case, cases
from tools.findings.rotation import MATRICES, hadamard, rotated

TASKS = {"passkeys", "needle", "number", "keyvalue"}


@pytest.mark.parametrize("kind", sorted(MATRICES))
def test_rotations_are_orthogonal_and_always_the_same(kind: str) -> None:
    made = MATRICES[kind](64)
    assert torch.allclose(made @ made.T, torch.eye(64), atol=1e-6)
    assert torch.equal(made, MATRICES[kind](64))


def test_a_hadamard_matrix_needs_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="size must be a power of two .*, got 96; use 'random'"):
        hadamard(96)


def error(x: torch.Tensor) -> float:
    stored = codec.get("int4", native=torch.float32)
    return float((stored.round_trip(x) - x).square().mean())


def test_a_rotation_helps_where_a_channel_stands_out_and_is_gone_afterwards() -> None:
    even = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    peaked = even.clone()
    peaked[:, 5] += 30
    plain = codec.get("int4", native=torch.float32)
    before = error(even), error(peaked)
    with rotated("hadamard"):
        after = error(even), error(peaked)
        turned = codec.get("int4", native=torch.float32)
        assert turned.name == "int4, hadamard"
        assert turned.vector_bytes(64) == plain.vector_bytes(64)
        assert codec.get("fp8", native=torch.float32).name == "fp8"
    assert codec.get("int4", native=torch.float32) is plain
    assert after[0] == pytest.approx(before[0], rel=0.2)
    assert after[1] < 0.2 * before[1]


def test_cases_differ_and_vary_one_thing_at_a_time() -> None:
    every = list(cases(RATIOS))
    assert len(set(every)) == len(every)
    # Whatever is rotated can be compared with the same storage as it is.
    assert {replace(case, rotation=None) for case in every} <= set(every)


def test_a_case_says_how_its_policy_stores_each_kind_of_head() -> None:
    pattern = HeadPattern.from_alpha([[0.9, 0.1], [0.8, 0.2]], sink=4, recent=8)
    assert Case(1.0, None, None).policy(pattern) is None
    kept = Case(0.5, "fp8", "int8/int4", evict=False).policy(pattern)
    assert kept is not None
    assert (kept.retrieval_dtype, kept.streaming_dtype, kept.evict) == ("fp8", "int8/int4", False)
    assert kept.retrieval_ratio == 0.5
    alike = Case(1.0, "int4", "int4").policy(pattern)
    assert alike is not None and alike.retrieval_ratio == 1


def test_the_experiment_leaves_a_record_for_each_case_and_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def few(ratios: object) -> Iterator[Case]:
        yield Case(1.0, None, None)
        yield Case(0.5, "fp8", "int4")
        yield Case(0.5, "fp8", "int4", evict=False, rotation="hadamard")

    monkeypatch.setattr(precision, "cases", few)
    text = tmp_path / "held-out.txt"
    text.write_text(" ".join(f"word{i} of a text" for i in range(9000)))
    effort = replace(SMALL, prose=(256,))
    out = tmp_path / "found.jsonl"
    lab = Lab.open("pocket", out=out, held_out=[str(text)], device="cpu", effort=effort)
    precision.precision(replace(lab, part=(1, 2)))
    entries = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(e["shape"]["rotation"], e["shape"]["length"]) for e in entries] == [
        (None, 256),
        (None, 1024),
        ("hadamard", 256),
        ("hadamard", 1024),
    ]
    assert [e["policy"] is None for e in entries] == [True, True, False, False]
    (prose, full), (kept_prose, kept) = entries[:2], entries[2:]
    assert prose["numbers"]["kl_nats"] == 0 < kept_prose["numbers"]["kl_nats"] < 1
    assert full["numbers"].keys() == kept["numbers"].keys() == TASKS | {"kv_bytes"}
    # Half of the heads at fp8 and half at int4, of 64 numbers: 66 and 36 bytes in place of 256.
    assert kept["numbers"]["kv_bytes"] / full["numbers"]["kv_bytes"] == pytest.approx(51 / 256)

"""The experiment on precision: its cases, and the records it leaves."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from duohead import HeadPattern, codec
from tools.findings import precision
from tools.findings.lab import SMALL, Lab
from tools.findings.precision import RATIOS, Case, cases

TASKS = {"passkeys", "needle", "number", "keyvalue"}


def unrotated(name: str | None) -> str | None:
    return name and codec.normal(name.replace("-hadamard", ""), field="storage")


def test_cases_differ_and_vary_one_thing_at_a_time() -> None:
    every = list(cases(RATIOS))
    assert len(set(every)) == len(every)
    # Whatever is rotated can be compared with the same storage as it is.
    plain = {
        replace(case, retrieval=unrotated(case.retrieval), streaming=unrotated(case.streaming))
        for case in every
    }
    assert plain < set(every)


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
        yield Case(0.5, "fp8", "int4-hadamard", evict=False)

    monkeypatch.setattr(precision, "cases", few)
    text = tmp_path / "held-out.txt"
    text.write_text(" ".join(f"word{i} of a text" for i in range(9000)))
    effort = replace(SMALL, prose=(256,))
    out = tmp_path / "found.jsonl"
    lab = Lab.open("pocket", out=out, held_out=[str(text)], device="cpu", effort=effort)
    precision.precision(replace(lab, part=(1, 2)))
    entries = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(e["shape"]["streaming"], e["shape"]["length"]) for e in entries] == [
        (None, 256),
        (None, 1024),
        ("int4-hadamard", 256),
        ("int4-hadamard", 1024),
    ]
    assert [e["policy"] is None for e in entries] == [True, True, False, False]
    (prose, full), (kept_prose, kept) = entries[:2], entries[2:]
    assert prose["numbers"]["kl_nats"] == 0 < kept_prose["numbers"]["kl_nats"] < 1
    assert full["numbers"].keys() == kept["numbers"].keys() == TASKS | {"kv_bytes"}
    # Half of the heads at fp8 and half at int4, of 64 numbers: 66 and 36 bytes in place of 256.
    assert kept["numbers"]["kv_bytes"] / full["numbers"]["kv_bytes"] == pytest.approx(51 / 256)

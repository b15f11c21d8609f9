"""The Triton decode kernel on keys and values in formats of their own, and on streaming heads that evict nothing."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from test_triton_decode import (
    Case,
    bf16,
    check,
    check_all,
    fp16,
    fp32,
    poisoned,  # noqa: F401 (a fixture that every test here gets too)
)

from duohead import codec
from duohead.attention import triton_decode_plan
from duohead.cache.view import Segment, StoredView

CODECS = ("auto", "fp8", "int8", "int4")
PAIRS = [f"{keys}/{values}" for keys, values in itertools.permutations(CODECS, 2)]


@pytest.mark.parametrize("dtype", [fp16, fp32, bf16])
@pytest.mark.parametrize(
    ("retrieval", "streaming"), list(zip(PAIRS[::2], PAIRS[1::2], strict=True))
)
def test_keys_and_values_may_be_stored_differently(
    retrieval: str, streaming: str, dtype: torch.dtype
) -> None:
    check(Case(dtype=dtype, retrieval=retrieval, streaming=streaming))


@pytest.mark.parametrize(
    "case",
    [
        Case(length=65, count=3, groups=7, retrieval="fp8/int4", streaming="int4/auto", padding=(0, 9)),
        Case(length=129, dim=192, value_dim=96, retrieval="int4/int8", streaming="auto/int4"),
        Case(length=129, dim=192, value_dim=96, retrieval="int4-hadamard", streaming="int4-hadamard/fp8"),
        Case(length=129, dim=96, value_dim=256, retrieval="int8/int4", streaming="int4/fp8", dtype=torch.float16),
        Case(length=1, retrieval="int4/fp8", streaming="fp8/int4", sink=0, recent=1),
        Case(length=250, window=100, count=5, padding=(0, 200), retrieval="int8/fp8", streaming="fp8/int8"),
        Case(length=180, segments=3, retrieval="bf16/int4", streaming="int4-hadamard/bf16", options={"softcap": 5.0}),
        Case(length=127, kind="all", retrieval="int4/auto", options={"sink_logits": True}, on_device=False),
    ],
    ids=lambda case: f"{case.retrieval}+{case.streaming}",
)  # fmt: skip
def test_pairs_of_codecs_on_shapes_that_hurt(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("dtype", [fp32, bf16])
def test_streaming_heads_that_evict_nothing_see_everything(dtype: torch.dtype) -> None:
    check_all(
        [
            Case(dtype=dtype, evict=False, retrieval="fp8/int4", streaming="int4/fp8", sink=0, recent=1),
            Case(dtype=dtype, evict=False, streaming="int4", count=3, window=70, padding=(0, 90)),
            Case(dtype=dtype, evict=False, kind="none", streaming="int8/int4", segments=2, length=129),
        ]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("heads", "batch"), [((4, 4), 1), ((26, 6), 4), ((6, 26), 4), ((7, 1), 16)], ids=str
)
def test_two_stores_that_keep_every_token_share_a_launch_by_their_bytes(
    heads: tuple[int, int], batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whole rounds of programs that each read about as much; places: two programs on 132 processors each."""
    monkeypatch.setattr(triton_decode_plan, "_processors", lambda device: 132)
    views, sizes = [], []
    for name, count in zip(("fp8", "int4"), heads, strict=True):
        parts = [
            torch.empty(batch, count, 65536, width, dtype=dtype, device="meta")
            for dtype, width in codec.get(name, native=torch.bfloat16).parts(128)
        ]
        sizes.append(2 * sum(part.nbytes for part in parts))
        segments = (Segment(tuple(parts), tuple(parts)),)
        views.append(StoredView(None, (name, name), segments, 0, None, None, None, 65536, None))
    query = torch.empty(batch, 4 * sum(heads), 1, 128, dtype=torch.bfloat16, device="meta")
    (launch,) = triton_decode_plan.make_plan(query, views).launches
    programs = [part.programs for part in launch if part is not None]
    rounds = sum(programs) / 264
    assert rounds / math.ceil(rounds) > 0.9
    reads = [size / count for size, count in zip(sizes, programs, strict=True)]
    assert max(reads) < 1.1 * min(reads)


def test_rotated_storage_is_read_by_the_same_programs_as_the_plain_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton_decode_plan, "_processors", lambda device: 132)
    plans = []
    for name in ("int4", "int4-hadamard", "int4/int4-hadamard"):
        keys, values = codec.pair(name, native=torch.bfloat16)
        parts = [
            tuple(torch.empty(2, 4, 4096, width, dtype=dtype, device="meta") for dtype, width in each.parts(128))
            for each in (keys, values)
        ]  # fmt: skip
        view = StoredView(
            None, (keys.name, values.name), (Segment(*parts),), 0, None, None, None, 4096, None
        )
        query = torch.empty(2, 16, 1, 128, dtype=torch.bfloat16, device="meta")
        plans.append(triton_decode_plan.make_plan(query, [view]))
    found = [(plan.launches[0][0].constants.pop("K_BITS"), plan.bits) for plan in plans]  # type: ignore[union-attr]
    assert found == [(0, (0,)), (7, (7,)), (0, (7,))]
    assert len({repr(replace(plan, bits=())) for plan in plans}) == 1

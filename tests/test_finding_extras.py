"""Additions to streaming heads: their attention against an oracle in fp64, and the records of the experiment."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from duohead.identify.banded import Scores, streaming_attention
from tools.findings import extras as module
from tools.findings.extras import extras, windows
from tools.findings.lab import RECENT, SINK, SMALL, Lab
from tools.findings.streams import Variant, stream

LENGTH, HEADS, GROUPS, SIZE = 300, 2, 3, 8


def qkv() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    sizes = (HEADS * GROUPS, HEADS, HEADS)
    return [torch.randn(2, size, LENGTH, SIZE, generator=draw) for size in sizes]


@pytest.mark.parametrize(("sink", "recent"), [(0, 1), (4, 20), (4, 129), (4, 400)])
def test_streams_without_an_entry_are_streaming_heads(sink: int, recent: int) -> None:
    q, k, v = qkv()
    ours = stream(q, k, v, sink=sink, recent=recent, entry="", scores=Scores())
    theirs = streaming_attention(q, k, v, sink=sink, recent=recent, scores=Scores())
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("entry", ["mean", "count"])
@pytest.mark.parametrize(("sink", "recent"), [(0, 1), (4, 20), (4, 129), (4, 400)])
def test_an_entry_is_one_more_token_with_the_mean_of_the_evicted(
    entry: str, sink: int, recent: int
) -> None:
    q, k, v = qkv()
    ours = stream(q, k, v, sink=sink, recent=recent, entry=entry, scores=Scores(scaling=0.3))
    q, k, v = (x.double() for x in (q, *(x.repeat_interleave(GROUPS, 1) for x in (k, v))))
    for place in (0, sink + recent - 1, sink + recent, 137, LENGTH - 1):
        if place >= LENGTH:
            continue
        first = max(sink, place + 1 - recent)
        seen = [*range(min(sink, place + 1)), *range(first, place + 1)]
        keys, values = k[:, :, seen], v[:, :, seen]
        if first > sink:
            keys, values = (
                torch.cat([x[:, :, seen], x[:, :, sink:first].mean(2, keepdim=True)], 2)
                for x in (k, v)
            )
        logits = (q[:, :, [place]] @ keys.mT)[:, :, 0] * 0.3
        if entry == "count" and first > sink:
            logits[..., -1] += torch.tensor(first - sink).log()
        expected = (logits.softmax(-1)[:, :, None] @ values)[:, :, 0]
        torch.testing.assert_close(ours[:, :, place].double(), expected, rtol=1e-4, atol=1e-5)


def test_unequal_windows_take_no_more_than_equal_ones() -> None:
    order = [3, 0, *range(4, 12), 1, 2]
    uneven = windows(order, [5, 7], 2)
    assert [uneven[head] for head in (3, 0, 5, 7)] == [RECENT, RECENT, 4 * RECENT, 4 * RECENT]
    plain = Variant("", frozenset({3, 0}), (RECENT,) * 12)
    wide = Variant("", frozenset({3, 0}), uneven)
    spare = plain.slots(8192, sink=SINK) - wide.slots(8192, sink=SINK)
    assert 0 <= spare < 8
    entry = Variant("", frozenset({3, 0}), (RECENT - 1,) * 12, "mean")
    assert entry.slots(8192, sink=SINK) == plain.slots(8192, sink=SINK)


def test_the_experiment_leaves_a_record_for_each_variant_and_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TASKS", {"needle": module.TASKS["needle"]})
    text, out = tmp_path / "held-out.txt", tmp_path / "found.jsonl"
    text.write_text(" ".join(f"word{i} of a text" for i in range(9000)))
    effort = replace(SMALL, lengths=(512,))
    lab = Lab.open("pocket", out=out, held_out=[str(text)], device="cpu", effort=effort)
    extras(replace(lab, ratios=(0.75,)))
    entries = [json.loads(line) for line in out.read_text().splitlines()]
    found = {entry["shape"]["variant"]: entry["numbers"] for entry in entries}
    assert list(found) == [
        "plain",
        "entry, mean",
        "entry, mean and count",
        "plain, a head more",
        "plain, windows 4 times as long",
        "1 of 4 times the window",
    ]
    assert [entry["shape"]["heads"] for entry in entries] == [18, 18, 18, 19, 18, 18]
    # 18 of 24 heads keep all tokens, the others 64 + 256.
    slots = {name: numbers["slots"] for name, numbers in found.items()}
    assert slots["plain"] == slots["entry, mean"] == 18 * 512 + 6 * 320
    assert slots["plain, a head more"] == 19 * 512 + 5 * 320
    assert slots["plain, windows 4 times as long"] == 24 * 512
    full = found["plain, windows 4 times as long"]
    assert full["mean"] == full["exact_match"]["needle"] == 100
    # Which of them is lower follows from the heads of the bundled pattern.
    differ = ("plain", "entry, mean", "entry, mean and count", "plain, windows 4 times as long")
    assert len({found[name]["loss"] for name in differ}) == len(differ)

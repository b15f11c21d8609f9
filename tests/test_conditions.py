"""Records that differ in dtype, text, chunk or machine alone stand apart on the page, and it says what differs."""

from __future__ import annotations

import json

import pytest
from pages import Page
from tiny_records import HARDWARE, answer, line

from duohead.evaluate.collect import collect
from duohead.evaluate.conditions import told_apart
from duohead.evaluate.folder_report import render
from duohead.evaluate.scores import means, scored

CHANGES = [
    ({"dtype": "float32"}, {"dtype": "bfloat16"}, "m, float32", "m, bfloat16"),
    (
        {"hardware": {**HARDWARE, "gpus": ["H100"]}},
        {"hardware": {**HARDWARE, "gpus": ["H200"]}},
        "m, H100",
        "m, H200",
    ),
    ({"text": "Emma"}, {"text": "Dracula"}, "m, text Emma", "m, text Dracula"),
    (
        {"text": "Emma", "text_digest": "a1"},
        {"text": "Emma", "text_digest": "b2"},
        "m, text digest a1",
        "m, text digest b2",
    ),
    ({"chunk": None}, {"chunk": 512}, "m, no chunk", "m, chunk 512"),
    ({"limit": 20}, {}, "m, limit 20", "m, no limit"),
]


def changed(text: str, change: dict) -> str:
    """A record with another dtype or hardware, or with other settings in its shape."""
    entry = json.loads(text)
    for name, value in change.items():
        place = entry if name in entry else entry["shape"]
        place[name] = value
    return json.dumps(entry) + "\n"


def both(one: dict, other: dict) -> str:
    """Full attention and identified heads under two conditions; the second ones are worse, and half as large."""
    return "".join(
        changed(answer(method, ratio, score * worth, round(taken * worth)), change)
        for change, worth in ((one, 1.0), (other, 0.5))
        for method, ratio, score, taken in (("full", 1.0, 1.0, 1000), ("duo_50", 0.5, 0.8, 600))
    )


@pytest.mark.parametrize(("one", "other", "first", "second"), CHANGES)
def test_what_differs_is_in_the_name_and_in_no_mean(tmp_path, one, other, first, second) -> None:
    (tmp_path / "a.jsonl").write_text(both(one, other))
    found = collect([tmp_path])
    assert found.replaced == 0
    scores = scored(told_apart(found.entries))
    for name, worth in ((first, 1.0), (second, 0.5)):
        own = {mean.method: mean for mean in means([s for s in scores if s.model == name])}
        assert own["full"].value == worth
        assert own["duo"].value == pytest.approx(0.8 * worth)
        assert own["duo"].footprint == pytest.approx(0.6)
    text = Page(render(found)).text
    assert f"find, {first}" in text and f"find, {second}" in text


def test_what_does_not_differ_is_not_said(tmp_path) -> None:
    lines = [answer("duo_50", 0.5, 0.8, 6, length=n, chunk=512, text="Emma") for n in (10, 20)]
    lines += [answer("duo_50", 0.5, 0.8, 6, task="other", length=10, chunk=512, text="Dracula")]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    entries = told_apart(collect([tmp_path]).entries)
    assert {entry.shape["model"] for entry in entries} == {"m"}


def test_prose_of_two_dtypes_has_two_charts(tmp_path) -> None:
    lines = [
        changed(
            line(
                "evaluate.prose",
                "duo_50",
                shape={"model": "m", "task": "prose", "length": 4096, "retrieval_ratio": 0.5},
                numbers={"kv_bytes": 5, "kl_nats_by_position": parts},
            ),
            {"dtype": dtype},
        )
        for dtype, parts in (("float32", [0.25, 0.5]), ("bfloat16", [0.75, 1.0]))
    ]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    labels = [attrs["aria-label"] or "" for attrs in Page(render(collect([tmp_path]))).charts]
    found = sorted(label for label in labels if "First part" in label)
    assert len(found) == 2
    assert "m, bfloat16" in found[0] and "0.75 to 1." in found[0]
    assert "m, float32" in found[1] and "0.25 to 0.5." in found[1]


def test_an_experiment_on_two_machines_is_two_experiments(tmp_path) -> None:
    lines = [
        changed(
            line(
                "findings.sinks",
                shape={"model": "m", "window": window, "ratio": ratio},
                numbers={"passkeys": score},
            ),
            {"hardware": {**HARDWARE, "gpus": [gpu]}},
        )
        for gpu, score in (("H100", 40.0), ("H200", 60.0))
        for window in ("sink only", "both")
        for ratio in (0.5, 0.25)
    ]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    page = Page(render(collect([tmp_path])))
    assert "Sinks, m, H100" in page.text and "Sinks, m, H200" in page.text
    said = [a["aria-label"] for a in page.charts if "by window" in (a["aria-label"] or "")]
    assert ["40, 40" in said[0], "60, 60" in said[1], len(said)] == [True, True, 2]


def test_of_one_machine_the_newest_counts_and_another_ones_stays(tmp_path) -> None:
    other = changed(answer("full", 1, 0.3, 5), {"hardware": {**HARDWARE, "cpu": "another"}})
    lines = [answer("full", 1, 0.1, 5), answer("full", 1, 0.2, 5), other]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    found = collect([tmp_path])
    assert [entry.numbers["exact_match"] for entry in found.entries] == [0.2, 0.3]
    assert found.replaced == 1

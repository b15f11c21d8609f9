"""`duohead report`: every record of a folder is on the page, its numbers are right, and damage is named."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import tiny_evaluation as tiny
from pages import Page, assert_fetches_nothing, colours, screenshot
from tiny_records import answer, line, log_of

from duohead.cli import main
from duohead.evaluate.collect import collect
from duohead.evaluate.folder_report import render
from duohead.evaluate.results import NeedleResult
from duohead.evaluate.scores import by_grid, scored
from duohead.pattern import HeadPattern

RESULTS = Path(__file__).resolve().parent.parent / "results"


def needles() -> NeedleResult:
    """Made-up rows of all methods over three lengths and two depths, two tasks."""
    methods = tiny.report().methods
    random = np.random.default_rng(1)
    return NeedleResult(
        tuple(
            tiny.row(
                name,
                method,
                task=task,
                length=length,
                depth=depth,
                exact_match=float(random.integers(9)) / 8,
            )
            for name, method in methods.items()
            for task in ("passkeys", "number")
            for length in (1024, 2048, 4096)
            for depth in (0.0, 1.0)
        )
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Every kind of thing that a report draws, and one that it does not know."""
    place = tmp_path_factory.mktemp("runs")
    needles().write(place / "needle.jsonl", model="pocket", dtype="float32")
    scorers = [
        answer(f"{scorer}_{100 * ratio:g}", ratio, score + 0.01 * seed, int(1000 * ratio), **shape)
        for scorer, score in (("optimise", 0.9), ("echo", 0.6))
        for ratio in (0.5, 0.25)
        for seed in (0, 1)
        for shape in [{"scorer": scorer, "seed": seed}]
    ]
    cost = line("identify", "echo", shape={"scorer": "echo", "model": "m"}, numbers={"seconds": 7})
    (place / "compare.jsonl").write_text("".join([answer("full", 1.0, 1.0, 1000), *scorers, cost]))
    findings = [
        line(
            "findings.sinks",
            shape={"model": "m", "window": window, "ratio": ratio, "seed": seed},
            numbers={"passkeys": 40.0 + 10 * seed, "number": 60.0},
        )
        for window in ("sink only", "both")
        for ratio in (0.5, 0.25)
        for seed in (0, 1)
    ]
    findings += [
        line(
            "findings.agreement",
            shape={"identified_on": a, "compared_with": b},
            numbers={"rank_correlation": 0.37},
        )
        for a in ("passkeys", "number")
        for b in ("passkeys", "number")
    ]
    (place / "deeper").mkdir()
    (place / "deeper" / "findings.jsonl").write_text("".join(findings))
    (place / "odd.jsonl").write_text(
        line("something.new", shape={"size": 3, "list": [1]}, numbers={"widgets": 4.25})
        + json.dumps({"op": "flat", "task": "x", "length": 5, "right": 0.625}) + "\n"
    )  # fmt: skip
    (place / "run").mkdir()
    (place / "run" / "identify.jsonl").write_text(log_of(150, 10))
    alpha = [[0.25, 0.75], [math.nan, math.nan], *[[1.0, 0.0]] * 4]
    HeadPattern.from_alpha(alpha, sink=4, recent=16).save(place / "run")
    return place


@pytest.fixture(scope="module")
def html(folder) -> str:
    return render(collect([folder]))


@pytest.fixture(scope="module")
def page(html) -> Page:
    return Page(html)


def test_the_page_is_well_formed_fetches_nothing_and_its_links_lead_somewhere(html, page) -> None:
    assert page.open == []
    assert_fetches_nothing(html)
    targets = {attrs.get("id") for attrs in page.all("section")}
    links = [attrs["href"] for attrs in page.all("a")]
    assert {f"#{target}" for target in targets} == set(links)
    assert targets == {
        *("glance", "accuracy", "needles", "heads", "training", "cost", "ablations", "other"),
        "sources",
    }


def test_every_chart_has_a_text_alternative(page) -> None:
    assert len(page.charts) > 20
    for attrs in page.charts:
        assert attrs["role"] == "img"
        assert len(attrs["aria-label"] or "") > 40


def test_every_operation_and_every_file_is_named(folder, page) -> None:
    for entry in collect([folder]).entries:
        assert entry.op in page.text
    for path in folder.rglob("*.jsonl"):
        assert str(path) in page.text


def test_what_no_picture_knows_stands_in_a_table(page) -> None:
    assert "something.new" in page.text
    assert "4.25" in page.text
    assert "0.625" in page.text


def test_every_number_of_the_scorers_stands_in_the_text(page) -> None:
    # Means of two seeds, the seeds themselves, and bytes against full attention.
    for said in ("90.5 %", "90.0 % to 91.0 %", "60.5 %", "50.0 %", "25.0 %", "token, s", "0.25"):
        assert said in page.text


def test_needle_grids_average_draws_and_tasks(page) -> None:
    result = needles()
    names = [name for name in result.methods if name.startswith("random_25_")]
    mean = sum(result.mean(method=name) for name in names) / len(names)
    assert f"mean {100 * mean:.1f} %" in page.text
    cell = result.mean(method="duo_25", length=1024, depth=0.0)
    titles = page.text.split("identified heads, 25 %")
    assert any(f"\n{100 * cell:.0f}\n" in part[:600] for part in titles[1:])


def test_a_grid_counts_tasks_alike_however_many_answers_they_have(tmp_path) -> None:
    lines = []
    for task, answers, score in (("one", 1, 1.0), ("many", 99, 0.0)):
        for length in (10, 20):
            for depth in (0.0, 1.0):
                entry = json.loads(
                    answer("full", 1, score, 5, task=task, length=length, depth=depth)
                )
                entry["numbers"]["answers"] = answers
                lines.append(json.dumps(entry) + "\n")
    (tmp_path / "a.jsonl").write_text("".join(lines))
    page = Page(render(collect([tmp_path])))
    assert "mean 50.0 %" in page.text
    assert page.text.count("\n50\n") >= 4


def test_lengths_that_were_run_at_other_depths_stand_in_a_grid_of_their_own(tmp_path) -> None:
    cells = [(n, d) for n in (10, 20) for d in (0.0, 0.5, 1.0)]
    cells += [(n, d) for n in (15, 25) for d in (0.25, 0.75)]
    lines = [answer("full", 1, n / 100, 5, length=n, depth=d) for n, d in cells]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    html = render(collect([tmp_path]))
    grids = html.partition('id="needles"')[2].partition('id="sources"')[0]
    assert grids.count('class="heat"') == len(cells) + 2 * 5  # five steps of each colour key
    assert 'class="void"' not in grids
    assert "mean 15.0" in grids and "mean 20.0" in grids


def test_methods_of_one_grid_are_not_held_against_full_attention_on_another(tmp_path) -> None:
    lines = [answer("full", 1, 0.5, 10, length=n, depth=0.5) for n in (10, 2048)]
    lines += [answer("full", 1, 1.0, 10, length=16, depth=d) for d in (0.0, 1.0)]
    lines += [answer("random_50_0", 0.5, 0.25, 4, length=n, depth=0.5) for n in (10, 2048)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    collection = collect([tmp_path])
    assert "Not every method" not in Page(render(collection)).text
    charts: dict[str, dict[str, float]] = {}
    for score in by_grid(scored(collection.entries)):
        charts.setdefault(score.model, {})[score.method] = score.value
    assert charts == {
        "m, 10 to 2K tokens at 1 depth": {"full": 0.5, "random": 0.25},
        "m, 16 tokens at 2 depths": {"full": 1.0},
    }
    alike = [score for score in scored(collection.entries) if score.length != 16]
    assert by_grid(alike) == alike


def test_prose_of_several_resolutions_or_windows_is_not_averaged(tmp_path) -> None:
    shape = {"model": "m", "task": "prose", "length": 4096, "retrieval_ratio": 0.5}
    lines = [
        line(
            "evaluate.prose",
            "duo_50",
            shape={**shape, "sink": sink, "recent": 64, "windows": windows},
            numbers={"kv_bytes": 5, "kl_nats_by_position": parts},
        )
        for sink, windows, parts in ((4, 1, [0.25, 0.5]), (8, 1, [0.125, 1]), (4, 2, [1, 2, 3, 4]))
    ]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    page = Page(render(collect([tmp_path])))
    found = [a["aria-label"] for a in page.charts if "First part" in (a["aria-label"] or "")]
    assert len(found) == 2
    assert "4+64, 50\xa0% 0.25 to 0.5; identified heads 8+64, 50\xa0% 0.125 to 1." in found[0]
    assert "4+64, 50\xa0% 1 to 4." in found[1]


def test_prose_is_drawn_by_position_and_windows_are_told_apart(tmp_path) -> None:
    rows = [("full", 1.0, 0.0), ("duo_50", 0.5, 0.25), ("duo@16+64_50", 0.5, 0.5)]
    lines = [
        line(
            "evaluate.prose",
            name,
            shape={"model": "m", "task": "prose", "length": 4096, "retrieval_ratio": ratio},
            numbers={
                "perplexity": 12.0,
                "kl_nats": kl,
                "kv_bytes": round(100 * ratio),
                "kl_nats_by_position": [kl / 2, kl],
            },
        )
        for name, ratio, kl in rows
    ]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    page = Page(render(collect([tmp_path])))
    label = next(a["aria-label"] for a in page.charts if "First part" in (a["aria-label"] or ""))
    assert "identified heads 16+64, 50\xa0% 0.25 to 0.5" in label
    assert "full attention 0 to 0" in label
    assert "2,048" in page.text
    assert page.open == []


def test_a_matrix_is_the_mean_over_seeds_and_tasks(page) -> None:
    labels = [a["aria-label"] or "" for a in page.charts]
    said = next(label for label in labels if "by window and retrieval heads" in label)
    assert "sink only 52.5, 52.5; both 52.5, 52.5" in said
    assert any("rank correlation" in label and "0.37" in label for label in labels)


def strip(html: str) -> str:
    part = html[html.index("gates over time</h3>") :]
    return part[: part.index("</figure>")]


def test_an_experiment_hides_no_number(tmp_path) -> None:
    scores = {
        f"old {ratio}": {f"task{i}": 100.5 + ratio + i for i in range(12)} for ratio in (1, 50)
    }
    (tmp_path / "a.jsonl").write_text(line("findings.tuning", numbers={"accuracy": scores}))
    text = Page(render(collect([tmp_path]))).text
    assert all(f"{value:.4g}" in text for own in scores.values() for value in own.values())
    assert "more numbers" not in text


def test_numbers_that_are_a_table_stand_as_one(tmp_path) -> None:
    accuracy = {f"old {ratio}": {"passkeys": 80.0, "key_value": ratio} for ratio in (0.5, 0.25)}
    lines = [
        line(
            "findings.tuning", shape={"tuned_on": text}, numbers={"accuracy": accuracy, "loss": 3.5}
        )
        for text in ("prose", "talk")
    ]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    text = Page(render(collect([tmp_path]))).text
    assert "accuracy\n\ntuned on" in re.sub("\n+", "\n\n", text)
    assert "passkeys\n\nkey value" in re.sub("\n+", "\n\n", text)
    assert not re.search(r"accuracy\.|\.passkeys", text)


def test_names_of_inner_numbers_are_read_as_words(tmp_path) -> None:
    lines = [
        line("findings.errors", shape={"task": task}, numbers={"by_depth": {"0.25": 3.0}})
        for task in ("a", "b")
    ]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    assert "by depth, 0.25" in Page(render(collect([tmp_path]))).text


def test_gates_over_time_have_a_row_per_gated_head_of_the_pattern(html) -> None:
    drawn = strip(html)
    assert drawn.count('class="heat"') == 10 * 60 + 5  # and the five steps of the key
    assert "head (layer.head)" in drawn
    assert ">0.0</text>" in drawn
    assert ">2.0</text>" in drawn
    assert ">1.0</text>" not in drawn  # layer 1 has no gates


@pytest.mark.parametrize(("layers", "rows", "what"), [(32, 32, "layer (mean"), (0, 96, "gates, l")])
def test_many_gates_are_averaged_in_groups(tmp_path, layers, rows, what) -> None:
    (tmp_path / "identify.jsonl").write_text(log_of(10, 256))
    if layers:
        HeadPattern.from_alpha(np.full((layers, 8), 0.5), sink=4, recent=16).save(tmp_path)
    html = render(collect([tmp_path]))
    assert what in strip(html)
    assert strip(html).count('class="heat"') == rows * 5 + 5
    assert Page(html).open == []


def test_bench_records_make_pictures_and_tables(tmp_path, capsys) -> None:
    files = [str(path) for path in sorted(RESULTS.glob("*-h100.jsonl"))]
    assert main(["report", *files, "--out", str(tmp_path / "r.html")]) == 0
    assert "wrote" in capsys.readouterr().out
    text = Page((tmp_path / "r.html").read_text()).text
    assert "Speed and memory" in text
    assert "Decode attention against the fastest full attention" in text
    for op in ("model.decode", "model.prefill", "prefill.streaming"):
        assert f"{op}" in text


def test_names_from_records_cannot_become_markup(tmp_path) -> None:
    evil = "</h3><script>alert(1)</script>"
    shape = {"model": evil, "task": evil, "task_version": 1, "length": 9, "depth": 0.0}
    lines = [
        line(
            f"evaluate.{evil}", evil, shape={**shape, "depth": depth, "length": n}, numbers=numbers
        )
        for depth in (0.0, 1.0)
        for n in (9, 10)
        for numbers in [{"exact_match": 0.5, "kv_bytes": 3}]
    ]
    lines += [
        line(f"findings.{evil}", shape={evil: f"{evil}{i}", "ratio": r}, numbers={"number": 5.0})
        for i in range(2)
        for r in (0.5, 0.25)
    ]
    lines.append(line(evil, evil, shape={evil: evil, "scorer": evil}, numbers={"seconds": 3}))
    (tmp_path / "evil.jsonl").write_text("".join(lines))
    page = Page(render(collect([tmp_path])))
    assert page.open == []
    assert "script" not in {tag for tag, _ in page.tags}
    assert evil in page.text


def test_what_is_no_share_of_anything_has_a_chart_and_no_mean(tmp_path) -> None:
    shape = {"model": "m", "task": "prose", "task_version": 1}
    lines = [
        line("evaluate.ppl", name, shape=shape, numbers={"perplexity": value, "kv_bytes": taken})
        for name, value, taken in (("full", 12.0, 100), ("duo_50", 12.5, 55))
    ]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    page = Page(render(collect([tmp_path])))
    assert "At a glance" not in page.text
    assert "perplexity (less is better)" in page.text
    assert "12.5" in page.text


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_a_browser_shows_it_without_a_complaint(html, tmp_path, width, dark) -> None:
    (tmp_path / "report.html").write_text(html)
    pixels = screenshot(tmp_path / "report.html", width=width, dark=dark)
    assert colours(pixels) > 30
    assert (pixels[5, 5].mean() < 0.2) == dark

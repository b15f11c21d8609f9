"""Tables and figures of docs/findings.md: they show the newest records, the same ones give the same bytes."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from duohead.record import read_records
from tools import (
    finding_compare,
    finding_figures,
    finding_records,
    finding_tables,
    needle_figures,
    precision_tables,
)
from tools.finding_records import by_model, models, of, scores, tuned_name

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is an extra"
)


def entry(question: str, numbers: dict, *, time: str = "2026-01-01", **shape: object) -> dict:
    return {
        "op": f"findings.{question}",
        "impl": "gates",
        "shape": {"model": "pocket", "steps": 60, "samples": 50, "lengths": [4096], **shape},
        "numbers": numbers,
        "time": time,
        "hardware": {"cpu": "a CPU", "cores": 2},
        "versions": {"torch": "2", "transformers": "5"},
    }


def right(score: float) -> dict:
    return dict.fromkeys(("passkeys", "needle", "number", "keyvalue"), score)


def stored(
    retrieval: str | None, kl: float, size: int, *, streaming: str | None = None, **shape: object
) -> list[dict]:
    case = {"ratio": 0.5, "evict": True, "retrieval": retrieval}
    case["streaming"] = streaming or retrieval
    return [
        entry("precision", {**numbers, "kv_bytes": size * n}, **case | shape, length=n)
        for n, numbers in (
            (1024, {"kl_nats": kl, "perplexity": 30.0}),
            (8192, {"kl_nats": kl, "perplexity": 20.0, **right(90.0)}),
        )
    ]


def test_a_setting_measured_again_counts_once_and_its_newest_record_does() -> None:
    old = entry("sinks", right(10.0), window="both", ratio=0.5, samples=15, lengths=[2048])
    new = entry("sinks", right(90.0), window="both", ratio=0.5, time="2026-02-01")
    other = entry("sinks", right(50.0), window="both", ratio=0.25)
    own = of([new, other, old, entry("tasks", right(1.0))], "sinks")
    assert own == [new, other]
    assert scores(own, ratio=0.5) == [90]
    assert scores(own, ratio=0.125) == []


def test_heads_that_an_older_pattern_chose_no_longer_count() -> None:
    first = entry("sinks", right(10.0), window="both", ratio=0.5, pattern="a")
    left = entry("sinks", right(20.0), window="both", ratio=0.25, pattern="a")
    none = entry("sinks", right(30.0), window="both", ratio=1.0)
    again = entry("sinks", right(90.0), window="both", ratio=0.5, pattern="b", time="2026-02-01")
    other = entry("sinks", right(40.0), window="both", ratio=0.5, pattern="a", model="pocket-mha")
    # In whatever order: files of several processes are joined.
    assert of([again, first, left, none, other], "sinks") == [again, none, other]
    assert of([first, left, none], "sinks") == [first, left, none]


def test_a_file_is_left_with_what_counts_and_all_that_is_no_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = entry("tuning", {"loss": 1}, tuned_on="prose")
    new = entry("tuning", {"loss": 2}, tuned_on="prose", rate=3e-4, time="2026-02-01")
    gentle = entry("tuning", {"loss": 3}, tuned_on="prose", rate=3e-5)
    plain = {**old, "op": "decode"}
    file = tmp_path / "found.jsonl"
    given = [old, plain, gentle, plain, new]
    file.write_text("".join(json.dumps(line) + "\n" for line in given))
    monkeypatch.setattr("sys.argv", ["finding_records", str(file)])
    finding_records.main()
    assert read_records(file) == [plain, gentle, plain, new]


def test_a_way_to_store_heads_is_of_one_pattern_at_every_length() -> None:
    old = stored("int8", 0.5, 300)
    new = [{**e, "time": "2026-02-01"} for e in stored("int8", 0.25, 300, pattern="b")]
    (row,) = precision_tables.rows([*old, new[1]])
    assert row.kl == {8192: 0.25}
    (row,) = precision_tables.rows([*new, *old])
    assert row.kl == {1024: 0.25, 8192: 0.25}


def test_a_way_to_store_heads_that_lacks_a_length_is_left_out() -> None:
    whole, cut = stored("int8", 0.5, 300), stored("int4", 0.5, 200)[:1]
    other = stored("bf16", 0.5, 900, model="pocket-mha")[:1]
    found = precision_tables.rows([*whole, *cut, *other])
    assert [(row.model, row.storage) for row in found] == [
        ("pocket", "int8"),
        ("pocket-mha", "bf16"),
    ]


def test_models_that_are_not_bundled_come_after_those_that_are() -> None:
    own = [entry("sinks", {}, model=name) for name in ("mine", "pocket-mha", "pocket")]
    assert models(own) == ["pocket", "pocket-mha", "mine"]


def test_records_are_put_in_order_by_model_and_setting() -> None:
    given = [
        entry("tuning", {}, model="pocket-mha", tuned_on="prose"),
        entry("tuning", {}, tuned_on="prose", rate=3e-5),
        entry("tuning", {}, tuned_on="instructions", rate=3e-5),
        entry("tuning", {}, tuned_on="prose", rate=1e-4),
    ]
    own = by_model(of(given, "tuning"), "tuned_on", "rate")
    assert [(e["shape"]["model"], tuned_name(e["shape"])) for e in own] == [
        ("pocket", "prose, peak 1e-4"),
        ("pocket", "prose, peak 3e-5"),
        ("pocket", "instructions, peak 3e-5"),
        ("pocket-mha", "prose, peak 3e-4"),
    ]


def test_the_front_has_what_no_other_way_beats_in_bytes_and_divergence() -> None:
    records = [
        *stored("bf16", 0.0, 800),
        *stored("fp8", 0.1, 400),
        *stored("int8", 0.2, 400, streaming="int4"),
        *stored("int4", 0.5, 200),
        *stored("fp8", 0.6, 300, evict=False),
    ]
    found = precision_tables.rows(records)
    best = precision_tables.front(found, at=8192)
    assert [(row.storage, row.per_token[8192]) for row in best] == [
        ("int4", 200),
        ("fp8", 400),
        ("bf16", 800),
    ]


def test_the_table_of_precision_has_a_row_for_each_way_and_marks_the_front() -> None:
    records = [
        *stored(None, 0.0, 1000, ratio=1.0),
        *stored("fp8", 0.25, 300, streaming="int4"),
        *stored("fp8", 0.5, 500),
    ]
    lines = precision_tables.precision("pocket")(records).splitlines()
    assert lines[0].startswith("| heads | storage | B/token, 1K | B/token, 8K | exact, 8K |")
    assert lines[2] == "| model as it is | its own | 1,000 | 1,000 | 90.0 | 20.00 | 0.0000 |"
    assert lines[3].startswith("| 50 %, others evict | fp8 | 500 |")
    assert lines[4].startswith("| 50 %, others evict | **fp8 + int4** | 300 |")
    assert precision_tables.precision("other")(records) == precision_tables.NOTHING


def test_scores_over_fewer_answers_are_marked_and_the_note_says_of_how_many() -> None:
    records = [*stored("int8", 0.25, 300), *stored("int4", 0.5, 200, samples=15)]
    made = precision_tables.precision("pocket")(records)
    assert "| **int8** | 300 | 300 | 90.0 |" in made
    assert "| **int4** | 200 | 200 | 90.0\\* |" in made
    assert made.endswith(" \\*: 15 answers of a task, not 50.\n")


def test_int8_is_shown_by_length_and_pairs_of_formats_by_bytes_at_the_longest() -> None:
    records = [
        *stored("bf16", 0.0, 1000, ratio=1.0),
        *stored("int8", 0.01, 500, ratio=1.0),
        *stored("int8", 0.25, 300),
        *stored("fp8", 0.5, 290, streaming="int4"),
        *stored("int4", 0.5, 200, evict=False),
    ]
    assert precision_tables.lengths(records).splitlines()[2:4] == [
        "| pocket, all heads alike | 0.0100 | 0.0100 |",
        "| pocket, 50 %, others evict | 0.2500 | 0.2500 |",
    ]
    assert precision_tables.pairs(records).splitlines()[2:4] == [
        "| pocket, 50 %, others evict | 30.0 %, 0.2500 | 29.0 %, 0.5000 |  |",
        "",
    ]


def test_variants_of_streaming_heads_that_lack_a_length_are_left_out() -> None:
    def variant(name: str, length: int) -> dict:
        numbers = {"slots": 12864, "mean": 91.92, "loss": 0.0285}
        return entry("extras", numbers, variant=name, heads=3, ratio=0.125, length=length)

    records = [variant("plain", 2048), variant("plain", 8192), variant("entry", 2048)]
    assert finding_tables.extras([variant("plain", 2048), variant("entry", 8192)]) == (
        finding_tables.NOTHING
    )
    lines = finding_tables.extras(records).splitlines()
    assert lines[0].startswith("|  | slots, 2K | exact, 2K | loss, 2K | slots, 8K |")
    assert lines[2:4] == [
        "| pocket, 3 heads: plain | 12,864 | 91.9 | 0.0285 | 12,864 | 91.9 | 0.0285 |",
        "",
    ]


def test_a_rotation_is_compared_with_the_same_storage_without_it() -> None:
    records = [
        *stored("int4", 0.5, 200),
        *stored("int4-hadamard", 0.25, 200),
        *stored("fp8", 0.25, 200, streaming="int4-hadamard"),
        *stored("int4-hadamard/int4", 1.0, 200),
    ]
    lines = precision_tables.rotation(records).splitlines()
    assert lines[2].startswith("| pocket, 50 %, others evict, int4-hadamard | 0.5000 | 0.2500 |")
    assert "-50 %" in lines[2]
    assert "int4-hadamard/int4 | 0.5000 | 1.0000 |" in lines[3]
    assert len(lines) == 6


def test_a_rotation_that_early_records_state_apart_is_replaced_by_the_format_of_that_name() -> None:
    old = stored("int4", 0.5, 200, rotation="hadamard")
    new = [{**e, "time": "2026-02-01"} for e in stored("int4-hadamard", 0.25, 200)]
    (row,) = precision_tables.rows([*new, *old])
    assert (row.storage, row.kl[8192]) == ("int4-hadamard", 0.25)


def compared(
    scorer: str, share: float, needle: list[float], number: list[float], **shape: object
) -> dict:
    """What is left of a comparison at one length: two tasks, and the scores at each depth."""
    by_depth = {
        task: {str(depth): right for depth, right in enumerate(rights)}
        for task, rights in (("needle", needle), ("number", number))
    }
    costs = {"identify_seconds": 2.0, "identify_forward_tokens": 3e6, "identify_backward_tokens": 0}
    made = entry(
        "x",
        {"by_depth": by_depth, **costs},
        scorer=scorer,
        seed=0,
        retrieval_ratio=share,
        length=2048,
    )
    made["shape"] |= shape
    return made | {"op": finding_compare.SUMMARY}


def test_a_difference_stands_with_the_standard_error_that_the_cells_of_each_task_give() -> None:
    records = [
        compared("full", 1.0, [100, 100], [100, 100]),
        compared("optimise", 0.125, [100, 60], [100, 100]),
        compared("optimise", 0.125, [100, 80], [100, 100], options='{"target": 0.04}'),
        compared("eliminate", 0.125, [100, 80], [100, 100], seed=0),
        compared("eliminate", 0.125, [100, 100], [100, 100], seed=1),
    ]
    lines = finding_compare.close(records).splitlines()
    # Needles differ by 0 and 40: a mean of 20 with an error of 20, half of it in the mean of two tasks.
    assert lines[2] == "| optimise | 90.0 (-10.0 ± 10.0) | 2 s | 3.0 M | 0 |"
    assert lines[3].startswith("| optimise, target 0.04 | 95.0 (-5.0 ± 5.0) |")
    assert lines[4].startswith("| eliminate | 97.5 (-2.5 ± 2.5) |")
    assert lines[5].startswith("| *full attention* | 100.0 |")
    assert "| eliminate less optimise | +7.5 ± 7.5 |" in finding_compare.rivals(records)
    tasks = finding_compare.close_tasks(records).splitlines()
    assert tasks[2] == "| needle | 100.0 | 80.0 | 90.0 | 95.0 | -5.0 ± 5.0 |"
    assert tasks[3].endswith("| 100.0 | 0.0 ± 0.0 |")


def test_a_step_that_was_not_measured_leaves_its_cell_empty_and_its_run_out() -> None:
    def step(length: int, seconds: float, **shape: object) -> dict:
        numbers = {"step_seconds": seconds, "floor_seconds": 1.0, "peak_bytes": 2**30}
        return entry("x", numbers, kernels="fastest", length=length, **shape) | {
            "op": "identify.step"
        }

    def run(**shape: object) -> dict:
        return entry("x", {"run_hours": 1.5}, kernels="fastest", **shape) | {"op": "identify.run"}

    two, shared = {"processes": 2, "shard": "no"}, {"processes": 2, "shard": "yes"}
    records = [
        step(4096, 1, **two),
        step(8192, 2, **two),
        run(**two),
        step(8192, 3, **shared),
        run(**shared),
    ]
    lines = finding_tables.identify_steps(records).splitlines()
    assert lines[2] == "| fastest, 2 GPUs | 1.00 s, 1 GiB | 2.00 s, 1 GiB | 2.00 × | 1.50 h |"
    assert lines[3] == "| fastest, 2 GPUs, weights sharded |  | 3.00 s, 1 GiB | 3.00 × |  |"


@needs_matplotlib
def test_the_same_records_give_the_same_bytes_and_only_their_figures(tmp_path: Path) -> None:
    records = [
        *stored(None, 0.0, 1000, ratio=1.0),
        *stored("fp8", 0.25, 300, streaming="int4"),
        *(
            entry("extras", {"slots": 9, "mean": 90, "loss": 0.1}, variant=v, **share, length=n)
            for share in ({"heads": 3, "ratio": 0.125}, {"heads": 2, "ratio": 0.0625})
            for v in ("plain", "entry", "wide")[: share["heads"]]
            for n in (2048, 8192)
        ),
        *(
            entry("windows", right(50.0), trained=a, deployed=b, ratio=0.125)
            for a in ("4+16", "16+64")
            for b in ("4+16", "16+64")
        ),
    ]
    file = tmp_path / "found.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in records))
    first = finding_figures.write(tmp_path / "a", [file])
    again = finding_figures.write(tmp_path / "b", [file])
    assert [path.name for path in first] == ["windows.png", "extras.png", "precision.png"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]


@needs_matplotlib
def test_files_without_a_question_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "empty.jsonl"
    file.write_text("")
    with pytest.raises(ValueError, match="no records of a question with a figure"):
        finding_figures.write(tmp_path / "figures", [file])


def test_the_figures_of_the_pages_are_those_that_the_commands_draw(root: Path) -> None:
    pages = [path.read_text() for path in (root / "docs").glob("*.md")]
    named = {name for page in pages for name in re.findall(r"\]\(figures/([\w-]+)\.png\)", page)}
    assert named == {path.stem for path in (root / "docs" / "figures").iterdir()}
    assert named <= finding_figures.FIGURES.keys() | needle_figures.FIGURES.keys()
    sizes = [path.stat().st_size for path in (root / "docs" / "figures").iterdir()]
    assert max(sizes) < 60_000
    assert sum(sizes) < 300_000


@needs_matplotlib
def test_every_question_of_the_page_has_records_that_its_figure_is_drawn_from(root: Path) -> None:
    entries = [
        line
        for name in ("findings", "identify-steps-pocket")
        for line in read_records(root / "results" / f"{name}.jsonl")
    ]
    page = (root / "docs" / "findings.md").read_text()
    for name in re.findall(r"\]\(figures/(\w+)\.png\)", page):
        if name != "precision":
            assert finding_figures.FIGURES[name](entries) is not None, name

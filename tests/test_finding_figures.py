"""Tables and figures of docs/findings.md: they show the newest records, the same ones give the same bytes."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from duohead.record import read_records
from tools import finding_figures, precision_tables
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
    case = {"ratio": 0.5, "evict": True, "rotation": None, "retrieval": retrieval}
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
    assert lines[3].startswith("| 50 %, others evict | **fp8 + int4** | 300 |")
    assert lines[4].startswith("| 50 %, others evict | fp8 | 500 |")
    assert precision_tables.precision("other")(records) == precision_tables.NOTHING


def test_a_rotation_is_compared_with_the_same_storage_without_it() -> None:
    records = [
        *stored("int4", 0.5, 200),
        *stored("int4", 0.25, 200, rotation="hadamard"),
        *stored("fp8", 0.25, 200, rotation="hadamard"),
    ]
    lines = precision_tables.rotation(records).splitlines()
    assert lines[2].startswith("| pocket, 50 %, others evict, int4, hadamard | 0.5000 | 0.2500 |")
    assert "-50 %" in lines[2]
    assert len(lines) == 5


@needs_matplotlib
def test_the_same_records_give_the_same_bytes_and_only_their_figures(tmp_path: Path) -> None:
    records = [
        *stored(None, 0.0, 1000, ratio=1.0),
        *stored("fp8", 0.25, 300, streaming="int4"),
        *stored("int4", 0.2, 300, rotation="hadamard"),
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
    assert [path.name for path in first] == ["windows.png", "precision.png"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]


@needs_matplotlib
def test_files_without_a_question_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "empty.jsonl"
    file.write_text("")
    with pytest.raises(ValueError, match="no records of a question with a figure"):
        finding_figures.write(tmp_path / "figures", [file])


def test_the_figures_of_the_page_are_those_that_the_command_draws(root: Path) -> None:
    page = (root / "docs" / "findings.md").read_text()
    named = set(re.findall(r"\]\(figures/(\w+)\.png\)", page))
    assert named == {path.stem for path in (root / "docs" / "figures").iterdir()}
    assert named <= finding_figures.FIGURES.keys()
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

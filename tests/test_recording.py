"""Records are in their file as soon as their cell is finished: what a crash or Ctrl-C costs is one cell."""

import json
import resource

import pytest
import tiny_evaluation as tiny

from duohead.cli import main
from duohead.evaluate import needle, prose
from duohead.evaluate.recording import recording
from duohead.evaluate.results import needle_recorder
from duohead.record import read_records


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("recording"), characters=20000)


@pytest.fixture
def as_record():
    return needle_recorder(model="tiny", dtype="float32")


def rows(count):
    grid = tiny.report().grid.rows
    return grid[:count]


def command(folder, kind, path, *words):
    given = ("--model", folder / "model", "--pattern", folder / "pattern", "--json", path)
    plain = ("--text", folder / "prose.txt", "--random-draws", 0, "--samples", 2)
    return ["evaluate", kind, *map(str, (*given, *plain, *words))]


def interrupting(monkeypatch, place, name, *, after):
    """Let a function of a module or class raise Ctrl-C when it is called once more than ``after`` times."""
    original, calls = getattr(place, name), []

    def counted(*given, **named):
        calls.append(None)
        if len(calls) > after:
            raise KeyboardInterrupt
        return original(*given, **named)

    monkeypatch.setattr(place, name, counted)


def test_needle_cells_that_were_finished_outlive_an_interruption(
    folder, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "needle.jsonl"
    interrupting(monkeypatch, needle, "score_samples", after=5)
    asked = ("--lengths", 300, 400, "--depths", 2, "--speed-tokens", 0)
    assert main(command(folder, "needle", path, *asked)) == 130
    found = [(e["impl"], e["shape"]["length"], e["shape"]["depth"]) for e in read_records(path)]
    assert found == [("full", 300, 0.0), ("full", 300, 1.0)]
    assert f"interrupted; {path} holds the 2 records finished so far" in capsys.readouterr().err


def test_prose_lengths_that_were_finished_outlive_a_crash(folder, tmp_path, monkeypatch):
    path = tmp_path / "prose.jsonl"
    original = prose._windows

    def broken(tokenizer, text_ids, length, count):
        if length == 120:
            raise RuntimeError("out of memory")
        return original(tokenizer, text_ids, length, count)

    monkeypatch.setattr(prose, "_windows", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        main(command(folder, "prose", path, "--lengths", 60, 120, "--bins", 2))
    found = read_records(path)
    assert {entry["shape"]["length"] for entry in found} == {60}
    assert [entry["impl"] for entry in found] == ["full", "duo_50", "duo_25", "streaming"]


def test_a_row_is_in_the_file_before_the_next_one_is_measured(tmp_path, as_record):
    path = tmp_path / "folder" / "rows.jsonl"
    with recording(path, as_record) as add:
        for done, row in enumerate(rows(3), start=1):
            add(row)
            assert len(read_records(path)) == done


def test_a_run_without_a_result_leaves_the_file_as_it_was(tmp_path, as_record):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"op": "older"}\n')
    with pytest.raises(KeyboardInterrupt, match="^$"), recording(path, as_record):
        raise KeyboardInterrupt
    assert read_records(path) == [{"op": "older"}]
    with recording(path, as_record) as add:
        add(rows(1)[0])
    assert [entry["op"] for entry in read_records(path)] == ["evaluate.needle"]


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch, as_record):
    monkeypatch.chdir(tmp_path)
    with recording(None, as_record) as add:
        add(rows(1)[0])
    assert not list(tmp_path.iterdir())


def test_a_line_that_the_disk_has_no_room_for_is_taken_back(tmp_path, as_record):
    path = tmp_path / "rows.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with recording(path, as_record) as add:
        add(rows(1)[0])
        whole = path.read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 100, before[1]))
        try:
            with pytest.raises(OSError, match="No space left"):
                add(rows(2)[1])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == whole


def test_each_record_has_the_time_at_which_it_was_finished(tmp_path, as_record, monkeypatch):
    import duohead.evaluate.recording as module

    class Clock(module.datetime):
        minutes = 0

        @classmethod
        def now(cls, tz):
            cls.minutes += 1
            return module.datetime.fromtimestamp(60 * cls.minutes, tz)

    path = tmp_path / "rows.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(module, "datetime", Clock)
        with recording(path, as_record) as add:
            for row in rows(2):
                add(row)
    times = [json.loads(line)["time"] for line in path.read_text().splitlines()]
    assert times == ["1970-01-01T00:01:00+00:00", "1970-01-01T00:02:00+00:00"]

"""`duohead export`: an adapter from a pattern, its card, and what is refused."""

import errno
import hashlib
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_adapters import base_and_pattern, laguna_folder, laguna_model
from transformers import AutoModelForCausalLM

from duohead import HeadPattern, HeadPolicy, pocket, record
from duohead.adapter.load import open_adapter
from duohead.adapter.save import write
from duohead.cli import main
from duohead.cli.export import FLAGS
from duohead.cli.export_card import card
from duohead.evaluate.needle import policy_facts
from duohead.models import policy_of


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    return base_and_pattern(tmp_path_factory.mktemp("export"))


def export(*words: Any) -> int:
    return main(["export", *map(str, words)])


def records(path: Path, base: Path, pattern: HeadPattern, *, ratio: float = 0.5) -> None:
    """Three rows as `duohead evaluate` writes them: full attention, these heads, and other heads."""

    def facts(used: HeadPolicy | None) -> dict[str, Any]:
        return {key: value for key, value in policy_facts(used).items() if key != "policy"}

    policy = pattern.policy(retrieval_ratio=ratio)
    model = AutoModelForCausalLM.from_pretrained(base).config
    ours = policy.bind(model, dtype="float32").digest()
    for impl, digest, value in (("full", None, 1.0), ("duo", ours, 0.875), ("duo", "0" * 12, 0.25)):
        record.write_record(
            path,
            op="evaluate.needle",
            impl=impl,
            dtype="float32",
            policy=digest,
            numbers={"exact_match": value, "kv_bytes": 4096 if impl == "full" else 2048, "answers": 8},
            shape={
                "model": str(base),
                "task": "passkeys",
                "task_version": 1,
                "length": 64 if digest != "0" * 12 else 65,
                **facts(None if impl == "full" else policy),
            },
        )  # fmt: skip


def test_an_export_loads_and_says_what_it_is(made, tmp_path, capsys) -> None:
    base, heads = made
    out = tmp_path / "adapter"
    code = export(
        heads, "--base", base, "--out", out, "--retrieval-ratio", 0.25, "--sink", 3, "--recent", 6,
        "--retrieval-dtype", "fp8", "--streaming-dtype", "int8", "--name", "me/heads",
    )  # fmt: skip
    said = capsys.readouterr()
    assert code == 0, said.err
    assert "hf upload me/heads" in said.out
    assert f"the base {base} is a folder of this machine" in said.err
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "duohead"
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_duohead.DuoheadForCausalLM"
    assert config["base_model_name_or_path"] == str(base)
    assert config["selection"] == {"retrieval_ratio": 0.25, "sink": 3, "recent": 6}
    assert config["precisions"] == {"retrieval_dtype": "fp8", "streaming_dtype": "int8"}
    assert re.fullmatch(r"duohead>=[\d.]+\n", (out / "requirements.txt").read_text())
    assert (out / "heads.png").read_bytes().startswith(b"\x89PNG")
    expected = HeadPattern.load(heads).policy(
        retrieval_ratio=0.25, sink=3, recent=6, retrieval_dtype="fp8", streaming_dtype="int8"
    )
    model = AutoModelForCausalLM.from_pretrained(out)
    assert policy_of(model) == expected.bind(model)


def test_without_flags_the_patterns_own_settings_hold_else_half_the_heads(made, tmp_path) -> None:
    heads = made[1]
    assert export(heads, "--out", tmp_path / "a", "--keep-all", "--streaming-dtype", "int4") == 0
    found = open_adapter(tmp_path / "a")
    assert dict(found.pattern.selection) == {
        "retrieval_ratio": 0.5, "evict": False, "streaming_dtype": "int4"
    }  # fmt: skip
    assert export(tmp_path / "a", "--out", tmp_path / "b", "--kv-budget", 0.9, "--tokens", 64) == 0
    assert dict(open_adapter(tmp_path / "b").pattern.selection) == {
        "kv_budget": 0.9, "tokens": 64, "evict": False, "streaming_dtype": "int4"
    }  # fmt: skip


def test_the_card_computes_its_bytes_and_tells_how_the_heads_were_found(made, tmp_path) -> None:
    base, heads = made
    assert export(heads, "--base", base, "--out", tmp_path / "a", "--retrieval-ratio", 0.5) == 0
    text = (tmp_path / "a" / "README.md").read_text()
    adapter = open_adapter(tmp_path / "a")
    bound = adapter.policy.bind(adapter.config)
    longest = adapter.config.max_position_embeddings
    assert f"| {longest:,} | {bound.dense_kv_bytes(longest) / 2**20:.2f} MiB |" in text
    assert f"| {bound.kv_bytes(longest) / bound.dense_kv_bytes(longest):.1%}".replace("%", " %") in text  # fmt: skip
    assert f"smaller at every length from {bound.saves_from():,} tokens" in text
    assert "6 of 12 KV heads keep every token (50.0 %)" in text
    assert "the first 2 and the last 4 tokens" in text
    assert "| scorer | drawn by lot |" in text and "| steps | 3 |" in text
    assert "| share of heads aimed at | unknown |" in text
    assert "| sink tokens of streaming heads | 2 |" in text
    assert (
        "<summary>All that is recorded</summary>\n\n|" in text
        and "| method | drawn by lot |" in text
    )
    assert "Nothing yet: there were no records" in text
    assert "trust_remote_code=True" in text and "![Alphas of all heads](heads.png)" in text
    assert not re.search(r"\bNone\b|nan", text)
    assert "\n\n\n" not in text and text.endswith("\n</details>\n")
    front = text.split("---\n")[1]
    assert "library_name: transformers\n" in front and str(base) not in front


def test_the_card_shows_records_of_these_heads_only(made, tmp_path, capsys) -> None:
    base, heads = made
    records(tmp_path / "r.jsonl", base, HeadPattern.load(heads))
    words = (heads, "--base", base, "--retrieval-ratio", 0.5, "--results", tmp_path / "r.jsonl")
    assert export(*words, "--out", tmp_path / "a") == 0
    assert "left out 1 records about other models or heads" in capsys.readouterr().err
    text = (tmp_path / "a" / "README.md").read_text()
    assert "| duo | 50.0 % | 87.5 % |" in text and "| full | 100.0 % | 100.0 % |" in text
    assert "25.0 %" not in text
    assert "Some of these rows have exactly the settings above" in text
    assert export(*words[:3], "--retrieval-ratio", 0.25, *words[5:], "--out", tmp_path / "b") == 0
    text = (tmp_path / "b" / "README.md").read_text()
    assert "None of these rows have exactly the settings above" in text


def test_records_beside_the_pattern_are_found_and_an_export_into_its_folder_adds_to_it(
    tmp_path,
) -> None:
    base, heads = base_and_pattern(tmp_path)
    records(heads / "needle.jsonl", base, HeadPattern.load(heads))
    for _ in range(2):  # the same again changes nothing
        assert export(heads, "--base", base, "--out", heads) == 0
    assert "| duo | 50.0 % | 87.5 % |" in (heads / "README.md").read_text()
    assert (heads / "needle.jsonl").exists()
    assert policy_of(AutoModelForCausalLM.from_pretrained(heads)) is not None


def test_records_of_another_model_are_refused(made, tmp_path, capsys) -> None:
    base, heads = made
    records(tmp_path / "r.jsonl", base, HeadPattern.load(heads))
    lines = (tmp_path / "r.jsonl").read_text().replace(str(base), "other/model")
    (tmp_path / "r.jsonl").write_text(lines)
    code = export(heads, "--base", base, "--out", tmp_path / "a", "--results", tmp_path / "r.jsonl")
    assert code == 2
    assert "none of the 3 records there is about" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_without_matplotlib_the_card_has_its_heat_map_in_letters(
    made, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert export(made[1], "--out", tmp_path / "a") == 0
    assert "pip install 'duohead[report]'" in capsys.readouterr().err
    text = (tmp_path / "a" / "README.md").read_text()
    assert "heads.png" not in text and re.search(r"\n    0  \S+ +\d\n", text)


def test_a_pinned_commit_of_a_hub_base_stands_in_the_config(made, tmp_path, monkeypatch) -> None:
    base, heads = made
    from duohead.adapter import load

    commit = "0123456789abcdef0123456789abcdef01234567"
    real = load.AutoConfig.from_pretrained

    def config(name: str, **options: Any) -> Any:
        assert (name, options["revision"]) == ("org/model", "v2")
        return real(base)

    def download(name: str, *, revision: str, allow_patterns: list[str]) -> str:
        assert (name, revision, allow_patterns) == ("org/model", "v2", ["config.json"])
        return f"/cache/models--org--model/snapshots/{commit}"

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(load.AutoConfig, "from_pretrained", config)
    assert export(heads, "--base", "org/model", "--base-revision", "v2", "--out", tmp_path / "a") == 0  # fmt: skip
    pattern = HeadPattern.load(tmp_path / "a")
    assert (pattern.base_model, pattern.base_revision) == ("org/model", commit)
    front = (tmp_path / "a" / "README.md").read_text().split("---\n")[1]
    assert "base_model: org/model\nbase_model_relation: adapter\n" in front


def test_only_a_base_on_the_hub_is_named_to_the_hub(made) -> None:
    adapter = open_adapter(made[1])
    for base, named in (("gpt2", True), ("/tmp", False), ("pocket", False)):
        elsewhere = replace(adapter, pattern=replace(adapter.pattern, base_model=base))
        text = card(elsewhere, "a", picture=None, entries=())
        assert (f"base_model: {base}\n" in text) is named


def test_the_card_names_what_a_reader_asks_first_of_how_heads_were_found(made) -> None:
    def said(**fields: Any) -> dict[str, str]:
        pattern = replace(adapter.pattern, **fields)
        text = card(replace(adapter, pattern=pattern), "a", picture=None, entries=())
        table = text.split("when the heads were found")[1].split("\n\n")[0]
        return dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", table, re.M)[1:])

    adapter = open_adapter(made[1])
    gates = said(training=HeadPattern.load(pocket.pattern("pocket-laguna")).training)
    assert gates == {
        "scorer": "optimise", "steps": "400", "share of heads aimed at": "none", "longest text in tokens": "8192",
        "sink tokens of streaming heads": "64", "recent tokens of streaming heads": "256",
    }  # fmt: skip
    mixed = said(training={"scorer": "optimise", "tasks": ["passkeys", "copy"], "steps": 9})
    assert mixed["tasks of the samples"] == "passkeys, copy"
    # Options say all that there is, so what a scorer has none of is no gap.
    options = {"sink": 8, "recent": 16, "context": None}
    scored = said(training={"scorer": "profile", "options": options})
    assert scored == {
        "scorer": "profile", "longest text in tokens": "the scorer's default",
        "sink tokens of streaming heads": "8", "recent tokens of streaming heads": "16",
    }  # fmt: skip
    assert set(said(training={}, raw_alpha=adapter.pattern.alpha).values()) == {"unknown"}


def test_a_laguna_adapter_becomes_one_of_ours(tmp_path) -> None:
    config = laguna_model().config
    config.save_pretrained(tmp_path / "base")
    folder = laguna_folder(tmp_path / "published", config, "some/laguna")
    code = export(folder, "--base", tmp_path / "base", "--out", tmp_path / "a", "--window-dtype", "int4")  # fmt: skip
    assert code == 0
    found = open_adapter(tmp_path / "a")
    assert dict(found.pattern.selection) == {"threshold": 0.5, "window_dtype": "int4"}
    published = HeadPattern.load(folder)
    assert found.policy == published.policy(threshold=0.5, window_dtype="int4")
    assert (found.pattern.raw_alpha == published.raw_alpha).all()
    text = (tmp_path / "a" / "README.md").read_text()
    assert "30 layers have a native window and keep it" in text
    assert "whose gates of all layers are kept as `raw_alpha`" in text
    assert "| scorer | unknown |" in text and "| sink tokens of streaming heads | 64 |" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--base", "pocket"), "do not go together: pattern has 3 layers but the model has 6"),
        (("--base", "./nothing"), "needs its base model ./nothing, which cannot be loaded"),
        (("--base", "nobody/nothing"), "needs its base model nobody/nothing, which cannot be loaded"),
        (("--retrieval-ratio", "2"), r"retrieval_ratio must lie in \[0, 1\], got 2.0"),
        (("--streaming-dtype", "int3"), "streaming_dtype must be"),
        (("--keep-all", "--sink", "3"), "--sink: of no use with --keep-all"),
        (("--base-revision", "v1"), "base_revision 'v1': of no use for the base .*, which is not on the hub"),
        (("--tokens", "64"), "--tokens says where --kv-budget counts"),
        (("--retrieval-ratio", "1", "--threshold", "1"), "not allowed with argument"),
        (("--results", "nothing.jsonl"), "nothing.jsonl does not exist"),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_line_and_write_nothing(
    made, tmp_path, monkeypatch, capsys, words, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert export(made[1], "--out", tmp_path / "a", *words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(message, said), said
    assert not (tmp_path / "a").exists()


def test_a_full_disk_is_told_with_the_folder_and_nothing_stays(
    made, tmp_path, monkeypatch, capsys
) -> None:
    def full(path: Path) -> None:
        if path.is_relative_to(tmp_path):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("duohead.files._sync", full)
    assert export(made[1], "--out", tmp_path / "a") == 2
    assert f"{tmp_path / 'a'}: No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_exporting_again_refreshes_what_was_written_until_somebody_edits_it(
    made, tmp_path, capsys
) -> None:
    out = tmp_path / "a"
    assert export(made[1], "--out", out) == 0
    AutoModelForCausalLM.from_pretrained(out).save_pretrained(out)  # which writes no card
    (out / "requirements.txt").write_text("duohead>=0.0.1\n")  # as an older version would have
    _known(out, "requirements.txt")
    assert export(made[1], "--out", out, "--retrieval-ratio", 0.25) == 0
    assert "3 of 12 KV heads keep every token" in (out / "README.md").read_text()
    assert open_adapter(out).policy.retrieval_ratio == 0.25
    assert "0.0.1" not in (out / "requirements.txt").read_text()
    for name, said in (("README.md", b"my own words\n"), ("heads.png", b"my own picture")):
        kept = (out / name).read_bytes()
        (out / name).write_bytes(said)
        before = contents(out)
        assert export(made[1], "--out", out, "--retrieval-ratio", 0.5) == 2
        message = f"{name} is there already and was not written by duohead, or was changed since; move it away"
        assert message in capsys.readouterr().err
        assert contents(out) == before
        (out / name).write_bytes(kept)


def test_what_is_recorded_is_on_the_card_whole(made) -> None:
    adapter = open_adapter(made[1])
    training = {
        "tasks": ["code"],
        "wording": {"outro": "\n| end"},
        "patience": 0,
        "context": None,
        "scores": [[0.5, None]] * 9,
    }
    pattern = replace(adapter.pattern, training=training)
    text = card(replace(adapter, pattern=pattern), "a", picture=None, entries=())
    assert text.split("All that is recorded</summary>")[1].strip().splitlines()[2:-2] == [
        "| tasks | code |", '| wording | {"outro": "\\n\\| end"} |', "| patience | 0 |",
        "| scores | 18 values, see `config.json` |",
    ]  # fmt: skip


def test_an_export_that_was_killed_amid_its_renames_can_be_done_again(
    made, tmp_path, monkeypatch
) -> None:
    pattern, out, rename = HeadPattern.load(made[1]), tmp_path / "a", os.replace
    other = replace(pattern, selection={"retrieval_ratio": 0.25})
    for survived in range(1, 6):
        shutil.rmtree(out, ignore_errors=True)
        write(out, pattern, more={"README.md": b"half"})
        places = iter([out] * survived)

        def killed(source: Any, target: Any, *, places=places) -> None:
            if next(places, None):  # after a kill nothing happens, putting back neither
                rename(source, target)

        with monkeypatch.context() as patch:
            patch.setattr("duohead.files.os.replace", killed)
            write(out, other, more={"README.md": b"a quarter"})
        write(out, other, more={"README.md": b"a quarter"})
        assert (out / "README.md").read_bytes() == b"a quarter"
        assert HeadPattern.load(out) == other


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _known(folder: Path, name: str) -> None:
    """Have the folder say that this file was written as it is."""
    config = json.loads((folder / "config.json").read_text())
    config["written_files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("said", ["nothing", None, ["README.md"], {"README.md": 3}])
def test_a_card_of_which_nothing_is_known_is_not_replaced(made, tmp_path, capsys, said) -> None:
    out = tmp_path / "a"
    assert export(made[1], "--out", out) == 0
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "written_files": said}))
    (out / "README.md").write_text("my own words\n")
    assert export(made[1], "--out", out) == 2
    assert "README.md is there already and was not written by" in capsys.readouterr().err
    assert (out / "README.md").read_text() == "my own words\n"


def test_the_flags_are_those_listed() -> None:
    from duohead.cli import build_parser

    parser = build_parser("export")
    child = next(a for a in parser._actions if hasattr(a, "choices") and a.choices)
    flags = {flag for action in child.choices["export"]._actions for flag in action.option_strings}
    assert flags - {"-h", "--help"} == set(FLAGS)

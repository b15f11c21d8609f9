"""lm-eval's tasks with a policy: rows as they are finished, groups, records, and the command around them."""

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_evaluation
import torch

from duohead.cli import evaluate_lm_eval as cli
from duohead.evaluate.harness import (
    HarnessOptions,
    evaluate_harness,
    harness_recorder,
    require_lm_eval,
)
from duohead.evaluate.recording import recording, write_rows
from duohead.record import read_records

pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'duohead[eval]')")
pytest.importorskip("accelerate", reason="lm-eval's adapter needs accelerate")

import tiny_harness as shared
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from tiny_harness import RECENT, SINK, plan, theirs

from duohead.evaluate.harness_model import PolicyLM

model, tokenizer, policy = shared.model, shared.tokenizer, shared.policy


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return shared.task_files(tmp_path_factory.mktemp("tasks"))


def test_task_files_score_as_with_lm_eval_itself(model, tokenizer, folder) -> None:
    tasks = ("tiny_choice", "tiny_text", "tiny_rolling")
    rows = evaluate_harness(
        model, tokenizer, policies={"full": None}, options=plan(folder, *tasks)
    )  # fmt: skip
    expected = simple_evaluate(
        theirs(model, tokenizer),
        tasks=list(tasks),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )["results"]
    assert [row.task for row in rows] == list(tasks)
    for row in rows:
        metric = next(iter(row.scores))
        assert row.scores[metric] == pytest.approx(expected[row.task][f"{metric},none"], rel=1e-4)


def test_methods_stand_side_by_side_with_bytes_versions_and_windows(
    model, tokenizer, policy, folder, tmp_path
) -> None:
    options = plan(folder, "tiny_group", "tiny_text", limit=4)
    rows = evaluate_harness(
        model, tokenizer, policies={"full": None, "duo_50": policy}, options=options
    )
    assert [(row.method, row.task) for row in rows] == [
        (method, task)
        for method in ("full", "duo_50")
        for task in ("tiny_choice", "tiny_second", "tiny_group", "tiny_text")
    ]
    *leaves, group, text = rows[4:]
    assert [row.part_of for row in rows[4:]] == ["tiny_group", "tiny_group", None, None]
    assert group.samples == 8
    assert group.scores["acc"] == pytest.approx(sum(row.scores["acc"] for row in leaves) / 2)
    as_record = harness_recorder(model="tiny", dtype=torch.float32, options=options)
    write_rows(tmp_path / "lm.jsonl", rows, as_record)
    records = read_records(tmp_path / "lm.jsonl")
    last = records[-1]
    assert last["op"] == "evaluate.lm_eval"
    assert last["impl"] == "duo_50"
    assert last["shape"]["task_version"] == "1.0"
    assert last["shape"]["retrieval_ratio"] == 0.5
    assert (last["shape"]["sink"], last["shape"]["recent"]) == (SINK, RECENT)
    assert last["shape"]["prefill_recent"] == RECENT
    assert (last["shape"]["streaming_dtype"], last["shape"]["evict"]) == ("auto", True)
    assert last["shape"]["limit"] == 4
    assert last["policy"] == text.policy is not None
    assert last["versions"]["lm_eval"]
    assert 0 < last["numbers"]["kv_bytes"] < records[3]["numbers"]["kv_bytes"]
    assert 0 < last["numbers"]["tpot_ms"] < last["numbers"]["ttft_ms"]
    assert records[0]["numbers"]["tpot_ms"] is None
    assert records[0]["policy"] is None


def test_a_task_is_in_the_file_before_the_next_one_is_asked(
    model, tokenizer, folder, tmp_path, monkeypatch
) -> None:
    path = tmp_path / "lm.jsonl"
    options = plan(folder, "tiny_group", "tiny_text", limit=2)
    as_record = harness_recorder(model="tiny", dtype=torch.float32, options=options)

    def interrupted(self: Any, requests: Any, disable_tqdm: bool = False) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(PolicyLM, "generate_until", interrupted)
    with (
        pytest.raises(KeyboardInterrupt, match="lm.jsonl holds the 3 records finished so far"),
        recording(path, as_record) as keep,
    ):
        evaluate_harness(model, tokenizer, policies={"full": None}, options=options, on_row=keep)
    found = [entry["shape"]["task"] for entry in read_records(path)]
    assert found == ["tiny_choice", "tiny_second", "tiny_group"]


def test_a_tasks_texts_do_not_depend_on_the_tasks_beside_it(
    model, tokenizer, folder, monkeypatch
) -> None:
    made: list[list[str]] = []
    generate = PolicyLM.generate_until

    def spy(self: Any, requests: Any, disable_tqdm: bool = False) -> Any:
        made.append(generate(self, requests, disable_tqdm))
        return made[-1]

    monkeypatch.setattr(PolicyLM, "generate_until", spy)
    sampled = {"do_sample": True, "temperature": 5.0}
    for tasks in (("tiny_text",), ("tiny_second_text", "tiny_text")):
        options = plan(folder, *tasks, gen_kwargs=sampled, limit=3)
        evaluate_harness(model, tokenizer, policies={"full": None}, options=options)
    assert made[0] == made[-1] and len(set(made[0])) > 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_written_as_null_and_told(
    model, tokenizer, folder, tmp_path, monkeypatch, caplog, value
) -> None:
    from lm_eval.api.task import ConfigurableTask

    monkeypatch.setattr(ConfigurableTask, "process_results", lambda *_: {"acc": value})
    options = plan(folder, "tiny_group", limit=1)
    rows = evaluate_harness(model, tokenizer, policies={"full": None}, options=options)
    assert [row.scores["acc"] for row in rows] == [None, None, None]
    assert f"acc of task tiny_choice is {value} and is written as null" in caplog.text
    as_record = harness_recorder(model="tiny", dtype=torch.float32, options=options)
    write_rows(tmp_path / "lm.jsonl", rows, as_record)
    assert read_records(tmp_path / "lm.jsonl")[0]["numbers"]["acc"] is None
    assert cli._table(rows).count("no number") == 3


def test_a_longer_window_for_prompts_reaches_the_policy() -> None:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser.add_subparsers())
    words = ["lm-eval", "--model", "m", "--pattern", "p", "--tasks", "t", "--prefill-recent", "64"]
    policies = cli._policies(parser.parse_args(words), tiny_evaluation.pattern())
    assert policies["duo_50"].prefill_recent == 64 > policies["duo_50"].recent


def test_storage_reaches_the_policy_and_the_name_of_the_method() -> None:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser.add_subparsers())
    words = ["lm-eval", "--model", "m", "--pattern", "p", "--tasks", "t", "--window-dtype", "fp8"]
    words += ["--streaming-dtype", "int4", "--keep-all"]
    policies = cli._policies(parser.parse_args(words), tiny_evaluation.pattern())
    policy = policies["duo:streaming=int4,window=fp8,keep-all_50"]
    assert (policy.streaming_dtype, policy.window_dtype, policy.evict) == ("int4", "fp8", False)
    with pytest.raises(ValueError, match="--recent: of no use with --keep-all"):
        cli._policies(parser.parse_args([*words, "--recent", "9"]), tiny_evaluation.pattern())


def test_a_chat_template_is_applied(model, tokenizer, folder, monkeypatch) -> None:
    seen: list[str] = []
    generate = PolicyLM.generate_until

    def spy(self: Any, requests: Any, disable_tqdm: bool = False) -> Any:
        seen.extend(request.args[0] for request in requests)
        return generate(self, requests, disable_tqdm)

    monkeypatch.setattr(PolicyLM, "generate_until", spy)
    options = plan(
        folder, "tiny_text", limit=1, apply_chat_template=True, system_instruction="Be kind."
    )
    evaluate_harness(model, tokenizer, policies={"full": None}, options=options)
    assert seen[0].startswith("[system] Be kind.\n[user] a fox")
    assert seen[0].endswith("[assistant] ")


def test_a_task_that_does_not_exist_is_named_with_its_neighbours(model, tokenizer, folder) -> None:
    with pytest.raises(ValueError, match="got 'tiny_chioce'; did you mean tiny_choice"):
        evaluate_harness(
            model, tokenizer, policies={"full": None}, options=plan(folder, "tiny_chioce")
        )


def test_code_that_a_model_wrote_runs_only_when_confirmed(model, tokenizer, folder) -> None:
    with pytest.raises(ValueError, match="unsafe"):
        evaluate_harness(
            model, tokenizer, policies={"full": None}, options=plan(folder, "tiny_unsafe")
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": ()}, "tasks must name at least one task"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"num_fewshot": -1}, "num_fewshot must be 0 or more, got -1"),
        ({"own_tasks_only": True}, "own_tasks_only needs include_path"),
    ],
)
def test_options_that_cannot_be_met_are_refused(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        HarnessOptions(**{"tasks": ("mmlu",), **fields})


def test_the_command_prints_a_table_and_writes_records(
    model, tokenizer, folder, tmp_path, monkeypatch, capsys
) -> None:
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_evaluation.pattern().save(tmp_path / "pattern")

    def own_tasks(**options: Any) -> TaskManager:
        return TaskManager(**options | {"include_defaults": False})

    monkeypatch.setattr("lm_eval.tasks.TaskManager", own_tasks)
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser.add_subparsers())
    words = ["lm-eval", "--model", str(tmp_path / "model"), "--pattern", str(tmp_path / "pattern")]
    words += ["--tasks", "tiny_choice,tiny_text", "--include-path", str(folder), "--limit", "2"]
    words += ["--json", str(tmp_path / "out.jsonl"), "--device", "cpu"]
    assert cli.run(parser.parse_args(words)) == 0
    out = capsys.readouterr().out
    assert "tiny_choice      2.0    full          acc" in out
    assert "duo_50" in out
    assert len(read_records(tmp_path / "out.jsonl")) == 4
    with pytest.raises(ValueError, match=r"--metadata must be a JSON object such as .* got '3'"):
        cli.run(parser.parse_args([*words, "--metadata", "3"]))
    with pytest.raises(ValueError, match="--methods must be among full, duo, random, streaming"):
        cli.run(parser.parse_args([*words, "--methods", "half"]))


def test_without_lm_eval_the_remedy_is_said(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(ValueError, match=r"install it with: pip install 'duohead\[eval\]'"):
        require_lm_eval()


def test_the_flags_are_the_listed_ones() -> None:
    parser = argparse.ArgumentParser()
    kinds = parser.add_subparsers()
    cli.add_arguments(kinds)
    child = kinds.choices["lm-eval"]
    found = {name for a in child._actions for name in a.option_strings} - {"-h", "--help"}
    assert found == set(cli.FLAGS)

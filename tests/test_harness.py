"""lm-eval's tasks through the small cache: scores equal lm-eval's own, and a masked reference where heads stream."""

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_evaluation
import torch
import yaml

from duohead.cli import evaluate_lm_eval as cli
from duohead.evaluate.harness import HarnessOptions, evaluate_harness, require_lm_eval, write_rows
from duohead.models import duo
from duohead.record import read_records

pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'duohead[eval]')")
pytest.importorskip("accelerate", reason="lm-eval's adapter needs accelerate")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from duohead.evaluate.harness_model import PolicyLM

SINK, RECENT = 4, 16
STORY = "a fox and a hen went over nine hills to see the sea; "
PAIRS = [
    (STORY * 2 + "they saw", " it."),
    (STORY * 2 + "they saw", " it!"),
    (STORY * 2 + "they saw", " a long boat"),
    ("why", "?"),
    (STORY, "and so on and on, " * 4),
]
PROMPTS = [STORY * 3 + "then", "so", STORY + "now", "x" * 40]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_evaluation.model(positions=256)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = tiny_evaluation.tokenizer()
    made.add_special_tokens({"eos_token": "~"})
    made.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    return made


@pytest.fixture(scope="module")
def policy() -> Any:
    return tiny_evaluation.pattern().policy(retrieval_ratio=0.5, sink=SINK, recent=RECENT)


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, args, i, metadata=("t", i, 1)) for i, args in enumerate(arguments)]


def asked(lm: Any, until: str = "e") -> tuple[Any, Any, Any]:
    """Likelihoods, rolling likelihoods and texts."""
    settings = {"until": [until], "max_gen_toks": 9, "do_sample": False}
    return (
        lm.loglikelihood(instances("loglikelihood", PAIRS)),
        lm.loglikelihood_rolling(
            instances("loglikelihood_rolling", [(STORY * 2,), (STORY * 6,), ("a",)])
        ),
        lm.generate_until(instances("generate_until", [(p, settings) for p in PROMPTS])),
    )


def ours(model: Any, tokenizer: Any, policy: Any, **changes: Any) -> PolicyLM:
    options = {"batch_size": 3, "max_length": None, "chunk": 17, **changes}
    return PolicyLM(model, tokenizer, policy=policy, **options)


def theirs(model: Any, tokenizer: Any) -> HFLM:
    return HFLM(
        pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal", batch_size=2
    )


def assert_scores_equal(found: Any, expected: Any) -> None:
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    for (a, _), (b, _) in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-4)


def test_full_attention_answers_as_lm_evals_own_adapter_does(model, tokenizer) -> None:
    likelihoods, rolling, texts = asked(ours(model, tokenizer, None))
    expected = asked(theirs(model, tokenizer))
    assert_scores_equal(likelihoods, expected[0])
    assert rolling == pytest.approx(expected[1], rel=1e-4)
    assert texts == expected[2]
    assert len(set(texts)) > 1


def test_a_policys_likelihoods_are_those_of_the_masked_reference(model, tokenizer, policy) -> None:
    with duo(model, policy) as bound:
        likelihoods, rolling, _ = asked(ours(model, tokenizer, bound))
    full = theirs(model, tokenizer).loglikelihood(instances("loglikelihood", PAIRS))
    with tiny.masked(model, policy):
        lm = theirs(model, tokenizer)
        expected = lm.loglikelihood(instances("loglikelihood", PAIRS))
        long = lm.loglikelihood_rolling(
            instances("loglikelihood_rolling", [(STORY * 2,), (STORY * 6,), ("a",)])
        )
    assert_scores_equal(likelihoods, expected)
    assert rolling == pytest.approx(long, rel=1e-4)
    assert abs(full[0][0] - expected[0][0]) > 1e-2  # the policy makes a difference here


def test_a_policys_texts_are_those_of_the_masked_reference(model, tokenizer, policy) -> None:
    with duo(model, policy) as bound:
        _, _, texts = asked(ours(model, tokenizer, bound))
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = torch.tensor([tokenizer.encode(prompt)])
        made = tiny.expected_greedy(model, policy, ids, 9)[0]
        assert text == tokenizer.decode(made[-9:]).split("e")[0].split("~")[0]


def test_texts_are_cut_alike_where_decoding_does_not_stop(
    model, tokenizer, policy, monkeypatch
) -> None:
    with duo(model, policy) as bound:
        stopped = asked(ours(model, tokenizer, bound))[2]
        monkeypatch.setattr(PolicyLM, "looks_at_text", False)
        lm = ours(model, tokenizer, bound, batch_size=len(PROMPTS))
        assert asked(lm)[2] == stopped
    assert lm.use["t"].decode_steps == 9


@pytest.mark.parametrize(("batch", "chunk"), [(1, None), (2, 1), (5, 7), (8, 256)])
def test_batches_and_chunks_change_nothing(model, tokenizer, policy, batch, chunk) -> None:
    with duo(model, policy) as bound:
        expected = asked(ours(model, tokenizer, bound))
        found = asked(ours(model, tokenizer, bound, batch_size=batch, chunk=chunk))
    assert_scores_equal(found[0], expected[0])
    assert found[1] == pytest.approx(expected[1], rel=1e-4)
    assert found[2] == expected[2]


def test_answers_that_differ_in_their_last_token_share_one_pass(model, tokenizer) -> None:
    lm = ours(model, tokenizer, None)
    lm.loglikelihood(instances("loglikelihood", PAIRS))
    assert lm.use["t"].sequences == len(PAIRS) - 1


def test_bytes_are_those_of_the_allocated_cache(model, tokenizer, policy) -> None:
    with duo(model, policy) as bound:
        lm = ours(model, tokenizer, bound, batch_size=1)
        lm.loglikelihood(instances("loglikelihood", PAIRS[4:]))
        tokens = len("".join(PAIRS[4])) - 1
        assert lm.use["t"].bytes_of_all == bound.kv_bytes(tokens)
    full = ours(model, tokenizer, None, batch_size=1)
    full.loglikelihood(instances("loglikelihood", PAIRS[4:]))
    assert full.use["t"].bytes_of_all == bound.dense_kv_bytes(tokens)


def test_a_continuation_longer_than_the_context_is_refused(model, tokenizer) -> None:
    lm = ours(model, tokenizer, None, max_length=16)
    with pytest.raises(ValueError, match="continuations must fit max_length=16, got one of 17 tok"):
        lm.loglikelihood(instances("loglikelihood", [("a", "b" * 17)]))


def test_the_callers_tokenizer_stays_as_it_is(model, tokenizer) -> None:
    ours(model, tokenizer, None)
    assert tokenizer.pad_token is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three task files with their data: a choice, a text, a perplexity; the first two are also a group."""
    place = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "q": f"{STORY * (i % 3 + 1)} pick {i}",
            "choices": ["a", "b", "of"],
            "gold": i % 3,
            "a": "o",
        }
        for i in range(5)
    ]
    (place / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(place / "data.jsonl")},
            "cache_dir": str(place / "cache"),
        },
        "test_split": "test",
        "doc_to_text": "{{q}}",
    }
    choice = {
        "task": "tiny_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 2.0},
    }
    text = {
        "task": "tiny_text",
        "output_type": "generate_until",
        "doc_to_target": "a",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 5, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    rolling = {
        "task": "tiny_rolling",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{q}}",
        "metric_list": [{"metric": "byte_perplexity"}],
        "metadata": {"version": 1.0},
    }
    unsafe = {**text, "task": "tiny_unsafe", "unsafe_code": True}
    for task in (choice, text, rolling, unsafe):
        (place / f"{task['task']}.yaml").write_text(yaml.safe_dump({**common, **task}))
    group = {
        "group": "tiny_group",
        "task": ["tiny_choice", "tiny_second"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
        "metadata": {"version": 3.0},
    }
    (place / "second.yaml").write_text(
        yaml.safe_dump({**common, **choice, "task": "tiny_second", "doc_to_text": "{{a}}{{q}}"})
    )
    (place / "group.yaml").write_text(yaml.safe_dump(group))
    return place


def plan(folder: Path, *tasks: str, **changes: Any) -> HarnessOptions:
    fields = {"batch_size": 2, "bootstrap_iters": 0, "chunk": 33, **changes}
    return HarnessOptions(tasks, include_path=str(folder), own_tasks_only=True, **fields)


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
        for task in ("tiny_choice", "tiny_second", "tiny_text", "tiny_group")
    ]
    *leaves, text, group = rows[4:]
    assert [row.part_of for row in rows[4:]] == ["tiny_group", "tiny_group", None, None]
    assert group.samples == 8
    assert group.scores["acc"] == pytest.approx(sum(row.scores["acc"] for row in leaves) / 2)
    write_rows(
        tmp_path / "lm.jsonl", rows, model="tiny", dtype=torch.float32, options=options
    )  # fmt: skip
    records = read_records(tmp_path / "lm.jsonl")
    last = records[-2]
    assert last["op"] == "evaluate.lm_eval"
    assert last["impl"] == "duo_50"
    assert last["shape"]["task_version"] == "1.0"
    assert last["shape"]["retrieval_ratio"] == 0.5
    assert (last["shape"]["sink"], last["shape"]["recent"]) == (SINK, RECENT)
    assert last["shape"]["prefill_recent"] == RECENT
    assert last["shape"]["limit"] == 4
    assert last["policy"] == text.policy is not None
    assert last["versions"]["lm_eval"]
    assert 0 < last["numbers"]["kv_bytes"] < records[2]["numbers"]["kv_bytes"]
    assert 0 < last["numbers"]["tpot_ms"] < last["numbers"]["ttft_ms"]
    assert records[0]["numbers"]["tpot_ms"] is None
    assert records[0]["policy"] is None


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

"""What the tests of lm-eval's adapter share: a tiny model, its tokenizer, a policy, requests, and task files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_evaluation
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from duohead.evaluate.harness import HarnessOptions
from duohead.evaluate.harness_model import PolicyLM

SINK, RECENT = 4, 16
STORY = "a fox and a hen went over nine hills to see the sea; "


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


def ours(model: Any, tokenizer: Any, policy: Any, **changes: Any) -> PolicyLM:
    options = {"batch_size": 3, "max_length": None, "chunk": 17, **changes}
    return PolicyLM(model, tokenizer, policy=policy, **options)


def theirs(model: Any, tokenizer: Any) -> HFLM:
    return HFLM(
        pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal", batch_size=2
    )


def task_files(place: Path) -> Path:
    """Three task files with their data: a choice, a text, a perplexity; the first two are also a group."""
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
    beside = {**text, "task": "tiny_second_text"}
    for task in (choice, text, rolling, unsafe, beside):
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

"""lm-eval's requests and task files on a CUDA device: kernels and the engine score as PyTorch does on the CPU."""

from pathlib import Path
from typing import Any

import pytest
import tiny_evaluation

pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'duohead[eval]')")
pytest.importorskip("accelerate", reason="lm-eval's adapter needs accelerate")

import tiny_harness as shared
from tiny_harness import STORY, instances, ours, plan, task_files

from duohead.evaluate.harness import evaluate_harness
from duohead.evaluate.scoring import using

pytestmark = pytest.mark.gpu
tokenizer = shared.tokenizer
POLICY = tiny_evaluation.pattern().policy(retrieval_ratio=0.5, sink=4, recent=16)


def answers(lm: Any) -> tuple[list[float], list[bool], list[str]]:
    """Likelihoods, whether each continuation is the greedy one, and texts."""
    pairs = [(STORY * n + "they saw", word) for n in (1, 2, 3) for word in (" it.", " a long boat")]
    settings = {"until": ["e"], "max_gen_toks": 9, "do_sample": False}
    prompts = [(STORY * n + "then", settings) for n in (1, 3)]
    scored = lm.loglikelihood(instances("loglikelihood", pairs))
    texts = lm.generate_until(instances("generate_until", prompts))
    return [value for value, _ in scored], [greedy for _, greedy in scored], texts


@pytest.mark.parametrize("policy", [None, POLICY], ids=["full", "duo"])
def test_likelihoods_and_texts_on_the_gpu_are_those_of_the_cpu(tokenizer: Any, policy: Any) -> None:
    model = tiny_evaluation.model(positions=256)
    made = []
    for device in ("cpu", "cuda"):
        with using(model.to(device), policy) as bound:
            made.append(answers(ours(model, tokenizer, bound)))
    expected, found = made
    assert found[0] == pytest.approx(expected[0], rel=1e-4, abs=1e-4)
    assert found[1:] == expected[1:]


def test_task_files_score_on_the_gpu_as_on_the_cpu(tokenizer: Any, tmp_path: Path) -> None:
    options = plan(task_files(tmp_path), "tiny_group", "tiny_text", "tiny_rolling")
    model, policies = tiny_evaluation.model(positions=256), {"full": None, "duo_50": POLICY}
    expected, found = (
        evaluate_harness(model.to(device), tokenizer, policies=policies, options=options)
        for device in ("cpu", "cuda")
    )
    assert [(row.method, row.task) for row in found] == [(r.method, r.task) for r in expected]
    for row, reference in zip(found, expected, strict=True):
        known = {name: value for name, value in reference.scores.items() if value is not None}
        assert known and {name: row.scores[name] for name in known} == pytest.approx(known, 1e-4)
        assert row.kv_bytes > 0 and row.ttft_ms > 0
    text = next(row for row in found if (row.method, row.task) == ("duo_50", "tiny_text"))
    assert text.tpot_ms is not None and text.tpot_ms > 0

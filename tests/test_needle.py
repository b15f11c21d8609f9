"""Needle scores mean what they say: the same samples for all, exact match as greedy decoding has it, real bytes."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny_evaluation as tiny
import torch

from duohead import pocket
from duohead.evaluate.demo import generate_greedy
from duohead.evaluate.methods import all_streaming, comparison, random_heads
from duohead.evaluate.needle import cache_bytes, evaluate_needle, new_cache, score_sample, using
from duohead.evaluate.results import NeedleResult
from duohead.evaluate.scoring import pieces, score_samples
from duohead.evaluate.tables import label
from duohead.evaluate.tasks import TASKS
from duohead.identify.assembly import Sample
from duohead.pattern import HeadPattern
from duohead.policy import HeadPolicy


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def text_ids(tokenizer):
    return torch.tensor(tokenizer(tiny.TEXT, add_special_tokens=False)["input_ids"])


POLICIES = {
    "full": None,
    "duo": HeadPolicy.from_heads(retrieval=[[0], [], [1]], num_kv_heads=2, sink=4, recent=16),
    "streaming": HeadPolicy.from_heads(retrieval=[[], [], []], num_kv_heads=2, sink=2, recent=8),
    "prompts": HeadPolicy.from_heads(
        retrieval=[[0], [], [1]], num_kv_heads=2, sink=4, recent=4, prefill_recent=64
    ),
}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("chunk", [None, 33])
def test_exact_match_of_one_pass_is_that_of_greedy_generation(model, name, chunk):
    policy = POLICIES[name]
    generator = torch.Generator().manual_seed(1)
    for wrong in (None, 0, 2, 4):
        prompt = torch.randint(97, (100,), generator=generator).tolist()
        made = generate_greedy(model, prompt, policy, tokens=5)
        answer = list(made)
        if wrong is not None:
            answer[wrong] = (answer[wrong] + 1) % 97
        sample = Sample(torch.tensor(prompt + answer), ((100, 105),))
        with using(model, policy):
            score = score_sample(model, sample, cache=new_cache(model, policy), chunk=chunk)
        assert score.exact_match == (made == answer) == (wrong is None)
        assert score.first_token == (wrong != 0)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("chunk", [None, 64])
def test_samples_side_by_side_score_as_they_do_alone(model, tokenizer, text_ids, name, chunk):
    options = {"tasks": ["number", "late"], "lengths": [700], "depths": [0.2, 0.8], "samples": 3}
    alone, together = (
        evaluate_needle(
            model,
            tokenizer,
            text_ids,
            policies={name: POLICIES[name]},
            batch=batch,
            chunk=chunk,
            **options,
        )
        for batch in (1, 8)
    )
    assert [replace(row, batch=8) for row in alone.rows] == list(together.rows)
    assert any(0 < row.token_accuracy < 1 for row in alone.rows)


def test_samples_of_different_lengths_do_not_share_a_pass(model):
    samples = [Sample(torch.zeros(n, dtype=torch.long), ((n - 2, n),)) for n in (20, 30)]
    with pytest.raises(ValueError, match=r"samples must be of one length .* got \[20, 30\]"):
        score_samples(model, samples, cache=new_cache(model, None))


def test_no_piece_of_a_prompt_is_a_single_token():
    assert list(pieces(100, None)) == [(0, 100)]
    assert list(pieces(100, 33)) == [(0, 33), (33, 66), (66, 100)]
    assert list(pieces(3, 1)) == [(0, 1), (1, 2), (2, 3)]


def test_rows_say_how_they_were_made_and_what_generation_took(model, tokenizer, text_ids):
    policy = HeadPolicy.from_heads(
        retrieval=[[0], [], [1]], num_kv_heads=2, sink=4, recent=16, prefill_recent=32
    )
    result = evaluate_needle(
        model,
        tokenizer,
        text_ids,
        policies={"full": None, "duo": policy},
        tasks=["number"],
        lengths=[512],
        depths=[0.5],
        samples=1,
        seed=7,
        chunk=100,
        speed_tokens=4,
        text="story",
    )
    full, duo = result.rows
    assert (duo.sink, duo.recent, duo.prefill_recent) == (4, 16, 32)
    assert (full.sink, full.recent, full.prefill_recent) == (None, None, None)
    assert (full.attention, duo.attention) == ("sdpa", "duo:tiled")
    for row in result.rows:
        assert (row.text, row.sample_seed, row.chunk, row.batch) == ("story", 7, 100, 1)
        assert row.text_digest == full.text_digest and len(row.text_digest) == 12
        assert row.ttft_ms > 0 and row.tpot_ms > 0 and row.engine == "transformers"
    assert duo.retrieval_ratio == 1 / 3


def test_several_answers_of_a_sample_count_by_their_mean(model):
    generator = torch.Generator().manual_seed(2)
    prompt = torch.randint(97, (60,), generator=generator).tolist()
    first = generate_greedy(model, prompt, None, tokens=2)
    bridge = torch.randint(97, (10,), generator=generator).tolist()
    second = generate_greedy(model, prompt + first + bridge, None, tokens=4)
    second[3] = (second[3] + 1) % 97
    sample = Sample(torch.tensor(prompt + first + bridge + second), ((60, 62), (72, 76)))
    score = score_sample(model, sample, cache=new_cache(model, None))
    assert score.exact_match == 0.5
    assert score.first_token == 1.0
    assert score.token_accuracy == pytest.approx((1 + 3 / 4) / 2)
    assert score.answers == 2


def test_every_method_sees_the_same_samples_and_a_cell_does_not_depend_on_the_others(
    model, tokenizer, text_ids
):
    options = {"tasks": ["number"], "depths": [0.5], "samples": 2, "seed": 3}
    same = {"a": None, "b": None}
    both = evaluate_needle(model, tokenizer, text_ids, policies=same, lengths=[700, 900], **options)
    one = evaluate_needle(
        model, tokenizer, text_ids, policies={"a": None}, lengths=[900], **options
    )
    a, b = both.select(method="a", length=900).rows[0], both.select(method="b", length=900).rows[0]
    assert (a.exact_match, a.first_token, a.token_accuracy) == (
        b.exact_match,
        b.first_token,
        b.token_accuracy,
    )
    assert one.rows[0] == a


def test_all_retrieval_scores_and_weighs_what_full_attention_does(model, tokenizer, text_ids):
    everything = HeadPolicy.from_heads(retrieval=[[0, 1]] * 3, num_kv_heads=2, sink=4, recent=16)
    result = evaluate_needle(
        model,
        tokenizer,
        text_ids,
        policies={"full": None, "all": everything},
        tasks=["needle", "number"],
        lengths=[512],
        depths=[0.0, 1.0],
        samples=2,
    )
    full, ours = result.select(method="full").rows, result.select(method="all").rows
    assert [r.token_accuracy for r in full] == [r.token_accuracy for r in ours]
    assert (
        result.kv_bytes(method="full") == result.kv_bytes(method="all") == 3 * 2 * 2 * 8 * 512 * 4
    )


def test_rows_carry_the_bytes_that_the_policy_predicts(model, tokenizer, text_ids):
    result = evaluate_needle(
        model,
        tokenizer,
        text_ids,
        policies=POLICIES,
        tasks=["needle"],
        lengths=[512, 640],
        depths=[0.5],
        samples=1,
    )
    for length in (512, 640):
        for name in ("duo", "streaming"):
            predicted = POLICIES[name].kv_bytes(length, head_dim=8, dtype="float32")
            assert result.kv_bytes(method=name, length=length) == predicted
            assert predicted < result.kv_bytes(method="full", length=length)


def test_bytes_of_a_cache_are_those_of_its_tensors(model):
    cache = new_cache(model, None)
    model(torch.zeros(1, 50, dtype=torch.long), past_key_values=cache)
    assert cache_bytes(cache) == 3 * 2 * 2 * 8 * 50 * 4


def test_evaluating_leaves_the_model_as_it_was(model, tokenizer, text_ids):
    before = model(text_ids[None, :64]).logits
    evaluate_needle(
        model,
        tokenizer,
        text_ids,
        policies=POLICIES,
        tasks=["needle"],
        lengths=[512],
        depths=[0.5],
        samples=1,
    )
    assert torch.equal(before, model(text_ids[None, :64]).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": [5000]}, "lengths must not exceed the model's 4096 positions, got 5000"),
        (
            {"text_ids": torch.zeros(500, dtype=torch.long)},
            "text is too short: .* 512 tokens .* has 500",
        ),
        ({"tasks": ["haystack"]}, "tasks must be among passkeys.* got haystack"),
        ({"tasks": []}, "tasks must not be empty"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"speed_tokens": 1}, "speed_tokens must leave .* be 2 or more, got 1"),
        ({"depths": [1.5]}, "depth must be between 0 and 1, got 1.5"),
    ],
)
def test_a_bad_argument_is_named_before_any_work(model, tokenizer, text_ids, changes, message):
    options = {
        "tasks": ["needle"],
        "lengths": [512],
        "depths": [0.5],
        "samples": 1,
        "text_ids": text_ids,
        **changes,
    }
    ids = options.pop("text_ids")
    with pytest.raises(ValueError, match=message):
        evaluate_needle(
            model, tokenizer, ids, policies={"full": None}, progress=pytest.fail, **options
        )


def test_a_model_in_training_mode_is_refused(tokenizer, text_ids):
    with pytest.raises(ValueError, match="model must be in evaluation mode"):
        evaluate_needle(
            tiny.model().train(),
            tokenizer,
            text_ids,
            policies={"full": None},
            tasks=["needle"],
            lengths=[512],
            depths=[0.5],
            samples=1,
        )


def test_random_heads_are_as_many_as_the_identified_and_leave_ungated_heads_alone():
    alpha = np.random.default_rng(0).random((6, 4), dtype=np.float32)
    alpha[2] = np.nan
    pattern = HeadPattern.from_alpha(alpha, sink=4, recent=16)
    policy = pattern.policy(retrieval_ratio=0.3)
    draws = random_heads(policy, pattern.gated, draws=5, seed=1)
    assert draws == random_heads(policy, pattern.gated, draws=5, seed=1)
    assert len(set(draws)) > 1
    for draw in draws:
        assert draw.retrieval_ratio == policy.retrieval_ratio
        assert draw.layers[2] == policy.layers[2]
        assert draw.kv_bytes(1000, head_dim=8) == policy.kv_bytes(1000, head_dim=8)
    alone = all_streaming(policy, pattern.gated)
    assert [len(layer.retrieval) for layer in alone.layers] == [0, 0, 4, 0, 0, 0]


def test_draws_of_a_ratio_do_not_depend_on_the_other_ratios():
    pattern = tiny.pattern(layers=6, heads=4)
    two = comparison(pattern, ratios=(0.5, 0.25), draws=2, seed=0)
    one = comparison(pattern, ratios=(0.25,), draws=2, seed=0)
    assert list(two) == [
        "full",
        "duo_50",
        "random_50_0",
        "random_50_1",
        "duo_25",
        "random_25_0",
        "random_25_1",
        "streaming",
    ]
    assert all(two[name] == method for name, method in one.items())


def test_scores_of_two_versions_of_a_task_are_not_mixed():
    method = comparison(tiny.pattern(), ratios=(0.5,), draws=0, seed=0)["full"]
    rows = (tiny.row("full", method, task_version=1), tiny.row("full", method, task_version=2))
    with pytest.raises(ValueError, match="rows mix versions 1 and 2 of task 'passkeys'"):
        NeedleResult(rows)


def test_records_come_back_as_the_rows_they_were(tmp_path):
    result = tiny.report().grid
    result.write(tmp_path / "needle.jsonl", model="pocket", dtype=torch.float32)
    assert NeedleResult.read(tmp_path / "needle.jsonl") == result


def test_records_of_the_first_version_are_read_as_before(tmp_path):
    tiny.report().grid.write(tmp_path / "now.jsonl", model="pocket", dtype=torch.float32)
    entry = json.loads((tmp_path / "now.jsonl").read_text().splitlines()[0])
    first = "model task task_version retrieval_ratio sink recent length depth samples".split()
    entry["shape"] = {name: entry["shape"][name] for name in first}
    counted = "answers exact_match first_token token_accuracy kv_bytes".split()
    entry["numbers"] = {name: entry["numbers"][name] for name in counted}
    (tmp_path / "then.jsonl").write_text(json.dumps(entry) + "\n")
    (row,) = NeedleResult.read(tmp_path / "then.jsonl").rows
    assert (row.exact_match, row.kv_bytes) == (
        entry["numbers"]["exact_match"],
        entry["numbers"]["kv_bytes"],
    )
    assert row.sample_seed is None and row.ttft_ms is None


def test_files_of_two_versions_are_not_read_together(tmp_path):
    method = comparison(tiny.pattern(), ratios=(0.5,), draws=0, seed=0)["full"]
    for version in (1, 2):
        result = NeedleResult((tiny.row("full", method, task_version=version),))
        result.write(tmp_path / f"{version}.jsonl", model="pocket", dtype=torch.float32)
    with pytest.raises(ValueError, match="rows mix versions 1 and 2 of task 'passkeys'"):
        NeedleResult.read(tmp_path / "1.jsonl", tmp_path / "2.jsonl")


def test_a_record_that_lacks_something_is_named(tmp_path):
    method = comparison(tiny.pattern(), ratios=(0.5,), draws=0, seed=0)["full"]
    path = tmp_path / "needle.jsonl"
    NeedleResult((tiny.row("full", method),)).write(path, model="pocket", dtype=torch.float32)
    path.write_text(path.read_text().replace('"depth"', '"deep"'))
    with pytest.raises(ValueError, match="record 'evaluate.needle' must say depth"):
        NeedleResult.read(path)


def test_windows_are_methods_of_their_own():
    methods = comparison(
        tiny.pattern(), ratios=(0.5,), draws=0, seed=0, windows=[(20, 1), (0, 20), (20, 1)]
    )
    assert list(methods) == ["full", "duo_50", "duo@20+1_50", "duo@0+20_50", "streaming"]
    assert (methods["duo@20+1_50"].policy.sink, methods["duo@20+1_50"].policy.recent) == (20, 1)
    assert methods["duo@0+20_50"].policy.layers == methods["duo_50"].policy.layers
    assert label(methods["duo@0+20_50"]) == "identified heads, 50 %, 0+20"


def test_means_weigh_rows_by_their_samples():
    method = comparison(tiny.pattern(), ratios=(0.5,), draws=0, seed=0)["full"]
    rows = (
        tiny.row("full", method, samples=1, exact_match=1.0),
        tiny.row("full", method, samples=3, exact_match=0.0),
    )
    assert NeedleResult(rows).mean(method="full") == 0.25
    with pytest.raises(ValueError, match="no row has"):
        NeedleResult(rows).mean(method="duo")
    with pytest.raises(ValueError, match="rows have no field"):
        NeedleResult(rows).mean(methods="full")


@pytest.mark.parametrize("task", ["needle", "number"])
def test_on_the_pocket_model_exact_match_is_that_of_generation(task):
    try:
        model, tokenizer = pocket.load("pocket")
    except ValueError as error:
        pytest.skip(f"no bundled model: {error}")
    from duohead.identify import haystack

    ids = haystack.tokens(haystack.default_text(), tokenizer, at_least=2048)
    policy = HeadPolicy.from_heads(
        retrieval=[range(layer % 2 * 2) for layer in range(model.config.num_hidden_layers)],
        num_kv_heads=model.config.num_key_value_heads,
        sink=16,
        recent=64,
    )
    generator = torch.Generator().manual_seed(0)
    for i in range(4):
        sample = TASKS[task].make(
            tokenizer, ids, context_length=512, depth=i / 3, generator=generator
        )
        ((start, end),) = sample.answers
        for chosen in (None, policy):
            made = generate_greedy(
                model, sample.input_ids[:start].tolist(), chosen, tokens=end - start
            )
            with using(model, chosen):
                score = score_sample(model, sample, cache=new_cache(model, chosen))
            assert score.exact_match == (made == sample.input_ids[start:end].tolist())

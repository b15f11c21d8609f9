"""Scorers: a planted head comes out on top, what it cost is counted, and nothing is left behind."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import FAMILIES, HYBRIDS, tiny
from tiny_identification import OPTIONS as TRAINING
from tiny_identification import TEXT, tokenizer
from tiny_planted import RETRIEVAL, order, planted, random_tokens

from duohead.fingerprint import TOKENS
from duohead.identify import scorers
from duohead.identify.checkpoint import CHECKPOINT, fingerprint
from duohead.identify.scorers import NAMES, alphas, load, score
from duohead.identify.scorers.cost import COST, Cost, metered
from duohead.pattern import HeadPattern

WINDOW: dict[str, Any] = {"sink": 4, "recent": 16}
SETTINGS: dict[str, Any] = {
    "optimise": replace(TRAINING, **WINDOW, steps=30, learning_rate=0.08, save_every=8),
    "prulong": {"context": 512, "steps": 40, **WINDOW},
    "eliminate": {"context": 600, "samples": 1, "questions": 1, "exhaustive": 2, **WINDOW},
    "kvzip": {"context": 400, "samples": 1, **WINDOW},
    "mean-qk": {"context": 512, "samples": 2, **WINDOW},
    "profile": {"context": 512, "samples": 2, "queries": 64, **WINDOW},
    "echo": {"tokens": 200, "copies": 2, **WINDOW},
    "random": WINDOW,
}
OBSERVING = ("kvzip", "mean-qk", "profile", "echo")
SHORT: dict[str, Any] = {"sink": 2, "recent": 4}
SMALL = {
    "kvzip": {"context": 40, "samples": 1, **SHORT},
    "mean-qk": {"context": 48, "samples": 3, **SHORT},
    "profile": {"context": 48, "samples": 2, **SHORT},
    "echo": {"tokens": 20, "copies": 3, **SHORT},
}


class Letters:
    """A tokenizer of single letters with ids below the tiny models' vocabulary."""

    bos_token_id = None
    all_special_ids = (0,)

    def __len__(self) -> int:
        return 61

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1 + ord(letter) % 60 for letter in text]}


def options(name: str, settings: dict[str, Any] = SETTINGS, **changes: Any) -> Any:
    given = settings[name]
    made = load(name).options(**given) if isinstance(given, dict) else given
    return replace(made, **changes)


def run(name: str, model: Any, **more: Any) -> HeadPattern:
    given = {"options": options(name), "progress": False, **more}
    return score(name, model, tokenizer(), TEXT, **given)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_planted_model_has_the_head_that_it_claims(groups: int) -> None:
    model = planted(groups=groups)
    ids = random_tokens(200).repeat(2)[None]
    with torch.no_grad():
        found = model(ids).logits[0].argmax(-1)
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        without = model(ids).logits[0].argmax(-1)
    right = found[200:-1] == ids[0, 201:]
    assert right.float().mean() > 0.7
    assert (without[200:-1] == ids[0, 201:]).float().mean() < 0.05


@pytest.mark.parametrize(
    ("name", "groups"),
    [(name, 1) for name in NAMES if name != "random"] + [(name, 2) for name in OBSERVING],
)
def test_a_planted_retrieval_head_is_ranked_first(name: str, groups: int) -> None:
    pattern = run(name, planted(groups=groups))
    assert order(pattern.alpha)[0] == RETRIEVAL
    assert (pattern.sink, pattern.recent) == (4, 16)
    assert pattern.training["scorer"] == name


@pytest.mark.parametrize("name", OBSERVING)
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt-oss", "laguna", *HYBRIDS])
def test_scores_exist_where_heads_are_gated_and_nowhere_else(family: str, name: str) -> None:
    assert family in FAMILIES
    model = tiny(family)
    pattern = score(name, model, Letters(), TEXT, options=options(name, SMALL), progress=False)
    assert pattern.gated.any()
    assert not pattern.gated.all() or family == "qwen3"
    raw = np.array(pattern.training["scores"], dtype=float)
    assert (np.isfinite(raw) == pattern.gated).all()
    assert (raw[pattern.gated] >= 0).all()
    assert (raw[pattern.gated] <= 1 + 1e-6).all()


@pytest.mark.parametrize("name", ["kvzip", "mean-qk", "profile", "echo", "random"])
def test_a_seed_decides_everything(name: str) -> None:
    model = tiny("llama", max_position_embeddings=128)
    given = options(name, {**SMALL, "random": SHORT})
    one, two, other = (
        score(name, model, Letters(), TEXT, options=chosen, progress=False)
        for chosen in (given, given, replace(given, seed=5))
    )
    assert one.training["scores"] == two.training["scores"]
    assert one.training["scores"] != other.training["scores"]


def test_half_a_passage_of_mean_qk_must_be_longer_than_the_window() -> None:
    model = tiny("llama", max_position_embeddings=128)
    shortest = options("mean-qk", SMALL, context=14)
    with pytest.raises(ValueError, match="context must be above 13"):
        score("mean-qk", model, Letters(), TEXT, options=replace(shortest, context=13))
    pattern = score("mean-qk", model, Letters(), TEXT, options=shortest, progress=False)
    found = np.array(pattern.training["scores"], dtype=float)
    assert (found < 0.9).all()


@pytest.mark.parametrize("name", ["optimise", *OBSERVING])
def test_the_model_is_left_as_it_was_found(name: str) -> None:
    model = planted().train()
    before, implementation = fingerprint(model), model.config._attn_implementation
    hooks = [len(module._forward_hooks) for module in model.modules()]
    changes = {"steps": 2} if name == "optimise" else {}
    run(name, model, options=options(name, **changes))
    assert fingerprint(model) == before
    assert model.training
    assert model.config._attn_implementation == implementation
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_tokens_and_passes_are_counted_forward_and_backward() -> None:
    model = planted()
    cost = Cost()
    with metered(model, cost):
        model(torch.ones(2, 5, dtype=torch.long)).logits.sum().backward()
        with torch.no_grad():
            model.base_model(inputs_embeds=torch.ones(1, 7, 128))
    assert (cost.forward_passes, cost.forward_tokens) == (2, 17)
    assert (cost.backward_passes, cost.backward_tokens) == (1, 10)
    assert cost.seconds > 0
    assert cost.peak_bytes is None
    kvzip = run("kvzip", model).training["cost"]
    prompt = len(tokenizer()("\n\nRepeat the previous context:\n\n")["input_ids"])
    assert (kvzip["forward_passes"], kvzip["forward_tokens"]) == (1, 2 * 400 + prompt)
    trained = run("optimise", model, options=options("optimise", steps=3)).training["cost"]
    # The last pass is that of the fingerprint.
    assert (trained["forward_passes"], trained["backward_passes"]) == (6 + 1, 3)
    assert trained["forward_tokens"] == 2 * trained["backward_tokens"] + len(TOKENS)
    assert run("random", model).training["cost"]["forward_tokens"] == 0


def test_an_interrupted_training_goes_on_and_so_does_its_bill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from duohead.identify import train

    out = tmp_path / "heads"
    expected = run("optimise", planted(), options=options("optimise", steps=20))
    original, calls = train.distillation, iter(range(100))

    def interrupted(*arguments: Any) -> Any:
        if next(calls) == 10:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "distillation", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("optimise", planted(), out=out, options=options("optimise", steps=20))
    bill = Cost.read(out)
    assert bill.backward_passes == 10
    with pytest.raises(ValueError, match="a run with different options"):
        run("optimise", planted(), out=out, options=options("optimise", steps=21))
    assert Cost.read(out) == bill
    pattern = run("optimise", planted(), out=out, options=options("optimise", steps=20))
    assert pattern.alpha.tobytes() == expected.alpha.tobytes()
    assert pattern.training["cost"]["backward_passes"] == 10 + 12  # steps 8 and 9 twice
    saved = HeadPattern.load(out)
    assert saved.training["cost"] == pattern.training["cost"]
    assert saved.training["steps"] == 20
    (out / COST).write_text("{}")
    with pytest.raises(ValueError, match="does not hold the cost of a run"):
        run("optimise", planted(), out=out, options=options("optimise", steps=20))


def test_alphas_keep_the_order_and_ties_and_are_shares_of_heads_beaten() -> None:
    raw = torch.tensor([[3.0, -1e30, torch.nan], [3.0, 7e20, 4.0]])
    found = alphas(raw)
    assert found.isnan().equal(raw.isnan())
    assert found[~found.isnan()].tolist() == [0.375, 0.0, 0.375, 1.0, 0.75]
    assert alphas(torch.full((2, 2), 5.0)).unique().tolist() == [0.5]
    assert alphas(torch.tensor([[torch.nan], [2.0]])).tolist()[1] == [1.0]


def test_a_pattern_says_how_it_was_made(tmp_path: Path) -> None:
    out = tmp_path / "heads"
    pattern = run("profile", planted(), out=out)
    training = HeadPattern.load(out).training
    assert training == json.loads(json.dumps(pattern.training))
    assert training["options"]["queries"] == 64
    assert training["source"] == load("profile").source
    assert len(training["text_digest"]) == len(training["model_digest"]) == 16
    again = scorers.origin("profile", planted(), [TEXT], options("profile"))
    assert again["text_digest"] == training["text_digest"]
    assert scorers.origin("profile", planted(), "x", options("profile")) != again


def test_a_folder_that_holds_something_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "heads"
    run("echo", planted(), out=out)
    with pytest.raises(ValueError, match="already holds a pattern"):
        run("profile", planted(), out=out)
    assert run("profile", planted(), out=out, restart=True).training["scorer"] == "profile"
    trained = tmp_path / "trained"
    run("optimise", planted(), out=trained, options=options("optimise", steps=2))
    with pytest.raises(ValueError, match="holds a training run"):
        run("echo", planted(), out=trained)
    run("echo", planted(), out=trained, restart=True)
    assert not (trained / CHECKPOINT).exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="out must be a folder"):
        run("echo", planted(), out=tmp_path / "file")


def test_mistakes_end_in_one_line_that_says_what_to_do() -> None:
    model = planted(positions=512)
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "scorer must be one of optimise, .*got 'magic'": ("magic", {"options": None}),
        "options of scorer 'echo' must be EchoOptions, got KVzipOptions": (
            "echo",
            {"options": options("kvzip")},
        ),
        "context must not exceed 245 for a model of 512 positions, got 500": (
            "kvzip",
            {"options": options("kvzip", context=500)},
        ),
        "tokens must not exceed 256": ("echo", {"options": options("echo", tokens=300)}),
        "leave something of 512 tokens out of sight, but context must be above 516": (
            "profile",
            {"options": options("profile", sink=4, recent=512)},
        ),
        "text is too short": ("profile", {"text": "a"}),
        "log is for scorers that train": ("echo", {"log": ["wandb"]}),
    }
    for message, (name, more) in cases.items():
        given = {"text": TEXT, "progress": False, **more}
        given.setdefault("options", options(name) if name in NAMES else None)
        with pytest.raises(ValueError, match=message):
            score(name, model, tokenizer(), given.pop("text"), **given)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("random", {"seed": -1}, "seed must not be negative, got -1"),
        ("random", {"recent": 0}, "recent must be above 0, got 0"),
        ("kvzip", {"pool": "sum"}, "pool must be max or mean, got sum"),
        ("kvzip", {"samples": 0}, "samples must be above 0, got 0"),
        ("profile", {"queries": 0}, "queries must be above 0, got 0"),
        ("mean-qk", {"samples": 1}, "samples must be above 1, got 1"),
        ("echo", {"copies": 1}, "copies must be above 1, got 1"),
    ],
)
def test_options_out_of_range_are_refused(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(name).options(**changes)


def test_every_scorer_says_what_it_is() -> None:
    for name in NAMES:
        scorer = load(name)
        assert scorer.name == name
        assert scorer.source
        assert len(scorer.summary) < 100
        names = {field.name for field in fields(scorer.options)}
        assert {"sink", "recent", "seed"} <= names
        assert all(field.metadata["help"] for field in fields(scorer.options))


def test_scores_of_the_wrong_shape_or_that_overflowed_are_refused() -> None:
    model = planted()
    for raw, message in (
        (torch.zeros(2, 3), r"shape \(2, 4\), got \(2, 3\)"),
        (torch.full((2, 4), torch.inf), "must be finite for gated heads"),
    ):
        with pytest.raises(ValueError, match=message):
            scorers._check(model, "test", raw)


@pytest.mark.parametrize("name", ["optimise", "echo"])
def test_a_model_split_by_tensor_parallelism_is_refused_before_any_work(name: str) -> None:
    model = tiny("llama")
    model._tp_size = 2
    with pytest.raises(
        ValueError, match="is split over 2 by tensor parallelism; load it without tp_plan"
    ):
        score(name, model, tokenizer(), TEXT, progress=False)

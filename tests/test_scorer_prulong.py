"""PruLong: the distribution of its gates, the schedule of its target, and which heads it ends with."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny_identification import TEXT, tiny, tokenizer

from duohead import pocket
from duohead.identify.passkeys import WORDS
from duohead.identify.scorers.prulong import SCORER, PrulongOptions, draw, measure, share_on

OPTIONS = PrulongOptions(sink=4, recent=8, context=64, steps=20, target=0.5)


def trained(options: PrulongOptions, model: Any = None) -> torch.Tensor:
    model = tiny() if model is None else model
    return measure(model, tokenizer(), TEXT, options=options, progress=False)


@pytest.mark.parametrize("log_odds", [-3.0, -0.5, 0.0, 2.0])
def test_gates_are_on_as_often_as_expected(log_odds: float) -> None:
    noise = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    odds = torch.full_like(noise, log_odds)
    gates = draw(odds, noise)
    assert (gates > 0).double().mean().item() == pytest.approx(share_on(odds).item(), abs=1e-4)
    assert gates.min() >= 0
    assert gates.max() <= 1
    # Stretched beyond both ends, so that both are reached.
    assert (gates == 1).any()
    assert (gates == 0).any()


def test_gates_are_differentiable_where_they_are_between_0_and_1() -> None:
    odds = torch.zeros(3, requires_grad=True)
    draw(odds, torch.tensor([1e-6, 0.5, 1 - 1e-6])).sum().backward()
    assert odds.grad is not None
    assert odds.grad[1] > 0
    assert odds.grad[[0, 2]].tolist() == [0, 0]


def test_the_target_goes_straight_from_all_heads_to_its_share_and_stays() -> None:
    options = PrulongOptions(steps=100, target=0.25, approach=0.8)
    shares = [options.share_at(step) for step in range(100)]
    assert shares[0] == 1
    assert shares[40] == pytest.approx(0.625)
    assert set(shares[80:]) == {0.25}
    assert all(a >= b for a, b in pairwise(shares))


def test_learning_rates_rise_and_fall() -> None:
    options = PrulongOptions(steps=100, warmup=0.1)
    rates = [options.rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert 0.01 <= rates[-1] < 0.02


@pytest.mark.parametrize("target", [0.0, 0.25, 0.5, 0.6, 1.0])
def test_exactly_the_share_of_the_target_is_above_zero(target: float) -> None:
    scores = trained(replace(OPTIONS, target=target, steps=3))
    assert scores.dtype == torch.float32
    assert (scores > 0).sum() == int(4 * target + 0.5)


@pytest.mark.parametrize("target", [0.25, 0.5])
def test_the_expected_share_is_pressed_to_the_target(
    target: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from duohead.identify.scorers import prulong

    shares: list[float] = []

    def spy(log_odds: torch.Tensor) -> torch.Tensor:
        share = share_on(log_odds)
        shares.append(share.item())
        return share

    monkeypatch.setattr(prulong, "share_on", spy)
    options = replace(OPTIONS, target=target, steps=150, context=32, learning_rate=0.2)
    trained(options, tiny(num_hidden_layers=4, num_key_value_heads=4))
    assert shares[0] > 0.98
    assert shares[-1] == pytest.approx(target, abs=0.05)


def test_scores_follow_from_the_seed_and_from_nothing_else() -> None:
    first = trained(OPTIONS)
    torch.manual_seed(5)
    assert torch.equal(first, trained(OPTIONS))
    assert not torch.equal(first, trained(replace(OPTIONS, seed=1)))
    frugal = trained(replace(OPTIONS, gradient_checkpointing=True))
    assert torch.allclose(first, frugal, rtol=0, atol=1e-4)


def test_several_texts_a_step_are_averaged() -> None:
    assert not torch.equal(trained(OPTIONS), trained(replace(OPTIONS, batch=2)))


def test_heads_that_copy_from_far_are_found_on_a_text_that_repeats_itself() -> None:
    model, its_tokenizer = pocket.load("pocket")
    generator = torch.Generator().manual_seed(0)
    text = ""
    for _ in range(40):
        drawn = torch.randint(len(WORDS), (60,), generator=generator).tolist()
        words = " ".join(WORDS[i] for i in drawn)
        text += f"{words}.\n\n" * 2
    options = PrulongOptions(
        sink=4, recent=24, context=320, steps=16, target=0.25, warmup=0.1, approach=0.5
    )
    scores = measure(model, its_tokenizer, text, options=options, progress=False)
    # The heads without which passkeys are lost (see docs/log.md).
    kept = [tuple(place) for place in (scores > 0).nonzero().tolist()]
    assert len(kept) == 6
    assert len({(2, 2), (3, 1), (3, 2), (3, 3)} & set(kept)) >= 3


def test_the_model_is_left_as_it_was() -> None:
    model = tiny()
    model.model.embed_tokens.weight.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained(replace(OPTIONS, steps=2), model)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="target must be between 0 and 1, got 1.5"):
        PrulongOptions(target=1.5)
    with pytest.raises(ValueError, match="steps must be above 0, got 0"):
        PrulongOptions(steps=0)
    with pytest.raises(ValueError, match="context must be above 12"):
        trained(replace(OPTIONS, context=12))
    with pytest.raises(ValueError, match="text is too short"):
        measure(tiny(), tokenizer(), "a b c", options=OPTIONS, progress=False)


def test_a_loss_that_is_not_finite_is_refused() -> None:
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="next-token loss must be finite, got nan"):
        trained(OPTIONS, model)


def test_the_scorer_says_what_it_is() -> None:
    assert SCORER.name == "prulong"
    assert "2506.17121" in SCORER.source

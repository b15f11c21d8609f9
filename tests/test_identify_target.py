"""Gates led down to a target: a ranking for every budget, a law for where they rest, and exact resume."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_identification import OPTIONS, TEXT, run, tiny, tokenizer

from duohead.identify import IdentifyOptions, Step, haystack
from duohead.identify.checkpoint import LOG
from duohead.identify.descent import PRESSURE
from duohead.identify.gates import Gates, distillation, installed
from duohead.identify.samples import training_samples

# Fast enough for the gates to keep up with the share that they are led to.
AIMED = replace(OPTIONS, steps=30, learning_rate=0.1, target=0.2)


def loud(*volumes: float) -> Any:
    """Planted: each head reaches the output as loudly as its volume."""
    model = tiny(num_hidden_layers=1, num_key_value_heads=len(volumes))
    columns = model.model.layers[0].self_attn.o_proj.weight.unflatten(1, (len(volumes), -1))
    with torch.no_grad():
        columns.mul_(torch.tensor(volumes)[None, :, None])
    return model


def test_a_target_ranks_heads_by_how_long_their_gates_stood(tmp_path: Path) -> None:
    steps: list[Step] = []
    pattern = run(tmp_path, model=loud(0.05, 0.5, 1.0, 4.0), options=AIMED, on_step=steps.append)
    means = [step.mean_gate for step in steps]
    alpha = pattern.alpha[0]
    assert alpha.argsort().tolist() == [0, 1, 2, 3]
    assert alpha.mean() == pytest.approx(sum(means) / len(means), abs=1e-6)
    assert pattern.training["target"] == 0.2
    # The pull on each of 4 gates is 2 * PRESSURE * excess / 4 = 5 * excess, and nothing here resists with more than 1.
    assert max(abs(mean - AIMED.share_at(step)) for step, mean in enumerate(means)) < 0.2


def test_gates_rest_above_the_target_where_answers_resist_the_pull(tmp_path: Path) -> None:
    """The slope of PRESSURE * excess ** 2 is that of the answers' loss, for every gate that is neither 0 nor 1."""
    options, model = replace(AIMED, steps=60), loud(0.05, 0.5, 1.0, 4.0)
    run(tmp_path, model=model, options=options)
    last = json.loads((tmp_path / LOG).read_text().splitlines()[-1])
    excess = last["mean_gate"] - options.target
    values = torch.tensor(last["gates"])
    gates = Gates.of(model, sink=options.sink, recent=options.recent)
    with torch.no_grad():
        gates.values.copy_(values)
    ids = haystack.tokens(TEXT, tokenizer(), at_least=400, at_most=6400)
    samples = training_samples(tokenizer(), ids, options, 400)
    with installed(model, gates) as backbone:
        for step in range(50, 60):
            (distillation(backbone, gates, samples[step]) / 10).backward()
    assert gates.values.grad is not None
    resistance = -gates.values.grad
    between = (values > 0) & (values < 1)
    pull = 2 * PRESSURE * excess / len(values)
    assert between.tolist() == [False, False, True, True]
    # Samples differ and the learning rate falls before all is at rest.
    assert pull == pytest.approx(float(resistance[between].mean()), rel=0.3)
    assert resistance[~between].max() < pull


def test_the_share_falls_straight_to_the_target_and_stays_while_the_learning_rate_falls() -> None:
    shares = [AIMED.share_at(step) for step in range(30)]
    falls = [before - after for before, after in itertools.pairwise([1.0, *shares[:24]])]
    assert falls == pytest.approx([0.8 / 24] * 24)
    assert shares[23:] == pytest.approx([0.2] * 7)
    assert IdentifyOptions(steps=1, target=0.5).share_at(0) == 0.5


@pytest.mark.parametrize("moment", [5, 7, 29])
def test_an_interrupted_run_with_a_target_continues_bit_for_bit(
    tmp_path: Path, moment: int
) -> None:
    def interrupt(step: Step) -> None:
        if step.step == moment:
            raise KeyboardInterrupt

    expected = run(options=AIMED)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, options=AIMED, on_step=interrupt)
    assert run(tmp_path, options=AIMED).alpha.tobytes() == expected.alpha.tobytes()
    assert run(tmp_path, options=AIMED).alpha.tobytes() == expected.alpha.tobytes()

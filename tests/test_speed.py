"""Times come from a generation of as many tokens as were asked for, whatever the model takes for the end of a text."""

import pytest
import tiny_evaluation as tiny
import torch

from duohead.evaluate import speed
from duohead.evaluate.scoring import using
from duohead.policy import HeadPolicy

POLICY = HeadPolicy.from_heads(retrieval=[[0], [], [1]], num_kv_heads=2, sink=4, recent=16)
PROMPT = torch.arange(60) % 97


@pytest.fixture
def model():
    made = tiny.model()
    made.generation_config.eos_token_id = list(range(97))
    return made


@pytest.mark.parametrize("policy", [None, POLICY], ids=["full", "duo"])
@pytest.mark.parametrize("chunk", [None, 25])
def test_a_generation_by_the_clock_does_not_stop_early(model, monkeypatch, policy, chunk):
    said = []
    monkeypatch.setattr("transformers.generation.utils.logger.warning", said.append)
    clocks = []
    made = speed._Clock.__init__
    monkeypatch.setattr(speed._Clock, "__init__", lambda self: (made(self), clocks.append(self))[0])
    with using(model, policy) as bound:
        found = speed.measure(model, bound, PROMPT, new_tokens=6, chunk=chunk)
    warm, timed = clocks
    assert (len(warm.times), len(timed.times)) == (1 + 6, 1 + 6)
    assert timed.times == sorted(timed.times)
    assert found.tpot_ms == pytest.approx(1e3 * (timed.times[-1] - timed.times[1]) / 5)
    assert found.ttft_ms > 0 and found.engine == "transformers"
    assert said == []


@pytest.mark.parametrize(
    ("prompt", "tokens", "message"),
    [
        (PROMPT, 1, "new_tokens must be at least 2, got 1"),
        (PROMPT[:2], 4, "prompt must have at least 3 tokens, got 2"),
    ],
)
def test_too_little_to_time_is_refused(model, prompt, tokens, message):
    with pytest.raises(ValueError, match=message):
        speed.measure(model, None, prompt, new_tokens=tokens)

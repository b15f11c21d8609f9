"""Time to the first token and time per token, of a real greedy generation under a policy or without one.

An accuracy figure without its times hides half the trade, and times of a teacher-forced pass are not those of
generation; so a prompt is read and continued the way users do it, on the engine where the machine has one.
`measure(model, policy, prompt, new_tokens=32)` inside `using(model, policy)` gives a `Speed`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from duohead.evaluate.scoring import new_cache, pieces
from duohead.policy import HeadPolicy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Speed:
    """Milliseconds of one sequence: `ttft_ms` from the prompt to its first new token, `tpot_ms` per token after it.

    `engine` says what decoded, as in `duohead.models.generate.Generation`.
    """

    ttft_ms: float
    tpot_ms: float
    engine: str


class _Clock:
    """A streamer, as transformers' generate takes it, that notes when tokens come; a prompt is the first to come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: torch.Tensor) -> None:
        """Called with the prompt, and then with every new token, on the CPU."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called after the last token."""


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    policy: HeadPolicy | None,
    prompt: torch.Tensor,
    *,
    new_tokens: int,
    chunk: int | None = None,
) -> Speed:
    """Generate once to warm up and once by the clock.

    Args:
        model: under `policy` already, see `duohead.evaluate.scoring.using`.
        policy: as bound to the model; None measures the model as it is, with transformers' generate.
        prompt: int64 [tokens], at least 3.
        new_tokens: how many to generate, at least 2; end-of-text tokens do not stop it.
        chunk: prompt tokens per forward; all at once by default.

    Raises:
        ValueError: a prompt or `new_tokens` that is too short.
    """
    if new_tokens < 2:
        raise ValueError(
            f"new_tokens must be at least 2, got {new_tokens}: a time per token needs two of them"
        )
    if len(prompt) < 3:
        raise ValueError(f"prompt must have at least 3 tokens, got {len(prompt)}")
    ids = prompt[None].to(model.device)
    once = _full if policy is None else _duo
    # The same call, so that the clock meets no kernel to compile and no graph to capture.
    once(model, ids, new_tokens, chunk)
    started = time.perf_counter()
    clock, engine = once(model, ids, new_tokens, chunk)
    first, last = clock.times[1], clock.times[-1]
    return Speed(1e3 * (first - started), 1e3 * (last - first) / (new_tokens - 1), engine)


def _options(clock: _Clock) -> dict[str, Any]:
    # One row is never padded, and unset it warns; no vocabulary is as large, so that no text ends early.
    return {
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": torch.iinfo(torch.int32).max,
        "streamer": clock,
    }


def _duo(
    model: PreTrainedModel, ids: torch.Tensor, new: int, chunk: int | None
) -> tuple[_Clock, str]:
    from duohead.models.generate import generate

    clock = _Clock()
    done = generate(model, ids, max_new_tokens=new, chunk=chunk, **_options(clock))
    return clock, done.engine


def _full(
    model: PreTrainedModel, ids: torch.Tensor, new: int, chunk: int | None
) -> tuple[_Clock, str]:
    clock = _Clock()
    cache = new_cache(model, None)
    # generate itself reads what is left of the prompt, at least one token of it.
    for start, stop in pieces(ids.shape[1] - 1, chunk) if chunk is not None else ():
        model(ids[:, start:stop], past_key_values=cache, use_cache=True, logits_to_keep=1)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=new,
        **_options(clock),
    )
    return clock, "transformers"

"""Is the model that is about to be timed computed right? The oracle of whole models, in the process of the clock.

A model of random weights in bf16 has no exact logits, so the readable reference implementation stands for the truth and
the portable one for what rounding does to it: an implementation may be off by twice what that one is off. Prefill in
chunks, a past, and single decode steps are all on the way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from duohead.attention import choose
from duohead.cache import DuoCache
from duohead.models.interface import duo
from duohead.models.prefill import prefill
from duohead.policy import HeadPolicy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS, CHUNK, DECODED = 600, 256, 3


def verify(
    model: PreTrainedModel, policy: HeadPolicy, *, impl: str = "auto"
) -> tuple[float, float]:
    """Error of ``impl``'s logits and the error allowed, both as root mean squares.

    Raises:
        ValueError: the error is beyond what is allowed, so a speed is not worth reporting.
    """
    generator = torch.Generator(model.device).manual_seed(0)
    vocabulary = int(model.config.vocab_size)
    tokens = torch.randint(vocabulary, (1, TOKENS), generator=generator, device=model.device)
    truth = _logits(model, policy, tokens, "reference")
    portable = _logits(model, policy, tokens, "tiled")
    name = choose(impl, model.device.type, index=model.device.index)
    found = portable if name == "tiled" else _logits(model, policy, tokens, impl)
    band = torch.finfo(model.dtype).eps * _rms(truth)
    error, budget = _rms(found - truth), 2 * (_rms(portable - truth) + band)
    if not error <= budget:
        raise ValueError(
            f"the model's logits under {name} are off by {error:.3g}, more than {budget:.3g}; no speed is reported"
        )
    return error, budget


@torch.no_grad()
def _logits(model: PreTrainedModel, policy: HeadPolicy, tokens: Tensor, impl: str) -> Tensor:
    """Logits after the prompt and after each decoded token, [DECODED + 1, vocabulary] in fp32."""
    fed = tokens.shape[1] - DECODED
    with duo(model, policy, impl=impl) as bound:
        cache = DuoCache(bound, model, max_length=tokens.shape[1])
        cache.allocate(tokens.shape[0], dtype=model.dtype, device=model.device)
        found = [prefill(model, tokens[:, :fed], cache, chunk=CHUNK)]
        for place in range(fed, tokens.shape[1]):
            step = tokens[:, place : place + 1]
            position = torch.tensor([[place]], device=model.device)
            out = model(input_ids=step, position_ids=position, past_key_values=cache)
            found.append(out.logits[:, -1])
    return torch.cat(found).float()


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())

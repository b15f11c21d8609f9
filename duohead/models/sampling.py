"""How the engine picks tokens: the part of transformers' sampling that can run on the device without the host.

Filtering is done by transformers' own processors; the draw is an exponential race instead of `torch.multinomial`, which
waits for the host, so that a whole decode step fits into one CUDA graph. `requested` reads a call of ``generate`` as
transformers would and refuses whatever the engine cannot do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from duohead.models.interface import unwrap

# What `requested` reads, and what says nothing about which tokens come out.
HONOURED = frozenset(
    "do_sample temperature top_k top_p min_p eos_token_id pad_token_id bos_token_id max_new_tokens max_length "
    "cache_implementation transformers_version".split()
)


@dataclass(frozen=True)
class Sampler:
    """How to pick the next token from its logits.

    Args:
        temperature: divides the logits; 0 takes the likeliest token (then the others must be None).
        top_k: keep the k likeliest tokens, None for all.
        top_p: keep the likeliest tokens that hold this much probability together, in (0, 1]; None for all.
        min_p: keep tokens at least this likely relative to the likeliest, in [0, 1]; None for all.

    Raises:
        ValueError: no number, one out of range, or a filter without a temperature.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        filters = {"top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
        given = [name for name, value in filters.items() if value is not None]
        for name in ("temperature", *given):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int if name == "top_k" else Real):
                raise ValueError(f"{name} must be a number, got {value!r}")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if self.temperature == 0 and given:
            raise ValueError(
                f"{', '.join(given)} say how to sample, but temperature is 0, which does not sample; "
                f"set a temperature above 0, or leave them out"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1 token, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie in [0, 1], got {self.min_p}")

    def processors(self) -> LogitsProcessorList:
        """transformers' processors for these numbers, in the order in which it applies them."""
        made = LogitsProcessorList()
        if self.temperature not in (0, 1):
            made.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k is not None:
            made.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None and self.top_p < 1:
            made.append(TopPLogitsWarper(self.top_p))
        if self.min_p is not None:
            made.append(MinPLogitsWarper(self.min_p))
        return made

    def __call__(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Next tokens [B] from logits [B, vocabulary], drawn with ``generator`` of the same device."""
        scores = logits.float()
        if self.temperature == 0:
            return scores.argmax(-1)
        scores = self.processors()(None, scores)
        # The first of independent exponential clocks with these rates to ring is a draw from the distribution.
        clocks = torch.empty_like(scores).exponential_(generator=generator)
        return (scores.softmax(-1) / clocks).argmax(-1)


@dataclass(frozen=True)
class Request:
    """What a call of ``generate`` asks for: a sampler, stop tokens, the padding token, and where tokens stream to."""

    sampler: Sampler
    stop: tuple[int, ...]
    pad: int
    streamer: Any = None


def requested(model: Any, options: dict[str, Any]) -> Request:
    """Read the options of a ``generate`` call as transformers would, the model's generation config included.

    Raises:
        ValueError: an option that the engine does not serve; the message names it.
    """
    options = {name: value for name, value in options.items() if value is not None}
    streamer = options.pop("streamer", None)
    config, others = _resolved(unwrap(model), options)
    differing = sorted(set(others) | _differing(config))
    if config.cache_implementation not in (None, "static"):
        differing.append("cache_implementation")
    if differing:
        raise ValueError(
            f"the engine does not serve {', '.join(differing)}; use model.generate, or engine='transformers'"
        )
    stop = _ids(config.eos_token_id)
    pad = _ids(config.pad_token_id) or stop or (0,)
    return Request(_sampler(config), stop, pad[0], streamer)


def _resolved(model: Any, options: dict[str, Any]) -> tuple[GenerationConfig, dict[str, Any]]:
    """transformers' own merge of options, the model's generation config and its defaults; and what it does not know."""
    given = options.pop("generation_config", None)
    return model._prepare_generation_config(given, **options)


def _differing(config: GenerationConfig) -> set[str]:
    """Settings that are not as in a fresh config, apart from those that are honoured."""
    fresh = GenerationConfig()
    fresh.update(**fresh._get_default_generation_params(), defaults_only=True)
    plain = fresh.to_dict()
    # None, False, [] and {} all say "not set".
    return {
        name
        for name, value in config.to_dict().items()
        if name not in HONOURED
        and not name.startswith("_")
        and value != plain.get(name)
        and (value or plain.get(name))
    }


def _sampler(config: GenerationConfig) -> Sampler:
    if not config.do_sample:
        return Sampler()
    return Sampler(
        temperature=1.0 if config.temperature is None else config.temperature,
        top_k=config.top_k or None,
        top_p=config.top_p,
        min_p=config.min_p,
    )


def _ids(given: int | Sequence[int] | None) -> tuple[int, ...]:
    if given is None:
        return ()
    return (given,) if isinstance(given, int) else tuple(given)

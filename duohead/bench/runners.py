"""Three ways to run one model: transformers as it is, our engine with every head full, our engine under a policy.

A runner hides what differs, so that `duohead.bench.model` times all of them alike: `prefill`, `fill` (a synthetic
past), `steps`. Each holds the memory of one cache and gives it back with `close`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from duohead.bench.filling import fill
from duohead.bench.jobs import METHODS
from duohead.models.engine import Engine
from duohead.models.interface import duo
from duohead.policy import HeadPolicy
from duohead.shapes import layer_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Runner(Protocol):
    """One model with room for a number of tokens."""

    @property
    def prepare_seconds(self) -> float:
        """Time spent on compiling and capturing so far."""

    def prefill(self, tokens: Tensor, chunk: int) -> None:
        """Feed a prompt [B, tokens] into an empty cache, ``chunk`` tokens at a time."""

    def fill(self, tokens: int) -> None:
        """Give the cache that length with random contents."""

    def steps(self, count: int) -> None:
        """Decode ``count`` tokens."""

    def reset(self) -> None:
        """Forget every token."""

    def kv_bytes(self) -> int:
        """Bytes of the cache."""

    def close(self) -> None:
        """Give the memory back."""


class EngineRunner:
    """Our engine under a policy; a policy that keeps every head full is the method "full"."""

    def __init__(
        self,
        model: PreTrainedModel,
        policy: HeadPolicy,
        *,
        batch: int,
        max_length: int,
        compile: bool | str = "auto",
        impl: str = "auto",
    ) -> None:
        self._leaving = ExitStack()
        self.policy = self._leaving.enter_context(duo(model, policy, impl=impl))
        try:
            self.engine: Any = Engine(model, batch=batch, max_length=max_length, compile=compile)
        except BaseException:
            self._leaving.close()
            raise
        self._token = torch.zeros(batch, dtype=torch.int64, device=model.device)

    @property
    def prepare_seconds(self) -> float:
        """Time spent on compiling and capturing so far."""
        return float(self.engine.prepare_seconds)

    def prefill(
        self, tokens: Tensor, chunk: int, *, progress: Callable[[int], object] | None = None
    ) -> None:
        """Feed a prompt, token-exact; ``progress`` is called with the number of tokens after every chunk."""
        self.engine.reset()
        self.engine.prefill(tokens, chunk=chunk, progress=progress)

    def fill(self, tokens: int) -> None:
        """Give the engine's cache that length with random contents."""
        fill(self.engine.cache, tokens)
        self.engine.length = tokens

    def steps(self, count: int) -> None:
        """Decode greedily, without looking at the tokens in between."""
        self.engine.decode(self._token, count, check_every=count)

    def reset(self) -> None:
        """Forget every token."""
        self.engine.reset()

    def kv_bytes(self) -> int:
        """Bytes allocated."""
        return int(self.engine.cache.kv_bytes())

    def close(self) -> None:
        """Leave the model as it was."""
        self.engine = None
        self._leaving.close()


class TransformersRunner:
    """The same model with transformers' own attention (SDPA) and `DynamicCache`, as its users run it."""

    def __init__(self, model: PreTrainedModel, *, batch: int) -> None:
        self.model = model
        self.batch = batch
        self.reset()

    @property
    def prepare_seconds(self) -> float:
        """None is spent."""
        return 0.0

    def reset(self) -> None:
        """Start with a fresh cache."""
        from transformers import DynamicCache

        self.cache: Any = DynamicCache(config=self.model.config)

    @torch.no_grad()
    def prefill(self, tokens: Tensor, chunk: int) -> None:
        """Feed a prompt as transformers' own chunked prefill does."""
        self.reset()
        for part in tokens.split(chunk, dim=1):
            self.model(input_ids=part, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def fill(self, tokens: int) -> None:
        """Give the cache that length with random contents."""
        self.reset()
        for index, shape in enumerate(layer_shapes(self.model)):
            keys, values = (
                torch.randn(
                    self.batch,
                    shape.num_kv_heads,
                    tokens,
                    width,
                    dtype=self.model.dtype,
                    device=self.model.device,
                )
                for width in (shape.head_dim, shape.value_dim)
            )
            self.cache.update(keys, values, index)

    @torch.no_grad()
    def steps(self, count: int) -> None:
        """Decode greedily."""
        token = torch.zeros(self.batch, 1, dtype=torch.int64, device=self.model.device)
        for _ in range(count):
            logits = self.model(
                input_ids=token, past_key_values=self.cache, use_cache=True, logits_to_keep=1
            ).logits
            token = logits[:, -1:].argmax(-1)

    def kv_bytes(self) -> int:
        """Bytes of keys and values."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)

    def close(self) -> None:
        """Drop the cache."""
        self.cache = None


def runner(
    method: str,
    model: PreTrainedModel,
    policy: HeadPolicy,
    *,
    batch: int,
    max_length: int,
    compile: bool | str = "auto",
    impl: str = "auto",
) -> Runner:
    """The runner of a method; ValueError for an unknown one. ``policy`` matters to "full" and "duo"."""
    if method not in METHODS:
        raise ValueError(f"--methods must be among {', '.join(METHODS)}, got {method!r}")
    if method == "transformers":
        return TransformersRunner(model, batch=batch)
    return EngineRunner(
        model, policy, batch=batch, max_length=max_length, compile=compile, impl=impl
    )

"""A decode step as fixed work for the device: one forward, the next token, stop tokens and counters.

Nothing in it depends on what the host knows, so it can be captured once in a CUDA graph and replayed for every token.
Steps may run on past the last stop token until the host looks; they leave no trace in the attention layers of a cache.

Shape letters: B rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from duohead.cache import DuoCache, DuoLayer
from duohead.models.sampling import Sampler

MAX_STOP_TOKENS = 32
WARM_UPS = 3
# Graphs kept at a time; a step with other sampling numbers is another graph, captured in a fraction of a second.
MAX_GRAPHS = 4


class Steps:
    """Decode steps of one model on one static cache.

    Args:
        model: the transformers model.
        forward: gives logits [B, vocabulary] for one more token a row [B, 1] at its position [B, 1].
        cache: an allocated static cache.
        rows: B.
        graphs: capture and replay CUDA graphs.
    """

    def __init__(
        self,
        model: Any,
        forward: Callable[[Tensor, Tensor], Tensor],
        cache: DuoCache,
        *,
        rows: int,
        graphs: bool,
    ) -> None:
        assert cache.max_length is not None, "steps need a static cache"
        self.model, self.cache, self.graphs = model, cache, graphs
        self.device: torch.device = model.device
        self.generator = torch.Generator(self.device)
        self._forward = forward
        self._captured: dict[Sampler, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if graphs else None

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self._token, self._position = zeros(rows, 1), zeros(rows, 1)
        self._finished, self._ended = zeros(rows, dtype=torch.bool), zeros(dtype=torch.bool)
        self._out, self._cursor = zeros(rows, cache.max_length), zeros(1)
        self._stop, self._pad = zeros(MAX_STOP_TOKENS) - 1, zeros()

    @property
    def traceless(self) -> bool:
        """Whether steps after the last stop token change nothing, so that the host may look at leisure.

        Layers without KV heads (linear attention, convolution) fold every token into their state for good, and under
        ``visibility="chunk"`` the next call still sees the token that a step overwrites.
        """
        return self.cache.policy.visibility == "token" and all(
            isinstance(layer, DuoLayer) for layer in self.cache.layers
        )

    def begin(self, tokens: Tensor, position: Tensor, stop: Sequence[int], pad: int) -> None:
        """Put a run's inputs where the steps find them: tokens [B] to feed, at positions [B]; stop and pad tokens."""
        self._token.copy_(tokens.reshape(-1, 1))
        self._position.copy_(position[:, None])
        self._stop.fill_(-1)
        self._stop[: len(stop)] = torch.tensor(stop, dtype=torch.int64)
        self._pad.fill_(pad)
        self._cursor.zero_()
        self._finished.zero_()
        self._look_for_stops(self._token[:, 0])

    def ended(self) -> bool:
        """Whether every row has come to a stop token; waits for the device."""
        return bool(self._ended)

    def made(self) -> int:
        """Tokens generated since `begin`; waits for the device."""
        return int(self._cursor)

    def tokens(self, start: int, stop: int) -> Tensor:
        """Generated tokens [B, stop - start], a view that the next run overwrites."""
        return self._out[:, start:stop]

    def run(self, sampler: Sampler) -> None:
        """Take one step."""
        # Mixtures of experts have another way for few tokens, which also does not wait for the host.
        with self.model._optimize_model_for_decode():
            self._step(sampler)

    def ready(self, sampler: Sampler) -> bool:
        """Whether a step with ``sampler`` is captured."""
        return sampler in self._captured

    def launcher(self, sampler: Sampler) -> Callable[[], None]:
        """What takes one step: the replay of a graph, captured now if need be, or `run` where there are no graphs.

        Raises:
            ValueError: the step cannot be captured.
        """
        if not self.graphs:
            return lambda: self.run(sampler)
        if sampler not in self._captured:
            while len(self._captured) >= MAX_GRAPHS:
                self._captured.pop(next(iter(self._captured)))
            with self.undone():
                self._captured[sampler] = self._capture(sampler)
        return self._captured[sampler].replay

    def _step(self, sampler: Sampler) -> None:
        """One step. Once every row has ended, it takes back what it counts.

        What it writes into the cache then lies in slots that the next real token overwrites.
        """
        chosen = sampler(self._forward(self._token, self._position), self.generator)
        chosen = torch.where(self._finished, self._pad, chosen)
        self._out.index_copy_(1, self._cursor, chosen[:, None])
        self._token.copy_(chosen[:, None])
        counts = (~self._ended).long()
        self._cursor.add_(counts)
        self._position.add_(counts)
        lengths = [x for layer in self.cache.duo_layers if isinstance(x := layer.length, Tensor)]
        torch._foreach_add_(lengths, [counts - 1] * len(lengths))
        self._look_for_stops(chosen)

    def _look_for_stops(self, tokens: Tensor) -> None:
        self._finished.logical_or_((tokens[:, None] == self._stop).any(-1))
        torch.all(self._finished, dim=0, out=self._ended)

    def _capture(self, sampler: Sampler) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        current, side = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        side.wait_stream(current)
        try:
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    self.run(sampler)
            current.wait_stream(side)
            # By default the capture would take a stream of whatever device was the current one first.
            with (
                torch.cuda.device(self.device),
                torch.cuda.graph(
                    graph, pool=self._pool, stream=side, capture_error_mode="thread_local"
                ),
            ):
                self.run(sampler)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._free_generators()
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"a decode step of {type(self.model).__name__} cannot be captured in a CUDA graph ({reason}); "
                f"make Engine(graphs=False), or use model.generate"
            ) from error
        return graph

    def _free_generators(self) -> None:
        """Undo what a capture that broke off leaves behind: generators that refuse to draw, because they "capture"."""
        self.generator = torch.Generator(self.device)
        default = torch.cuda.default_generators[torch.empty(0, device=self.device).get_device()]
        seed, offset = default.initial_seed(), default.get_offset()
        default.graphsafe_set_state(torch.Generator(self.device))
        default.manual_seed(seed)
        default.set_offset(offset)

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Inside, steps run as if every row had ended; on leaving, cache and generator are as they were before."""
        floors = [
            floor
            for layer in self.cache.duo_layers
            for kind in layer.kinds
            if isinstance(floor := getattr(kind.store, "floor", None), Tensor)
        ]
        kept = [(x, x.clone()) for x in [*floors, *self._states()]]
        drawn = self.generator.get_state()
        self._ended.fill_(True)
        self._finished.fill_(True)
        try:
            yield
        finally:
            self.generator.set_state(drawn)
            for tensor, before in kept:
                tensor.copy_(before)

    def _states(self) -> list[Tensor]:
        """The states of layers without KV heads."""
        return [
            state
            for layer in self.cache.layers
            if not isinstance(layer, DuoLayer)
            for name in ("conv_states", "recurrent_states")
            for state in (getattr(layer, name, None) or {}).values()
            if isinstance(state, Tensor)
        ]

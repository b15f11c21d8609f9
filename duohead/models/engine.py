"""The engine: prefill in chunks, then decode steps that the device takes alone.

A decode step (one forward, picking the next token, stop tokens, counters) is a fixed piece of device work on a static
cache, captured in one CUDA graph, so that the host neither launches hundreds of kernels nor waits for a token; it looks
every few steps whether all rows have stopped. The same loop runs without graphs on any device.

Shape letters: B rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from duohead.cache import DuoCache
from duohead.models.checks import (
    check_callable,
    check_integer,
    check_mask,
    check_run,
    check_tokens,
    flag,
)
from duohead.models.compiling import (
    compiled_chunks,
    compiled_step,
    in_slices,
    is_long,
    is_one_graph,
)
from duohead.models.interface import policy_of, unwrap
from duohead.models.padding import settled
from duohead.models.prefill import CHUNK, check_prompt, positions_of, prefill
from duohead.models.sampling import Sampler
from duohead.models.steps import Steps
from duohead.models.weights import fingerprint, single_device

CHECK_EVERY = 16
# Tokens of the rehearsal prefill, over all rows: enough that kernels are chosen and tuned as for long chunks.
REHEARSAL = 4096

GREEDY = Sampler()


class Engine:
    """Generation for one enabled model on one static cache, for one prompt (or conversation) after the other.

    Args:
        model: a model with a policy (`duohead.duo` or `duohead.enable`), all of it on one device.
        batch: rows.
        max_length: tokens of prompt and answer that fit, padding included; the cache is allocated for them at once.
        padded: whether rows may have left padding.
        compile: compile the decode step and the chunks of prefill, or their row-wise parts where a chunk is not one
            graph, which takes a minute or two and pays off for many texts; "auto" compiles the row-wise parts alone, in
            seconds, and only for long prompts on a GPU (`duohead.models.compiling.LONG_PROMPT`); False nothing.
        graphs: replay decode steps as CUDA graphs; "auto" where there is CUDA.

    Raises:
        ValueError: no policy, an argument of the wrong type or out of range, graphs without CUDA, or several devices.

    Attributes:
        cache: the `DuoCache`.
        compiles: whether decode steps are compiled.
        length: tokens in it, padding included.
        prepare_seconds: time spent so far on compiling, tuning and capturing, apart from running.
    """

    def __init__(
        self,
        model: Any,
        *,
        batch: int = 1,
        max_length: int,
        padded: bool = False,
        compile: bool | str = "auto",
        graphs: bool | str = "auto",
    ) -> None:
        target = unwrap(model)
        policy = policy_of(target)
        if policy is None:
            raise ValueError("this model has no policy; use it inside duohead.duo(model, policy)")
        check_integer("batch", batch)
        check_integer("max_length", max_length)
        if batch < 1:
            raise ValueError(f"batch must be at least 1 row, got {batch}")
        self.policy = policy
        self.model = getattr(model, "_orig_mod", model)
        self.device = single_device(target)
        self.batch, self.max_length = int(batch), int(max_length)
        self.padded = flag("padded", padded)
        self.compiles = flag("compile", compile, auto=False)
        self._compiles_long = compile == "auto"
        self._compiled_long = False
        self.graphs = flag("graphs", graphs, auto=self.device.type == "cuda")
        if self.graphs and self.device.type != "cuda":
            raise ValueError(
                f"graphs=True needs CUDA, but the model is on {self.device}; use graphs='auto'"
            )
        self.cache = DuoCache(policy, target, max_length=self.max_length)
        self.cache.allocate(self.batch, dtype=target.dtype, device=self.device, padded=padded)
        self.length = 0
        self.prepare_seconds = 0.0
        self._target = target
        self._padding = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self._weights = fingerprint(target)
        self._rehearses = self.graphs or self.compiles
        logits = _last_logits(self.model, self.cache)
        forward = compiled_step(logits, rows=batch) if self.compiles else logits
        # Layers without KV heads go through a chunk in loops, which compile to as many copies of their bodies.
        whole = (
            self.compiles
            and len(self.cache.duo_layers) == len(self.cache.layers)
            and is_one_graph(target, self.device)
        )
        self._chunks = compiled_chunks(self.model) if whole else None
        self._steps = Steps(target, forward, self.cache, rows=batch, graphs=self.graphs)

    def fits(self, *, rows: int, tokens: int, padded: bool) -> bool:
        """Whether this engine can serve ``rows`` of ``tokens`` tokens, prompt and answer, padding included."""
        return self.batch == rows and self.max_length >= tokens and (self.padded or not padded)

    def reset(self) -> None:
        """Forget every token; what is compiled and captured stays."""
        self.cache.reset()
        self._padding.zero_()
        self.length = 0

    def knows(self, model: Any) -> bool:
        """Whether ``model`` is the engine's, with the weights and adapters that its graphs were captured with."""
        return self.model is getattr(model, "_orig_mod", model) and (
            self._weights == fingerprint(self._target)
        )

    def _check_weights(self) -> None:
        if self._weights != fingerprint(self._target):
            raise ValueError(
                "the model's weights or adapters have been replaced or moved since this engine was made, "
                "and its graphs know only the old ones; make a new Engine"
            )

    def seed(self, seed: int | None = None) -> None:
        """Seed the sampling; by default from torch's global generator, so that `torch.manual_seed` decides."""
        drawn = int(torch.randint(2**62, ())) if seed is None else seed
        self._steps.generator.manual_seed(drawn)

    def prefill(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        chunk: int | None = CHUNK,
        progress: Callable[[int], object] | None = None,
    ) -> Tensor:
        """Feed tokens [B, tokens] that follow what the cache holds, a chunk at a time.

        Args:
            input_ids: new tokens [B, tokens].
            attention_mask: padding mask [B, length + tokens]; needed in the first call only, for left-padded rows.
            chunk: tokens per forward, None for all at once; only ``visibility="chunk"`` sees a difference.
            progress: called with the number of tokens done after every chunk.

        Returns:
            Logits of the last token [B, vocabulary]. What is refused changes nothing; an error or an
            interruption on the way leaves the engine empty.

        Raises:
            ValueError: something of the wrong type, shape or device, more tokens than ``max_length`` leaves room for,
                another number of rows, or a mask that the engine or the cache cannot honour.
        """
        check_tokens(input_ids, self.device)
        rows, count = input_ids.shape
        check_mask(attention_mask, rows)
        check_callable("progress", progress)
        if rows != self.batch:
            raise ValueError(
                f"input_ids must have the engine's {self.batch} rows, got {rows}; make Engine(batch={rows})"
            )
        self.check_room(count)
        self._check_weights()
        try:
            mask = self._mask(attention_mask, count)
            check_prompt(
                self.model,
                self.cache,
                past=self.length,
                count=count,
                attention_mask=mask,
                chunk=chunk,
            )
        except BaseException:
            if self.length == 0:
                self.reset()  # the padding may have been written
            raise
        compiled = self.compiles or self._is_long(count)
        try:
            logits = self._feed(input_ids, mask, chunk, progress, compiled=compiled)
        except BaseException:
            # Some layers hold more than others now, or a state of later tokens, which no later call could tell.
            self.reset()
            raise
        self.length += count
        return logits

    def _feed(
        self,
        input_ids: Tensor,
        mask: Tensor | None,
        chunk: int | None = None,
        progress: Callable[[int], object] | None = None,
        *,
        compiled: bool,
    ) -> Tensor:
        sliced = in_slices(self._target, compiled=compiled)
        with nullcontext() if self._chunks else sliced:
            return prefill(
                self.model,
                input_ids,
                self.cache,
                attention_mask=mask,
                chunk=chunk,
                progress=progress,
                forward=self._chunks,
            )

    def _is_long(self, tokens: int) -> bool:
        """Whether the row-wise parts are compiled for a prompt of ``tokens`` tokens a row, under compile="auto"."""
        return self._compiles_long and is_long(self.batch * tokens, self.device)

    def _mask(self, given: Tensor | None, count: int) -> Tensor | None:
        return settled(self._padding, given, length=self.length, count=count, padded=self.padded)

    def check_room(self, count: int) -> None:
        """Raise ValueError unless ``count`` more tokens fit; the last one generated need not, as it is never fed."""
        needed = self.length + count
        if needed > self.max_length:
            raise ValueError(
                f"max_length of this engine is {self.max_length} tokens but {needed} are needed; "
                f"make Engine(max_length={needed}) or more, or reset() it for another text"
            )

    def pick(self, logits: Tensor, sampler: Sampler = GREEDY) -> Tensor:
        """Next tokens [B] from the logits [B, vocabulary] that `prefill` returned."""
        return sampler(logits, self._steps.generator)

    @torch.no_grad()
    def decode(
        self,
        tokens: Tensor,
        steps: int,
        *,
        sampler: Sampler = GREEDY,
        stop: Sequence[int] = (),
        pad: int = 0,
        check_every: int = CHECK_EVERY,
        on_tokens: Callable[[Tensor], object] | None = None,
    ) -> Tensor:
        """Feed ``tokens`` and generate up to ``steps`` more; the last one generated is not fed.

        Args:
            tokens: the tokens [B] that follow what the cache holds.
            steps: tokens to generate at most.
            sampler: how to pick them.
            stop: a row ends after one of these (which it may begin with); it goes on with ``pad`` until all rows end.
            pad: fills rows that have ended.
            check_every: steps between two looks of the host at the device.
            on_tokens: called with new tokens [B, n] at every look, a copy that it may keep.

        Returns:
            Generated tokens [B, n], n <= steps. After an error or interruption between steps the engine holds what was
            generated until then; after one inside a step, without graphs, it is empty.

        Raises:
            ValueError: no room for ``steps`` tokens, nothing prefilled, an argument of the wrong type or out of range.
        """
        check_run(tokens, steps, rows=self.batch, stop=stop, pad=pad, check_every=check_every)
        check_callable("on_tokens", on_tokens)
        if not isinstance(sampler, Sampler):
            raise ValueError(
                f"sampler must be a Sampler, got {sampler!r}; use Sampler(temperature=...)"
            )
        if self.length == 0:
            raise ValueError("decode continues a text, but the cache is empty; call prefill first")
        self.check_room(steps)
        self._check_weights()
        step = self._launcher(sampler)
        self._steps.begin(tokens, self.length - self._padding, stop, pad)
        burst = check_every if self._steps.traceless or not stop else 1
        launched = seen = 0
        stepping = False
        try:
            while launched < steps and not (stop and self._steps.ended()):
                count = min(burst, steps - launched)
                stepping = True
                for _ in range(count):
                    step()
                stepping = False
                launched += count
                if on_tokens is not None:
                    done = self._steps.made()
                    on_tokens(self._steps.tokens(seen, done).clone())
                    seen = done
        except BaseException:
            if stepping and not self.graphs:
                # A forward broke off, so layers hold different numbers of tokens; a graph runs whole.
                self.reset()
            else:
                self.length += self._steps.made()
            raise
        made = self._steps.made()
        self.length += made
        return self._steps.tokens(0, made).clone()

    def _launcher(self, sampler: Sampler) -> Callable[[], None]:
        started, captured = time.perf_counter(), self._steps.ready(sampler)
        step = self._steps.launcher(sampler)
        if self.graphs and not captured:
            self.prepare_seconds += time.perf_counter() - started
        return step

    def prepare(self, sampler: Sampler = GREEDY, *, tokens: int | None = None) -> None:
        """Compile, tune and capture ahead of the first text, so that the clock of a run shows the run.

        Args:
            sampler: how tokens will be picked, which is part of the graph.
            tokens: of the longest prompt to come; None for as many as fit.

        Raises:
            ValueError: the engine holds a text, or a decode step cannot be captured.
        """
        if self.length:
            raise ValueError(f"prepare needs an empty engine, got {self.length} tokens; reset() it")
        if tokens is not None:
            check_integer("tokens", tokens)
        steps = self._rehearses and not self._steps.ready(sampler)
        long = self._is_long(tokens or self.max_length) and not self._compiled_long
        if self.max_length < 3 or not (steps or long):
            return
        started, before = time.perf_counter(), self.prepare_seconds
        room = min(self.max_length - 1, positions_of(self.model) or REHEARSAL)
        count = min(max(2, REHEARSAL // self.batch), room)
        rehearsed = torch.zeros(self.batch, count, dtype=torch.int64, device=self.device)
        try:
            self._feed(rehearsed, self._mask(None, count), compiled=self.compiles or long)
            if steps:
                self._rehearse(sampler)
        finally:
            self.reset()
        # Graphs are kept for each sampler, a compiled forward serves all of them.
        self._rehearses = self.graphs
        self._compiled_long = self._compiled_long or long
        wait(self.device)
        self.prepare_seconds = before + time.perf_counter() - started

    @torch.no_grad()
    def _rehearse(self, sampler: Sampler) -> None:
        """Capture a decode step, or compile it where there are no graphs."""
        if self.graphs:
            self._steps.launcher(sampler)
        elif self.compiles:
            with self._steps.undone():
                self._steps.run(sampler)


def _last_logits(model: Any, cache: DuoCache) -> Callable[[Tensor, Tensor], Tensor]:
    """A forward of one more token a row: [B, 1] at positions [B, 1] to logits [B, vocabulary].

    A function of its own, since a method would keep the engine, and with it the cache, alive in a cycle.
    """

    def logits(token: Tensor, position: Tensor) -> Tensor:
        out = model(
            input_ids=token,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1]

    return logits


def wait(device: torch.device) -> None:
    """Let the device finish, before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

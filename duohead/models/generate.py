"""A long prompt in chunks, then decoding, on the engine where it can and with transformers' own generate elsewhere.

The engine (`duohead.models.engine`) is the fast way: a static cache and decode steps in CUDA graphs. transformers does
everything else (beams, assistants, custom processors, other devices) on a growing `DuoCache`. The result says which it
was, and what it took.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duohead.cache import DuoCache
from duohead.models.checks import (
    check_callable,
    check_integer,
    check_mask,
    check_stop,
    check_tokens,
)
from duohead.models.engine import Engine, wait
from duohead.models.interface import STATE, policy_of, unwrap
from duohead.models.prefill import CHUNK, check_chunk, check_positions, positions_of, prefill
from duohead.models.sampling import Request, requested

__all__ = ["ENGINES", "KEPT", "Generation", "check_positions", "generate", "prefill"]

logger = logging.getLogger(__name__)
ENGINES = ("auto", "graph", "compiled", "transformers")
# model.generate wants prompt tokens that the cache has not seen; a single one would count as decoded, so two are left.
KEPT = 2
# The engine that generate makes by itself has room for texts up to the next multiple of this, so that it can be kept.
ROOM = 1024


@dataclass(frozen=True)
class Generation:
    """What was generated, and what it took.

    ``tokens`` [B, prompt + new] includes the prompt, of which ``prefilled_tokens`` took ``prefill_seconds``. Times are
    in seconds, sizes in bytes; ``kv_bytes`` are allocated (for the whole ``max_length`` of an engine), and
    ``dense_kv_bytes`` is what the same room costs without a policy. ``engine`` says what decoded: "graph" or "compiled"
    (CUDA graphs of the eager or the compiled step), "steps" (the engine without graphs), "transformers".
    ``prepare_seconds`` went into compiling and capturing, apart from the other times.
    """

    tokens: Tensor
    prompt_tokens: int
    prefilled_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    kv_bytes: int
    dense_kv_bytes: int
    engine: str = "transformers"
    prepare_seconds: float = 0.0


def generate(
    model: Any,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 128,
    chunk: int | None = CHUNK,
    progress: Callable[[int], object] | None = None,
    engine: Engine | str = "auto",
    max_length: int | None = None,
    **options: Any,
) -> Generation:
    """Continue a prompt with an enabled model: prefill in chunks, then decode on the same cache.

    Args:
        model: a model with a policy (`duohead.duo` or `duohead.enable`).
        input_ids: prompt [B, tokens].
        attention_mask: padding mask [B, tokens], needed for left-padded rows.
        max_new_tokens: how many tokens to generate at most.
        chunk: tokens per prefill forward, None for all at once; only ``visibility="chunk"`` sees a difference.
        progress: called with the number of prompt tokens done after every chunk.
        engine: "graph" or "compiled" for an engine that stays with the model until it is disabled (or needs another
            one), "transformers" for ``model.generate``, "auto" for "graph" on a CUDA device where the options allow it.
            An `Engine` of your own goes on with the text it holds: ``input_ids`` is then the whole text so far, of
            which it feeds what is new; ``reset()`` it for another text. What is refused leaves it as it was; an error
            or an interruption on the way leaves it empty, and the whole text may be passed again.
        max_length: tokens to allocate the engine's cache for; by default what this call needs, rounded up.
        options: anything that ``model.generate`` takes (do_sample, temperature, streamer, ...).

    Raises:
        ValueError: the model has no policy, something is of the wrong type or shape, prompt and new tokens exceed the
            model's positions or ``max_length``, or an engine was asked for that cannot do what the options say.
    """
    policy = policy_of(model)
    if policy is None:
        raise ValueError("this model has no policy; use it inside duohead.duo(model, policy)")
    check_tokens(input_ids)
    check_mask(attention_mask, input_ids.shape[0])
    check_integer("max_new_tokens", max_new_tokens)
    check_chunk(chunk)
    check_callable("progress", progress)
    if max_length is not None:
        check_integer("max_length", max_length)
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}; leave it out")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    check_positions(model, input_ids.shape[1] + max_new_tokens)
    found = _engine(model, input_ids, attention_mask, max_new_tokens, engine, max_length, options)
    run = _Run(model, input_ids, attention_mask, max_new_tokens, chunk, progress)
    if found is None:
        return run.with_transformers(options)
    return run.with_engine(*found)


def _engine(
    model: Any,
    input_ids: Tensor,
    mask: Tensor | None,
    new: int,
    engine: Engine | str,
    max_length: int | None,
    options: dict[str, Any],
) -> tuple[Engine, Request] | None:
    """The engine that serves this call and the call as it reads it; None for transformers."""
    if isinstance(engine, Engine):
        if engine.model is not getattr(model, "_orig_mod", model):
            raise ValueError("the engine was made for another model; make Engine(model, ...)")
        if max_length not in (None, engine.max_length):
            raise ValueError(
                f"max_length must be the engine's {engine.max_length}, got {max_length}; leave it out"
            )
        return engine, requested(model, options)
    if engine not in ENGINES:
        raise ValueError(f"engine must be an Engine or one of {', '.join(ENGINES)}, got {engine!r}")
    device = unwrap(model).device
    if engine in ("graph", "compiled") and device.type != "cuda":
        raise ValueError(
            f"engine={engine!r} needs CUDA, but the model is on {device}; use 'auto' or 'transformers'"
        )
    if engine == "transformers" or (engine == "auto" and device.type != "cuda"):
        if max_length is not None:
            raise ValueError(
                f"max_length={max_length} is for an engine, but {engine!r} decodes with transformers here; "
                f"leave it out"
            )
        return None
    try:
        request = requested(model, options)
        made = _kept(
            model, input_ids, mask, new, compiled=engine == "compiled", max_length=max_length
        )
    except ValueError as error:
        if engine != "auto":
            raise
        logger.info("decoding with transformers: %s", error)
        return None
    return made, request


def _kept(
    model: Any,
    input_ids: Tensor,
    mask: Tensor | None,
    new: int,
    *,
    compiled: bool,
    max_length: int | None,
) -> Engine:
    """The engine that stays with the model's policy, made anew when it does not fit."""
    target = unwrap(model)
    rows, prompt = input_ids.shape
    # The last token is never fed.
    needed = prompt + new - 1
    rounded = -(-needed // ROOM) * ROOM
    padded = mask is not None and not bool(mask.all())
    kept: dict[str, Any] = vars(vars(target)[STATE])
    engine: Engine | None = kept.get("engine")
    fits = (
        engine is not None
        and engine.fits(rows=rows, tokens=needed, padded=padded)
        and engine.compiles == compiled
        and engine.max_length == (max_length or engine.max_length)
        and engine.knows(model)
    )
    if engine is None or not fits:
        # Before the next one is made: two caches may not fit.
        kept.pop("engine", None)
        engine = None
        gc.collect()
        engine = Engine(
            model,
            batch=rows,
            max_length=max_length or max(needed, min(rounded, positions_of(model) or rounded)),
            padded=padded,
            compile=compiled or "auto",
            graphs=True,
        )
        kept["engine"] = engine
    engine.reset()
    return engine


@dataclass
class _Run:
    """One call of `generate`."""

    model: Any
    input_ids: Tensor
    mask: Tensor | None
    new: int
    chunk: int | None
    progress: Callable[[int], object] | None

    def with_engine(self, engine: Engine, request: Request) -> Generation:
        """Generate on an engine, from where it is."""
        past, prompt = engine.length, self.input_ids.shape[1]
        self._check(engine, request)
        before = engine.prepare_seconds
        if not past:
            engine.prepare(request.sampler, tokens=prompt)
        engine.seed()
        try:
            if request.streamer is not None:
                request.streamer.put(self.input_ids.cpu())
            started = time.perf_counter()
            logits = engine.prefill(
                self.input_ids[:, past:],
                attention_mask=self.mask,
                chunk=self.chunk,
                progress=self.progress,
            )
            wait(engine.device)
            ready, captured = time.perf_counter(), engine.prepare_seconds
            made = self._decoded(engine, request, engine.pick(logits, request.sampler))
        except BaseException:
            if engine.length != past:
                # The caller has not got what was generated, so the next text cannot go on from it.
                engine.reset()
            raise
        wait(engine.device)
        late = engine.prepare_seconds - captured
        return self._result(
            torch.cat([self.input_ids, made], 1),
            engine.cache,
            rows=engine.batch,
            prefilled=prompt - past,
            seconds=(ready - started, time.perf_counter() - ready - late),
            engine=("compiled" if engine.compiles else "graph") if engine.graphs else "steps",
            prepare_seconds=engine.prepare_seconds - before,
        )

    def _check(self, engine: Engine, request: Request) -> None:
        """Refuse what would otherwise fail once the prompt has been read."""
        past, prompt = engine.length, self.input_ids.shape[1]
        if past >= prompt:
            raise ValueError(
                f"input_ids must be the whole text so far and more, but the engine holds {past} tokens already and "
                f"got {prompt}; reset() it for another text"
            )
        check_stop(request.stop)
        engine.check_room(prompt - past + self.new - 1)

    def _decoded(self, engine: Engine, request: Request, first: Tensor) -> Tensor:
        """The first new token and those after it [B, n], streamed as they come."""
        streamer = request.streamer

        def show(tokens: Tensor) -> None:
            for column in tokens.cpu().unbind(1):
                streamer.put(column)

        made = first[:, None]
        if streamer is not None:
            show(made)
        if self.new > 1:
            rest = engine.decode(
                first,
                self.new - 1,
                sampler=request.sampler,
                stop=request.stop,
                pad=request.pad,
                on_tokens=None if streamer is None else show,
            )
            made = torch.cat([made, rest], 1)
        if streamer is not None:
            streamer.end()
        return made

    def with_transformers(self, options: dict[str, Any]) -> Generation:
        """Prefill all but the last tokens, and let ``model.generate`` go on with a growing cache."""
        policy = policy_of(self.model)
        assert policy is not None, "generate has looked"
        prompt, device = self.input_ids.shape[1], self.input_ids.device
        cache = DuoCache(policy, unwrap(self.model))
        started = time.perf_counter()
        if prompt > KEPT:
            prefill(
                self.model,
                self.input_ids[:, :-KEPT],
                cache,
                attention_mask=self.mask,
                chunk=self.chunk,
                progress=self.progress,
            )
            wait(device)
        copies = _copies(self.model, options)
        if copies > 1:
            cache.batch_repeat_interleave(copies)
        ready = time.perf_counter()
        tokens = self.model.generate(
            self.input_ids,
            attention_mask=torch.ones_like(self.input_ids) if self.mask is None else self.mask,
            past_key_values=cache,
            max_new_tokens=self.new,
            **options,
        )
        wait(device)
        return self._result(
            tokens,
            cache,
            rows=self.input_ids.shape[0] * copies,
            prefilled=max(prompt - KEPT, 0),
            seconds=(ready - started, time.perf_counter() - ready),
        )

    def _result(
        self,
        tokens: Tensor,
        cache: DuoCache,
        *,
        rows: int,
        prefilled: int,
        seconds: tuple[float, float],
        engine: str = "transformers",
        prepare_seconds: float = 0.0,
    ) -> Generation:
        prompt = self.input_ids.shape[1]
        return Generation(
            tokens=tokens,
            prompt_tokens=prompt,
            prefilled_tokens=prefilled,
            new_tokens=tokens.shape[1] - prompt,
            prefill_seconds=seconds[0],
            decode_seconds=seconds[1],
            kv_bytes=cache.kv_bytes(),
            dense_kv_bytes=cache.policy.dense_kv_bytes(
                cache.max_length or int(cache.get_seq_length()), rows
            ),
            engine=engine,
            prepare_seconds=prepare_seconds,
        )


def _copies(model: Any, options: dict[str, Any]) -> int:
    """Rows that ``model.generate`` makes of each prompt: beams, or sequences to return."""
    config = options.get("generation_config") or unwrap(model).generation_config
    asked = [
        options.get(name) or getattr(config, name, None) or 1
        for name in ("num_beams", "num_return_sequences")
    ]
    return max(asked)

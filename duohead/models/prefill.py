"""A prompt of any length, fed in chunks into a cache, so that activations stay small.

The result does not depend on the chunk size, because attention and eviction happen together, token-exact. Only the last
position of a chunk goes through the language model head. The host counts the tokens itself meanwhile, so that neither
it nor the device waits for the other.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from duohead.cache import DuoCache
from duohead.models.checks import check_callable, check_integer, check_mask, check_tokens
from duohead.models.interface import unwrap
from duohead.shapes import text_config

# Tokens per forward: at full speed on every GPU, with activations of a few GiB for models of any size.
CHUNK = 32768


def prefill(
    model: Any,
    input_ids: Tensor,
    cache: DuoCache,
    *,
    attention_mask: Tensor | None = None,
    chunk: int | None = CHUNK,
    progress: Callable[[int], object] | None = None,
    forward: Callable[..., Any] | None = None,
) -> Tensor:
    """Feed a prompt through an enabled model into ``cache``, a chunk at a time.

    Args:
        model: a model with a policy (`duohead.duo` or `duohead.enable`).
        input_ids: new tokens [B, tokens]; they follow whatever the cache holds.
        cache: where keys and values go.
        attention_mask: [B, past + tokens], needed for left-padded rows.
        chunk: tokens per forward, None for all at once; no result depends on it but those of ``visibility="chunk"``.
        progress: called with the number of tokens done after every chunk.
        forward: runs a chunk, by default the model itself.

    Returns:
        Logits of the last token [B, vocabulary].

    Raises:
        ValueError: something of the wrong type or shape, no tokens, a chunk below 1 (below 2 for padded rows of hybrid
            models), or more tokens than the model has positions.
    """
    check_tokens(input_ids)
    check_mask(attention_mask, input_ids.shape[0])
    check_callable("progress", progress)
    count, past = input_ids.shape[1], int(cache.get_seq_length())
    check_prompt(model, cache, past=past, count=count, attention_mask=attention_mask, chunk=chunk)
    step = chunk or count
    logits = None
    with torch.no_grad():
        start = 0
        while start < count:
            # A single token counts as decoding, so it is no piece of its own where pieces are longer.
            rest = count - start
            stop = count if step > 1 and rest == step + 1 else start + min(step, rest)
            mask = None if attention_mask is None else attention_mask[:, : past + stop]
            extra = (
                {}
                if mask is None
                else {"attention_mask": mask, "position_ids": _positions(mask, stop - start)}
            )
            with cache.counted(past + start) if isinstance(cache, DuoCache) else nullcontext():
                logits = (forward or model)(
                    input_ids=input_ids[:, start:stop],
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                    **extra,
                ).logits
            if progress is not None:
                progress(stop - start)
            start = stop
    assert logits is not None, "there is at least one chunk"
    return logits[:, -1]


def check_prompt(
    model: Any,
    cache: DuoCache,
    *,
    past: int,
    count: int,
    attention_mask: Tensor | None,
    chunk: int | None,
) -> None:
    """Raise ValueError for what `prefill` refuses of ``count`` new tokens after ``past``, before anything runs."""
    if count == 0:
        raise ValueError("input_ids must hold at least one token, got none")
    check_chunk(chunk)
    ours = getattr(cache, "duo_layers", None)
    hybrid = ours is not None and len(ours) < len(cache.layers)
    if chunk == 1 and hybrid and attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError(
            "chunk must be at least 2 tokens for left-padded rows of this model, got 1: "
            "its layers without KV heads take a single padding token for text"
        )
    check_positions(model, past + count)


def check_chunk(chunk: int | None) -> None:
    """Raise ValueError unless ``chunk`` is a number of tokens, or None."""
    if chunk is not None:
        check_integer("chunk", chunk)
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1 token, got {chunk}")


def positions_of(model: Any) -> int | None:
    """Positions that the model was made for, or None if its config does not say."""
    return getattr(text_config(unwrap(model)), "max_position_embeddings", None)


def check_positions(model: Any, tokens: int) -> None:
    """Raise ValueError if ``tokens`` exceed the positions that the model was made for."""
    limit = positions_of(model)
    if limit is not None and tokens > limit:
        raise ValueError(
            f"prompt and new tokens must fit the model's {limit} positions, got {tokens}; shorten the prompt, "
            f"or use a model with a longer context"
        )


def _positions(mask: Tensor, count: int) -> Tensor:
    """Position ids [B, count] of the newest tokens, counted from each row's first real token."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -count:]

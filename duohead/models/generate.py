"""Long prompts in pieces, then decoding with transformers' own generate, all through one `DuoCache`.

A prompt of any length is fed in chunks, so that activations stay small; the result does not depend on the chunk size.
Sampling, stopping and streaming are transformers' business, this adds the prefill, the clock and the bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duohead.cache import DuoCache
from duohead.models.interface import policy_of, unwrap
from duohead.shapes import text_config

# model.generate wants prompt tokens that the cache has not seen; a single one would count as decoded, so two are left.
KEPT = 2


@dataclass(frozen=True)
class Generation:
    """What was generated, and what it took.

    ``tokens`` [B, prompt + new] includes the prompt, of which ``prefilled_tokens`` took ``prefill_seconds``. Times are
    in seconds, sizes in bytes; ``dense_kv_bytes`` is what the same length costs without a policy.
    """

    tokens: Tensor
    prompt_tokens: int
    prefilled_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    kv_bytes: int
    dense_kv_bytes: int


def prefill(
    model: Any,
    input_ids: Tensor,
    cache: DuoCache,
    *,
    attention_mask: Tensor | None = None,
    chunk: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Feed a prompt through an enabled model into ``cache``, a chunk at a time.

    Args:
        model: a model with a policy (`duohead.duo` or `duohead.enable`).
        input_ids: new tokens [B, tokens]; they follow whatever the cache holds.
        cache: where keys and values go.
        attention_mask: [B, past + tokens], needed for left-padded rows.
        chunk: tokens per forward, None for all at once.
        progress: called with the number of tokens done after every chunk.

    Returns:
        Logits of the last token [B, vocabulary].

    Raises:
        ValueError: no tokens, a chunk below 1, or more tokens than the model has positions.
    """
    count = input_ids.shape[1]
    if count == 0:
        raise ValueError("input_ids must hold at least one token, got none")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    past = int(cache.get_seq_length())
    check_positions(model, past + count)
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
            logits = model(
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


def generate(
    model: Any,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 128,
    chunk: int | None = None,
    progress: Callable[[int], object] | None = None,
    **options: Any,
) -> Generation:
    """Continue a prompt with an enabled model: prefill in chunks, then `model.generate` on the same cache.

    Args:
        model: a model with a policy (`duohead.duo` or `duohead.enable`).
        input_ids: prompt [B, tokens].
        attention_mask: padding mask [B, tokens], needed for left-padded rows.
        max_new_tokens: how many tokens to generate at most.
        chunk: tokens per prefill forward, None for all at once.
        progress: called with the number of prompt tokens done after every chunk.
        options: anything that ``model.generate`` takes (do_sample, temperature, streamer, ...).

    Raises:
        ValueError: the model has no policy, or prompt and new tokens exceed its positions.
    """
    policy = policy_of(model)
    if policy is None:
        raise ValueError("this model has no policy; use it inside duohead.duo(model, policy)")
    rows, prompt = input_ids.shape
    check_positions(model, prompt + max_new_tokens)
    cache = DuoCache(policy, unwrap(model))
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    started = time.perf_counter()
    if prompt > KEPT:
        prefill(
            model,
            input_ids[:, :-KEPT],
            cache,
            attention_mask=attention_mask,
            chunk=chunk,
            progress=progress,
        )
        _wait(input_ids.device)
    copies = _copies(options)
    if copies > 1:
        cache.batch_repeat_interleave(copies)
    ready = time.perf_counter()
    tokens = model.generate(
        input_ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        **options,
    )
    _wait(input_ids.device)
    finished = time.perf_counter()
    length = int(cache.get_seq_length())
    return Generation(
        tokens=tokens,
        prompt_tokens=prompt,
        prefilled_tokens=max(prompt - KEPT, 0),
        new_tokens=tokens.shape[1] - prompt,
        prefill_seconds=ready - started,
        decode_seconds=finished - ready,
        kv_bytes=cache.kv_bytes(),
        dense_kv_bytes=policy.dense_kv_bytes(length, rows * copies),
    )


def _copies(options: dict[str, Any]) -> int:
    """Rows that ``model.generate`` makes of each prompt: beams, or sequences to return."""
    config = options.get("generation_config")
    asked = [
        options.get(name) or getattr(config, name, None) or 1
        for name in ("num_beams", "num_return_sequences")
    ]
    return max(asked)


def check_positions(model: Any, tokens: int) -> None:
    """Raise ValueError if ``tokens`` exceed the positions that the model was made for."""
    limit = getattr(text_config(unwrap(model)), "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise ValueError(
            f"prompt and new tokens must fit the model's {limit} positions, got {tokens}; shorten the prompt, "
            f"or use a model with a longer context"
        )


def _positions(mask: Tensor, count: int) -> Tensor:
    """Position ids [B, count] of the newest tokens, counted from each row's first real token."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -count:]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""What callers of the engine and of `generate` may get wrong, told before anything runs.

A tensor of the wrong shape or a number that is none would otherwise fail deep in a model, or not at all. Every function
returns or raises ValueError with the argument's name, the rule, what was given and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from duohead.models.steps import MAX_STOP_TOKENS


def check_integer(name: str, value: Any) -> None:
    """Refuse what is no whole number; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be an integer, got {value!r}; pass an int")


def flag(name: str, value: Any, *, auto: bool | None = None) -> bool:
    """``value``, which must be True or False, or "auto" where there is something that it means."""
    if auto is not None and value == "auto":
        return auto
    if not isinstance(value, bool):
        known = "True or False" if auto is None else "True, False or 'auto'"
        raise ValueError(f"{name} must be {known}, got {value!r}")
    return value


def check_callable(name: str, value: Any) -> None:
    """Refuse what is neither a function nor None."""
    if value is not None and not callable(value):
        raise ValueError(f"{name} must be a function or None, got {value!r}")


def check_tokens(input_ids: Any, device: torch.device | None = None) -> None:
    """Refuse what are no token ids [B, tokens], on ``device`` if one is given."""
    if not isinstance(input_ids, Tensor):
        raise ValueError(
            f"input_ids must be a tensor of token ids [rows, tokens], got {type(input_ids).__name__}; "
            f"use tokenizer(text, return_tensors='pt').input_ids"
        )
    kind = input_ids.dtype
    if input_ids.ndim != 2 or kind not in (torch.int64, torch.int32):
        raise ValueError(
            f"input_ids must hold integers [rows, tokens], got shape {tuple(input_ids.shape)} of {kind}; "
            f"pass one row per text, even for a single one"
        )
    if device is not None and input_ids.device != device:
        raise ValueError(
            f"input_ids must be on the model's device {device}, got {input_ids.device}; "
            f"move them with .to(model.device)"
        )


def check_mask(mask: Any, rows: int) -> None:
    """Refuse what is neither None nor a padding mask [B, tokens] of ``rows`` rows."""
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[0] == rows):
        return
    got = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
    raise ValueError(
        f"attention_mask must be a tensor [rows, tokens] with the {rows} rows of input_ids, got {got}; "
        f"pass the tokenizer's padding mask, or leave it out where there is no padding"
    )


def check_stop(stop: Any) -> None:
    """Refuse what is no sequence of at most MAX_STOP_TOKENS token ids."""
    if not isinstance(stop, Sequence) or isinstance(stop, str):
        raise ValueError(f"stop must be a sequence of token ids, got {stop!r}; pass a list of them")
    for token in stop:
        check_integer("stop", token)
    if len(stop) > MAX_STOP_TOKENS:
        raise ValueError(
            f"stop holds at most {MAX_STOP_TOKENS} tokens, got {len(stop)}; use model.generate"
        )


def check_run(tokens: Any, steps: Any, *, rows: int, stop: Any, pad: Any, check_every: Any) -> None:
    """Refuse what `Engine.decode` cannot begin with: one token id for each of ``rows`` rows, and how far to go."""
    for name, value in (("steps", steps), ("check_every", check_every), ("pad", pad)):
        check_integer(name, value)
    if steps < 1 or check_every < 1:
        raise ValueError(f"steps and check_every must be at least 1, got {steps} and {check_every}")
    check_stop(stop)
    if not isinstance(tokens, Tensor):
        raise ValueError(
            f"tokens must be a tensor of token ids [rows], got {type(tokens).__name__}; pass what pick returned"
        )
    if tokens.shape != (rows,) or tokens.is_floating_point():
        raise ValueError(
            f"tokens must hold one token id for each of the engine's {rows} rows, got shape "
            f"{tuple(tokens.shape)} of {tokens.dtype}; pass integers [B]"
        )

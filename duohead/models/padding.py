"""The padding mask of an engine's calls: settled by the first one, the same for every later one.

Compiled chunks and captured steps cannot look at a mask, so it is checked here, before any of them runs.

Shape letters: B rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from duohead.cache.view import left_padding


def settled(
    padding: Tensor, given: Tensor | None, *, length: int, count: int, padded: bool
) -> Tensor | None:
    """The padding mask [B, length + count] of a call, None for an engine without.

    Args:
        padding: left padding of every row [B], written by the first call.
        given: the caller's mask [B, length + count], or None for no padding but what is settled.
        length: tokens before this call.
        count: tokens of this call.
        padded: whether the engine was made for padded rows.

    Raises:
        ValueError: padding in an engine without, or a mask that is not the one of the first call, gone on.
    """
    if given is None and not padded:
        return None
    if length == 0 and given is not None:
        padding.copy_(left_padding(given))
        if not padded and bool(padding.any()):
            padding.zero_()
            raise ValueError(
                "attention_mask has left padding but the engine was made without; make Engine(padded=True)"
            )
    place = torch.arange(length + count, device=padding.device)
    mask = (place >= padding[:, None]).long()
    if given is not None and not torch.equal(given.to(mask), mask):
        raise ValueError(
            f"attention_mask must cover the {length + count} tokens so far, 0 for padding on the left as in "
            f"the first call and 1 for every other token; leave no padding between turns"
        )
    return mask if padded else None

"""The append kernel by the clock: new tokens of both kinds encoded and stored, against the same in plain PyTorch.

Stored bits must be those of `duohead.codec`, not merely near them: a later crop or another implementation reads them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from duohead.bench.kernels import Place, Result, filled_layer, random_inputs, reaches
from duohead.bench.timing import measure_rotated
from duohead.cache import DuoLayer
from duohead.cache.store import encode_pair
from duohead.cache.view import pick_heads


def timed_append(blank: Result, place: Place) -> Result:
    """The case of ``blank`` with a time; "torch" among its rivals stores the same tokens through PyTorch.

    Raises:
        ValueError: a stored bit differs.
    """
    from duohead.cache import append as kernel

    case = blank.case
    _, keys, values = random_inputs(case, place, 0, tokens=case.new_tokens)
    past = case.length - case.new_tokens
    ours = filled_layer(case, keys, values, tokens=past)
    theirs = filled_layer(case, keys, values, tokens=past)
    ours.advance(case.new_tokens)
    views = ours.stored_views(reaches(ours))

    def store() -> None:
        kernel.append(keys, values, views)

    store()
    _store(theirs, keys, values, past)
    wrong = _differences(ours, theirs)
    if wrong:
        raise ValueError(f"append stored {wrong} parts with other bits; no speed is reported")
    rival = measure_rotated(
        [lambda: _store(theirs, keys, values, past)], device=place.device, seconds=place.seconds
    )
    time = measure_rotated([store], device=place.device, seconds=place.seconds)
    return replace(
        blank, impl="triton", outcome=time, rivals={"torch": rival}, error=0.0, budget=0.0
    )


def _store(layer: DuoLayer, keys: Tensor, values: Tensor, past: int) -> None:
    """The new tokens [B, G, K, D] stored from token ``past`` on, without counting them."""
    for kind in layer.kinds:
        new = (pick_heads(x, kind.heads) for x in (keys, values))
        kind.store.append(past, encode_pair(kind.codec, *new), None)


def _differences(ours: DuoLayer, theirs: DuoLayer) -> int:
    """Stored tensors that are not equal bit by bit."""
    count = 0
    for mine, other in zip(ours.kinds, theirs.kinds, strict=True):
        for left, right in zip(mine.store.segments(), other.store.segments(), strict=True):
            pairs = zip(left.keys + left.values, right.keys + right.values, strict=True)
            count += sum(not torch.equal(a, b) for a, b in pairs)
    return count

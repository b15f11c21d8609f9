"""Whether a pattern was made for this model: what each KV head makes of a few fixed tokens, in four numbers.

A digest of weights changes with every cast, shard, adapter or quantisation, and names of weights differ by family; keys
are what the heads of any model produce, so they are asked for, in one forward pass of sixteen tokens. Other weights of
the same shape give unrelated numbers, and so do permuted heads, while the same model in another precision or after
tuning gives nearly the same ones: `likeness(fingerprint(model), stored)` is 1 for equals and about 0 for strangers.
`HeadPattern` stores one and holds models against it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from duohead.shapes import layer_shapes, text_config

# Ids that every vocabulary has, and that stay what they are when tokens are added to it.
TOKENS = range(5, 21)
# Walsh functions: dimension d counts with the parity of its bits in the mask as sign.
_MASKS = (1, 6, 11, 21)
# Of weights of which each process has a part, and of FSDP's first form, a module around others.
_SHARED = frozenset({"DTensor", "FullyShardedDataParallel"})
ALIKE = 0.5
"""The least likeness of a model to the one that a pattern was made for."""


def whole(model: Any) -> bool:
    """Whether this process holds the weights of a model, all of them: what a fingerprint can be taken of.

    It does not if given a config, weights on the meta device (as of parts that are offloaded), or weights that several
    processes share (tensor parallelism, FSDP), where a forward of one process alone would wait for the others.
    """
    from torch import nn

    if not isinstance(model, nn.Module) or (getattr(model, "tp_size", None) or 1) > 1:
        return False
    weights = list(model.parameters())
    kinds = {type(part).__name__ for part in (*model.modules(), *weights)}
    return not kinds & _SHARED and not any(weight.is_meta for weight in weights)


def fingerprint(model: Any) -> NDArray[np.float32]:
    """What the KV heads of a model make of fixed tokens: fp32 [layers, kv_heads, 4].

    NaN stands where a head is not gated, and for layers that leave no keys of their own in a cache.

    The numbers are projections of keys of length one, as they enter a cache, averaged over the tokens. Costs one
    forward pass; the model may be quantised, spread over devices, or have adapters, and is left as it was found.

    Raises:
        ValueError: the model leaves the keys of some of its KV heads in a cache, as when a process of several holds a
            part of the heads (see `whole`).
    """
    import torch
    from transformers import DynamicCache

    shapes = layer_shapes(model)
    cache = DynamicCache(config=text_config(model))
    ids = torch.tensor([[token % text_config(model).vocab_size for token in TOKENS]])
    with torch.no_grad(), _evaluating(model):
        model(ids.to(model.device), past_key_values=cache, use_cache=True)
    found = np.full(
        (len(shapes), max(shape.num_kv_heads for shape in shapes), len(_MASKS)), np.nan, np.float32
    )
    for layer, shape in enumerate(shapes):
        if not shape.gated:
            continue
        keys = getattr(cache.layers[layer], "keys", None) if layer < len(cache.layers) else None
        if keys is None:
            continue
        if keys.shape[1] != shape.num_kv_heads:
            raise ValueError(
                f"layer {layer} must leave the keys of {shape.num_kv_heads} KV heads in a cache, got those of "
                f"{keys.shape[1]}; take the fingerprint of a whole model, before it is shared out"
            )
        unit = torch.nn.functional.normalize(keys[0].double(), dim=-1)
        signs = torch.tensor(_signs(unit.shape[-1]), device=unit.device)
        found[layer, : shape.num_kv_heads] = (unit @ signs.T).mean(1).cpu().numpy()
    return found


def likeness(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Cosine of two fingerprints over the heads that both have: 1 for the same model, near 0 for unrelated ones.

    Raises ValueError if their shapes or their gated heads differ, which no two models with one pattern do.
    """
    if one.shape != other.shape or not np.array_equal(np.isnan(one), np.isnan(other)):
        raise ValueError(
            f"fingerprints must be of the same gated heads, got {_told(one)} and {_told(other)}; the models differ in "
            "shape"
        )
    first, second = (np.nan_to_num(part.astype(np.float64)).ravel() for part in (one, other))
    scale = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / scale if scale else float(np.array_equal(first, second))


def check(model: Any, stored: NDArray[np.float32], *, made_for: str) -> float:
    """The likeness of a model to the stored fingerprint of a pattern, if it is `ALIKE` at least.

    Raises:
        ValueError: it is less; ``made_for`` names what the fingerprint was taken of.
    """
    found = likeness(fingerprint(model), stored)
    if found < ALIKE:
        raise ValueError(
            f"the model's heads must be those that the pattern was made for ({made_for}), got a likeness of "
            f"{found:.2f} where {ALIKE} is needed (1 is the same, 0 another model or other places of the heads); load "
            "that model, identify the heads of this one, or use the pattern all the same with "
            "dataclasses.replace(pattern, fingerprint=None)"
        )
    return found


def _signs(dim: int) -> NDArray[np.float64]:
    """One row of +1 and -1 per mask, over the dimensions of a head, scaled to length one."""
    signs = [[(-1.0) ** (d & mask).bit_count() for d in range(dim)] for mask in _MASKS]
    return np.array(signs) / dim**0.5


def _told(found: NDArray[np.float32]) -> str:
    gated = int((~np.isnan(found[..., 0])).sum())
    return f"{gated} of {found.shape[0]} layers x {found.shape[1]} heads"


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Without dropout; afterwards every module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True

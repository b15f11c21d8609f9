"""A check at run time that a model keeps transformers' attention contract, instead of a list of models.

The contract: every attention layer calls ``cache.update`` once, passes the result untouched to the
registered attention function, and uses what it returns. The probe runs a handful of tokens with
every head kept and compares with the model's own attention; a model that fails is refused with the
part that failed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from duohead.cache import DuoCache, DuoHandle
from duohead.policy import HeadPolicy
from duohead.shapes import text_config

TOKENS = 6
# Relative difference of logits allowed between our attention and the model's own, both in the model's dtype. A broken
# contract is off by the size of the logits themselves; sixteen-bit rounding can move a mixture-of-experts router.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
LOW_PRECISION_TOLERANCE = 0.15


def probe(
    model: PreTrainedModel,
    policy: HeadPolicy,
    eager: Callable[[], AbstractContextManager[None]],
    installed: Callable[[], AbstractContextManager[None]],
) -> None:
    """Check ``model`` against its own eager attention, which honours every argument (SDPA drops a soft cap).

    Args:
        model: the model.
        policy: a policy for it that keeps every head.
        eager: a context in which the model uses its eager attention.
        installed: a context in which the policy is on the model.

    Raises:
        ValueError: the model breaks the contract; the message names the part.
    """
    name = type(model).__name__
    ids = some_tokens(model)
    with torch.no_grad(), evaluating(model):
        with eager():
            expected = model(input_ids=ids, use_cache=False).logits[:, -1].float()
        with installed():
            found = _cached_logits(model, policy, ids, name)
    error = relative_error(found, expected)
    limit = TOLERANCE.get(model.dtype, LOW_PRECISION_TOLERANCE)
    if not error <= limit:
        raise ValueError(
            f"{name} does not keep the attention contract: with every head kept, logits differ from its own "
            f"attention by {error:.2g} (relative, limit {limit:g}); keys or values are "
            f"changed after cache.update, or masks differ"
        )


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Length of the difference as a share of the expected length; NaN is passed on, so ask for ``error <= limit``."""
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


def some_tokens(model: PreTrainedModel) -> Tensor:
    """A handful of different tokens [1, TOKENS] that the model knows, where it takes them."""
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(TOKENS, device=device) * 7 + 3
    return ids.remainder(text_config(model).vocab_size)[None, :]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Every part of ``module`` in evaluation mode, and in the mode it was in afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _cached_logits(model: PreTrainedModel, policy: HeadPolicy, ids: Tensor, name: str) -> Tensor:
    """Logits of the last token after prefill and one step of decode through our cache."""
    cache = DuoCache(policy, model)
    split = TOKENS - 1
    try:
        model(input_ids=ids[:, :split], past_key_values=cache, use_cache=True)
        _check_layers(cache, split, name)
        logits = model(input_ids=ids[:, split:], past_key_values=cache, use_cache=True).logits
    except (AttributeError, TypeError) as error:
        ours = isinstance(getattr(error, "obj", None), DuoHandle)
        detail = f"it asks them for {getattr(error, 'name', None)!r}" if ours else str(error)
        raise ValueError(
            f"{name} does not keep the attention contract: it handles keys and values between cache.update and the "
            f"attention function, or has no attention function that can be replaced ({detail})"
        ) from error
    except ValueError as error:
        raise ValueError(f"{name} does not keep the attention contract: {error}") from error
    _check_layers(cache, TOKENS, name)
    return logits[:, -1].float()


def _check_layers(cache: DuoCache, tokens: int, name: str) -> None:
    for layer in cache.duo_layers:
        if int(layer.length) != tokens:
            part = (
                "calls cache.update"
                if not layer.is_initialized
                else "reaches the registered attention function once"
            )
            raise ValueError(
                f"{name} does not keep the attention contract: layer {layer.index} never {part} "
                f"({int(layer.length)} of {tokens} tokens attended); duohead does not support this model"
            )

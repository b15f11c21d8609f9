"""Putting a policy on a transformers model and taking it off again: `duo`, `enable`, `disable`.

Nothing of the model is copied or patched by class: its modules get a private copy of their config that names our
attention function, a plan each, one pre-forward hook, and one instance method that makes the cache for `generate`. All of
it is undone exactly, and two models with two policies do not know of each other.
"""

from __future__ import annotations

import copy
import inspect
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, StaticCache

from duohead.attention import check_impl
from duohead.cache import DuoCache
from duohead.models.hooks import NAME, PLAN, LayerPlan
from duohead.models.probe import probe
from duohead.policy import HeadPolicy
from duohead.shapes import text_config

STATIC_CACHES = (
    "static",
    "hybrid",
    "sliding_window",
    "hybrid_chunked",
    "offloaded_static",
    "offloaded_hybrid",
)


@dataclass
class _Installed:
    """What has to be undone on one model."""

    policy: HeadPolicy
    configs: list[tuple[nn.Module, Any]]
    planned: list[nn.Module]
    hook: torch.utils.hooks.RemovableHandle


_installed: weakref.WeakKeyDictionary[nn.Module, _Installed] = weakref.WeakKeyDictionary()
_probed: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@contextmanager
def duo(
    model: Any, policy: HeadPolicy, *, impl: str = "auto", probe: bool = True
) -> Iterator[HeadPolicy]:
    """Run ``model`` under ``policy`` inside the block; on leaving, the model is exactly as it was.

    Args:
        model: a transformers causal language model (a PEFT or torch.compile wrapper of one is fine).
        policy: which heads keep what.
        impl: attention implementation, one of `duohead.attention.IMPLEMENTATIONS`.
        probe: check once per model, on a handful of tokens, that it keeps transformers' attention contract.

    Yields:
        The policy bound to the model: geometry, native windows and dtype filled in.

    Raises:
        ValueError: the policy does not fit, or the model breaks the contract; the message says which part.
    """
    bound = enable(model, policy, impl=impl, probe=probe)
    try:
        yield bound
    finally:
        disable(model)


def enable(model: Any, policy: HeadPolicy, *, impl: str = "auto", probe: bool = True) -> HeadPolicy:
    """Put ``policy`` on ``model`` until `disable`; arguments, result and errors as for `duo`."""
    target = unwrap(model)
    check_impl(impl)
    if target in _installed:
        raise ValueError("this model has a policy already; call duohead.disable(model) first")
    _check_kind(target)
    bound = policy.bind(target)
    if probe and target not in _probed:
        _probe(target, bound, impl)
        _probed.add(target)
    _install(target, bound, impl)
    return bound


def disable(model: Any) -> None:
    """Take the policy off ``model`` again, restoring what `enable` changed.

    Raises:
        ValueError: the model has no policy.
    """
    target = unwrap(model)
    if target not in _installed:
        raise ValueError("this model has no policy; nothing to disable")
    state = _installed.pop(target)
    state.hook.remove()
    target.__dict__.pop("_prepare_cache_for_generation", None)
    for module in state.planned:
        delattr(module, PLAN)
    for module, config in state.configs:
        module.config = config


def policy_of(model: Any) -> HeadPolicy | None:
    """The bound policy that is on ``model`` now, or None."""
    state = _installed.get(unwrap(model))
    return None if state is None else state.policy


def unwrap(model: Any) -> PreTrainedModel:
    """The transformers model inside PEFT and torch.compile wrappers.

    Raises:
        ValueError: there is none.
    """
    inner = getattr(model, "_orig_mod", model)
    base = getattr(inner, "get_base_model", None)
    inner = inner if base is None else base()
    if not isinstance(inner, PreTrainedModel):
        raise ValueError(
            f"model must be a transformers PreTrainedModel, got {type(model).__name__}"
        )
    return inner


def _check_kind(model: PreTrainedModel) -> None:
    """Refuse what is not a causal language model with a KV cache, before anything of it runs."""
    encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
    if (
        encoder_decoder
        or "past_key_values" not in inspect.signature(type(model).forward).parameters
    ):
        kind = "an encoder-decoder" if encoder_decoder else "whose forward takes no past_key_values"
        raise ValueError(
            f"model must be a causal language model with a KV cache, got {type(model).__name__}, {kind}"
        )


def _probe(model: PreTrainedModel, policy: HeadPolicy, impl: str) -> None:
    """Run the contract check under an all-retrieval version of the policy, on a model that is put back afterwards."""
    everything = policy.with_retrieval([range(layer.num_kv_heads) for layer in policy.layers])
    lossless = HeadPolicy(
        everything.layers, sink=0, recent=1, shapes=policy.shapes, native_dtype=policy.native_dtype
    )

    @contextmanager
    def installed() -> Iterator[None]:
        _install(model, lossless, impl)
        try:
            yield
        finally:
            disable(model)

    probe(model, lossless, installed)


def _install(model: PreTrainedModel, policy: HeadPolicy, impl: str) -> None:
    planned = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and module.layer_idx < len(policy.layers)
    ]
    configs = [(module, module.config) for module in model.modules() if "config" in vars(module)]
    _copy_configs(model, configs)
    for module in planned:
        if "config" in vars(module):
            module.config._attn_implementation_internal = NAME
        setattr(module, PLAN, LayerPlan(policy, int(module.layer_idx), impl))
    hook = model.register_forward_pre_hook(_cache_hook(model, policy), with_kwargs=True)
    model._prepare_cache_for_generation = types.MethodType(  # type: ignore[method-assign]
        _prepare_cache(type(model)._prepare_cache_for_generation, policy), model
    )
    _installed[model] = _Installed(policy, configs, planned, hook)


def _copy_configs(model: PreTrainedModel, configs: list[tuple[nn.Module, Any]]) -> None:
    """Give the modules private configs, equal in every way but the attention's name; shared ones stay shared."""
    memo: dict[int, Any] = {}
    for module, config in configs:
        module.config = copy.deepcopy(config, memo)
    text_config(model)._attn_implementation_internal = NAME


def _cache_hook(model: PreTrainedModel, policy: HeadPolicy) -> Callable[..., Any]:
    """A pre-forward hook that makes the cache of a bare forward and refuses caches that would give wrong tokens."""
    place = list(inspect.signature(type(model).forward).parameters).index("past_key_values") - 1
    config = text_config(model)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            return None
        given = args[place] if len(args) > place else kwargs.get("past_key_values")
        if isinstance(given, StaticCache):
            raise ValueError(
                "a StaticCache of transformers gives wrong tokens under a policy; "
                "pass past_key_values=DuoCache(policy, model, max_length=...)"
            )
        use_cache = kwargs.get("use_cache")
        wanted = getattr(config, "use_cache", False) if use_cache is None else use_cache
        if given is None and wanted and not module.training and len(args) <= place:
            return args, {**kwargs, "past_key_values": DuoCache(policy, model), "use_cache": True}
        return None

    return hook


def _prepare_cache(original: Callable[..., Any], policy: HeadPolicy) -> Callable[..., Any]:
    """The instance method with which `generate` gets a `DuoCache` where it would make a cache of its own."""

    def prepare(
        self: PreTrainedModel,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        given = model_kwargs.get("past_key_values")
        kind = generation_config.cache_implementation
        if given is None and generation_config.use_cache is not False:
            if kind not in (None, "dynamic", *STATIC_CACHES) or (kind or "").startswith(
                "offloaded"
            ):
                raise ValueError(
                    f"cache_implementation must be 'dynamic' or 'static' under a policy, got {kind!r}; storage precision "
                    f"is the policy's retrieval_dtype and streaming_dtype"
                )
            cache = DuoCache(
                policy, self, max_length=max_cache_length if kind in STATIC_CACHES else None
            )
            if generation_config.is_assistant:
                cache.activate_past_recording()
            model_kwargs["past_key_values"] = cache
            return None
        if isinstance(given, DuoCache):
            _check_fit(given, policy, max_cache_length)
        elif isinstance(given, StaticCache):
            raise ValueError(
                "a StaticCache of transformers gives wrong tokens under a policy; "
                "pass past_key_values=DuoCache(policy, model, max_length=...)"
            )
        elif isinstance(given, Cache) and any(
            getattr(layer, "is_sliding", False) for layer in given.layers
        ):
            raise ValueError(
                "a cache that drops tokens of native windows cannot be used under a policy; "
                "pass past_key_values=DuoCache(policy, model), or none and let duohead make it"
            )
        return original(
            self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    return prepare


def _check_fit(cache: DuoCache, policy: HeadPolicy, tokens: int) -> None:
    if cache.policy != policy:
        raise ValueError(
            "the DuoCache was made for another policy than the one on the model; make it with the policy that "
            "duo(model, policy) yields"
        )
    if cache.max_length is not None and cache.max_length < tokens:
        raise ValueError(
            f"max_length of this static cache is {cache.max_length} tokens but {tokens} are needed; "
            f"make it with DuoCache(..., max_length={tokens}) or ask for fewer new tokens"
        )

"""Putting a policy on a transformers model and taking it off again: `duo`, `enable`, `disable`.

Nothing of the model is copied or patched by class: its modules get a private copy of their config
that names our attention function, a plan each, one pre-forward hook, and one instance method that
makes the cache for `generate`. All of it is undone exactly, and two models with two policies do not
know of each other.
"""

from __future__ import annotations

import copy
import inspect
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, StaticCache

from duohead.attention import check_impl
from duohead.cache import DuoCache
from duohead.models.hooks import NAME, PLAN, LayerPlan
from duohead.models.probe import probe
from duohead.models.tensor_parallel import own_heads
from duohead.policy import HeadPolicy
from duohead.shapes import text_config

STATE = "_duohead_state"
STATIC_CACHES = ("static", "hybrid", "sliding_window", "hybrid_chunked")


@dataclass
class _Installed:
    """What has to be undone on one model."""

    policy: HeadPolicy
    configs: list[tuple[nn.Module, Any]]
    planned: list[nn.Module]
    hook: torch.utils.hooks.RemovableHandle


_probed: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@contextmanager
def duo(
    model: Any, policy: HeadPolicy, *, impl: str = "auto", probe: bool = True
) -> Iterator[HeadPolicy]:
    """Run ``model`` under ``policy`` inside the block; on leaving, the model is exactly as it was.

    Args:
        model: a transformers causal language model (a PEFT or torch.compile wrapper of one is fine).
        policy: which heads keep what. Under tensor parallelism it speaks of the whole model, the same in every process.
        impl: attention implementation, one of `duohead.attention.IMPLEMENTATIONS`.
        probe: check once per model, on a handful of tokens, that it keeps transformers' attention contract.

    Yields:
        The policy bound to the model: geometry, native windows and dtype filled in. Under tensor parallelism it holds
        the heads of this process alone, and so do its ``kv_bytes`` and those of caches.

    Raises:
        ValueError: the policy does not fit, the model breaks the contract, or its processes do not share KV heads
            evenly; the message says which part.
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
    if STATE in vars(target):
        raise ValueError("this model has a policy already; call duohead.disable(model) first")
    _check_kind(target)
    bound = own_heads(target, policy.bind(target))
    if not any(layer.num_kv_heads for layer in bound.layers):
        raise ValueError(
            f"{type(target).__name__} has no layer with KV heads, so a policy has nothing to do"
        )
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
    if STATE not in vars(target):
        raise ValueError("this model has no policy; nothing to disable")
    state: _Installed = vars(target).pop(STATE)
    state.hook.remove()
    target.__dict__.pop("_prepare_cache_for_generation", None)
    for module in state.planned:
        delattr(module, PLAN)
    _put_back(state.configs)


def policy_of(model: Any) -> HeadPolicy | None:
    """The bound policy that is on ``model`` now, or None."""
    state: _Installed | None = vars(unwrap(model)).get(STATE)
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
    lossless = replace(everything, retrieval_dtype="auto", window_dtype="auto", visibility="token")

    @contextmanager
    def eager() -> Iterator[None]:
        configs = _private_configs(model, "eager")
        try:
            yield
        finally:
            _put_back(configs)

    @contextmanager
    def installed() -> Iterator[None]:
        _install(model, lossless, impl)
        try:
            yield
        finally:
            disable(model)

    probe(model, lossless, eager, installed)


def _install(model: PreTrainedModel, policy: HeadPolicy, impl: str) -> None:
    planned = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and module.layer_idx < len(policy.layers)
    ]
    configs = _private_configs(model, NAME)
    for module in planned:
        setattr(module, PLAN, LayerPlan(policy, int(module.layer_idx), impl))
    hook = model.register_forward_pre_hook(_cache_hook(model, policy), with_kwargs=True)
    model._prepare_cache_for_generation = types.MethodType(
        _prepare_cache(type(model)._prepare_cache_for_generation, policy), model
    )
    # On the model rather than in a table here: what is installed refers to the model and would keep it alive.
    vars(model)[STATE] = _Installed(policy, configs, planned, hook)


def _private_configs(model: PreTrainedModel, attention: str) -> list[tuple[nn.Module, Any]]:
    """Give the modules private configs, equal in every way but the attention's name; returns the ones they had.

    Modules that shared a config share its copy.
    """
    configs = [(module, module.config) for module in model.modules() if "config" in vars(module)]
    memo: dict[int, Any] = {}
    for module, config in configs:
        module.config = copy.deepcopy(config, memo)
        if isinstance(getattr(module, "layer_idx", None), int):
            module.config._attn_implementation_internal = attention
    text_config(model)._attn_implementation_internal = attention
    return configs


def _put_back(configs: list[tuple[nn.Module, Any]]) -> None:
    for module, config in configs:
        module.config = config


def _cache_hook(model: PreTrainedModel, policy: HeadPolicy) -> Callable[..., Any]:
    """A pre-forward hook that makes the cache of a bare forward and refuses caches that would give wrong tokens."""
    place = list(inspect.signature(type(model).forward).parameters).index("past_key_values") - 1
    config = text_config(model)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            return None
        given = args[place] if len(args) > place else kwargs.get("past_key_values")
        if given is not None:
            _check_cache(given, policy)
            _check_unpacked(kwargs)
            return None
        use_cache = kwargs.get("use_cache")
        wanted = getattr(config, "use_cache", False) if use_cache is None else use_cache
        if wanted and not module.training and len(args) <= place:
            _check_unpacked(kwargs)
            return args, {**kwargs, "past_key_values": DuoCache(policy, model), "use_cache": True}
        return None

    return hook


def _check_cache(cache: Any, policy: HeadPolicy) -> None:
    """Refuse caches that would give wrong tokens without an error."""
    if isinstance(cache, StaticCache):
        raise ValueError(
            "a StaticCache of transformers gives wrong tokens under a policy; "
            "pass past_key_values=DuoCache(policy, model, max_length=...)"
        )
    if isinstance(cache, DuoCache) and cache.policy != policy:
        raise ValueError(
            "the DuoCache was made for another policy than the one on the model; make it with the policy that "
            "duo(model, policy) yields"
        )


def _check_unpacked(kwargs: dict[str, Any]) -> None:
    """Refuse several texts in one row: beside a cache, transformers' masks do not look for them."""
    places = kwargs.get("position_ids")
    if kwargs.get("attention_mask") is not None or places is None or places.ndim != 2:
        return
    if places.shape[1] == 1:
        return
    if bool((places.diff() != 1).any()):
        raise ValueError(
            "position_ids must count up by one within a row, got packed sequences (positions that restart); "
            "pass one sequence a row"
        )


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
            if kind not in (None, "dynamic", *STATIC_CACHES):
                raise ValueError(
                    f"cache_implementation must be 'dynamic' or 'static' under a policy, got {kind!r}; storage "
                    f"precision is the policy's retrieval_dtype and streaming_dtype"
                )
            room = max(max_cache_length, getattr(generation_config, "max_cache_len", None) or 0)
            cache = DuoCache(policy, self, max_length=room if kind in STATIC_CACHES else None)
            if kind in STATIC_CACHES and generation_config.prefill_chunk_size is not None:
                # transformers compiles a chunked prefill, which must not create the stores inside a graph.
                copies = max(generation_config.num_beams, generation_config.num_return_sequences)
                _allocate(cache, self, batch_size * copies, model_kwargs.get("attention_mask"))
            if generation_config.is_assistant:
                cache.activate_past_recording()
            model_kwargs["past_key_values"] = cache
            return None
        if given is not None:
            _check_cache(given, policy)
        if isinstance(given, DuoCache):
            _check_fit(given, max_cache_length)
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


def _allocate(cache: DuoCache, model: PreTrainedModel, rows: int, mask: Tensor | None) -> None:
    if len(set(getattr(model, "hf_device_map", {}).values())) <= 1:
        padded = mask is not None and not bool(mask.all())
        cache.allocate(rows, dtype=model.dtype, device=model.device, padded=padded)


def _check_fit(cache: DuoCache, tokens: int) -> None:
    if cache.max_length is not None and cache.max_length < tokens:
        raise ValueError(
            f"max_length of this static cache is {cache.max_length} tokens but {tokens} are needed; "
            f"make it with DuoCache(..., max_length={tokens}) or ask for fewer new tokens"
        )

"""`DuoCache`: a transformers cache in which each head keeps what its policy says, and nothing more.

It is a `transformers.Cache` like any other (generate, beams, crop, reset), in a growing form and in a static form with
fixed addresses for compiled graphs. Layers without KV heads (linear attention, convolution) keep their usual cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from duohead.cache.handle import DuoHandle
from duohead.cache.layer import DUO_KV_OFFSET, DuoLayer
from duohead.cache.view import HeadView, Piece, Segment, StoredView, pick_heads
from duohead.policy import HeadPolicy
from duohead.shapes import text_config
from duohead.storage import is_int

__all__ = [
    "DUO_KV_OFFSET",
    "DuoCache",
    "DuoHandle",
    "DuoLayer",
    "HeadView",
    "Piece",
    "Segment",
    "StoredView",
    "pick_heads",
]


class DuoCache(Cache):
    """The KV cache of one batch under a policy.

    Args:
        policy: a `HeadPolicy`; bound to ``model`` if it is not yet bound.
        model: the transformers model, or its config; needed unless the policy is bound and every layer has KV heads.
        max_length: None to grow with the text, else the number of tokens to allocate for (static form: fixed addresses,
            ready for torch.compile and CUDA graphs; longer texts are an error).
        rollback: tokens that `crop` can undo once streaming heads have evicted. Speculative decoding of a growing cache
            sets it by itself (to 128).

    Raises:
        ValueError: the policy does not fit the model, or a number is out of range.
    """

    def __init__(
        self,
        policy: HeadPolicy,
        model: Any = None,
        *,
        max_length: int | None = None,
        rollback: int = 0,
    ) -> None:
        if max_length is not None and (not is_int(max_length) or max_length < 1):
            raise ValueError(
                f"max_length must be an integer >= 1 (tokens), or None for a cache that grows, got {max_length!r}"
            )
        if not is_int(rollback) or rollback < 0:
            raise ValueError(f"rollback must be an integer >= 0 (tokens), got {rollback!r}")
        if model is not None:
            policy = policy.bind(model, dtype=policy.native_dtype)
        self.policy = policy
        self.max_length = max_length
        layers = [
            DuoLayer(policy, index, max_length=max_length, rollback=rollback)
            if layer.num_kv_heads
            else None
            for index, layer in enumerate(policy.layers)
        ]
        if None in layers:
            layers = [
                ours or theirs
                for ours, theirs in zip(layers, _native_layers(model, max_length), strict=True)
            ]
        super().__init__(layers=layers)

    @property
    def duo_layers(self) -> list[DuoLayer]:
        """The layers that this policy governs."""
        return [layer for layer in self.layers if isinstance(layer, DuoLayer)]

    def allocate(
        self, rows: int, *, dtype: torch.dtype, device: torch.device | str, padded: bool = False
    ) -> None:
        """Create the stores now instead of at the first tokens, so that a compiled prefill finds fixed addresses.

        Args:
            rows: batch size.
            dtype: the dtype the model computes in.
            device: where the cache lives, all layers of it.
            padded: whether some rows will have left padding.

        Raises:
            ValueError: the policy is not bound to a model, so that head sizes are unknown.
        """
        if not self.policy.shapes:
            raise ValueError(
                "allocate needs the head sizes of a model; make the cache with DuoCache(policy, model)"
            )
        for layer in self.duo_layers:
            shape = self.policy.shapes[layer.index]
            layer.allocate(
                torch.empty(
                    rows, shape.num_kv_heads, 0, shape.head_dim, dtype=dtype, device=device
                ),
                torch.empty(
                    rows, shape.num_kv_heads, 0, shape.value_dim, dtype=dtype, device=device
                ),
                padded=padded,
            )

    @contextmanager
    def counted(self, length: int) -> Iterator[None]:
        """Inside, for one forward, the host knows that ``length`` tokens came before, so that nothing waits for it.

        Of one forward alone, since compiled code and replayed graphs count where the host does not see it.
        """
        try:
            for layer in self.duo_layers:
                layer.counted = length
            yield
        finally:
            for layer in self.duo_layers:
                layer.counted = None

    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values, scales included; what `HeadPolicy.kv_bytes` predicts."""
        return sum(layer.kv_bytes() for layer in self.duo_layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far, padding included, of the first attention layer at or after ``layer_idx``."""
        for layer in self.layers[layer_idx:]:
            if isinstance(layer, DuoLayer):
                return layer.get_seq_length()
        return super().get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Key length, and the offset that marks this cache for our mask function."""
        for layer in self.layers[layer_idx:] + self.layers[:layer_idx]:
            if isinstance(layer, DuoLayer):
                return layer.get_mask_sizes(query_length)
        return super().get_mask_sizes(query_length, layer_idx)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Tokens that fit, or -1 for a cache that grows."""
        return -1 if self.max_length is None else self.max_length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of every layer (a negative number of them), or of none if one layer cannot.

        Raises:
            ValueError: a positive number, more tokens than there are, or one that needs evicted tokens back.
        """
        for layer in self.duo_layers:
            layer.check_crop(tokens_to_remove)
        for layer in sorted(self.layers, key=lambda layer: isinstance(layer, DuoLayer)):
            layer.crop(tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times in a row."""
        rows = next((layer.batch_size for layer in self.duo_layers if layer.is_initialized), None)
        if rows is not None:
            self.batch_select_indices(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` (integers, or a boolean mask of rows), in that order."""
        index = torch.as_tensor(indices)
        index = index.nonzero()[:, 0] if index.dtype == torch.bool else index
        for layer in self.layers:
            # transformers' layers without KV heads know this name alone.
            layer.reorder_cache(index)

    def activate_past_recording(self) -> None:
        """Prepare every layer for exact crops; layers of transformers' own do it their way."""
        for layer in self.layers:
            activate = getattr(layer, "activate_past_recording", None)
            if activate is not None:
                activate()

    def __repr__(self) -> str:
        form = "growing" if self.max_length is None else f"static, {self.max_length} tokens"
        return (
            f"DuoCache({form}, {len(self.layers)} layers, retrieval ratio {self.policy.retrieval_ratio:.2f}, "
            f"{self.kv_bytes()} bytes)"
        )


def _native_layers(model: Any, max_length: int | None) -> list[Any]:
    """transformers' own cache layers, for the layers that have no KV heads."""
    if model is None:
        raise ValueError(
            "model is needed for a policy with layers that have no KV heads (linear attention, convolution); "
            "use DuoCache(policy, model)"
        )
    config = text_config(model)
    cache = (
        DynamicCache(config=config)
        if max_length is None
        else StaticCache(config=config, max_cache_len=max_length)
    )
    return list(cache.layers)

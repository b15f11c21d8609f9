"""What to do with each head: its kind, its window and its storage precision, per layer and KV head.

A `HeadPolicy` is frozen, hashable and JSON, so that it can travel with a model, key a compiled graph and be named in a
record by its digest. It predicts the bytes of the cache that `duohead.cache` allocates for it, exactly.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

import torch

from duohead import codec
from duohead.shapes import LayerShape, check_window, layer_shapes
from duohead.storage import LayerPolicy, Store, first_saving, is_int

__all__ = ["HeadPolicy", "LayerPolicy"]

Visibility = Literal["token", "chunk"]


@dataclass(frozen=True)
class HeadPolicy:
    """Kinds, windows and precisions of every KV head of a model (see module docstring).

    Attributes:
        layers: one `LayerPolicy` per decoder layer.
        sink: first tokens that a streaming head keeps.
        recent: last tokens that a streaming head sees, the query's own included.
        prefill_recent: the same during prefill (calls with more than one new token); None means ``recent``. A larger
            value also enlarges what a streaming head stores, since a later chunk must see as far back.
        retrieval_dtype, streaming_dtype, window_dtype: storage of retrieval heads, of streaming heads, and of the
            retrieval heads of natively windowed layers, which keep their window: "auto" (the model's dtype) or a
            format of `duohead.codec` ("bf16", "fp8", "int8", "int4", …), or two as "KEYS/VALUES", such as "fp8/int4".
        evict: False lets streaming heads keep and see every token, stored as ``streaming_dtype``: a lower precision
            instead of a shorter memory. ``sink`` and ``recent`` then have no say; native windows stay as they are.
        visibility: "token" (exact), or "chunk" for the reference code's rule, to reproduce published numbers only.
        shapes: geometry of the model the policy was bound to; empty before `bind`.
        native_dtype: the bound model's dtype, what "auto" stands for; None before `bind`.

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    layers: tuple[LayerPolicy, ...]
    sink: int = 64
    recent: int = 256
    prefill_recent: int | None = None
    retrieval_dtype: str = "auto"
    streaming_dtype: str = "auto"
    window_dtype: str = "auto"
    visibility: Visibility = "token"
    evict: bool = True
    shapes: tuple[LayerShape, ...] = ()
    native_dtype: str | None = None

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError(
                "layers must name at least one layer, got none; pass one list of heads per layer"
            )
        if not is_int(self.sink) or self.sink < 0:
            raise ValueError(f"sink must be an integer >= 0, got {self.sink!r}")
        if not is_int(self.recent) or self.recent < 1:
            raise ValueError(
                f"recent must be an integer >= 1 (the query's own token counts), got {self.recent!r}; "
                f"a head that must see everything is a retrieval head"
            )
        prefill = self.prefill_recent
        if prefill is not None and (not is_int(prefill) or prefill < self.recent):
            raise ValueError(
                f"prefill_recent must be an integer >= recent ({self.recent}), got {prefill!r}"
            )
        for field in ("sink", "recent", "prefill_recent"):
            check_window(field, getattr(self, field) or 0)
        if self.visibility not in ("token", "chunk"):
            raise ValueError(f"visibility must be 'token' or 'chunk', got {self.visibility!r}")
        for field in ("retrieval_dtype", "streaming_dtype", "window_dtype"):
            # One spelling of each, so that equal policies are equal.
            object.__setattr__(self, field, codec.normal(getattr(self, field), field=field))
        self._check_evict()

    def _check_evict(self) -> None:
        if not isinstance(self.evict, bool):
            raise ValueError(f"evict must be True or False, got {self.evict!r}")
        if self.evict:
            return
        if self.prefill_recent is not None:
            raise ValueError(
                f"prefill_recent must be None with evict=False, whose streaming heads see every token in a prompt "
                f"too, got {self.prefill_recent}; leave one of the two out"
            )
        if self.visibility != "token":
            raise ValueError(
                f"visibility must be 'token' with evict=False, since it says what streaming heads lose, got "
                f"{self.visibility!r}; leave one of the two out"
            )

    @classmethod
    def from_heads(
        cls,
        *,
        retrieval: Sequence[Sequence[int]],
        num_kv_heads: int | Sequence[int],
        sink: int = 64,
        recent: int = 256,
        windows: Sequence[int | None] | None = None,
        **fields: Any,
    ) -> Self:
        """A policy from explicit retrieval heads.

        Args:
            retrieval: for each layer the KV heads that keep every token; the others stream.
            num_kv_heads: KV heads of every layer, or one number per layer (0: no KV cache).
            sink: see the class.
            recent: see the class.
            windows: native sliding window per layer; None is filled in from the model when the policy is bound.
            fields: any other field of the class.
        """
        count = len(retrieval)
        heads = [num_kv_heads] * count if isinstance(num_kv_heads, int) else list(num_kv_heads)
        native = [None] * count if windows is None else list(windows)
        if not len(heads) == len(native) == count:
            raise ValueError(
                f"num_kv_heads and windows must have one entry per layer of retrieval ({count}), "
                f"got {len(heads)} and {len(native)}"
            )
        layers = tuple(
            LayerPolicy(heads[index], _ascending(retrieval[index]), native[index])
            for index in range(count)
        )
        return cls(layers=layers, sink=sink, recent=recent, **fields)

    @property
    def window_tokens(self) -> int:
        """Recent tokens that a streaming head has to store."""
        return max(self.recent, self.prefill_recent or 0)

    @property
    def retrieval_ratio(self) -> float:
        """Share of retrieval heads among the KV heads of gated layers; 1.0 if there are none."""
        gated = [layer for layer in self.layers if layer.gated]
        total = sum(layer.num_kv_heads for layer in gated)
        return sum(len(layer.retrieval) for layer in gated) / total if total else 1.0

    def bind(self, model_or_config: Any, *, dtype: torch.dtype | str | None = None) -> Self:
        """The same policy with the geometry of a model filled in.

        Args:
            model_or_config: a transformers model or config.
            dtype: the dtype the model computes in; by default the model's own (bfloat16 if only a config is given
                that names none).

        Raises:
            ValueError: the policy has other layers, KV heads or native windows than the model (None leaves a layer's
                window to the model).
        """
        shapes = layer_shapes(model_or_config)
        found, expected = len(self.layers), len(shapes)
        if found != expected:
            raise ValueError(
                f"policy has {found} layers but the model has {expected}; "
                f"use a policy or pattern that was made for this model"
            )
        for index, (layer, shape) in enumerate(zip(self.layers, shapes, strict=True)):
            if shape.num_kv_heads and layer.num_kv_heads != shape.num_kv_heads:
                raise ValueError(
                    f"policy has {layer.num_kv_heads} KV heads in layer {index} but the model has "
                    f"{shape.num_kv_heads}; use a policy or pattern that was made for this model"
                )
            if shape.num_kv_heads and layer.window not in (None, shape.window):
                theirs = "none" if shape.window is None else f"one of {shape.window} tokens"
                raise ValueError(
                    f"policy has a native window of {layer.window} tokens in layer {index} but the model has {theirs}; "
                    f"leave windows out to take the model's, or use a policy that was made for this model"
                )
        layers = tuple(
            LayerPolicy(
                shape.num_kv_heads, layer.retrieval if shape.num_kv_heads else (), shape.window
            )
            for layer, shape in zip(self.layers, shapes, strict=True)
        )
        native = (
            dtype
            if dtype is not None
            else getattr(model_or_config, "dtype", None) or torch.bfloat16
        )
        name = str(codec.parse_dtype(native)).removeprefix("torch.")
        return replace(self, layers=layers, shapes=shapes, native_dtype=name)

    def with_retrieval(self, retrieval: Sequence[Sequence[int]]) -> Self:
        """The same policy with other retrieval heads (one sequence of KV heads per layer)."""
        if len(retrieval) != len(self.layers):
            raise ValueError(
                f"retrieval must have one entry per layer ({len(self.layers)}), got {len(retrieval)}"
            )
        layers = tuple(
            replace(layer, retrieval=_ascending(heads))
            for layer, heads in zip(self.layers, retrieval, strict=True)
        )
        return replace(self, layers=layers)

    def stores(self, index: int) -> Iterator[Store]:
        """What layer ``index`` has to store, one entry per kind of head that occurs in it."""
        layer = self.layers[index]
        if layer.retrieval:
            dtype = self.retrieval_dtype if layer.window is None else self.window_dtype
            yield Store("retrieval", layer.retrieval, dtype, 0, layer.window, sees_all=True)
        # Where `recent` covers the native window, that is all they see: sinks leave it like any other token.
        evicts = self.evict and (layer.window is None or layer.window > self.recent)
        if layer.streaming and evicts:
            ring = min(self.window_tokens, layer.window or self.window_tokens)
            yield Store(
                "streaming", layer.streaming, self.streaming_dtype, self.sink, ring, sees_all=False
            )
        elif layer.streaming:
            yield Store(
                "streaming", layer.streaming, self.streaming_dtype, 0, layer.window, sees_all=True
            )

    def kv_bytes(
        self,
        tokens: int,
        batch: int = 1,
        *,
        head_dim: int | None = None,
        dtype: torch.dtype | str | None = None,
        rollback: int = 0,
    ) -> int:
        """Bytes that the KV cache of ``tokens`` tokens allocates, for every layer and row.

        Args:
            tokens: length in tokens, padding included; for a static cache its ``max_length``.
            batch: rows.
            head_dim: head size; needed unless the policy is bound to a model.
            dtype: what "auto" storage means; by default the bound model's dtype, else bfloat16.
            rollback: extra tokens that streaming heads keep so that `crop` can undo (see `DuoCache`).
        """
        _check_size(tokens, batch, rollback)
        total = 0
        for index, (key_dim, value_dim) in enumerate(self._dims(head_dim)):
            for store in self.stores(index):
                token = codec.pair(store.dtype, native=self._native(dtype)).vector_bytes(
                    key_dim, value_dim
                )
                total += len(store.heads) * store.slots(tokens, rollback=rollback) * token
        return total * batch

    def dense_kv_bytes(
        self,
        tokens: int,
        batch: int = 1,
        *,
        head_dim: int | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> int:
        """Bytes of the cache without duohead: every head keeps every token (its window, where native) in ``dtype``."""
        _check_size(tokens, batch)
        itemsize = self._native(dtype).itemsize
        total = 0
        for layer, (key_dim, value_dim) in zip(self.layers, self._dims(head_dim), strict=True):
            kept = tokens if layer.window is None else min(tokens, max(layer.window - 1, 1))
            total += layer.num_kv_heads * kept * (key_dim + value_dim) * itemsize
        return total * batch

    def saves_from(
        self,
        *,
        head_dim: int | None = None,
        dtype: torch.dtype | str | None = None,
        rollback: int = 0,
        up_to: int | None = None,
    ) -> int | None:
        """The smallest length in tokens from which on the cache is smaller than the model's own, at every longer one.

        The model's own is `dense_kv_bytes`, native windows respected, in the model's dtype; ours is `kv_bytes`. One row
        stands for any number of them, and a growing cache for a static one of that ``max_length``.

        Args:
            head_dim, dtype, rollback: as in `kv_bytes`.
            up_to: longest text that counts; None for any, however long.

        Returns:
            The length, or None if there is none, as where every head keeps every token as it is.

        Raises:
            ValueError: ``up_to`` or ``head_dim`` below 1, ``rollback`` below 0, or no head size.
        """
        if up_to is not None and (not is_int(up_to) or up_to < 1):
            raise ValueError(f"up_to must be None or an integer >= 1 (tokens), got {up_to!r}")

        def saving(tokens: int) -> int:
            dense = self.dense_kv_bytes(tokens, head_dim=head_dim, dtype=dtype)
            return dense - self.kv_bytes(tokens, head_dim=head_dim, dtype=dtype, rollback=rollback)

        level = max([self.sink + self.window_tokens, *(layer.window or 0 for layer in self.layers)])
        return first_saving(saving, level=level + rollback, up_to=up_to)

    def _dims(self, head_dim: int | None) -> list[tuple[int, int]]:
        if head_dim is not None:
            if not is_int(head_dim) or head_dim < 1:
                raise ValueError(f"head_dim must be None or an integer >= 1, got {head_dim!r}")
            return [(head_dim, head_dim)] * len(self.layers)
        if not self.shapes:
            raise ValueError(
                "head_dim is needed for a policy that is not bound to a model; pass head_dim= or bind(model)"
            )
        return [(shape.head_dim, shape.value_dim) for shape in self.shapes]

    def _native(self, dtype: torch.dtype | str | None) -> torch.dtype:
        return codec.parse_dtype(dtype or self.native_dtype or torch.bfloat16)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description; `from_dict` reads it back. ``evict`` is named where it is False alone."""
        fields = asdict(self)
        if self.evict:
            # Digests of policies are older than this field, and name them in records.
            del fields["evict"]
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`; unknown fields are an error."""
        unknown = set(fields) - set(cls.__dataclass_fields__)
        if unknown:
            raise ValueError(
                f"policy has unknown fields {sorted(unknown)}; known are {sorted(cls.__dataclass_fields__)}"
            )
        if "layers" not in fields:
            raise ValueError("policy has no field 'layers'; pass what to_dict or to_json gave")
        layers = _parts(LayerPolicy, "layers", fields["layers"])
        shapes = _parts(LayerShape, "shapes", fields.get("shapes", ()))
        return cls(**{**fields, "layers": layers, "shapes": shapes})

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    def digest(self) -> str:
        """Twelve hex digits that name the policy in records (SHA-256 of `to_json`)."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]


def _ascending(heads: Sequence[int]) -> tuple[int, ...]:
    """KV heads in order, NumPy integers as plain ones."""
    try:
        return tuple(sorted(operator.index(head) for head in heads))
    except TypeError:
        raise ValueError(
            f"retrieval must list the KV heads of a layer as integers, got {heads!r}"
        ) from None


def _parts(kind: type[Any], name: str, listed: Any) -> tuple[Any, ...]:
    """Layers or shapes from their JSON form."""
    known = sorted(kind.__dataclass_fields__)
    if not isinstance(listed, Sequence) or isinstance(listed, str):
        raise ValueError(
            f"{name} must be a list, got {listed!r}; pass what to_dict or to_json gave"
        )
    for fields in listed:
        if not isinstance(fields, Mapping) or sorted(fields) != known:
            raise ValueError(
                f"{name} must list entries with the fields {known}, got {fields!r}; pass what to_dict or to_json gave"
            )
    return tuple(
        kind(**{key: tuple(x) if isinstance(x, list) else x for key, x in fields.items()})
        for fields in listed
    )


def _check_size(tokens: int, batch: int, rollback: int = 0) -> None:
    if not is_int(tokens) or tokens < 0:
        raise ValueError(f"tokens must be an integer >= 0, got {tokens!r}")
    if not is_int(rollback) or rollback < 0:
        raise ValueError(f"rollback must be an integer >= 0 (tokens), got {rollback!r}")
    if not is_int(batch) or batch < 1:
        raise ValueError(f"batch must be an integer >= 1 (rows), got {batch!r}")

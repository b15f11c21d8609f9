"""What identification found: one alpha per KV head of one model, and where it came from.

Alphas outlive any use of them, so they are kept apart from the policy that says what to do with each head, and stored
with what is needed to check that they belong to the model at hand. Use `HeadPattern.load(folder)`, then
`pattern.policy(retrieval_ratio=0.5)`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from duohead import files, formats
from duohead.fingerprint import check, fingerprint, whole
from duohead.selection import Heads, rank_heads, select_heads
from duohead.shapes import LayerShape, check_window, layer_shapes, text_config
from duohead.storage import is_int

if TYPE_CHECKING:
    from duohead.policy import HeadPolicy


@dataclass(frozen=True, eq=False)
class HeadPattern:
    """Alphas of one model, and where they came from.

    Attributes:
        alpha: float32 [layers, kv_heads] in [0, 1], read-only; a row of NaN marks a layer that is not gated.
        sink, recent: window of the streaming heads during identification, and what `policy` takes unless told.
        base_model, base_revision: name or path of the model, and its commit.
        base_type: the model's ``model_type``; a model of another type is refused.
        windows: native sliding window per layer, None where attention is global.
        kv_heads: KV heads per layer, 0 where there is no KV cache; None means ``alpha.shape[1]`` everywhere. Entries of
            alpha beyond a layer's count are NaN.
        selection: keyword arguments of `policy` that the maker recommends; nothing applies them by itself.
        training: how alpha was made (JSON).
        raw_alpha: the gates as another tool trained them, for every layer and unclipped, shaped like ``alpha``; nothing
            is chosen by them. None for patterns of our own making.
        fingerprint: float32 [layers, kv_heads, numbers], what the model's heads make of fixed tokens
            (`duohead.fingerprint`), by which `validate` tells other weights of the same shape; None where it is not
            known, as in patterns of other tools.

    Raises:
        ValueError: a field breaks these rules; the message names it.
    """

    alpha: NDArray[np.float32]
    sink: int = 128
    recent: int = 256
    base_model: str | None = None
    base_revision: str | None = None
    base_type: str | None = None
    windows: tuple[int | None, ...] | None = None
    kv_heads: tuple[int, ...] | None = None
    selection: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    raw_alpha: NDArray[np.float32] | None = None
    fingerprint: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        for name in formats.ARRAYS:
            if getattr(self, name) is not None:
                array = np.array(getattr(self, name), dtype=np.float32)
                array.flags.writeable = False
                object.__setattr__(self, name, array)
        alpha, raw = self.alpha, self.raw_alpha
        for name in ("windows", "kv_heads"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))
        _check_integer("sink", self.sink, minimum=0)
        _check_integer("recent", self.recent, minimum=1)
        check_window("sink", self.sink)
        check_window("recent", self.recent)
        if alpha.ndim != 2 or 0 in alpha.shape:
            raise ValueError(f"alpha must have shape (layers, kv_heads), got {alpha.shape}")
        _check_alpha(alpha)
        self._check_layers()
        if raw is not None and (raw.shape != alpha.shape or not np.isfinite(raw).all()):
            raise ValueError(
                f"raw_alpha must hold a finite gate for every entry of alpha {alpha.shape}, got shape {raw.shape} with "
                f"{int((~np.isfinite(raw)).sum())} that are not finite; leave it out if there is none"
            )
        taken = self.fingerprint
        if taken is not None and (taken.ndim != 3 or len(taken) != len(alpha)):
            raise ValueError(
                f"fingerprint must have shape (layers, kv_heads, numbers) with {len(alpha)} layers as alpha has, got "
                f"{taken.shape}; leave it out if there is none"
            )

    @classmethod
    def from_alpha(cls, alpha: Any, *, model: Any = None, **fields: Any) -> Self:
        """A pattern from a matrix of alphas.

        Args:
            alpha: (layers, kv_heads), an array, a tensor or nested lists; NaN means not gated.
            model: a transformers model or config that alpha belongs to: fills in ``base_model``, ``base_type``,
                ``windows`` and ``kv_heads`` and is checked as by `validate`. A model with all its weights in this
                process also gives the ``fingerprint``, which costs a forward of 16 tokens.
            fields: any other field of the class, such as ``sink`` and ``recent``.
        """
        if hasattr(alpha, "detach"):
            alpha = alpha.detach().float().cpu().numpy()
        matrix = _as_matrix(alpha)
        if model is None:
            return cls(matrix, **fields)
        shapes = layer_shapes(model)
        if len(shapes) != len(matrix):
            raise ValueError(f"alpha has {len(matrix)} layers but the model has {len(shapes)}")
        known = {
            "base_model": getattr(getattr(model, "config", model), "_name_or_path", None) or None,
            "base_type": getattr(text_config(model), "model_type", None),
            "windows": tuple(shape.window for shape in shapes),
            "kv_heads": tuple(shape.num_kv_heads for shape in shapes),
        }
        made = cls(matrix, **{**known, **fields}).validate(model)
        unknown = made.fingerprint is None and whole(model)
        return replace(made, fingerprint=fingerprint(model)) if unknown else made

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, revision: str | None = None) -> Self:
        """Read a pattern from a folder (ours, the reference code's or a Laguna adapter's) or from the hub.

        Args:
            path: a folder, or a hub id such as "owner/name" if there is no folder of that name.
            revision: branch, tag or commit on the hub.

        Raises:
            ValueError: missing, damaged or malformed; the message names the file and what to do.
        """
        folder = Path(path)
        local = folder.exists() or not isinstance(path, str) or folder.is_absolute()
        found = folder if local else formats.fetch(str(path), revision)
        stored = formats.read(found)
        try:
            return cls(**stored)
        except ValueError as error:
            raise ValueError(f"{found}: {error}") from error

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json, full_attention_heads.tsv and duohead.safetensors: all of them, or nothing.

        Other files in the folder stay as they are. Reading the folder back gives this pattern, bit for bit.
        """
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        files.write_folder(folder, formats.contents(values))

    @property
    def gated(self) -> NDArray[np.bool_]:
        """Which KV heads are ranked, [layers, kv_heads]."""
        return ~np.isnan(self.alpha)

    def rank(self) -> list[tuple[int, int]]:
        """Gated heads as (layer, KV head), most retrieval-like first; ties go by layer, then head."""
        return rank_heads(self.alpha)

    def ungate(self, layers: Iterable[int]) -> Self:
        """The same pattern with these layers left to their native attention."""
        alpha = self.alpha.copy()
        alpha[list(layers)] = np.nan
        return replace(self, alpha=alpha)

    def validate(self, model_or_config: Any) -> Self:
        """Check that this pattern belongs to a transformers model or config, and return it.

        If the pattern has a fingerprint and this process holds all the weights of a model, one forward of 16 tokens
        also tells other weights of the same shape; casts, quantisation, adapters and fine-tuning pass. A config, a
        model on the meta device or one that several processes share is held against its shape alone.

        Raises:
            ValueError: layer count, KV head count, native windows, model type or weights differ; the message says
                which.
        """
        shapes = layer_shapes(model_or_config)
        if len(shapes) != len(self.alpha):
            raise ValueError(
                f"pattern has {len(self.alpha)} layers but the model has {len(shapes)}; {self._origin()}"
            )
        kind = getattr(text_config(model_or_config), "model_type", None)
        if self.base_type is not None and kind is not None and kind != self.base_type:
            raise ValueError(
                f"pattern is of a {self.base_type!r} model but the model is {kind!r}; {self._origin()}"
            )
        self._validate_heads(shapes)
        self._validate_windows([shape.window for shape in shapes])
        if self.fingerprint is not None and whole(model_or_config):
            check(model_or_config, self.fingerprint, made_for=self.base_model or "an unnamed model")
        return self

    def policy(
        self,
        *,
        retrieval_ratio: float | None = None,
        kv_budget: float | None = None,
        threshold: float | None = None,
        sink: int | None = None,
        recent: int | None = None,
        tokens: int = 32768,
        head_dim: int = 128,
        ranks: int = 1,
        **options: Any,
    ) -> HeadPolicy:
        """What to do with each head. Exactly one of the first three arguments selects the retrieval heads.

        Args:
            retrieval_ratio: share of the gated heads that keep every token, in [0, 1]; exact, rounded half up.
            kv_budget: share of the dense cache's bytes that may be spent on ``tokens`` tokens, in (0, 1].
            threshold: heads with alpha at or above it keep every token.
            sink: first tokens that a streaming head keeps; by default as during identification.
            recent: last tokens that a streaming head keeps; by default as during identification.
            tokens: length in tokens at which ``kv_budget`` counts.
            head_dim: head size with which ``kv_budget`` counts; it matters for quantised storage only.
            ranks: tensor-parallel ranks over which ``retrieval_ratio`` balances.
            options: fields of `HeadPolicy`: ``prefill_recent``, ``retrieval_dtype``, ``streaming_dtype``,
                ``window_dtype``, ``evict``, ``visibility``.

        Raises:
            ValueError: not exactly one selector, or a value out of range.
        """
        from duohead.policy import HeadPolicy

        if tokens < 1:
            raise ValueError(
                f"tokens must be at least 1, got {tokens}; it is the length kv_budget counts at"
            )
        layers, columns = self.alpha.shape
        kv_heads = self.kv_heads or (columns,) * layers

        def build(heads: Heads) -> HeadPolicy:
            return HeadPolicy.from_heads(
                retrieval=[
                    [h for h in row if h < count]
                    for row, count in zip(heads, kv_heads, strict=True)
                ],
                num_kv_heads=kv_heads,
                sink=self.sink if sink is None else sink,
                recent=self.recent if recent is None else recent,
                windows=self.windows,
                **options,
            )

        def budget_share(heads: Heads) -> float:
            chosen = build(heads)
            return chosen.kv_bytes(tokens, head_dim=head_dim) / chosen.dense_kv_bytes(
                tokens, head_dim=head_dim
            )

        heads = select_heads(
            self.alpha,
            retrieval_ratio=retrieval_ratio,
            kv_budget=kv_budget,
            threshold=threshold,
            ranks=ranks,
            budget_share=budget_share,
            evict=options.get("evict", True),
        )
        return build(heads)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HeadPattern):
            return NotImplemented
        return all(
            _same(getattr(self, item.name), getattr(other, item.name)) for item in fields(self)
        )

    def __hash__(self) -> int:
        return hash((self.alpha.tobytes(), self.sink, self.recent, self.base_model))

    def __repr__(self) -> str:
        layers, heads = self.alpha.shape
        return (
            f"HeadPattern({layers} layers x {heads} KV heads, {int(self.gated.sum())} gated, "
            f"sink={self.sink}, recent={self.recent}, base_model={self.base_model!r})"
        )

    def _origin(self) -> str:
        made_for = (
            f"it was made for {self.base_model}"
            if self.base_model
            else "it does not say which model it is of"
        )
        return f"{made_for}; use the pattern of this model, or identify its heads"

    def _check_layers(self) -> None:
        layers, columns = self.alpha.shape
        for name, value in (("windows", self.windows), ("kv_heads", self.kv_heads)):
            if value is not None and len(value) != layers:
                raise ValueError(
                    f"{name} must have one entry per layer of alpha ({layers}), got {len(value)}"
                )
        for window in self.windows or ():
            if window is not None:
                _check_integer("an entry of windows", window, minimum=1)
        for layer, count in enumerate(self.kv_heads or (columns,) * layers):
            _check_integer("an entry of kv_heads", count, minimum=0)
            row = self.gated[layer]
            if row.any() and not (count <= columns and row[:count].all() and not row[count:].any()):
                raise ValueError(
                    f"alpha of layer {layer} must have gates for all of its {count} KV heads or be nan throughout (not "
                    f"gated), got {int(row.sum())} gates in {columns} columns; nan amid gates means training diverged"
                )
        if not self.gated.any():
            raise ValueError(
                "alpha is nan throughout: no layer is gated, so there is no head to choose"
            )

    def _validate_heads(self, shapes: Sequence[LayerShape]) -> None:
        columns = self.alpha.shape[1]
        for layer, shape in enumerate(shapes):
            own = columns if self.kv_heads is None else self.kv_heads[layer]
            unknown = self.kv_heads is None and not self.gated[layer].any()
            if own != shape.num_kv_heads and not (unknown and shape.num_kv_heads in range(columns)):
                raise ValueError(
                    f"pattern has {own} KV heads in layer {layer} but the model has {shape.num_kv_heads}; "
                    f"{self._origin()}"
                )

    def _validate_windows(self, native: Sequence[int | None]) -> None:
        if self.windows is not None and self.windows != tuple(native):
            layer = next(
                i
                for i, (ours, theirs) in enumerate(zip(self.windows, native, strict=True))
                if ours != theirs
            )
            raise ValueError(
                f"pattern was made with native window {self.windows[layer]} in layer {layer} but the model has "
                f"{native[layer]}; {self._origin()}"
            )
        wrong = [i for i, window in enumerate(native) if window is not None and self.gated[i].any()]
        if wrong:
            raise ValueError(
                f"pattern gates layers {wrong}, which in the model have a native sliding window "
                f"({native[wrong[0]]} tokens in layer {wrong[0]}) and so are not ranked; "
                f"leave them to it with pattern.ungate({wrong})"
            )


def _same(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, np.ndarray) or isinstance(theirs, np.ndarray):
        both = mine is not None and theirs is not None
        return both and np.array_equal(mine, theirs, equal_nan=True)
    return bool(mine == theirs)


def _as_matrix(alpha: ArrayLike) -> NDArray[np.float32]:
    try:
        return np.asarray(alpha, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"alpha must be a matrix of numbers (layers, kv_heads): {error}"
        ) from error


def _check_alpha(alpha: NDArray[np.float32]) -> None:
    outside = np.argwhere(~np.isnan(alpha) & ~((alpha >= 0.0) & (alpha <= 1.0)))
    if len(outside):
        layer, head = outside[0]
        raise ValueError(
            f"alpha must lie in [0, 1], or be nan for a layer that is not gated, got {alpha[layer, head]:g} in layer "
            f"{layer}, KV head {head}; clip raw gates first"
        )


def _check_integer(name: str, value: Any, *, minimum: int) -> None:
    if not is_int(value) or value < minimum:
        raise ValueError(f"{name} must be an integer >= {minimum}, got {value!r}")

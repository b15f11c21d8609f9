"""The append kernel: new keys and values of every head of a layer, encoded and stored in one launch.

Decoding steps live on launches, so both kinds of heads, keys and values, codecs, ring overwrite and the ring's floor
are one Triton kernel with the bits of `duohead.codec`; lengths and padding are read on the device, ready for CUDA
graphs. For prefill it can also write what attention sees of the new tokens (``round_trip``), in place of an encode and
decode in PyTorch: append with ``evict=False`` before attention, and the rings again after it.

Shape letters: B rows, G KV heads, K new tokens, T slots, D key head size, Dv value head size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from duohead import codec
from duohead.cache.append_kernel import INTERPRETED, append_kernel
from duohead.cache.view import KeysAndValues, Segment, StoredView, on_device

__all__ = ["append", "supports"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
RAW = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
MAX_DIM = 512
MAX_VIEWS = 2
# Up to this many tokens, a program stores one of them; beyond, a tile of TILE numbers, or fewer where sums of them need
# registers as well.
FEW_TOKENS = 8
TILE, ROTATED_TILE = 4096, 2048


class _Layout(NamedTuple):
    """How a vector lies in storage, as the kernel needs it: groups, their sizes as powers of two, and the rotation."""

    group: int
    groups: int
    group_width: int
    groups_width: int
    bits: int


def append(
    keys: Tensor,
    values: Tensor,
    views: Sequence[StoredView],
    *,
    evict: bool = True,
    round_trip: Sequence[KeysAndValues | None] | None = None,
) -> None:
    """Encode new tokens with the bits of `duohead.codec` and store them into the slots of every view.

    One launch, and one more for each further segment of a growing store that the tokens reach into. Where the tokens do
    not fit a ring, its last ones stay; left padding is stored by heads that keep every token and skipped by rings.

    Args:
        keys: new keys [B, G, K, D] of all heads; any strides, the last dimension contiguous.
        values: new values [B, G, K, Dv], likewise.
        views: at most two, together usually every head of the layer; ``tokens`` counts the new ones already. Their
            segments must have the slots; tokens beyond the last one are dropped.
        evict: False stores of a ring's tokens the sinks alone and leaves its ``floor``, for attention that still has to
            see what the ring holds; append the rings again after it, with True.
        round_trip: per view None or contiguous keys [B, G of the view, K, D] and values [B, G of the view, K, Dv] of
            the inputs' dtype, to be filled with what attention sees of the new tokens: ``codec.round_trip`` of them.

    Raises:
        ValueError: inputs that the kernel does not do (what `supports` returns), or ``round_trip`` of another length.
    """
    reason = supports(keys, values, views)
    if reason is not None:
        raise ValueError(f"the append kernel cannot store these tokens: {reason}")
    if round_trip is not None and len(round_trip) != len(views):
        raise ValueError(
            f"round_trip must have one entry per view, {len(views)}, got {len(round_trip)}; "
            f"use None for a view without"
        )
    if not keys.shape[2]:
        return
    tokens = views[0].tokens
    count = keys.shape[2]
    decoded: Sequence[KeysAndValues | None] = round_trip or (None,) * len(views)
    parts = []
    for view, pair in zip(views, decoded, strict=True):
        for segment in _reached(view, tokens, count):
            parts.append((view, segment, pair))
            pair = None  # once is enough
    # A launch has room for two parts, which is all of them unless the tokens straddle segments.
    for start in range(0, len(parts), MAX_VIEWS):
        _launch(keys, values, parts[start : start + MAX_VIEWS], evict=evict)


def supports(keys: Tensor, values: Tensor, views: Sequence[StoredView]) -> str | None:
    """None if the kernel can store these tokens, else the reason why not."""
    first = views[0]
    for view in views[1:]:
        if view.padding is not first.padding or (
            view.tokens is not first.tokens and view.tokens != first.tokens
        ):
            return "the views differ in tokens or padding, so they are not of one layer"
    if len(views) > MAX_VIEWS:
        return f"there are {len(views)} views, but a layer has at most {MAX_VIEWS} kinds of heads"
    return _refused(
        keys.device.type,
        keys.dtype,
        values.dtype,
        (keys.shape[3], values.shape[3]),
        (keys.stride(3), values.stride(3)),
        tuple([name for view in views for name in view.codecs]),
    )


@functools.cache
def _refused(
    device: str,
    dtype: torch.dtype,
    value_dtype: torch.dtype,
    dims: tuple[int, int],
    strides: tuple[int, int],
    codecs: tuple[str, ...],
) -> str | None:
    if device != "cuda" and not (INTERPRETED and device == "cpu"):
        return f"Triton needs a CUDA device, and the tokens are on {device}"
    if dtype not in DTYPES or dtype != value_dtype:
        return f"keys and values must share one of {', '.join(map(str, DTYPES))}, got {dtype} and {value_dtype}"
    if max(dims) > MAX_DIM:
        return f"head sizes must be at most {MAX_DIM}, got {dims[0]} and {dims[1]}"
    if any(stride != 1 and dim > 1 for stride, dim in zip(strides, dims, strict=True)):
        return "the last dimension of keys and values must be contiguous"
    for name in codecs:
        if name in RAW and RAW[name] not in (dtype, torch.bfloat16):
            return f"{dtype} tokens in {name} storage; keep them in their own dtype or in bf16"
        if codec.layout(name) not in (*RAW, "fp8", "int8", "int4"):
            return f"storage format {name!r} is none that the kernel knows"
    return None


def _reached(view: StoredView, tokens: int | Tensor, count: int) -> Sequence[Segment]:
    """The segments that the last ``count`` of ``tokens`` go to."""
    if len(view.segments) == 1:
        return view.segments
    assert isinstance(tokens, int), "a store whose length is on the device has one segment"
    return [
        segment
        for segment in view.segments
        if segment.first < tokens and segment.first + segment.keys[0].shape[2] > tokens - count
    ]


def _launch(
    keys: Tensor,
    values: Tensor,
    parts: Sequence[tuple[StoredView, Segment, KeysAndValues | None]],
    *,
    evict: bool,
) -> None:
    rows, _, count, dim = keys.shape
    value_dim = values.shape[3]
    arguments: list[Any] = []
    modes: list[Any] = []
    heads, tile = 0, TILE
    for view, segment, decoded in parts:
        payload = segment.keys[0]
        assert payload.is_contiguous(), "stores hold their slots contiguously"
        heads += payload.shape[1]
        arguments += (
            view.heads,
            *_padded(segment.keys),
            *_padded(segment.values),
            *(decoded or (None, None)),
            payload.shape[1],
            payload.shape[2],
            segment.first,
            view.sink,
            view.ring or 0,
            view.floor,
        )
        layouts = _layout(view.codecs[0], dim), _layout(view.codecs[1], value_dim)
        modes += (
            *("raw" if name in RAW else codec.layout(name) for name in view.codecs),
            view.ring is not None,
            *layouts[0],
            *layouts[1],
        )
        if any(layout.bits for layout in layouts):
            tile = ROTATED_TILE
    if len(parts) < MAX_VIEWS:
        arguments += (None,) * 9 + (0,) * 5 + (None,)
        modes += (None, None, False) + (1, 1, 1, 1, 0) * 2
    few = count <= FEW_TOKENS
    block = 1 if few else tile // triton.next_power_of_2(max(dim, value_dim))
    tokens, padding = parts[0][0].tokens, parts[0][0].padding
    with on_device(keys):
        append_kernel[(-(-count // block), 2 * heads, rows)](
            keys,
            values,
            *keys.stride()[:3],
            *values.stride()[:3],
            count,
            tokens,
            padding,
            *arguments,
            *modes,
            dim,
            value_dim,
            isinstance(tokens, Tensor),
            evict,
            block,
            num_warps=1 if few else 4,
        )


def _padded(stored: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Payload, scale and minimum, None for those that a format has not."""
    return (*stored, None, None)[:3]  # type: ignore[return-value]


@functools.cache
def _layout(name: str, dim: int) -> _Layout:
    stored = codec.layout(name)
    groups = codec.get(stored, native=torch.float32).parts(dim)[1][1] if stored == "int4" else 1
    size, power = dim // groups, triton.next_power_of_2
    return _Layout(size, groups, power(size), power(groups), codec.rotation(name, dim))

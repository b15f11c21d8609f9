"""Prefill through flash-attn-4: on Blackwell, and on Hopper what the own kernel does not do (`hopper_prefill`).

Retrieval heads take its causal kernel, in one call over keys that lie in one piece, else over spans of decoded past
that are merged by their log-sum-exp, so that decoded memory stays bounded at millions of tokens. Heads with a band do
not come here: its mask functions run at half the speed of `duohead.attention.hopper_prefill` (docs/log.md).
Use `attend(query, view, out, scale=..., kv_heads=...)` after `supports` has
said that it can; compiled kernels are kept on disk (FLASH_ATTENTION_CUTE_DSL_CACHE_DIR), as compiling takes seconds.

Shape letters: B rows, H query heads, G KV heads of one kind, Q query tokens, T key tokens, D head size of queries and
keys, Dv of values.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duohead.cache.view import HeadView, KeysAndValues, Piece

# Decoded keys and values of the past that are in memory at a time, in bytes.
SPAN_BYTES = 1 << 30
_DTYPES = (torch.float16, torch.bfloat16)
_REMEDY = "pip install 'duohead[cuda]', or use impl='triton'"


@dataclass(frozen=True)
class Scores:
    """How scores become weights: scale, softcap or None, and sink logits of the view's query heads or None."""

    scale: float
    softcap: float | None = None
    sink_logits: Tensor | None = None


def supports(
    query: Tensor,
    view: HeadView,
    *,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> str | None:
    """None if `attend` can do this, else why not.

    Args:
        query: [B, H, Q, D], all heads.
        view: what the heads of one kind see.
        softcap: cap on the scores, or None.
        sink_logits: learned logits [H], or None.
    """
    if query.device.type != "cuda":
        return f"flash-attn-4 runs on CUDA devices, the tensors are on {query.device.type!r}"
    major = torch.cuda.get_device_capability(query.device)[0]
    if torch.version.hip is not None or major not in (9, 10):
        return "flash-attn-4 is for Hopper and Blackwell data-center GPUs; use impl='triton'"
    return (
        _missing()
        or _unfit(view, query.dtype, query.shape[-1], major)
        or _differentiated(query, view, sink_logits)
        or _traced(view)
    )


def attend(
    query: Tensor,
    view: HeadView,
    out: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    kv_heads: int | None = None,
) -> None:
    """Write the outputs of a view's heads into ``out`` at their original places; the other heads stay as they were.

    Args:
        query: [B, H, Q, D], all heads; query head h belongs to KV head h // (H / kv_heads).
        view: what its heads see.
        out: [B, Q, H, Dv], all heads.
        scale: factor on the scores.
        softcap: cap * tanh(score / cap) on the scaled scores, or None.
        sink_logits: learned logit per query head [H] in the softmax, without a value, or None.
        kv_heads: KV heads of the layer, of all kinds; needed if ``view.heads`` is given.

    Raises:
        ValueError: ``kv_heads`` is missing.
    """
    heads = _query_heads(view, query.shape[1], kv_heads)
    part, target, logits = query, out, sink_logits
    if heads is not None:
        part = query.index_select(1, heads)
        target = out.new_empty(*out.shape[:2], len(heads), out.shape[3])
        logits = None if sink_logits is None else sink_logits.index_select(0, heads)
    scores = Scores(scale, softcap, None if logits is None else logits.float())
    if view.padded:
        _rows(part, view, target, scores)
    else:
        _dense(part, view, target, scores)
    if heads is not None:
        out.index_copy_(2, heads, target)


def _unfit(view: HeadView, dtype: torch.dtype, dim: int, major: int) -> str | None:
    """What of the call itself no kernel of flash-attn-4 does."""
    if view.reach is not None or view.sinks is not None:
        return "flash-attn-4 is used for heads that see everything; heads with a band have kernels of their own"
    if dtype not in _DTYPES or view.keys.dtype != dtype or view.values.dtype != dtype:
        return f"flash-attn-4 takes fp16 and bf16, got queries of {dtype} and keys of {view.keys.dtype}"
    value_dim = view.values.shape[-1]
    largest = 256 if major == 9 else 128
    square = dim == value_dim == 256
    if dim % 8 or value_dim % 8 or (max(dim, value_dim) > largest and not square):
        return f"head sizes must be multiples of 8 up to {largest}, got {dim} and {value_dim}"
    return None


def _differentiated(query: Tensor, view: HeadView, sink_logits: Tensor | None) -> str | None:
    inputs = (query, view.keys, view.values, sink_logits)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return "gradients are asked for; use impl='tiled' or torch.no_grad()"
    return None


def _traced(view: HeadView) -> str | None:
    """Why not inside a graph: dynamo cannot trace the call, and padded rows need their lengths on the host."""
    if torch.compiler.is_compiling():
        return "torch.compile cannot trace flash-attn-4; compile decode only"
    if view.padded and torch.cuda.is_current_stream_capturing():
        return "padded rows wait for the device, which a CUDA graph cannot; capture decode only"
    return None


@functools.cache
def _missing() -> str | None:
    for package in ("flash_attn.cute", "cutlass"):
        try:
            found = importlib.util.find_spec(package)
        except ModuleNotFoundError:  # its parent is not there
            found = None
        if found is None:
            return f"flash-attn-4 is not installed ({package} is missing); {_REMEDY}"
    return None


@functools.cache
def _forward() -> Callable[..., Any]:
    """Flash-attn-4's forward pass; unlike the public functions it writes into a given output."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    # Read when flash-attn-4 is imported; whoever has set them knows better.
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(home / "duohead" / "cute"))
    from flash_attn.cute.interface import _flash_attn_fwd

    return _flash_attn_fwd


def _query_heads(view: HeadView, heads: int, kv_heads: int | None) -> Tensor | None:
    """The query heads of the view's KV heads, as an index; None for all."""
    if view.heads is None:
        return None
    group = heads // view.layer_heads(kv_heads)
    member = torch.arange(group, device=view.heads.device)
    return (view.heads[:, None] * group + member).flatten()


def _rows(query: Tensor, view: HeadView, out: Tensor, scores: Scores) -> None:
    """Rows with left padding one by one, each from its first real token on; padding queries give zeros."""
    queries = query.shape[2]
    new = view.keys.shape[2]
    tokens = new + sum(piece.position.shape[1] for piece in view.past)
    real = (view.query_position[:, -1] + 1).tolist()
    for row in range(query.shape[0]):
        first = min(max(0, queries - real[row]), queries)
        out[row : row + 1, :first] = 0
        if first < queries:
            _dense(
                query[row : row + 1, :, first:],
                _row(view, row, tokens - real[row]),
                out[row : row + 1, first:],
                scores,
            )


def _row(view: HeadView, row: int, padding: int) -> HeadView:
    """One row of a view without its first ``padding`` tokens; only what `_dense` reads is right in it."""

    past, left = [], padding
    for piece in view.past:
        size = piece.position.shape[1]
        skip = min(left, size)
        left -= skip
        if skip < size:
            read = functools.partial(_cut_read, piece.read, row, skip)
            past.append(Piece(read, piece.position[:1, skip:]))
    keys, values = _cut((view.keys, view.values), row, left)
    whole = None if view.whole is None else _cut(view.whole, row, padding)
    return replace(view, past=tuple(past), keys=keys, values=values, whole=whole, padded=False)


def _cut(pair: KeysAndValues, row: int, skip: int) -> KeysAndValues:
    keys, values = pair
    return keys[row : row + 1, :, skip:], values[row : row + 1, :, skip:]


def _cut_read(read: Callable[[], KeysAndValues], row: int, skip: int) -> KeysAndValues:
    return _cut(read(), row, skip)


def _dense(query: Tensor, view: HeadView, out: Tensor, scores: Scores) -> None:
    """Every key up to the query's own, for unpadded rows: [B, H, Q, D] of this view into [B, Q, H, Dv]."""
    merged: tuple[Tensor, Tensor] | None = None
    for keys, values, last in spans(view, SPAN_BYTES):
        if last and merged is None:
            _call(query, keys, values, out, scores, causal=True)
            return
        part = torch.empty_like(out)
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        # The logits belong to the softmax over all spans, so they may come in once.
        use = scores if last else replace(scores, sink_logits=None)
        _call(query, keys, values, part, use, causal=last, lse=lse)
        merged = (part.float(), lse) if merged is None else merge(*merged, part, lse)
    assert merged is not None, "a view always has the new tokens as a span"
    out.copy_(merged[0])


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from that over each: outputs [B, Q, H, Dv] and log-sum-exps [B, H, Q] in fp32.

    ``out`` is changed in place and given back.
    """
    total = torch.logaddexp(lse, part_lse)

    def share(x: Tensor) -> Tensor:
        return (x - total).exp().transpose(1, 2)[..., None]

    return out.mul_(share(lse)).addcmul_(part.to(out.dtype), share(part_lse)), total


def spans(view: HeadView, limit: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Keys and values [B, G, T, D] of a view that keeps everything, in order, and whether they are the last ones.

    Decoded copies are at most ``limit`` bytes at a time (one piece and the new tokens at least). The last span ends
    with the new tokens.
    """
    if view.whole is not None:
        yield *view.whole, True
        return
    new = view.keys.shape[2]
    room = limit * new // max(view.keys.nbytes + view.values.nbytes, 1)
    group: list[Piece] = []
    held = 0
    for piece in view.past:
        size = piece.position.shape[1]
        if group and held + size > room:
            yield *_filled(view, group, held, new=False), False
            group, held = [], 0
        group.append(piece)
        held += size
    if group and held + new > room:
        yield *_filled(view, group, held, new=False), False
        group, held = [], 0
    yield *(_filled(view, group, held, new=True) if group else (view.keys, view.values)), True


def _filled(view: HeadView, pieces: Sequence[Piece], tokens: int, *, new: bool) -> KeysAndValues:
    """The ``tokens`` keys and values of some pieces, and the new ones if asked for, in one place."""
    total = tokens + (view.keys.shape[2] if new else 0)
    keys, values = (x.new_empty(*x.shape[:2], total, x.shape[3]) for x in (view.keys, view.values))
    start = 0
    for piece in pieces:
        stop = start + piece.position.shape[1]
        keys[:, :, start:stop], values[:, :, start:stop] = piece.read()
        start = stop
    if new:
        keys[:, :, start:], values[:, :, start:] = view.keys, view.values
    return keys, values


def _call(
    query: Tensor, keys: Tensor, values: Tensor, out: Tensor, scores: Scores, **options: Any
) -> None:
    """Flash-attn-4 on query [B, H, Q, D], keys and values [B, G, T, D] into [B, Q, H, Dv]; it takes any strides."""
    with torch.cuda.device_of(query):
        _forward()(
            query.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            softmax_scale=scores.scale,
            softcap=scores.softcap,
            learnable_sink=scores.sink_logits,
            out=out,
            **options,
        )

"""Decode in Triton: a few query tokens against everything that is stored, in one launch for both kinds of heads.

The cache is read once, as it is stored, by programs that each take an equal share of one KV head's tokens; a second
small kernel joins their results. How many programs there are depends on shapes and capacities only; lengths and
paddings are read on the device, so a captured CUDA graph stays valid while the cache fills.
Use `attend(query, views, scale=...)` after the new tokens have been stored; `supports` says whether it can.

Shape letters: B rows, H query heads, G KV heads of one view, R = H / (KV heads) query heads per KV head, Q query
tokens, T slots of a segment, D head size of queries and keys, Dv of values.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from duohead import codec
from duohead.attention.choice import MAX_DECODE_TOKENS
from duohead.attention.triton_decode_join import join_kernel
from duohead.attention.triton_decode_kernels import split_kernel
from duohead.attention.triton_decode_numbers import NUMBERS
from duohead.attention.triton_decode_plan import NATIVE, Part, Plan, kv_heads, make_plan, value_size
from duohead.attention.triton_tiles import LOG2E, UNLIMITED
from duohead.cache.view import Segment, StoredView, on_device

MAX_HEAD_SIZE = 256
_empty = torch.empty
# Whether kernels are compiled for NVIDIA GPUs, neither for AMD's nor run by the interpreter.
_PTX = torch.version.hip is None and isinstance(split_kernel, triton.JITFunction)


def supports(
    query: Tensor,
    views: Sequence[StoredView] = (),
    *,
    value_dim: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> str | None:
    """None if `attend` can take these queries [B, H, Q, D], else why not.

    Without views yet, ``value_dim`` says the value size Dv where it differs from D.
    """
    if query.dtype not in NATIVE.values():
        return (
            f"query has dtype {query.dtype}; the kernel computes in float16, bfloat16 and float32"
        )
    if torch.is_grad_enabled() and query.requires_grad:
        return "the kernel has no gradient; decode under torch.no_grad()"
    sizes = {query.shape[3], value_dim or query.shape[3], *(value_size(view) for view in views)}
    if any(size % 4 or size > MAX_HEAD_SIZE for size in sizes):
        return f"the head size must be a multiple of 4 up to {MAX_HEAD_SIZE}, got {max(sizes)}"
    names = [codec.layout(name) for view in views for name in view.codecs]
    if any(name not in NATIVE and name not in NUMBERS for name in names):
        return f"the kernel reads {', '.join((*NATIVE, *NUMBERS))}, not {names}"
    return None


def attend(
    query: Tensor,
    views: Sequence[StoredView],
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attention of the last Q stored tokens on everything that their heads see.

    Args:
        query: [B, H, Q, D] with contiguous last dimension; query head h belongs to KV head h // R.
        views: one or two kinds of heads, which together cover every KV head once; their tokens include the new ones.
        scale: factor on the scores.
        softcap: cap * tanh(score / cap) on the scaled scores, or None.
        sink_logits: learned logit per query head [H] in the softmax, without a value, or None.

    Returns:
        [B, Q, H, Dv] in the dtype of ``query``, each head at its original place; zeros for padding queries.

    Raises:
        ValueError: more than MAX_DECODE_TOKENS query tokens or two views, what `supports` refuses, storage that is not
            contiguous, or a ring too short for the oldest query.
    """
    plan = _plan(query, views)
    batch, heads, count, _ = query.shape
    width = value_size(views[0])
    out = _empty(batch, count, heads, width, dtype=query.dtype, device=query.device)
    acc = _empty(plan.partials, width, dtype=torch.float32, device=query.device)
    stat = _empty(plan.partials, 2, dtype=torch.float32, device=query.device)
    # Scores are kept in base 2; a cap applies before the change of base.
    factor = scale if softcap is not None else scale * LOG2E
    early = _early_start(query.device)
    with on_device(query):
        for index, parts in enumerate(plan.launches):
            present = [(number, part) for number, part in enumerate(parts) if part is not None]
            arguments: list[Any] = []
            constants: dict[str, Any] = {}
            for place, (number, part) in enumerate((*present, present[0])[:2]):
                view = views[number]
                arguments += _view_arguments(view, view.segments[index], part, plan, number)
                constants |= {f"{name}{place}": value for name, value in part.constants.items()}
            split_kernel[(sum(part.programs for _, part in present),)](
                query, query.stride(0), query.stride(1), query.stride(2), acc, stat,
                factor, softcap or 1.0, present[0][1].programs, *arguments,
                ROWS=plan.rows, GROUP=plan.group, BLOCK_M=plan.block_m, CAPPED=softcap is not None,
                SHIFT=_shift(query.dtype), PTX=_PTX, EARLY=bool(early), BOTH=len(present) == 2,
                num_warps=plan.warps, **early, **constants,
            )  # fmt: skip
        _join(query, views, plan, acc, stat, out, sink_logits)
    return out


def _join(
    query: Tensor,
    views: Sequence[StoredView],
    plan: Plan,
    acc: Tensor,
    stat: Tensor,
    out: Tensor,
    sink_logits: Tensor | None,
) -> None:
    early = _early_start(query.device)
    groups = [kv_heads(view) for view in views]
    rows = [query.shape[0] * count * plan.rows for count in groups]
    last = len(views) - 1
    width = out.shape[3]
    bits = max(plan.bits)
    # A rotation needs its channels in one program, whose sums (splits times channels) must fit registers.
    block = max(min(triton.next_power_of_2(width), 64), 1 << bits)
    join_kernel[(sum(rows), triton.cdiv(width, block))](
        acc, stat, out, sink_logits, query.shape[1], views[0].heads, views[last].heads,
        groups[0], groups[last], plan.totals[0], plan.totals[last], plan.starts[last], rows[0],
        ROWS=plan.rows, GROUP=plan.group, WIDTH=width, BLOCK_W=block,
        BLOCK_S=min(triton.next_power_of_2(max(plan.totals)), 8192 // max(block, 64)), EARLY=bool(early),
        BITS=bits, ROTATED0=plan.bits[0] > 0, ROTATED1=plan.bits[last] > 0, num_warps=4, **early,
    )  # fmt: skip


def _view_arguments(
    view: StoredView, segment: Segment, part: Part, plan: Plan, number: int
) -> list[Any]:
    keys, values = (*segment.keys, None, None)[:3], (*segment.values, None, None)[:3]
    return [
        view.heads, *keys, *values, view.tokens, view.padding, view.floor, segment.first,
        segment.keys[0].shape[2], kv_heads(view), part.splits, part.offset, plan.totals[number],
        plan.starts[number], view.sink, view.ring or 1,
        UNLIMITED if view.reach is None else view.reach,
        UNLIMITED if view.window is None else view.window,
    ]  # fmt: skip


def _shift(dtype: torch.dtype) -> float:
    """Exponent added to softmax weights, so that the small ones of long texts do not underflow in fp16."""
    return 12.0 if dtype == torch.float16 else 0.0


@functools.cache
def _early_start(device: torch.device) -> dict[str, bool]:
    """Launch option by which the joining kernel starts while the last splits still run, where there is such a thing."""
    if not _PTX or torch.cuda.get_device_capability(device)[0] < 9:
        return {}
    return {"launch_pdl": True}


_plans: dict[tuple[Any, ...], Plan] = {}
_MAX_PLANS = 1024


def _plan(query: Tensor, views: Sequence[StoredView]) -> Plan:
    """The plan of this call, made once for every step of a generation and every layer of one kind."""
    key = (
        query.shape, query.stride(3), query.dtype, query.device,
        torch.is_grad_enabled() and query.requires_grad,
        *(
            (
                view.codecs, view.ring, view.sink, view.reach, isinstance(view.tokens, Tensor),
                *(
                    (part.shape, part.is_contiguous())
                    for segment in view.segments
                    for part in (*segment.keys, *segment.values)
                ),
            )
            for view in views
        ),
    )  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        _check(query, views)
        if len(_plans) >= _MAX_PLANS:
            _plans.clear()
        plan = _plans[key] = make_plan(query, views)
    return plan


def _check(query: Tensor, views: Sequence[StoredView]) -> None:
    count = query.shape[2]
    if not 1 <= count <= MAX_DECODE_TOKENS:
        raise ValueError(
            f"decode takes 1 to {MAX_DECODE_TOKENS} query tokens, got {count}; use prefill for more"
        )
    if not 1 <= len(views) <= 2:
        raise ValueError(
            f"decode takes one or two views, got {len(views)}; call it once for every two kinds of heads"
        )
    reason = supports(query, views)
    if reason is not None:
        raise ValueError(f"the Triton decode kernel cannot do this: {reason}; use impl='tiled'")
    total = sum(kv_heads(view) for view in views)
    if query.shape[1] % total:
        raise ValueError(
            f"query must have a multiple of the {total} KV heads of its views, got {query.shape[1]} heads; "
            f"pass the views of every kind of head"
        )
    if query.stride(3) != 1 or not all(
        part.is_contiguous()
        for view in views
        for segment in view.segments
        for part in (*segment.keys, *segment.values)
    ):
        raise ValueError(
            "query must be contiguous in its last dimension, and stored keys and values in all, but they are not; "
            "call .contiguous() on what is a slice or a transposition"
        )
    for view in views:
        if view.ring is not None and view.reach is not None and view.ring < view.reach + count - 1:
            raise ValueError(
                f"ring must have {view.reach + count - 1} slots, so that the first of {count} query tokens sees "
                f"{view.reach} tokens back, got {view.ring}; make the cache with rollback={count - 1} or more"
            )

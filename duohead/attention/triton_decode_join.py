"""Triton code that joins the splits of decode: each has its own softmax maximum and sum, and the values so weighted.

A separate kernel, not the last program of each head: it needs no counters that would have to be zero before a captured
graph is replayed, and it adds in the same order every time. `duohead.attention.triton_decode` launches it.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from duohead.cache.rotation_kernel import rotated


@triton.jit(do_not_specialize=["groups0", "groups1", "total0", "total1", "start1", "rows0"])
def join_kernel(
    acc, stat, out, sink_logits, query_heads, heads0, heads1, groups0, groups1, total0, total1, start1, rows0,
    ROWS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_S: tl.constexpr,
    EARLY: tl.constexpr, BITS: tl.constexpr, ROTATED0: tl.constexpr, ROTATED1: tl.constexpr,
):  # fmt: skip
    """One query row: the splits of its head, weighted by their softmax sums, to its place in [B, Q, H, Dv].

    Programs [0, rows0) do rows of the first view; axis 1 goes over blocks of the head size. Sums of values that were
    ROTATED before they were stored, in blocks of 2^BITS numbers, are rotated back.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
    pid = tl.program_id(0)
    first_view = pid < rows0
    index = pid if first_view else pid - rows0
    groups = groups0 if first_view else groups1
    total = total0 if first_view else total1
    start = 0 if first_view else start1
    row = index % ROWS
    base = index // ROWS
    group = base % groups
    batch = (base // groups).to(tl.int64)
    head = group.to(tl.int64)
    if heads0 is not None:
        head = tl.load(heads0 + group, mask=first_view, other=0)
    if heads1 is not None:
        other = tl.load(heads1 + group, mask=pid >= rows0, other=0)
        head = head if first_view else other
    head = head * GROUP + row % GROUP

    column = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    width_live = (column < WIDTH)[None, :]
    top = float("-inf")
    if sink_logits is not None:
        top = tl.load(sink_logits + head).to(tl.float32) * 1.4426950408889634
    weight_sum = 0.0 if sink_logits is None else 1.0
    value = tl.zeros([BLOCK_W], tl.float32)
    for first in range(0, total, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        place = (start + (base.to(tl.int64) * total + split) * ROWS + row).to(tl.int64)
        live = split < total
        m = tl.load(stat + 2 * place, mask=live, other=float("-inf"))
        l = tl.load(stat + 2 * place + 1, mask=live, other=0.0)  # noqa: E741
        # Splits without keys have written nothing else.
        used = (m > float("-inf"))[:, None] & width_live
        part = tl.load(acc + place[:, None] * WIDTH + column[None, :], mask=used, other=0.0)
        new_top = tl.maximum(top, tl.max(m, 0))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        fade = tl.exp2(top - safe)
        weight = tl.exp2(m - safe)
        weight_sum = weight_sum * fade + tl.sum(weight * l, 0)
        value = value * fade + tl.sum(weight[:, None] * part, 0)
        top = new_top
    # Padding queries see nothing; their output must be finite.
    value = value / tl.where(weight_sum > 0.0, weight_sum, 1.0)
    if BITS > 0:
        back = rotated(value, column, BITS, True)
        if ROTATED0 and ROTATED1:
            value = back
        elif ROTATED0:
            value = tl.where(first_view, back, value)
        else:
            value = tl.where(first_view, value, back)
    at = ((batch * (ROWS // GROUP) + row // GROUP) * query_heads + head) * WIDTH
    tl.store(out + at + column, value.to(out.dtype.element_ty), mask=column < WIDTH)

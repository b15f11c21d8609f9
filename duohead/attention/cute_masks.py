# mypy: disable-error-code="no-untyped-def,import-not-found"
"""The mask of streaming heads in flash-attn-4's language: imported only where flash-attn-4 is, since it needs cutlass.

Shape letters: B rows.
"""

# No `from __future__ import annotations` here: the compiler of cutlass reads annotations as they are.

import cutlass
import cutlass.cute as cute
from flash_attn.cute import utils
from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

__all__ = ["BlockSparseTensorsTorch", "sinks_and_band"]
INTEGER = cutlass.Int32


@cute.jit
def sinks_and_band(batch_idx, head_idx, q_idx, kv_idx, seqlen_info, aux_tensors):
    """Whether a query sees a key: a sink that is not ahead of it, or one of the last keys up to its own.

    ``aux_tensors`` holds one int32 tensor [B, 6], `duohead.attention.cute_streaming.Numbers`.
    """
    numbers = aux_tensors[0]
    row = batch_idx[0]
    sinks = utils.scalar_to_ssa(numbers[row, 0], INTEGER)
    low = utils.scalar_to_ssa(numbers[row, 1], INTEGER)
    reach = utils.scalar_to_ssa(numbers[row, 2], INTEGER)
    window = utils.scalar_to_ssa(numbers[row, 3], INTEGER)
    own = q_idx + utils.scalar_to_ssa(numbers[row, 4], INTEGER)
    position = q_idx + utils.scalar_to_ssa(numbers[row, 5], INTEGER)
    sink = (kv_idx < sinks) & (kv_idx <= position) & (kv_idx > position - window)
    band = (kv_idx >= low) & (kv_idx <= own) & (kv_idx > own - reach)
    return sink | band

"""What a head may see, stated once; reference, fast paths, cache eviction, training and docs derive from it.

Positions count from the first real (non-padding) token of a row; a negative key position is padding or an empty slot
and is never seen. A retrieval head sees every key up to the query, a streaming head the first ``sink`` and the last
``recent`` of them (the query's own token included), and a native sliding window applies on top (arXiv 2410.10819, 2.3).

Shape letters: Q query tokens, K key tokens, G KV heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from duohead.policy import LayerPolicy


def visible(
    query_position: Tensor,
    key_position: Tensor,
    *,
    retrieval: Tensor | bool,
    sink: int,
    recent: int,
    window: int | None = None,
    chunk_start: Tensor | int | None = None,
) -> Tensor:
    """Whether each query may see each key.

    Args:
        query_position: integer positions, any shape that broadcasts with ``key_position`` (usually [..., Q, 1]).
        key_position: integer positions (usually [..., 1, K]); negative means padding or an empty slot.
        retrieval: True for retrieval heads, False for streaming heads, or a boolean tensor to broadcast.
        sink: first tokens a streaming head keeps.
        recent: last tokens a streaming head keeps, the query's own included.
        window: native sliding window in tokens, the query's own included; None for global attention.
        chunk_start: position of the first token of the current chunk. Given only for ``visibility="chunk"``, the
            reference code's rule: a streaming head sees the sinks, ``recent`` tokens before the chunk, and the chunk.

    Returns:
        Boolean tensor of the broadcast shape; True means visible.
    """
    seen = (key_position <= query_position) & (key_position >= 0)
    oldest = query_position - recent + 1 if chunk_start is None else chunk_start - recent
    streaming = (key_position < sink) | (key_position >= oldest)
    seen = seen & (streaming | retrieval)
    if window is not None:
        seen = seen & (query_position - key_position < window)
    return seen


def dense_mask(length: int, layer: LayerPolicy, *, sink: int, recent: int) -> Tensor:
    """The whole mask of one layer for an unpadded sequence: bool [G, length, length], True means visible."""
    position = torch.arange(length)
    retrieval = torch.zeros(layer.num_kv_heads, 1, 1, dtype=torch.bool)
    retrieval[list(layer.retrieval)] = True
    return visible(
        position[:, None],
        position[None, :],
        retrieval=retrieval,
        sink=sink,
        recent=recent,
        window=layer.window,
    )

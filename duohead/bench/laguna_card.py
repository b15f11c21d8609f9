"""The memory figures on the card of the published Laguna adapter, and the accounting that gives them.

The card compares two sizes: a cache in which all 40 layers keep every token in FP8, although 30 of them see only 512,
and a mixed cache that keeps every token in FP8 in 128 of the 320 KV heads, sinks and recent ones in INT4 in the others.
Use `dense_bytes(tokens)` and `mixed_bytes(tokens)`; `PUBLISHED` has the nine rows as printed.

Source: huggingface.co/poolside-laguna-hackathon/duo-laguna-adapter, written by `duo_attn/model_card.py` of
github.com/dogeplusplus/duo-attention; how many heads and tokens it counts is not said there and was worked out.
"""

from __future__ import annotations

HEADS = 320
RETRIEVAL_HEADS = 128
SINK, RECENT = 64, 256
# Bytes of keys and values of one token in one head of size 128: FP8 without scales, INT4 with a scale and a zero point.
FP8_TOKEN = 2 * 128
INT4_TOKEN = 2 * (128 // 2 + 2 + 2)

# (prompt, decoded tokens) -> MiB of the dense cache and of the mixed one, as printed.
PUBLISHED: dict[tuple[int, int], tuple[float, float]] = {
    (512, 1): (40.08, 24.03),
    (512, 16): (41.25, 24.50),
    (512, 64): (45.00, 26.00),
    (1024, 1): (80.08, 40.03),
    (1024, 16): (81.25, 40.50),
    (1024, 64): (85.00, 42.00),
    (1462, 1): (114.30, 53.72),
    (1462, 16): (115.47, 54.19),
    (1462, 64): (119.22, 55.69),
}


def dense_bytes(tokens: int) -> int:
    """The card's base: every head of every layer keeps ``tokens`` tokens in FP8."""
    return HEADS * tokens * FP8_TOKEN


def mixed_bytes(tokens: int) -> int:
    """The card's cache of ``tokens`` tokens: allocated for one more, and for all sinks and recent tokens."""
    streaming = (HEADS - RETRIEVAL_HEADS) * (SINK + RECENT) * INT4_TOKEN
    return RETRIEVAL_HEADS * (tokens + 1) * FP8_TOKEN + streaming

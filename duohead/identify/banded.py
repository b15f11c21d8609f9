"""Differentiable attention for gate training: full causal, and streaming (sinks and a band) in time linear in length.

On a GPU, half precision streams through the Triton kernels. Elsewhere FlexAttention has no backward and a dense mask
costs memory quadratic in the length, so the band is cut into query tiles that attend to [sink keys | band keys], all in
one attention call, masked by `duohead.mask.visible`.
Use `full_attention(q, k, v, scores=Scores())` and `streaming_attention(..., sink=128, recent=256)` without padding.

Shape letters: B batch, T tokens, Q query tokens, K key tokens, H query heads, G KV heads, D head size, N tiles.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from duohead.mask import visible

logger = logging.getLogger(__name__)
IMPLEMENTATIONS = ("auto", "triton", "tiles")
# Fastest of 128, 256, 384 and 512 on CPU for sink 64-128, recent 128-256: small tiles waste least of the band.
TILE = 128
# Query rows whose weights are written out at a time where no fused kernel will do.
ROWS = 512
_FLASH_HEAD_SIZE = 256
_FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@dataclass(frozen=True)
class Scores:
    """How a layer turns query-key products into weights.

    ``scaling`` multiplies the products (None: head size ** -0.5), ``softcap`` c bends them to c * tanh(x / c)
    (Gemma 2), and ``sinks`` [H] are logits that take weight but carry no value (gpt-oss).
    """

    scaling: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether it is what `F.scaled_dot_product_attention` computes."""
        return self.softcap is None and self.sinks is None


def full_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scores: Scores, deterministic: bool = True
) -> Tensor:
    """Causal attention. ``q`` [B, H, T, D], ``k`` and ``v`` [B, G, T, D]; returns [B, H, T, D].

    On a GPU, ``deterministic`` takes kernels whose gradients are the same bits every time; without it, the fastest.
    """
    if not deterministic and q.is_cuda and scores.plain:
        with sdpa_kernel(_FASTEST_FIRST, set_priority=True):
            return _causal(q, k, v, scores)
    if _fused(q, scores, masked=False):
        # Of the fused kernels on CUDA only flash attention can be asked for reproducible gradients.
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if q.is_cuda else nullcontext():
            out = _causal(q, k, v, scores)
        return _reproducible(out) if q.is_cuda else out
    tiles = []
    position = torch.arange(q.shape[2], device=q.device)
    for start in range(0, q.shape[2], ROWS):
        stop = min(start + ROWS, q.shape[2])
        seen = visible(
            position[start:stop, None], position[:stop], retrieval=True, sink=0, recent=1
        )
        # Recomputed in the backward pass: keeping the weights of every tile would cost memory quadratic in T.
        tiles.append(
            checkpoint(
                _explicit_attention,
                q[:, :, start:stop],
                k[:, :, :stop],
                v[:, :, :stop],
                seen,
                scores,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        )
    return torch.cat(tiles, dim=2)


def _causal(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scores.scaling, enable_gqa=True
    )


def streaming_attention(
    q: Tensor, k: Tensor, v: Tensor, *, sink: int, recent: int, scores: Scores, impl: str = "auto"
) -> Tensor:
    """Attention to the first ``sink`` and the last ``recent`` tokens, token-exact.

    ``q`` [B, H, T, D], ``k`` and ``v`` [B, G, T, D]; returns [B, H, T, D]. With ``sink`` 0 this is a native sliding
    window of ``recent`` tokens. Time and memory are linear in T, forward and backward. ``impl`` is "triton" (the GPU
    kernels), "tiles" (plain PyTorch) or "auto", which logs its choice once.

    Raises:
        ValueError: unknown ``impl``, or "triton" where the kernels cannot do this; the message says why.
    """
    batch, _, length, _ = q.shape
    choice = _choose(impl, q, k, v, scores)
    if sink + recent >= length and impl != "triton":
        return full_attention(q, k, v, scores=scores)
    if choice == "triton":
        from duohead.attention.triton_training import streaming

        return streaming(
            q,
            k,
            v,
            sink=sink,
            recent=recent,
            scale=_scaling(q, scores),
            softcap=scores.softcap,
            sink_logits=scores.sinks,
        )
    tiles = -(-length // TILE)
    back = -(-(recent - 1) // TILE)
    keys, values = (_bands(x, sink=sink, tiles=tiles, back=back) for x in (k, v))
    queries = _tiles(q, tiles).flatten(0, 1)
    seen = _band_mask(tiles, sink=sink, recent=recent, back=back, device=q.device)
    seen = seen.repeat_interleave(batch, dim=0)[:, None]
    if _fused(q, scores, masked=True):
        out = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=seen, scale=scores.scaling, enable_gqa=True
        )
    else:
        out = _explicit_attention(queries, keys, values, seen, scores)
    out = out.unflatten(0, (tiles, batch)).permute(1, 2, 0, 3, 4).flatten(2, 3)
    return out[:, :, :length]


def _choose(impl: str, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> str:
    """The implementation that ``impl`` means for these tensors; what "auto" chooses on a GPU is logged once."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    # Without matrix units for fp32, PyTorch's own products are the faster ones.
    if impl == "tiles" or (impl == "auto" and (not q.is_cuda or q.itemsize > 2)):
        return "tiles"
    reason = _missing(q, k, v, scores)
    if impl == "triton" and reason is not None:
        raise ValueError(f"impl='triton' cannot run here: {reason}; use impl='tiles' or 'auto'")
    choice = "triton" if reason is None else "tiles"
    if impl == "auto":
        because = "" if reason is None else f" ({reason})"
        _log_once(f"streaming attention of gate training: impl={choice}{because}")
    return choice


def _missing(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> str | None:
    """Why the Triton kernels cannot stream here, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    from duohead.attention.triton_training import trains

    scale = _scaling(q, scores)
    return trains(q, k, v, scale=scale, softcap=scores.softcap, sink_logits=scores.sinks)


@functools.cache
def _log_once(message: str) -> None:
    logger.info(message)


def _tiles(x: Tensor, count: int) -> Tensor:
    """[B, H, T, D] as tiles [N, B, H, TILE, D], the last one filled up with zeros."""
    padded = F.pad(x, (0, 0, 0, count * TILE - x.shape[2]))
    return padded.unflatten(2, (count, TILE)).permute(2, 0, 1, 3, 4)


def _bands(x: Tensor, *, sink: int, tiles: int, back: int) -> Tensor:
    """Per query tile the keys (or values) it can reach: [N * B, G, sink + (back + 1) * TILE, D].

    Whole tiles are concatenated, never sliced per query tile, so that the backward pass adds up ``back + 1`` tensors
    of the sequence's size instead of one for each tile.
    """
    blocks = F.pad(_tiles(x, tiles), (0, 0, 0, 0, 0, 0, 0, 0, back, 0))
    first = x[:, :, :sink].expand(tiles, -1, -1, -1, -1)
    band = [blocks[offset : offset + tiles] for offset in range(back + 1)]
    return torch.cat([first, *band], dim=3).flatten(0, 1)


def _band_mask(tiles: int, *, sink: int, recent: int, back: int, device: torch.device) -> Tensor:
    """Which of its tile's keys a query sees: bool [N, TILE, sink + (back + 1) * TILE]."""
    start = torch.arange(tiles, device=device)[:, None, None] * TILE
    query = start + torch.arange(TILE, device=device)[:, None]
    band = start - back * TILE + torch.arange((back + 1) * TILE, device=device)
    first = torch.arange(sink, device=device).expand(tiles, 1, sink)
    seen_first = visible(query, first, retrieval=False, sink=sink, recent=recent)
    # A token that is both a sink and recent is in the batch twice; it counts once, as a sink.
    seen_band = visible(query, band, retrieval=False, sink=sink, recent=recent) & (band >= sink)
    return torch.cat([seen_first, seen_band], dim=2)


def _fused(q: Tensor, scores: Scores, *, masked: bool) -> bool:
    """Whether one fused call gives the same bits every time without writing out all weights.

    On CUDA that is the unmasked half-precision kernel alone: the one for masks and fp32 adds up its gradients in an
    order that changes from run to run.
    """
    if not scores.plain:
        return False
    half = q.dtype in (torch.float16, torch.bfloat16)
    return not q.is_cuda or (half and not masked and q.shape[-1] <= _FLASH_HEAD_SIZE)


def _reproducible(out: Tensor) -> Tensor:
    """Have the kernel that made ``out`` take its reproducible form in the backward pass.

    It does so in strict deterministic mode alone, in which other operations of a model may refuse to run; hence the
    mode is strict only while that one kernel runs.
    """
    if out.grad_fn is None:
        return out
    modes: list[tuple[bool, bool]] = []

    def strict(_: tuple[Tensor, ...]) -> None:
        enabled = torch.are_deterministic_algorithms_enabled()
        modes.append((enabled, torch.is_deterministic_algorithms_warn_only_enabled()))
        torch.use_deterministic_algorithms(True)

    def as_before(*_: tuple[Tensor, ...]) -> None:
        enabled, warn_only = modes.pop()
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)

    out.grad_fn.register_prehook(strict)
    out.grad_fn.register_hook(as_before)
    return out


def _scaling(q: Tensor, scores: Scores) -> float:
    """Factor on the scores."""
    return q.shape[-1] ** -0.5 if scores.scaling is None else scores.scaling


def _explicit_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scores: Scores) -> Tensor:
    """Attention written out, for what fused kernels cannot do; softmax in at least fp32.

    ``q`` [B, H, Q, D], ``k`` and ``v`` [B, G, K, D], ``seen`` bool broadcastable to [B, 1, Q, K].
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    logits = (q @ k.mT) * _scaling(q, scores)
    if scores.softcap is not None:
        logits = torch.tanh(logits / scores.softcap) * scores.softcap
    logits = logits.masked_fill(~seen, float("-inf"))
    if scores.sinks is not None:
        column = scores.sinks.to(logits.dtype).reshape(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, column], dim=-1)
    weights = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return weights[..., : k.shape[2]].to(v.dtype) @ v

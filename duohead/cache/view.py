"""What the heads of one kind can read in one call: pieces of keys with their positions, old and new.

Attention works on views only, so that it does not know whether keys come from a growing cache, a static one, or no
cache at all. A piece decodes itself when it is read, one piece at a time, which bounds the temporary memory.

Shape letters: B rows, G KV heads of one kind, Q query tokens, K key tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from duohead.mask import visible

KeysAndValues = tuple[Tensor, Tensor]
MaskedPiece = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Piece:
    """Some slots: ``read()`` gives keys and values [B, G, K, D]; ``position`` [B or 1, K] is -1 where empty."""

    read: Callable[[], KeysAndValues]
    position: Tensor


@dataclass(frozen=True)
class HeadView:
    """Everything that the heads of one kind see in one call.

    Attributes:
        heads: KV heads of this kind, ascending, as an index tensor [G]; None if all heads are of this kind.
        retrieval: whether the heads see every token, as retrieval heads do, and streaming heads that nothing evicts.
        sinks: the sink tokens of streaming heads, those of this call included; None without sinks.
        past: the other tokens from before this call.
        keys, values: the new tokens [B, G, K, D], as decoded from storage; K >= Q, the queries belong to the last Q.
        key_position: [B or 1, K], negative for padding.
        query_position: [B or 1, Q].
        sink, recent, window: the policy's numbers for this call (see `duohead.mask.visible`).
        chunk_start: [B or 1, 1] for ``visibility="chunk"``, else None.
        padded: whether any row has padding (then position tensors differ by row).
        whole: past and new tokens [B, G, past + K, D] of heads that keep everything, as they lie in storage, without a
            copy; None where storage is lossy or not in one piece.
    """

    heads: Tensor | None
    retrieval: bool
    sinks: Piece | None
    past: tuple[Piece, ...]
    keys: Tensor
    values: Tensor
    key_position: Tensor
    query_position: Tensor
    sink: int
    recent: int
    window: int | None
    chunk_start: Tensor | None
    padded: bool
    whole: KeysAndValues | None = None

    @property
    def reach(self) -> int | None:
        """Tokens back that a query sees outside the sinks, its own included; None for all."""
        if self.retrieval:
            return self.window
        if self.chunk_start is not None:
            return None
        return self.recent if self.window is None else min(self.recent, self.window)

    def layer_heads(self, kv_heads: int | None) -> int:
        """KV heads of the layer, of all kinds: ``kv_heads``, which a view of all heads need not be told.

        Raises:
            ValueError: it is None for a view of some of the heads.
        """
        if kv_heads is not None:
            return kv_heads
        if self.heads is not None:
            raise ValueError("kv_heads must be given for a view of some of the heads, got None")
        return self.keys.shape[1]

    def mask(self, query_position: Tensor, key_position: Tensor, *, sinks: bool) -> Tensor:
        """Visibility [B or 1, 1, Q, K] of keys at ``key_position`` [B or 1, K] for ``query_position`` [B or 1, Q].

        ``sinks`` says whether these keys are the piece of sinks, since the other pieces may hold the same tokens. A
        padding query sees everything: its output is never read but must stay finite.
        """
        query, key = query_position[:, None, :, None], key_position[:, None, None, :]
        start = None if self.chunk_start is None else self.chunk_start[:, None, :, None]
        seen = visible(
            query,
            key,
            retrieval=self.retrieval,
            sink=self.sink,
            recent=self.recent,
            window=self.window,
            chunk_start=start,
        )
        if self.sinks is not None:
            seen = seen & ((key < self.sink) == sinks)
        return seen | (query < 0) if self.padded else seen

    def reads(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor, Tensor, bool]]:
        """What the queries [start, stop) can reach, a piece at a time.

        Yields:
            Keys and values [B, G, k, D], their positions [B or 1, k], and whether they are the piece of sinks.
        """
        if self.sinks is not None:
            yield *self.sinks.read(), self.sinks.position, True
        first = self._first_key(start)
        if first is None or first < 0:
            for piece in self.past:
                yield *piece.read(), piece.position, False
        offset = self.keys.shape[2] - self.query_position.shape[1]
        new = slice(max(0, first or 0), offset + stop)
        yield self.keys[:, :, new], self.values[:, :, new], self.key_position[:, new], False

    def pieces(self, start: int, stop: int) -> Iterator[MaskedPiece]:
        """Keys, values [B, G, k, D] and mask [B or 1, 1, stop - start, k] for the queries [start, stop)."""
        query = self.query_position[:, start:stop]
        for keys, values, position, sinks in self.reads(start, stop):
            yield keys, values, self.mask(query, position, sinks=sinks)

    def steady(self, start: int) -> bool:
        """Whether every tile from ``start`` on has the same mask: a full band beyond the sinks, in unpadded rows."""
        first = self._first_key(start)
        # A native window wider than the band hides the sinks only later on.
        sinks_settled = self.window is None or self.reach == self.window
        return first is not None and first >= self.sink and sinks_settled and not self.padded

    def _first_key(self, start: int) -> int | None:
        """Index of the first new key that query ``start`` reaches outside the sinks, negative for older ones."""
        if self.reach is None:
            return None
        return self.keys.shape[2] - self.query_position.shape[1] + start - self.reach + 1


@dataclass(frozen=True)
class Segment:
    """Consecutive slots as they lie in memory: the parts that `duohead.codec` lists, each [B, G, T, width].

    ``first`` is the token, counted with padding, in slot 0 of a store that keeps every token; 0 for a ring.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    first: int = 0


@dataclass(frozen=True)
class StoredView:
    """What the heads of one kind hold once the new tokens are stored too, as encoded, for kernels that decode it.

    Without a ring, slot t of a segment holds token ``first + t``. With one, position p of a row (counted from its first
    real token) sits in slot p if p < sink, else in slot sink + (p - sink) % ring, and newer tokens overwrite older.

    Attributes:
        heads: KV heads of this kind, ascending, as an index tensor [G]; None if all heads are of this kind.
        codecs: names of the storage formats of keys and of values (`duohead.codec`; native dtypes are called fp16,
            bf16, fp32).
        segments: the slots, in the order of tokens; a ring has one segment.
        sink: slots for first tokens; 0 without a ring.
        ring: slots for last tokens; None for heads that keep every token.
        reach: tokens back that a query sees outside the sinks, its own included; None for all.
        window: native sliding window, which limits the sinks as well; None for global attention.
        tokens: tokens stored, padding included, those of this call too; 0-d int64 on the device for static caches.
        padding: left padding of each row [B], int64, or None.
        floor: oldest token in the ring of a static cache, 0-d int64 on the device, which a store updates; or None.
    """

    heads: Tensor | None
    codecs: tuple[str, str]
    segments: tuple[Segment, ...]
    sink: int
    ring: int | None
    reach: int | None
    window: int | None
    tokens: int | Tensor
    padding: Tensor | None
    floor: Tensor | None = None


def pick_heads(tensor: Tensor, heads: Tensor | None) -> Tensor:
    """The given KV heads of [B, G, ...]; the tensor itself when ``heads`` is None."""
    return tensor if heads is None else tensor.index_select(1, heads)


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Kernels are launched on the current device, which need not be that of ``x``."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def left_padding(mask: Tensor) -> Tensor:
    """Padding tokens before the first real token of each row [B], from a 2-D mask [B, tokens] (True: real)."""
    return (mask.cumsum(-1) == 0).sum(-1)

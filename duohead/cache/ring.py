"""Sinks and a ring: the store of heads that keep only the first and the last tokens.

A new token overwrites the oldest one: keys carry their rotary position already and softmax does not care about order,
so nothing is ever shifted. Rows with left padding have their own positions, so the first real tokens of each row are
its sinks. Lengths may be device tensors, for compiled graphs; then every update has a fixed shape.

Shape letters: B rows, G KV heads, T slots, K new tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from duohead.cache.store import Slots
from duohead.cache.view import KeysAndValues, Piece, Segment
from duohead.codec import Encoded, Pair
from duohead.storage import capacity


class RingStore:
    """Token p < sink of a row sits in slot p, token p >= sink in slot sink + (p - sink) % ring.

    Args:
        codec: storage formats.
        like: keys and values whose rows, heads and head sizes to store.
        sink: first tokens to keep.
        ring: last tokens to keep (the policy's window, and what `crop` shall be able to undo).
        max_length: None to grow with the length, else the tokens to allocate for.
    """

    def __init__(
        self,
        codec: Pair,
        like: KeysAndValues,
        *,
        sink: int,
        ring: int,
        max_length: int | None = None,
    ) -> None:
        self.sink = sink
        self.ring = ring
        self.static = max_length is not None
        self.slots = Slots.empty(codec, like, min(capacity(max_length or 0), sink + ring))
        # The oldest token that the ring still holds, counted with padding: what a crop may not need back.
        self.floor: int | Tensor = 0
        if self.static:
            self.floor = torch.zeros((), dtype=torch.int64, device=self.slots.device)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.slots.nbytes

    def reserve(self, tokens: int | Tensor) -> None:
        """Make room for a length of ``tokens``; growth ends at sink + ring slots, and a static ring never grows."""
        if self.static:
            return
        wanted = min(capacity(int(tokens)), self.sink + self.ring)
        if wanted > self.slots.size:
            self.slots.resize(wanted)

    def _layout(self, length: int | Tensor, padding: Tensor | None) -> Tensor:
        """Position that belongs into each slot once ``length`` tokens have come, [B or 1, T]; -1 for none yet."""
        slot = torch.arange(self.slots.size, device=self.slots.device)[None, :]
        real = torch.as_tensor(length, device=self.slots.device).reshape(1, 1)
        real = real if padding is None else real - padding[:, None]
        turns = torch.div(real - 1 - slot, self.ring, rounding_mode="floor").clamp(min=0)
        latest = torch.where(slot < self.sink, slot, slot + self.ring * turns)
        return torch.where(slot < real, latest, -1)

    def _held(self, length: int | Tensor, padding: Tensor | None) -> Tensor:
        """The layout without tokens that have been overwritten and not come back (after a crop)."""
        position = self._layout(length, padding)
        floor = self.floor if padding is None else (self.floor - padding)[:, None]
        return torch.where((position < self.sink) | (position >= floor), position, -1)

    def put_sinks(self, length: int | Tensor, encoded: Encoded, padding: Tensor | None) -> None:
        """Store those of the new tokens that are sinks, ahead of attention, so that sinks are read from one place."""
        count = encoded[0].shape[2]
        if isinstance(length, int) and length >= self.sink + (
            0 if padding is None else int(padding.max())
        ):
            return
        self.reserve(length + count)
        if isinstance(length, int) and padding is None:
            self.slots.write(length, encoded, slice(0, self.sink - length))
        elif count == 1:
            position = self._next(length, padding)
            self.slots.write_rows(
                position.clamp(0, self.sink - 1), (position >= 0) & (position < self.sink), encoded
            )
        else:
            layout = self._layout(length + count, padding)
            self._gather(torch.where(layout < self.sink, layout, -1), length, encoded, padding)

    def append(self, length: int | Tensor, encoded: Encoded, padding: Tensor | None) -> None:
        """Store the new tokens over the oldest ones."""
        count = encoded[0].shape[2]
        self.reserve(length + count)
        if isinstance(length, int) and padding is None:
            first = min(max(length, self.sink, length + count - self.ring), length + count)
            fresh = torch.arange(first, length + count, device=self.slots.device)
            part = tuple(tensor[:, :, first - length :] for tensor in encoded)
            self.slots.write_at(self.sink + (fresh - self.sink) % self.ring, part)
        elif count == 1:
            position = self._next(length, padding)
            slot = torch.where(
                position < self.sink, position, self.sink + (position - self.sink) % self.ring
            )
            self.slots.write_rows(slot.clamp(min=0), position >= 0, encoded)
        else:
            self._gather(self._layout(length + count, padding), length, encoded, padding)
        if isinstance(self.floor, Tensor):
            self.floor.clamp_(min=length + count - self.ring)
        else:
            self.evict(int(length) + count)

    def evict(self, length: int) -> None:
        """Note that tokens up to a length of ``length`` have been stored over older ones (growing form)."""
        self.floor = max(int(self.floor), length - self.ring)

    def segments(self) -> tuple[Segment, ...]:
        """The slots in memory."""
        return (self.slots.segment(),)

    def _next(self, length: int | Tensor, padding: Tensor | None) -> Tensor:
        """Position [B] of one new token of each row; negative for padding."""
        rows = self.slots.keys[0].shape[0]
        position = torch.as_tensor(length, device=self.slots.device).expand(rows)
        return position if padding is None else position - padding

    def _gather(
        self, target: Tensor, length: int | Tensor, encoded: Encoded, padding: Tensor | None
    ) -> None:
        """Put into each slot the new token at position ``target`` [B or 1, T], where it is one of the new ones."""
        count, rows = encoded[0].shape[2], encoded[0].shape[0]
        index = target - length
        index = index if padding is None else index + padding[:, None]
        take = (target >= 0) & (index >= 0) & (index < count)
        self.slots.write_gathered(
            index.clamp(0, count - 1).expand(rows, -1), take.expand(rows, -1), encoded
        )

    def sink_piece(self, length: int | Tensor, padding: Tensor | None, dtype: torch.dtype) -> Piece:
        """The sinks of the first ``length`` tokens."""
        sink = min(self.sink, self._used(length))
        return Piece(
            lambda: self.slots.read(0, sink, dtype), self._layout(length, padding)[:, :sink]
        )

    def pieces(
        self, length: int | Tensor, padding: Tensor | None, dtype: torch.dtype
    ) -> tuple[Piece, ...]:
        """The ring of the first ``length`` tokens, sinks left out."""
        used = self._used(length)
        if used <= self.sink:
            return ()
        position = self._held(length, padding)[:, self.sink : used]
        return (Piece(lambda: self.slots.read(self.sink, used, dtype), position),)

    def _used(self, length: int | Tensor) -> int:
        """Leading slots that may hold one of ``length`` tokens; for a device length all of them."""
        return min(self.slots.size, length) if isinstance(length, int) else self.slots.size

    def lost(self, oldest: int, length: int, padding: Tensor | None) -> bool:
        """Whether a token in [oldest, length), counted with padding and no sink of its row, has been overwritten."""
        first = self.sink if padding is None else self.sink + int(padding.min())
        return max(oldest, first) < min(int(self.floor), length)

    def crop(self, length: int) -> None:
        """Forget the tokens from ``length`` on."""
        if isinstance(self.floor, Tensor):
            self.floor.clamp_(max=length)
        else:
            self.floor = min(self.floor, length)

    def enlarge(self, ring: int, length: int, padding: Tensor | None) -> None:
        """Change to a longer ring, keeping every token held at ``length``."""
        old = tuple(tensor.clone() for tensor in self.slots.keys + self.slots.values)
        shorter, self.ring = self.ring, ring
        self.reserve(length)
        target = self._held(length, padding)
        source = torch.where(target < self.sink, target, self.sink + (target - self.sink) % shorter)
        rows = (old[0].shape[0], -1)
        self.slots.write_gathered(source.clamp(min=0).expand(rows), (target >= 0).expand(rows), old)

    def select_rows(self, index: Tensor) -> None:
        """Replace the rows by ``index``."""
        self.slots.select_rows(index)

"""Encoded keys and values in memory, and the stores of heads that keep every token.

A growing store adds segments instead of reallocating (only its first few thousand tokens are ever copied), so that two
copies of a cache are never alive; a static store keeps its addresses, which compiled graphs need. The store of
streaming heads is in `duohead.cache.ring`.

Shape letters: B rows, G KV heads of one kind, T slots, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from duohead.cache.view import KeysAndValues, Piece, Segment
from duohead.codec import Codec, Encoded, Pair
from duohead.storage import capacity

COPY_LIMIT = 4096
READ_LIMIT = 4096


class Slots:
    """Encoded keys and values of G heads in T slots; every tensor is [B, G, T, width]."""

    def __init__(
        self, codec: Pair, keys: Encoded, values: Encoded, *, dims: tuple[int, int]
    ) -> None:
        self.codec = codec
        self.keys = list(keys)
        self.values = list(values)
        self.dims = dims

    @property
    def device(self) -> torch.device:
        """Where the slots are."""
        return self.keys[0].device

    @classmethod
    def empty(cls, codec: Pair, like: KeysAndValues, slots: int) -> Slots:
        """Zeroed slots for the rows, heads and head sizes of ``like`` (zeros: a masked NaN would still spread)."""
        keys, values = like

        def zeros(storage: Codec, x: Tensor) -> Encoded:
            shape = (x.shape[0], x.shape[1], slots)
            return tuple(
                torch.zeros(*shape, width, dtype=dtype, device=x.device)
                for dtype, width in storage.parts(x.shape[-1])
            )

        return cls(
            codec,
            zeros(codec.keys, keys),
            zeros(codec.values, values),
            dims=(keys.shape[-1], values.shape[-1]),
        )

    @property
    def size(self) -> int:
        """Number of slots."""
        return self.keys[0].shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(tensor.nbytes for tensor in self.keys + self.values)

    def segment(self, first: int = 0) -> Segment:
        """The slots as kernels read them; slot 0 holds token ``first``."""
        return Segment(tuple(self.keys), tuple(self.values), first)

    def tensors(self) -> Iterator[tuple[list[Tensor], int]]:
        """Every stored tensor as (list that holds it, index), so that each can be replaced on its own."""
        for holder in (self.keys, self.values):
            for index in range(len(holder)):
                yield holder, index

    def read(self, start: int, stop: int, dtype: torch.dtype) -> KeysAndValues:
        """Decoded keys and values of slots [start, stop)."""
        parts = tuple(tensor[:, :, start:stop] for tensor in self.keys + self.values)
        return decode_pair(self.codec, parts, dims=self.dims, dtype=dtype)

    def write(self, start: int, encoded: Encoded, source: slice = slice(None)) -> None:
        """Store consecutive tokens from slot ``start`` on."""
        for tensor, new in zip(self.keys + self.values, encoded, strict=True):
            part = new[:, :, source]
            tensor[:, :, start : start + part.shape[2]] = part

    def write_at(self, slot: Tensor, encoded: Encoded) -> None:
        """Store tokens at the slots ``slot`` [K], the same for every row."""
        for tensor, new in zip(self.keys + self.values, encoded, strict=True):
            tensor.index_copy_(2, slot, new)

    def write_rows(self, slot: Tensor, keep: Tensor, encoded: Encoded) -> None:
        """Store one token a row at ``slot`` [B]; a row where ``keep`` [B] is False stays as it was."""
        row = torch.arange(slot.shape[0], device=slot.device)
        for tensor, new in zip(self.keys + self.values, encoded, strict=True):
            old = tensor[row, :, slot]
            tensor[row, :, slot] = torch.where(keep[:, None, None], new[:, :, 0], old)

    def write_gathered(self, source: Tensor, take: Tensor, encoded: Encoded) -> None:
        """Slot t of row b becomes new token ``source[b, t]`` where ``take[b, t]``; both are [B, T]."""
        for tensor, new in zip(self.keys + self.values, encoded, strict=True):
            index = source[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
            tensor.copy_(torch.where(take[:, None, :, None], new.gather(2, index), tensor))

    def clear(self) -> None:
        """Zero every slot in place."""
        for tensor in self.keys + self.values:
            tensor.zero_()

    def resize(self, slots: int) -> None:
        """Change the number of slots, keeping the first ones; one tensor is copied at a time."""
        for holder, index in self.tensors():
            old = holder[index]
            new = old.new_zeros(old.shape[0], old.shape[1], slots, old.shape[3])
            kept = min(slots, old.shape[2])
            new[:, :, :kept] = old[:, :, :kept]
            holder[index] = new

    def select_rows(self, index: Tensor) -> None:
        """Replace the rows by ``index`` [rows], repeats allowed; one tensor at a time, in place if the count stays."""
        for holder, place in self.tensors():
            old = holder[place]
            new = old.index_select(0, index)
            if len(index) == old.shape[0]:
                old.copy_(new)
            else:
                holder[place] = new


def encode_pair(codec: Pair, keys: Tensor, values: Tensor) -> Encoded:
    """New tokens [B, G, K, D] in storage form, the parts of the keys before those of the values."""
    return *codec.keys.encode(keys.detach()), *codec.values.encode(values.detach())


def decode_pair(
    codec: Pair, encoded: Encoded, *, dims: tuple[int, int], dtype: torch.dtype
) -> KeysAndValues:
    """Inverse of `encode_pair` for key and value head sizes ``dims``."""
    split = len(codec.keys.parts(dims[0]))
    keys = codec.keys.decode(encoded[:split], dims[0], dtype)
    return keys, codec.values.decode(encoded[split:], dims[1], dtype)


def positions(start: int, stop: int, padding: Tensor | None, device: torch.device) -> Tensor:
    """Logical positions [B or 1, stop - start] of tokens counted with padding; -1 for padding."""
    position = torch.arange(start, stop, device=device)[None, :]
    return position if padding is None else (position - padding[:, None]).clamp(min=-1)


class StaticStore:
    """Every token of G heads in slots with fixed addresses; lengths may be device tensors."""

    def __init__(self, codec: Pair, like: KeysAndValues, *, max_length: int) -> None:
        self.slots = Slots.empty(codec, like, capacity(max_length))

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.slots.nbytes

    def append(self, length: int | Tensor, encoded: Encoded, padding: Tensor | None) -> None:
        """Store tokens from ``length`` on."""
        count = encoded[0].shape[2]
        self.slots.write_at(torch.arange(count, device=self.slots.device) + length, encoded)

    def pieces(
        self, length: int | Tensor, padding: Tensor | None, dtype: torch.dtype
    ) -> tuple[Piece, ...]:
        """The stored tokens [0, length); for a device length every slot, those beyond it marked empty."""
        if isinstance(length, int):
            return _pieces(self.slots, 0, length, padding, dtype)
        used = self.slots.size
        position = positions(0, used, padding, self.slots.device)
        slot = torch.arange(used, device=self.slots.device)[None, :]
        return (
            Piece(_reader(self.slots, 0, used, dtype), torch.where(slot < length, position, -1)),
        )

    def whole(self, tokens: int | Tensor) -> KeysAndValues | None:
        """The first ``tokens`` slots as they are, for a lossless codec; None for a device length."""
        return _whole(self.slots, tokens) if isinstance(tokens, int) else None

    def segments(self) -> tuple[Segment, ...]:
        """The slots in memory."""
        return (self.slots.segment(),)

    def select_rows(self, index: Tensor) -> None:
        """Replace the rows by ``index``."""
        self.slots.select_rows(index)


class GrowingStore:
    """Every token of G heads, in segments (`capacity` slots in all, so the size depends on the length alone)."""

    def __init__(self, codec: Pair, like: KeysAndValues) -> None:
        self._codec = codec
        keys, values = like
        # Not slices of the first chunk: those would keep all of it in memory.
        self._like = (
            keys.new_empty(*keys.shape[:2], 0, keys.shape[3]),
            values.new_empty(*values.shape[:2], 0, values.shape[3]),
        )
        self._segments: list[Slots] = [Slots.empty(codec, like, 0)]

    @property
    def slots(self) -> int:
        """Slots allocated."""
        return sum(segment.size for segment in self._segments)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(segment.nbytes for segment in self._segments)

    def append(self, start: int | Tensor, encoded: Encoded, padding: Tensor | None) -> None:
        """Store tokens from ``start`` on, growing as needed."""
        start = int(start)
        count = encoded[0].shape[2]
        self.reserve(start + count)
        first = 0
        for segment in self._segments:
            last = first + segment.size
            low, high = max(start, first), min(start + count, last)
            if low < high:
                segment.write(low - first, encoded, slice(low - start, high - start))
            first = last

    def reserve(self, tokens: int) -> None:
        """Make room for a length of ``tokens``."""
        wanted, have = capacity(tokens), self.slots
        if wanted <= have:
            return
        if wanted <= COPY_LIMIT or have == 0:
            self._segments[0].resize(wanted)
        else:
            self._segments.append(Slots.empty(self._codec, self._like, wanted - have))

    def pieces(
        self, length: int | Tensor, padding: Tensor | None, dtype: torch.dtype
    ) -> tuple[Piece, ...]:
        """The stored tokens [0, length) in pieces of bounded size."""
        found: list[Piece] = []
        first, length = 0, int(length)
        for segment in self._segments:
            found += _pieces(segment, first, length - first, padding, dtype)
            first += segment.size
        return tuple(found)

    def whole(self, tokens: int | Tensor) -> KeysAndValues | None:
        """The first ``tokens`` slots as they are, for a lossless codec, if they are in one segment."""
        return _whole(self._segments[0], int(tokens)) if len(self._segments) == 1 else None

    def segments(self) -> tuple[Segment, ...]:
        """The slots in memory."""
        found, first = [], 0
        for slots in self._segments:
            found.append(slots.segment(first))
            first += slots.size
        return tuple(found)

    def select_rows(self, index: Tensor) -> None:
        """Replace the rows by ``index``."""
        keys, values = (x.new_empty(len(index), *x.shape[1:]) for x in self._like)
        self._like = (keys, values)
        for segment in self._segments:
            segment.select_rows(index)


def _whole(slots: Slots, tokens: int) -> KeysAndValues:
    return slots.keys[0][:, :, :tokens], slots.values[0][:, :, :tokens]


def _pieces(
    slots: Slots, first: int, tokens: int, padding: Tensor | None, dtype: torch.dtype
) -> tuple[Piece, ...]:
    """The first ``tokens`` slots, which hold the tokens from ``first`` on, READ_LIMIT at a time."""
    used = min(slots.size, tokens)
    return tuple(
        Piece(
            _reader(slots, start, min(start + READ_LIMIT, used), dtype),
            positions(first + start, first + min(start + READ_LIMIT, used), padding, slots.device),
        )
        for start in range(0, used, READ_LIMIT)
    )


def _reader(slots: Slots, start: int, stop: int, dtype: torch.dtype) -> Callable[[], KeysAndValues]:
    return lambda: slots.read(start, stop, dtype)

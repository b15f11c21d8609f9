"""Where tokens live: stores and rings against a plain list, for host lengths and for device lengths."""

import random

import pytest
import torch
from torch import Tensor

from duohead import codec
from duohead.cache.ring import RingStore
from duohead.cache.store import COPY_LIMIT, READ_LIMIT, GrowingStore, StaticStore, encode_pair
from duohead.storage import capacity

RAW = codec.pair("auto", native=torch.float32)
HEADS, DIM = 2, 4


def like(batch: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(batch, HEADS, 0, DIM), torch.zeros(batch, HEADS, 0, DIM + 2)


def tokens(stamps: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B, G, K, D] of tokens that carry the numbers ``stamps`` [B, K], told apart by head and kind."""
    head = torch.arange(HEADS)[None, :, None, None] * 0.25
    keys = stamps[:, None, :, None].float() + head
    return keys.expand(-1, -1, -1, DIM).clone(), (keys + 0.5).expand(-1, -1, -1, DIM + 2).clone()


def contents(pieces, row: int) -> dict[int, float]:
    """Position -> stamp of what the pieces show of a row, after checking that heads, keys and values agree."""
    found: dict[int, float] = {}
    for piece in pieces:
        keys, values = piece.read()
        assert keys.shape[2] == values.shape[2] == piece.position.shape[1]
        position = piece.position.expand(keys.shape[0], -1)[row]
        slots = (position >= 0).nonzero()[:, 0]
        stamps = keys[row, 0, slots, 0]
        expected, expected_values = tokens(stamps[None, :])
        assert torch.equal(keys[row][:, slots], expected[0])
        assert torch.equal(values[row][:, slots], expected_values[0])
        shown = dict(zip(position[slots].tolist(), stamps.tolist(), strict=True))
        assert len(shown) == len(slots), "a token is shown twice"
        assert not found.keys() & shown.keys(), "a token is shown twice"
        found |= shown
    return found


class Program:
    """A random history of one store, and beside it the list of tokens that each row has."""

    def __init__(self, seed: int, make, *, device_length: bool) -> None:
        self.draw = random.Random(seed)
        self.batch = self.draw.choice((1, 3))
        padded = self.draw.random() < 0.5
        self.padding = (
            torch.tensor([self.draw.randint(0, 9) for _ in range(self.batch)]) if padded else None
        )
        self.store = make(like(self.batch))
        self.device_length = device_length
        self.rows: list[list[int]] = [[] for _ in range(self.batch)]
        self.longest = self.stamp = 0

    def length(self) -> int | Tensor:
        return torch.tensor(len(self.rows[0])) if self.device_length else len(self.rows[0])

    def append(self, count: int) -> None:
        stamps = (
            torch.arange(self.stamp, self.stamp + count)[None, :]
            + torch.arange(self.batch)[:, None] * 10000
        )
        encoded = encode_pair(RAW, *tokens(stamps))
        if isinstance(self.store, RingStore):
            self.store.put_sinks(self.length(), encoded, self.padding)
        self.store.append(self.length(), encoded, self.padding)
        for row, fresh in zip(self.rows, stamps.tolist(), strict=True):
            row += fresh
        self.stamp += count
        self.longest = max(self.longest, len(self.rows[0]))

    def select(self) -> None:
        index = [
            self.draw.randrange(self.batch)
            for _ in range(self.draw.choice((self.batch, self.batch, 2)))
        ]
        self.store.select_rows(torch.tensor(index))
        self.rows = [list(self.rows[row]) for row in index]
        self.padding = None if self.padding is None else self.padding[index]
        self.batch = len(index)

    def real(self, row: int) -> dict[int, int]:
        """Position -> stamp of every token of a row that is no padding."""
        skipped = 0 if self.padding is None else int(self.padding[row])
        return {
            place - skipped: stamp for place, stamp in enumerate(self.rows[row]) if place >= skipped
        }

    def shown(self, row: int, dtype=torch.float32) -> dict[int, float]:
        return contents(self.store.pieces(self.length(), self.padding, dtype), row)


def rings(static: bool, sink: int, ring: int):
    return lambda pair: RingStore(
        RAW, pair, sink=sink, ring=ring, max_length=400 if static else None
    )


def full_store(static: bool):
    if static:
        return lambda pair: StaticStore(RAW, pair, max_length=300)
    return lambda pair: GrowingStore(RAW, pair)


FORMS = [
    pytest.param(False, False, id="growing"),
    pytest.param(True, False, id="static"),
    pytest.param(True, True, id="device-length"),
]


@pytest.mark.parametrize(("static", "device_length"), FORMS)
@pytest.mark.parametrize(("sink", "ring"), [(0, 1), (0, 6), (1, 5), (4, 16), (20, 3)])
def test_a_ring_shows_exactly_its_sinks_and_last_tokens(sink, ring, static, device_length) -> None:
    for seed in range(6):
        run = Program(seed, rings(static, sink, ring), device_length=device_length)
        while len(run.rows[0]) < 120:
            run.append(run.draw.choice((1, 1, 2, 5, 17, 40)))
            if run.draw.random() < 0.2:
                run.select()
            length = len(run.rows[0])
            for row in range(run.batch):
                real = run.real(row)
                sinks = {p: s for p, s in real.items() if p < sink}
                last = {p: s for p, s in real.items() if p >= max(sink, max(real) + 1 - ring)}
                piece = run.store.sink_piece(run.length(), run.padding, torch.float32)
                assert contents([piece], row) == sinks
                assert run.shown(row) == last
            wanted = min(capacity(400 if static else length), sink + ring)
            assert run.store.slots.size == wanted
            assert run.store.nbytes == run.batch * HEADS * wanted * (2 * DIM + 2) * 4


@pytest.mark.parametrize(("static", "device_length"), FORMS)
def test_a_cropped_ring_shows_what_is_left_and_says_what_is_lost(static, device_length) -> None:
    sink, ring = 3, 9
    for seed in range(30):
        run = Program(seed, rings(static, sink, ring), device_length=device_length)
        alive: set[int] = set()  # places whose token the ring must still have
        while run.stamp < 150:
            before = len(run.rows[0])
            count = run.draw.choice((1, 1, 3, 12))
            run.append(count)
            alive = {
                place
                for place in alive | set(range(before, before + count))
                if place >= before + count - ring
            }
            kept = max(0, len(run.rows[0]) - run.draw.randint(0, 8))
            first = sink + (0 if run.padding is None else int(run.padding.min()))
            for oldest in range(max(0, kept - ring), kept + 1):
                needed = set(range(max(oldest, first), kept))
                assert run.store.lost(oldest, kept, run.padding) == bool(needed - alive)
            run.store.crop(kept)
            run.rows = [row[:kept] for row in run.rows]
            alive = {place for place in alive if place < kept}
            for row in range(run.batch):
                skipped = 0 if run.padding is None else int(run.padding[row])
                real = run.real(row)
                expected = {p: s for p, s in real.items() if p >= sink and p + skipped in alive}
                assert run.shown(row) == expected
                piece = run.store.sink_piece(run.length(), run.padding, torch.float32)
                assert contents([piece], row) == {p: s for p, s in real.items() if p < sink}


def test_a_ring_can_be_enlarged_without_losing_what_it_holds() -> None:
    for seed in range(10):
        run = Program(seed, rings(False, 3, 8), device_length=False)
        for _ in range(run.draw.randint(1, 20)):
            run.append(run.draw.choice((1, 5)))
        held = [run.shown(row) for row in range(run.batch)]
        run.store.enlarge(20, len(run.rows[0]), run.padding)
        assert [run.shown(row) for row in range(run.batch)] == held
        for _ in range(4):
            run.append(1)
        for row in range(run.batch):
            real = run.real(row)
            fresh = [p for p in sorted(real)[-4:] if p >= 3]
            assert run.shown(row) == {p: real[p] for p in {*held[row], *fresh}}


@pytest.mark.parametrize("form", ["growing", "static", "device-length"])
def test_a_store_shows_every_token(form) -> None:
    for seed in range(4):
        run = Program(seed, full_store(form != "growing"), device_length=form == "device-length")
        while len(run.rows[0]) < 250:
            run.append(run.draw.choice((1, 2, 16, 45)))
            if run.draw.random() < 0.3:
                run.select()
            if run.draw.random() < 0.2:
                kept = run.draw.randint(1, len(run.rows[0]))
                run.rows = [row[:kept] for row in run.rows]
            for row in range(run.batch):
                assert run.shown(row) == run.real(row)


def test_a_growing_store_adds_segments_and_copies_only_while_it_is_small() -> None:
    store = GrowingStore(RAW, like(1))
    length = 0
    for count in (1, 100, 3000, 1, 5000, 1, 9000, 4000, 1):
        fixed = [segment.keys[0].data_ptr() for segment in store.segments()]
        encoded = encode_pair(RAW, *tokens(torch.arange(length, length + count)[None, :]))
        store.append(length, encoded, None)
        if length >= COPY_LIMIT:
            assert [
                segment.keys[0].data_ptr() for segment in store.segments()[: len(fixed)]
            ] == fixed
        length += count
        assert store.slots == capacity(length)
        pieces = store.pieces(length, None, torch.float32)
        assert sum(piece.position.shape[1] for piece in pieces) == length
        assert max(piece.position.shape[1] for piece in pieces) <= READ_LIMIT
        assert all(
            keys[0, 0, :, 0].equal(piece.position[0].float())
            for piece in pieces
            for keys in [piece.read()[0]]
        )
    assert len(store.segments()) > 2


def test_a_growing_store_does_not_keep_its_first_chunk_alive() -> None:
    chunk = torch.zeros(1, HEADS, 1000, DIM)
    store = GrowingStore(RAW, (chunk[:, :, :0], chunk[:, :, :0]))
    held = {tensor.untyped_storage().data_ptr() for tensor in store._like}
    assert chunk.untyped_storage().data_ptr() not in held


def test_a_static_store_keeps_its_addresses() -> None:
    stores = [StaticStore(RAW, like(2), max_length=100), rings(True, 2, 10)(like(2))]
    for store in stores:
        before = [tensor.data_ptr() for tensor in store.slots.keys + store.slots.values]
        for start in (0, 30, 31):
            store.append(
                start, encode_pair(RAW, *tokens(torch.zeros(2, 30 if start == 0 else 1))), None
            )
        store.select_rows(torch.tensor([1, 0]))
        assert [tensor.data_ptr() for tensor in store.slots.keys + store.slots.values] == before


@pytest.mark.parametrize("name", ["bf16", "fp8", "int8", "int4", "fp8/int4", "int4-hadamard/auto"])
def test_what_is_read_is_the_round_trip_of_what_was_written(name) -> None:
    storage = codec.pair(name, native=torch.float32)
    keys, values = torch.randn(2, HEADS, 70, 64), torch.randn(2, HEADS, 70, 32)
    pair = keys[:, :, :0], values[:, :, :0]
    full, ring = GrowingStore(storage, pair), RingStore(storage, pair, sink=4, ring=16)
    for start, stop in ((0, 33), (33, 34), (34, 70)):
        encoded = encode_pair(storage, keys[:, :, start:stop], values[:, :, start:stop])
        full.append(start, encoded, None)
        ring.append(start, encoded, None)
    for store in (full, ring):
        (piece,) = store.pieces(70, None, torch.float32)
        read_keys, read_values = piece.read()
        seen_keys, seen_values = storage.round_trip(keys, values)
        assert torch.equal(read_keys, seen_keys[:, :, piece.position[0]])
        assert torch.equal(read_values, seen_values[:, :, piece.position[0]])

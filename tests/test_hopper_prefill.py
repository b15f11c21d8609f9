"""The own Hopper kernel: its arithmetic on the CPU, what it is given, and on a GPU its results."""

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from oracle import Inputs, hold, inputs, make_policy, split
from torch import Tensor

from duohead.attention import hopper_launch, hopper_prefill
from duohead.cache import DuoLayer
from duohead.cache.direct import direct_views
from duohead.policy import HeadPolicy

UNIT = hopper_launch.UNIT
HARNESS = """
#include <algorithm>
using std::min; using std::max; using u32 = unsigned int;
#define __device__
#define __forceinline__ inline
inline int load(const long long* p) { return (int)*p; }
constexpr int TW = 64 / R, TT = 2 * TW, UNIT = 16, UB = BN / UNIT;
@part@
// What the rows of one tile see and where it comes from: origin[unit], seen[row][key of the tile], full[unit].
extern "C" int plan(int number, const Numbers* n, int* place, int* origin, char* seen, char* full) {
  Tile tile;
  tile.set(number, *n);
  place[0] = tile.token; place[1] = tile.group; place[2] = tile.row; place[3] = tile.blocks; place[4] = tile.band_units;
  place[5] = tile.head; place[6] = tile.low; place[7] = tile.start;
  for (int unit = 0; unit < tile.units; ++unit) origin[unit] = tile.origin(unit);
  int width = tile.blocks * BN;
  for (int token = 0; token < TT; ++token) {
    Row row;
    row.set(tile, tile.token + token, *n);
    for (int at = 0; at < width; ++at) seen[token * width + at] = row.span(at / UNIT * UNIT).has(at);
  }
  Row all = common(tile, *n);
  for (int unit = 0; unit < width / UNIT; ++unit) full[unit] = all.whole(unit / UB) >> unit % UB & 1;
  return tile.units;
}
"""


@pytest.fixture(scope="session")
def arithmetic(tmp_path_factory: pytest.TempPathFactory):
    """The kernel's own arithmetic for a group and a block size, as a function for the CPU."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    part = (Path(hopper_prefill.__file__).parent / "hopper_tiles.cu").read_text(encoding="utf-8")
    folder = tmp_path_factory.mktemp("band")

    def build(group: int, block: int):
        (folder / "plan.cpp").write_text(HARNESS.replace("@part@", part))
        library = folder / f"plan{group}_{block}.so"
        command = [compiler, "-O1", "-shared", "-fPIC", f"-DR={group}", f"-DBN={block}"]
        subprocess.run([*command, "-o", library, folder / "plan.cpp"], check=True)
        return ctypes.CDLL(str(library)).plan

    return build


def planned(plan, number: int, numbers: hopper_launch.Numbers) -> tuple:
    """Of one tile: how many units, its place, and what the C function wrote into the rest."""
    place, origin = (ctypes.c_int * 8)(), (ctypes.c_int * 4096)()
    seen, full = ctypes.create_string_buffer(1 << 20), ctypes.create_string_buffer(4096)
    units = plan(number, ctypes.byref(numbers), place, origin, seen, full)
    return units, list(place), list(origin[:units]), seen.raw, full.raw


def check_tiles(
    plan, numbers: hopper_launch.Numbers, last: Tensor, skipped: Tensor, group: int, block: int
) -> None:
    """Every row of every tile sees each key that it must see once, and none that it must not."""
    tokens = 2 * (64 // group)
    met = set()
    for number in range(numbers.tiles * numbers.kv_heads * numbers.rows):
        units, place, origin, seen, full = planned(plan, number, numbers)
        token, kv_head, row, blocks, band_units, head = place[:6]
        assert head == 7 - kv_head
        met.add((token, kv_head, row))
        width = blocks * block
        found = torch.frombuffer(bytearray(seen[: tokens * width]), dtype=torch.uint8)
        found = found.reshape(tokens, width).bool()[: numbers.queries - token]
        keys = torch.tensor(origin)[:, None] + torch.arange(UNIT)
        is_sink = (torch.arange(units) >= band_units)[:, None].expand(-1, UNIT).flatten()
        keys = torch.cat([keys.flatten(), torch.full((width - units * UNIT,), -(1 << 30))])
        is_sink = torch.cat([is_sink, torch.zeros(width - units * UNIT, dtype=torch.bool)])
        assert not found[:, units * UNIT :].any(), "nothing beyond what was fetched"
        assert int(keys[: band_units * UNIT].min()) >= -numbers.ring
        own = (torch.arange(len(found)) + token + numbers.keys - numbers.queries)[:, None]
        position = own + last[row] - (numbers.keys - 1)

        def in_band(key: Tensor, own: Tensor = own, row: int = row) -> Tensor:
            new = key + last[row] - (numbers.keys - 1) >= numbers.bound
            held = key >= skipped[row] - numbers.ring
            return (key <= own) & (key > own - numbers.reach) & torch.where(key < 0, held, new)

        must = torch.where(is_sink, (keys < numbers.sinks) & (keys <= position), in_band(keys))
        assert torch.equal(found, must)
        # Each visible key is there once: as many as the definition has.
        band = in_band(torch.arange(-numbers.ring, int(own.max()) + 1)).sum(1)
        assert torch.equal(found.sum(1), band + position[:, 0].add(1).clamp(0, numbers.sinks))
        for index in range(width // UNIT):
            if full[index]:
                assert found[:, index * UNIT : (index + 1) * UNIT].all()
    tiles = range(0, numbers.queries, tokens)
    assert met == set(itertools.product(tiles, range(numbers.kv_heads), range(numbers.rows)))


@pytest.mark.parametrize(("group", "block"), [(4, 144), (1, 128), (7, 96), (64, 160)])
def test_every_row_sees_what_it_must_and_nothing_else(arithmetic, group: int, block: int) -> None:
    plan = arithmetic(group, block)
    heads = torch.tensor([7, 6])
    for sinks, reach, queries in itertools.product((0, 4, 128), (1, 63, 256), (1, 150)):
        tiles = -(-queries // (2 * (64 // group)))
        # Rows: at the start of a text, with padding, beyond a ring, nothing but padding; tiles in both orders.
        last = torch.tensor([queries - 1, queries - 1 - queries // 2, 999 + queries, -1])
        skipped = torch.tensor([48, 48, 11, 48])
        for more in (0, 5):
            numbers = hopper_launch.Numbers(
                last.data_ptr(), skipped.data_ptr(), heads.data_ptr(), 1, 1,
                queries, queries + more, sinks, sinks + more, reach, 48, 2, 4, tiles, 3 if more else 0, 1.0,
            )  # fmt: skip
            check_tiles(plan, numbers, last, skipped, group, block)


def test_most_of_a_long_text_needs_no_mask(arithmetic) -> None:
    plan = arithmetic(4, 144)
    last = torch.tensor([4095])
    numbers = hopper_launch.Numbers(
        last.data_ptr(), None, None, 0, 0, 4096, 4096, 128, 128, 256, 0, 1, 1, 128, 0, 1.0
    )
    units, *_, full = planned(plan, 100, numbers)
    assert units == (32 + 256 + 128) // UNIT
    # The oldest 32 keys of the band, the tile's own 32 and what the last block has beyond the sinks.
    assert list(full[:27]) == [0] * 2 + [1] * 14 + [0] * 2 + [1] * 8 + [0]


def begins(arithmetic, reads: hopper_launch.Reads, queries: int) -> list[list[int]]:
    """By row: index of the first key that is a token and no sink, the first new one being 0; position of query 0."""
    shape = hopper_launch.Shape(64, 1, 96, False)
    numbers = hopper_launch.numbers(shape, reads, queries=queries, heads=None, scale=1.0)
    count = numbers.tiles * numbers.kv_heads * numbers.rows
    places = [planned(arithmetic(1, 96), number, numbers)[1] for number in range(count)]
    return [list(x) for _, *x in sorted({(place[2], *place[6:]) for place in places})]


def test_the_block_size_wastes_little() -> None:
    x = inputs(600, kv_heads=1, groups=4, dim=128)
    for sink, recent in ((128, 256), (64, 256), (0, 1024), (4, 8192)):
        policy = make_policy("none", 1, sink=sink, recent=recent)
        (view,) = direct_views(policy, 0, x.keys, x.values, queries=600, mask=None)
        for group in (1, 4, 7, 8):
            reads = hopper_prefill.gather(view, 600)
            block = hopper_prefill.block_for(reads, group, 128)
            tokens = 2 * (64 // group)
            keys = -(-(tokens + recent - 1) // UNIT) * UNIT + -(-sink // UNIT) * UNIT
            assert -(-keys // block) * block <= 1.2 * keys + UNIT
            shape = hopper_launch.Shape(128, group, block, False)
            assert shape.shared_bytes <= 227 * 1024


def test_the_ring_comes_in_order_and_its_first_token_is_found(arithmetic) -> None:
    policy = make_policy("none", 1, sink=2, recent=20)
    x = inputs(60, kv_heads=1, dim=8)
    layer = DuoLayer(policy, 0)
    for part in (slice(0, 50), slice(50, 60)):
        handle, _ = layer.update(x.keys[:, :, part], x.values[:, :, part])
        (view,) = handle.open(None)
        if part.start == 0:
            handle.commit()
    reads = hopper_prefill.gather(view, 10)
    held = view.past[0].position.shape[1]
    assert reads.ring[0].shape[2] % UNIT == 0
    torch.testing.assert_close(reads.ring[0][:, :, -held:], x.keys[:, :, 50 - held : 50])
    torch.testing.assert_close(reads.ring[1][:, :, -held:], x.values[:, :, 50 - held : 50])
    torch.testing.assert_close(reads.sinks[0], x.keys[:, :, :2])
    assert begins(arithmetic, reads, 10) == [[-held, 50]]


def test_padding_and_sinks_are_no_part_of_the_band(arithmetic) -> None:
    policy = make_policy("none", 1, sink=4, recent=20)
    x = inputs(40, kv_heads=1, dim=8, padding=(0, 7, 38))
    (view,) = direct_views(policy, 0, x.keys, x.values, queries=40, mask=x.mask)
    reads = hopper_prefill.gather(view, 40)
    assert begins(arithmetic, reads, 40) == [[4, 0], [11, -7], [40, -38]]
    assert reads.ring is None


@pytest.mark.parametrize("padding", [None, (0, 7, 45)])
def test_slots_of_a_static_ring_that_are_empty_are_no_part_of_the_band(arithmetic, padding) -> None:
    policy = make_policy("none", 1, sink=4, recent=20)
    x = inputs(60, kv_heads=1, dim=8, padding=padding or (0, 0, 0))
    layer = DuoLayer(policy, 0, max_length=256)
    for start, stop in ((0, 9), (9, 48), (48, 60)):
        handle, _ = layer.update(x.keys[:, :, start:stop], x.values[:, :, start:stop])
        (view,) = handle.open(None if padding is None else x.mask[:, :stop])
        got = begins(arithmetic, hopper_prefill.gather(view, stop - start), stop - start)
        handle.commit()
        for pad, (low, first) in zip(padding or (0,) * 3, got, strict=True):
            # The band begins at the oldest token beyond the sinks that the ring still holds, if there is one.
            assert first == max(stop - pad, 0) - (stop - start)
            assert low == min(max(pad + 4, start - 20), stop) - start


def view_of(
    dtype: torch.dtype = torch.bfloat16, dim: int = 64, window: int | None = None, **fields
):
    policy = HeadPolicy.from_heads(retrieval=[[]], num_kv_heads=2, sink=4, recent=8, **fields)
    x = inputs(8, kv_heads=2, dim=dim, dtype=dtype)
    view = direct_views(policy, 0, x.keys, x.values, queries=8, mask=None)[0]
    return x, view


@pytest.mark.parametrize(
    ("fields", "options", "reason"),
    [
        ({"dtype": torch.float32}, {}, "fp16 and bf16"),
        ({"dim": 96}, {}, "one of \\[64, 128\\]"),
        ({"visibility": "chunk"}, {}, "visibility='chunk'"),
        ({}, {"softcap": 3.0}, "does not cap"),
    ],
)
def test_calls_that_the_kernel_does_not_do_are_refused(fields, options, reason: str) -> None:
    x, view = view_of(**fields)
    with pytest.raises(ValueError, match=reason):
        hopper_prefill.attend(
            x.query, view, torch.empty(1, 8, 2, x.query.shape[-1]), scale=1.0, **options
        )


def test_retrieval_heads_read_storage_in_place_or_a_decoded_past_in_order(arithmetic) -> None:
    for dtype in ("auto", "int8"):
        policy = make_policy("all", 1, retrieval_dtype=dtype)
        x = inputs(60, kv_heads=1, dim=8, padding=(0, 7, 55))
        layer = DuoLayer(policy, 0)
        for part in (slice(0, 50), slice(50, 60)):
            handle, _ = layer.update(x.keys[:, :, part], x.values[:, :, part])
            (view,) = handle.open(x.mask[:, : part.stop])
            handle.commit()
        reads = hopper_prefill.gather(view, 10)
        assert reads.sinks is None
        assert reads.reach == hopper_launch.EVERYTHING
        if dtype == "auto":
            assert reads.ring is None
            assert reads.new[0].data_ptr() == view.whole[0].data_ptr()
            assert begins(arithmetic, reads, 10) == [[0, 50], [7, 43], [55, -5]]
        else:
            assert reads.ring[0].shape[2] == 64
            assert torch.equal(reads.ring[0][:, :, 14:], view.past[0].read()[0])
            assert not reads.ring[0][:, :, :14].any()
            assert begins(arithmetic, reads, 10) == [[-50, 50], [-43, 43], [5, -5]]


def test_a_past_that_would_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy("all", 1, retrieval_dtype="int8")
    x = inputs(60, kv_heads=1, dim=64, dtype=torch.bfloat16)
    layer = DuoLayer(policy, 0)
    for part in (slice(0, 50), slice(50, 60)):
        handle, _ = layer.update(x.keys[:, :, part], x.values[:, :, part])
        (view,) = handle.open(None)
        handle.commit()
    options = {"softcap": None, "sink_logits": None}
    assert hopper_prefill.unfit(x.query[:, :, 50:], view, **options) is None
    monkeypatch.setattr(hopper_prefill, "PAST_BYTES", 50 * 2 * 64 * 2 - 1)
    assert "decoded" in hopper_prefill.unfit(x.query[:, :, 50:], view, **options)


def test_gradients_and_cpus_are_refused() -> None:
    x, view = view_of()
    assert "Hopper" in hopper_prefill.supports(x.query, view)
    query = x.query.requires_grad_()
    assert "no_grad" in hopper_prefill.unfit(query, view, softcap=None, sink_logits=None)


def test_the_source_is_complete_for_every_shape() -> None:
    for dim, group in ((64, 1), (128, 7)):
        text = hopper_launch.source(hopper_launch.Shape(dim, group, 96, True))
        assert "@instructions@" not in text
        assert f"m64n{dim}k16.f32.f16.f16" in text
        assert "m64n96k16.f32.f16.f16" in text


@pytest.mark.parametrize("scale", [-0.5, 0.0, 0.25])
def test_scores_stay_the_same_with_a_positive_scale(scale: float) -> None:
    query, keys = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 8, 7)
    other, positive = hopper_prefill._positive(query, scale)
    assert positive > 0
    assert torch.equal(other @ keys * positive, query @ keys * scale)


@pytest.fixture
def hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")


def on_gpu(policy: HeadPolicy, x: Inputs, chunks, **options) -> Tensor:
    """Outputs chunk by chunk through one cache layer; with ``only``, those of one kind, the other heads stay NaN."""
    only, max_length = options.pop("only", None), options.pop("max_length", None)
    layer, start, outs = DuoLayer(policy, 0, max_length=max_length), 0, []
    mask = None if x.mask is None else x.mask.cuda()
    query, keys, values = (t.cuda() for t in (x.query, x.keys, x.values))
    for count in chunks:
        part = slice(start, start + count)
        handle, _ = layer.update(keys[:, :, part], values[:, :, part])
        out = query.new_full((query.shape[0], count, *query.shape[1::2]), torch.nan)
        for view in handle.open(None if mask is None else mask[:, : start + count]):
            if only is None or view.retrieval == (only == "retrieval"):
                hopper_prefill.attend(
                    query[:, :, part], view, out, kv_heads=keys.shape[1],
                    **{"scale": query.shape[-1] ** -0.5} | options,
                )  # fmt: skip
        handle.commit()
        outs.append(out)
        start += count
    return torch.cat(outs, 1).cpu()


@pytest.mark.gpu
@pytest.mark.parametrize("padding", [None, (0, 77, 1500)], ids=["plain", "padded"])
@pytest.mark.parametrize("chunk", [33, 1000])
@pytest.mark.parametrize(
    ("group", "dim", "dtype"),
    [
        (1, 128, torch.bfloat16),
        (4, 128, torch.bfloat16),
        (4, 64, torch.float16),
        (7, 128, torch.float16),
        (8, 64, torch.bfloat16),
        (3, 128, torch.bfloat16),
    ],
)
@pytest.mark.parametrize(("sink", "recent"), [(4, 63), (128, 256), (0, 1000)])
def test_the_kernel_keeps_the_error_budget(
    hopper, sink: int, recent: int, group: int, dim: int, dtype, chunk, padding
) -> None:
    policy = make_policy("alternating", 2, sink=sink, recent=recent)
    length = 300 if chunk == 33 else 1700
    if chunk == 33 and padding:
        padding = (0, 77, 290)
    x = inputs(length, kv_heads=2, groups=group, dim=dim, padding=padding, dtype=dtype)
    hold(on_gpu(policy, x, split(length, chunk)), policy, x)


@pytest.mark.gpu
def test_sink_logits_take_their_share_and_other_heads_stay(hopper) -> None:
    policy = make_policy("none", 2, sink=4, recent=63)
    x = inputs(700, kv_heads=2, groups=4, dim=128, dtype=torch.bfloat16)
    logits = torch.randn(8)
    got = on_gpu(policy, x, [300, 400], sink_logits=logits.cuda())
    hold(got, policy, x, sink_logits=logits)
    mixed = make_policy("alternating", 4, sink=4, recent=63)
    x = inputs(700, kv_heads=4, groups=4, dim=128, dtype=torch.bfloat16)
    got = on_gpu(mixed, x, [700], only="streaming").unflatten(2, (4, 4))
    assert got[:, :, ::2].isnan().all()
    assert got[:, :, 1::2].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["auto", "fp8", "int4-hadamard"])
@pytest.mark.parametrize("max_length", [None, 4096])
def test_retrieval_heads_read_any_store(hopper, name: str, max_length: int | None) -> None:
    policy = make_policy("alternating", 4, retrieval_dtype=name, sink=64, recent=256)
    x = inputs(3000, kv_heads=4, groups=4, dim=128, padding=(0, 1100), dtype=torch.bfloat16)
    hold(on_gpu(policy, x, [1700, 800, 500], max_length=max_length), policy, x)


@pytest.mark.gpu
def test_large_scores_stay_finite(hopper) -> None:
    policy = make_policy("none", 2, sink=64, recent=256)
    x = inputs(900, kv_heads=2, groups=4, dim=128, dtype=torch.bfloat16)
    x = Inputs(x.query * 40, x.keys, x.values)
    hold(on_gpu(policy, x, [900]), policy, x)


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [-0.2, 0.0])
def test_any_scale_is_taken(hopper, scale: float) -> None:
    policy = make_policy("alternating", 2, sink=4, recent=63)
    x = inputs(500, kv_heads=2, groups=4, dim=64, dtype=torch.bfloat16)
    hold(on_gpu(policy, x, [500], scale=scale), policy, x, scale=scale)


@pytest.mark.gpu
@pytest.mark.parametrize(("sink", "recent"), [(4, 63), (20, 300), (128, 200)])
def test_what_another_tile_left_in_memory_never_comes_back(hopper, sink: int, recent: int) -> None:
    policy = make_policy("none", 2, sink=sink, recent=recent)
    x = inputs(1500, kv_heads=2, groups=4, dim=128, padding=(0, 0, 0), dtype=torch.bfloat16)
    plain = on_gpu(policy, x, [700, 800])
    x.values[1] = torch.nan
    got = on_gpu(policy, x, [700, 800])
    assert torch.equal(got[[0, 2]], plain[[0, 2]])

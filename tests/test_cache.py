"""The cache as a whole: random programs against a list of tokens that knows who must see whom."""

import copy
import random

import pytest
import torch
from oracle import Inputs, inputs, sees, split, through_cache

from duohead.cache import DuoCache, DuoLayer
from duohead.policy import HeadPolicy
from duohead.storage import Store

GROUPS, DIM = 3, 4


class Player:
    """One cache layer and, beside it, what a person would write down: every row's tokens and what rings must hold."""

    def __init__(
        self, policy: HeadPolicy, draw: random.Random, *, index: int, static: bool, padded: bool
    ) -> None:
        self.policy, self.draw, self.index = policy, draw, index
        self.rollback = draw.choice((0, 0, 7))
        self.layer = DuoLayer(
            policy, index, max_length=200 if static else None, rollback=self.rollback
        )
        self.static, self.padded = static, padded
        self.recording = False
        self.stamp = 0
        self.forget()

    def forget(self) -> None:
        self.batch = (
            self.draw.choice((1, 2))
            if not (self.static and self.layer.is_initialized)
            else self.batch
        )
        self.padding = [self.draw.randint(0, 6) if self.padded else 0 for _ in range(self.batch)]
        self.rows: list[list[int]] = [[] for _ in range(self.batch)]
        self.alive = {spec.kind: set() for spec in self.policy.stores(self.index)}

    @property
    def length(self) -> int:
        return len(self.rows[0])

    def mask(self, tokens: int) -> torch.Tensor | None:
        if not self.padded:
            return None
        return torch.arange(tokens)[None, :] >= torch.tensor(self.padding)[:, None]

    def append(self, count: int) -> None:
        start, chunked = self.length, self.policy.visibility == "chunk"
        fresh = [
            [self.stamp + 1000 * row + step for step in range(count)] for row in range(self.batch)
        ]
        self.stamp += count
        head = torch.arange(GROUPS)[None, :, None, None] * 1e5
        keys = (torch.tensor(fresh)[:, None, :, None] + head).float().expand(-1, -1, -1, DIM)
        handle, same = self.layer.update(keys, -keys)
        assert handle is same
        views = handle.open(self.mask(start + count))
        for row, new in zip(self.rows, fresh, strict=True):
            row += new
        drafting = self.recording and start > 0 and count <= self.rollback
        recent = self.policy.window_tokens if count > 1 and not drafting else self.policy.recent
        stores = list(self.policy.stores(self.index))
        assert [view.retrieval for view in views] == [spec.sees_all for spec in stores]
        for view, spec in zip(views, stores, strict=True):
            keeps = spec.kind == "retrieval" or not self.policy.evict
            for row in range(self.batch):
                rule = {
                    "retrieval": keeps, "sink": self.policy.sink, "recent": recent,
                    "window": self.policy.layers[self.index].window,
                    "chunk_start": start - self.padding[row] if chunked else None,
                }  # fmt: skip
                self.check(view, row, start, count, rule)
        handle.commit()
        for spec in stores:
            places = self.alive[spec.kind] | set(range(start, start + count))
            held = None if spec.ring is None else spec.ring + self.rollback
            self.alive[spec.kind] = {p for p in places if held is None or p >= start + count - held}
        assert int(self.layer.get_seq_length()) == self.length

    def check(self, view, row: int, start: int, count: int, rule: dict) -> None:
        """The keys that each query of ``row`` is shown are those it must see, each once, from every head."""
        heads = list(range(GROUPS)) if view.heads is None else view.heads.tolist()
        shown: list[list[int]] = [[] for _ in range(count)]
        skipped = self.padding[row]
        real = torch.arange(start, start + count) >= skipped
        for keys, values, mask in view.pieces(0, count):
            assert torch.equal(keys, -values)
            assert keys.shape[1] == len(heads)
            mask = mask.expand(self.batch, -1, -1, -1)[row, 0]
            stamps = keys[row, 0, :, 0] - heads[0] * 1e5
            for other, head in enumerate(heads):
                present = mask[real].any(0)
                assert torch.equal(keys[row, other, present, 0] - head * 1e5, stamps[present])
            for query in range(count):
                shown[query] += stamps[mask[query]].int().tolist()
        for query in range(count):
            position = start + query - skipped
            if position < 0:
                continue
            seen = [
                stamp for place, stamp in enumerate(self.rows[row])
                if sees(position, place - skipped, **rule)
            ]  # fmt: skip
            assert sorted(shown[query]) == sorted(seen), (row, position, rule)

    def crop(self, count: int) -> None:
        kept = self.length - count
        if not self.layer.is_initialized:
            return
        lost = any(
            self.needs_evicted(spec, kept, row)
            for spec in self.policy.stores(self.index)
            for row in range(self.batch)
        )
        if lost:
            before = self.length
            with pytest.raises(
                ValueError, match=rf"cannot crop {count} tokens: .* rollback={count}\) or more"
            ):
                self.layer.crop(-count)
            assert int(self.layer.get_seq_length()) == before
            return
        self.layer.crop(-count)
        self.rows = [row[:kept] for row in self.rows]
        self.alive = {kind: {p for p in places if p < kept} for kind, places in self.alive.items()}

    def needs_evicted(self, spec: Store, kept: int, row: int) -> bool:
        """Whether the token that comes after ``kept`` tokens would see one that is gone."""
        skipped, layer = self.padding[row], self.policy.layers[self.index]
        start = kept - skipped if self.policy.visibility == "chunk" else None
        for place in range(skipped, kept):
            sink = not spec.sees_all and place - skipped < self.policy.sink
            visible = sees(
                kept - skipped, place - skipped, retrieval=spec.sees_all, sink=self.policy.sink,
                recent=self.policy.window_tokens, window=layer.window, chunk_start=start,
            )  # fmt: skip
            if visible and not sink and place not in self.alive[spec.kind]:
                return True
        return False

    def step(self) -> None:
        draw = self.draw
        action = draw.choices(
            ["append", "crop", "select", "repeat", "reset", "record"], [12, 3, 2, 1, 0.5, 0.5]
        )[0]
        if action == "append":
            count = draw.choice((1, 1, 1, 2, 3, 9, 20))
            if not self.static or self.length + count <= 200:
                self.append(count)
        elif action == "crop" and self.length:
            self.crop(draw.randint(1, min(self.length, draw.choice((3, 8, 200)))))
        elif action == "select" and self.length:
            index = [
                draw.randrange(self.batch) for _ in range(draw.choice((self.batch, self.batch, 1)))
            ]
            keep = torch.tensor(index)
            if draw.random() < 0.5:
                self.layer.batch_select_indices(keep)
            else:
                self.layer.reorder_cache(keep)
            self.take(index)
        elif action == "repeat" and self.length and self.batch < 3:
            self.layer.batch_repeat_interleave(2)
            self.take([row for row in range(self.batch) for _ in range(2)])
        elif action == "reset":
            self.layer.reset()
            self.forget()
        elif action == "record" and not self.recording and (not self.static or self.rollback):
            self.layer.activate_past_recording()
            self.recording = True
            self.rollback = self.rollback or 128

    def take(self, index: list[int]) -> None:
        self.rows = [list(self.rows[row]) for row in index]
        self.padding = [self.padding[row] for row in index]
        self.batch = len(index)


def policies() -> dict[str, HeadPolicy]:
    def make(**fields) -> HeadPolicy:
        return HeadPolicy.from_heads(
            **{"retrieval": [[1]], "num_kv_heads": GROUPS, "sink": 3, "recent": 5} | fields
        )

    return {
        "mixed": make(),
        "streaming": make(retrieval=[[]]),
        "retrieval": make(retrieval=[[0, 1, 2]]),
        "no-sink": make(sink=0, recent=1),
        "many-sinks": make(sink=11, recent=2),
        "window": make(windows=[4]),
        "longer-window": make(windows=[7]),
        "window-of-recent": make(windows=[9], prefill_recent=9),
        "prefill-recent": make(prefill_recent=12),
        "kept": make(evict=False),
        "kept-window": make(evict=False, windows=[4]),
        "chunk": make(visibility="chunk"),
        "chunk-window": make(visibility="chunk", windows=[8]),
        "chunk-short-window": make(visibility="chunk", windows=[5]),
    }


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
@pytest.mark.parametrize("name", policies())
def test_random_programs_show_every_query_exactly_what_it_must_see(name, static, padded) -> None:
    for seed in range(4):
        draw = random.Random(f"{name} {static} {padded} {seed}")
        player = Player(policies()[name], draw, index=0, static=static, padded=padded)
        player.append(draw.choice((1, 4, 25)))
        for _ in range(40):
            player.step()


def filled(policy: HeadPolicy, chunks: list[int], **options) -> tuple[DuoCache, Inputs]:
    cache = DuoCache(policy, **options)
    x = inputs(sum(chunks) + 8, kv_heads=GROUPS, dim=8)
    for layer in cache.duo_layers:
        through_cache(policy, x, chunks, index=layer.index, layer=layer)
    return cache, x


@pytest.mark.parametrize("options", [{}, {"max_length": 64}], ids=["growing", "static"])
@pytest.mark.parametrize("dtype", ["auto", "int4", "fp8/int4"])
def test_a_deep_copy_lives_its_own_life(options, dtype) -> None:
    policy = HeadPolicy.from_heads(
        retrieval=[[0], []],
        num_kv_heads=GROUPS,
        sink=2,
        recent=4,
        retrieval_dtype=dtype,
        streaming_dtype=dtype,
    )
    cache, x = filled(policy, [20, 1], **options)
    twin = copy.deepcopy(cache)
    other = inputs(29, kv_heads=GROUPS, dim=8, seed=1)
    for index in range(2):
        through_cache(policy, other, [3, 1], layer=twin.layers[index], index=index, start=21)
    assert int(cache.get_seq_length()) == 21
    assert int(twin.get_seq_length()) == 25
    for index in range(2):
        here = through_cache(policy, x, [1, 2], layer=cache.layers[index], index=index, start=21)
        fresh = through_cache(policy, x, [20, 1, 1, 2], index=index, **options)
        assert torch.equal(here, fresh[:, 21:])


@pytest.mark.parametrize("options", [{}, {"max_length": 64}], ids=["growing", "static"])
def test_a_reset_cache_is_as_good_as_new_even_after_an_overflow(options) -> None:
    policy = HeadPolicy.from_heads(retrieval=[[0], []], num_kv_heads=GROUPS, sink=2, recent=4)
    cache = DuoCache(policy, **options)
    bad = inputs(30, kv_heads=GROUPS, dim=8)
    bad.keys.fill_(float("nan"))
    bad.values.fill_(float("inf"))
    good = inputs(30, kv_heads=GROUPS, dim=8, seed=1)
    for index in range(2):
        through_cache(policy, bad, [30], layer=cache.layers[index], index=index)
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    for index in range(2):
        again = through_cache(policy, good, [9, 1, 10], layer=cache.layers[index], index=index)
        assert torch.equal(again, through_cache(policy, good, [9, 1, 10], index=index, **options))
        for kind in cache.layers[index].kinds:
            slots = kind.store.segments()
            assert all(t.isfinite().all() for part in slots for t in part.keys + part.values)


def test_a_cache_can_be_cropped_to_nothing() -> None:
    policy = HeadPolicy.from_heads(retrieval=[[0], []], num_kv_heads=GROUPS, sink=2, recent=4)
    cache, x = filled(policy, [25])
    cache.crop(-25)
    assert cache.get_seq_length() == 0
    for index in range(2):
        again = through_cache(policy, x, [12, 1], layer=cache.layers[index], index=index)
        assert torch.equal(again, through_cache(policy, x, [12, 1], index=index))


def test_crop_speaks_of_what_it_was_given() -> None:
    policy = HeadPolicy.from_heads(retrieval=[[0]], num_kv_heads=GROUPS, sink=1, recent=4)
    cache, _ = filled(policy, [25])
    with pytest.raises(ValueError, match="tokens_to_remove must be zero or negative .*got 3"):
        cache.layers[0].crop(3)
    with pytest.raises(
        ValueError, match="tokens_to_remove must be at least -25, the tokens there are, got -26"
    ):
        cache.layers[0].crop(-26)
    with pytest.raises(
        ValueError, match=r"cannot crop 2 tokens: streaming heads of layer 0 .*rollback=2\)"
    ):
        cache.layers[0].crop(-2)
    cache.layers[0].crop(0)
    assert cache.get_seq_length() == 25


def test_bad_use_is_refused_with_the_remedy() -> None:
    policy = HeadPolicy.from_heads(retrieval=[[0], []], num_kv_heads=GROUPS, sink=1, recent=4)
    for wrong in (0, 2.5, True):
        with pytest.raises(ValueError, match=f"max_length must be an integer >= 1 .*got {wrong}"):
            DuoCache(policy, max_length=wrong)
    for wrong in (-1, 2.5, None):
        with pytest.raises(ValueError, match=f"rollback must be an integer >= 0 .*got {wrong}"):
            DuoCache(policy, rollback=wrong)
    with pytest.raises(
        ValueError, match="model is needed for a policy with layers that have no KV heads"
    ):
        DuoCache(HeadPolicy.from_heads(retrieval=[[0], []], num_kv_heads=[GROUPS, 0]))
    cache, x = filled(policy, [10], max_length=12)
    with pytest.raises(
        ValueError,
        match=r"max_length of this static cache is 12 tokens but 13 are needed.*max_length=13",
    ):
        cache.update(x.keys[:, :, :3], x.values[:, :, :3], 0)
    with pytest.raises(
        ValueError, match="this cache holds 1 rows, got a batch of 2; use a new cache"
    ):
        cache.update(
            x.keys[:, :, :1].expand(2, -1, -1, -1), x.values[:, :, :1].expand(2, -1, -1, -1), 0
        )
    with pytest.raises(
        ValueError, match="layer 0 got 2 KV heads but its policy has 3; use a policy"
    ):
        DuoCache(policy).update(x.keys[:, :2], x.values[:, :2], 0)
    with pytest.raises(ValueError, match="a static cache cannot start to record its past"):
        cache.activate_past_recording()
    with pytest.raises(ValueError, match="DuoCache does not offload"):
        cache.layers[0].offload()


def test_a_handle_is_opened_once_and_is_no_tensor() -> None:
    policy = HeadPolicy.from_heads(retrieval=[[0]], num_kv_heads=GROUPS, sink=1, recent=4)
    x = inputs(4, kv_heads=GROUPS, dim=8)
    handle, _ = DuoCache(policy).update(x.keys, x.values, 0)
    handle.open(None)
    with pytest.raises(ValueError, match="layer 0 attends twice to the same keys and values"):
        handle.open(None)
    with pytest.raises(
        AttributeError,
        match=r"'shape': a DuoCache was used with an attention implementation other than 'duo'",
    ):
        _ = handle.shape


def test_rows_may_be_chosen_by_a_boolean_mask() -> None:
    policy = HeadPolicy.from_heads(retrieval=[[0]], num_kv_heads=GROUPS, sink=2, recent=4)
    x = inputs(20, kv_heads=GROUPS, dim=8, padding=[0, 5, 2])
    layer = DuoLayer(policy, 0)
    through_cache(policy, x, [18], layer=layer)
    layer.batch_select_indices(torch.tensor([True, False, True]))
    keep = torch.tensor([0, 2])
    rest = Inputs(x.query[keep], x.keys[keep], x.values[keep], (0, 2))
    out = through_cache(policy, rest, [1, 1], layer=layer, start=18)
    assert torch.equal(out, through_cache(policy, rest, [18, 1, 1])[:, 18:])


def test_sizes_for_masks_mark_the_cache_as_ours() -> None:
    policy = HeadPolicy.from_heads(retrieval=[[0]], num_kv_heads=GROUPS, sink=2, recent=4)
    growing, _ = filled(policy, [20])
    static, _ = filled(policy, [20], max_length=50)
    assert growing.get_mask_sizes(3, 0) == (23, -1)
    assert static.get_mask_sizes(3, 0) == (50, -1)
    assert growing.get_max_length() == -1
    assert static.get_max_length() == 50
    assert repr(static).startswith("DuoCache(static, 50 tokens, 1 layers, retrieval ratio 0.33, ")
    assert split(7, 3) == [3, 3, 1]

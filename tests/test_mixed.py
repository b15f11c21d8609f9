"""Keys and values in formats of their own, and streaming heads that keep every token: in whole models, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import inputs
from tiny import (
    LENGTH,
    assert_close,
    chunked_logits,
    ids,
    left_padded,
    policy_for,
    tiny,
)
from tiny_stored import stored
from torch import Tensor

from duohead import DuoCache, HeadPolicy, codec, duo
from duohead.cache import DuoLayer
from duohead.cache.ring import RingStore
from duohead.models.engine import Engine
from duohead.models.generate import generate

FAMILIES = ("llama", "gemma3", "laguna", "gpt-oss")
MIXED = {
    "retrieval_dtype": "fp8/int4",
    "streaming_dtype": "int4-hadamard/fp8",
    "window_dtype": "int8/auto",
}


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    # In fp64 no rounding of a level depends on the order of some sum.
    made = {family: tiny(family).double() for family in FAMILIES}
    for model in made.values():
        model.config._experts_implementation = "eager"  # grouped products are for narrower dtypes
    return made


@pytest.mark.parametrize("evict", [True, False], ids=["evict", "keep"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_mixed_storage_is_the_same_in_every_form(
    models: dict[str, Any], family: str, evict: bool
) -> None:
    model = models[family]
    policy = policy_for(model, "alternating", evict=evict, **MIXED)
    tokens, mask = left_padded([LENGTH, LENGTH - 11])
    place = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = {"input_ids": tokens, "attention_mask": mask, "position_ids": place}
    with stored(model, policy):
        expected = model(**whole, use_cache=False).logits
    with duo(model, policy) as bound:
        assert_close(model(**whole, use_cache=False).logits, expected, mask)
        for options, chunks in (({}, [7, 1, 9]), ({"max_length": LENGTH}, [LENGTH - 4])):
            cache = DuoCache(bound, model, **options)
            assert_close(chunked_logits(model, cache, tokens, chunks, mask), expected, mask)
            assert cache.kv_bytes() == bound.kv_bytes(LENGTH, batch=2)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_without_eviction_and_loss_a_model_is_what_it_was(
    models: dict[str, Any], family: str
) -> None:
    model = models[family]
    tokens, mask = left_padded([LENGTH, LENGTH - 11])
    greedy = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(tokens, **greedy)
    with duo(model, policy_for(model, "none", evict=False)) as bound:
        assert torch.equal(model.generate(tokens, **greedy), expected)
        static = DuoCache(bound, model, max_length=LENGTH + 6)
        assert torch.equal(model.generate(tokens, **greedy, past_key_values=static), expected)
        assert torch.equal(generate(model, tokens, **greedy).tokens, expected)


@torch.no_grad()
def test_heads_that_keep_all_can_be_cropped_to_any_length(models: dict[str, Any]) -> None:
    model, tokens = models["llama"], ids(2)
    policy = policy_for(model, "alternating", evict=False, **MIXED)
    with duo(model, policy) as bound:
        expected = model(tokens, use_cache=False).logits
        cache = DuoCache(bound, model)
        chunked_logits(model, cache, torch.cat([tokens[:, :6], ids(2, 20, seed=5)], 1), [26])
        cache.crop(-20)
        assert_close(chunked_logits(model, cache, tokens[:, 6:], [3, 9]), expected[:, 6:])
        one, greedy = tokens[:1], {"max_new_tokens": 8, "do_sample": False}
        drafted = model.generate(one, **greedy, prompt_lookup_num_tokens=3)
        assert torch.equal(drafted, model.generate(one, **greedy))


def continued(model: Any, policy: HeadPolicy, **engine: Any) -> list[list[int]]:
    """Tokens of two padded rows after eight steps of an engine."""
    tokens, mask = left_padded([LENGTH, LENGTH - 11])
    with duo(model, policy):
        made = Engine(model, batch=2, max_length=LENGTH + 8, padded=True, **engine)
        return generate(
            model, tokens.to(made.device), attention_mask=mask.to(made.device), max_new_tokens=8, chunk=7, engine=made
        ).tokens.tolist()  # fmt: skip


@pytest.mark.parametrize("evict", [True, False], ids=["evict", "keep"])
def test_the_engine_serves_mixed_storage(models: dict[str, Any], evict: bool) -> None:
    model = models["laguna"]
    policy = policy_for(model, "alternating", evict=evict, **MIXED)
    tokens, mask = left_padded([LENGTH, LENGTH - 11])
    with duo(model, policy):
        plain = model.generate(tokens, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert continued(model, policy) == plain.tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("evict", [True, False], ids=["evict", "keep"])
@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_serve_mixed_storage_as_single_steps_do(family: str, evict: bool) -> None:
    model = tiny(family).to("cuda", torch.bfloat16)
    policy = policy_for(model, "alternating", evict=evict, **MIXED)
    assert continued(model, policy, graphs=True) == continued(model, policy, graphs=False)


class Ledger:
    """What each slot of a layer must hold, by the codecs alone: every token encoded once, from what it was."""

    def __init__(
        self, policy: HeadPolicy, *, padding: tuple[int, ...] | None, **options: Any
    ) -> None:
        self.x = inputs(700, kv_heads=3, groups=1, dim=16, padding=padding, dtype=torch.float16)
        self.layer = DuoLayer(policy, 0, **options)
        self.rows = list(range(len(self.x.keys)))

    def feed(self, count: int) -> None:
        start = int(self.layer.length)
        part = slice(start, start + count)
        keys, values = self.x.keys[self.rows, :, part], self.x.values[self.rows, :, part]
        handle, _ = self.layer.update(keys, values)
        handle.open(None if self.x.mask is None else self.x.mask[self.rows, : start + count])
        handle.commit()

    def check(self) -> int:
        """Compare every stored token; returns how many there are."""
        length, found = int(self.layer.length), 0
        for kind in self.layer.kinds:
            heads = list(kind.spec.heads)
            stored = [(s.keys, s.values) for s in kind.store.segments()]
            sides = [
                (formats.encode(x[self.rows][:, heads]), segments)
                for formats, x, segments in zip(
                    kind.codec, (self.x.keys, self.x.values), zip(*stored, strict=True), strict=True
                )
            ]
            for row, number in enumerate(self.rows):
                skipped = 0 if self.x.padding is None else self.x.padding[number]
                tokens, slots = self.held(kind.store, kind.spec.sink, length, skipped)
                found += len(tokens)
                for encoded, segments in sides:
                    for index, part in enumerate(encoded):
                        slot = torch.cat([segment[index][row] for segment in segments], 1)
                        assert torch.equal(slot[:, slots], part[row][:, tokens])
        return found

    def held(self, store: Any, sink: int, length: int, skipped: int) -> tuple[Tensor, Tensor]:
        """The tokens, counted with padding, that a row holds, and their slots."""
        if not isinstance(store, RingStore):
            return torch.arange(length), torch.arange(length)
        position = torch.arange(length - skipped)
        alive = (position < sink) | (
            position + skipped >= max(int(store.floor), length - store.ring)
        )
        position = position[alive]
        return position + skipped, torch.where(
            position < sink, position, sink + (position - sink) % store.ring
        )


@pytest.mark.parametrize("padding", [None, (0, 9, 30)], ids=["full", "padded"])
@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"evict": False}, {"windows": [50]}, {"windows": [50], "evict": False}],
    ids=["evict", "keep", "window", "keep-window"],
)
def test_the_bits_of_a_token_never_change_once_they_are_stored(
    fields: dict[str, Any], static: bool, padding: tuple[int, ...] | None
) -> None:
    policy = HeadPolicy.from_heads(
        retrieval=[[1]], num_kv_heads=3, sink=4, recent=40, retrieval_dtype="fp8/int4",
        streaming_dtype="int4/int8", window_dtype="int8/int4", **fields,
    )  # fmt: skip
    options = {"max_length": 700, "rollback": 20} if static else {}
    book = Ledger(policy, padding=padding, **options)
    for count in (37, 1, 1, 90, 1, 300, 1, 2):
        book.feed(count)
        assert book.check() > 0
    book.layer.batch_select_indices(torch.tensor([len(book.rows) - 1, 0]))
    book.rows = [len(book.rows) - 1, 0]
    book.layer.activate_past_recording()
    book.check()
    for count in (5, 1, 100):
        book.feed(count)
        book.check()
    book.layer.crop(-3)
    book.feed(7)
    stored, room = (
        book.check(),
        sum(kind.store.segments()[0].keys[0].shape[2] for kind in book.layer.kinds),
    )
    assert stored > room / 2


def test_a_token_encoded_twice_would_be_noticed() -> None:
    """The law above has teeth: in fp16, what comes back from int4 is not what it was, and encodes to other bits."""
    x = inputs(200, kv_heads=1, groups=1, dim=16, dtype=torch.float16).keys
    storage = codec.get("int4", native=torch.float16)
    once, twice = storage.encode(x), storage.encode(storage.round_trip(x))
    assert any(not torch.equal(a, b) for a, b in zip(once, twice, strict=True))

"""Feed, crop, reorder, repeat, select and reset, alone and in any order: every logit stays that of the reference."""

import random
from typing import Any

import pytest
import torch
from tiny import (
    RECENT,
    assert_close,
    chunked_logits,
    expected_logits,
    ids,
    kv_heads,
    left_padded,
    policy_for,
    tiny,
)
from torch import Tensor

from duohead import DuoCache, HeadPolicy, duo

FAMILIES = ("llama", "gemma3", "laguna", "gpt-oss", "mistral-window")
ROOM = 90


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {family: tiny(family) for family in FAMILIES}


class Walk:
    """One cache, the text that it must stand for, and the logits that came out on the way."""

    def __init__(self, model: Any, cache: DuoCache, rows: int) -> None:
        self.model, self.cache = model, cache
        self.text = self.mask = torch.zeros(rows, 0, dtype=torch.long)
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def feed(self, tokens: Tensor, mask: Tensor) -> None:
        self.text, self.mask = torch.cat([self.text, tokens], 1), torch.cat([self.mask, mask], 1)
        place = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        out = self.model(
            input_ids=tokens,
            attention_mask=self.mask,
            position_ids=place,
            past_key_values=self.cache,
        )
        self.seen.append((self.text, self.mask, out.logits))

    def crop(self, count: int) -> None:
        before = {int(layer.length) for layer in self.cache.duo_layers}
        try:
            self.cache.crop(-count)
        except ValueError:
            assert {int(layer.length) for layer in self.cache.duo_layers} == before
        else:
            self.text, self.mask = self.text[:, :-count], self.mask[:, :-count]

    def arrange(self, operation: str, argument: Any, order: Tensor) -> None:
        getattr(self.cache, operation)(argument)
        self.text, self.mask = self.text[order], self.mask[order]

    def check(self, policy: HeadPolicy) -> None:
        for text, mask, found in self.seen:
            count = found.shape[1]
            if mask[:, -count:].any():
                expected = expected_logits(self.model, policy, text, mask)[:, -count:]
                assert_close(found, expected, mask[:, -count:])


def random_policy(draw: random.Random, model: Any) -> HeadPolicy:
    heads = kv_heads(model)
    return HeadPolicy.from_heads(
        retrieval=[[head for head in range(count) if draw.random() < 0.4] for count in heads],
        num_kv_heads=heads,
        sink=draw.choice([0, 1, 4, 64]),
        recent=draw.choice([1, 2, 5, 9, 63]),
    )


def step(draw: random.Random, walk: Walk, rollback: int) -> None:
    rows, length = walk.text.shape
    shortest = int(walk.mask.sum(1).min())
    match draw.choice(["feed", "feed", "crop", "reorder", "repeat", "select"]):
        case "feed":
            count = draw.choice([1, 2, 5, 11])
            if length + count <= ROOM:
                walk.feed(
                    ids(rows, count, seed=draw.randrange(10**6)),
                    torch.ones(rows, count, dtype=torch.long),
                )
        case "crop" if shortest > 1:
            walk.crop(draw.randint(1, min(rollback + 3, shortest - 1)))
        case "reorder":
            order = torch.tensor([draw.randrange(rows) for _ in range(rows)])
            walk.arrange("reorder_cache", order, order)
        case "repeat" if rows <= 3:
            walk.arrange("batch_repeat_interleave", 2, torch.arange(rows).repeat_interleave(2))
        case "select":
            order = torch.tensor(sorted(draw.sample(range(rows), draw.randint(1, rows))))
            walk.arrange("batch_select_indices", order, order)


@pytest.mark.parametrize("seed", range(24))
def test_any_order_of_operations_gives_the_logits_of_the_text_that_remains(
    models: dict[str, Any], seed: int
) -> None:
    draw = random.Random(seed)
    model = models[FAMILIES[seed % len(FAMILIES)]]
    policy, rollback, max_length = (
        random_policy(draw, model),
        draw.choice([0, 4, 9]),
        draw.choice([None, ROOM]),
    )
    width, chunk = draw.randint(2, 20), draw.choice([1, 3, 7, 20])
    tokens, mask = left_padded(
        [width, *(draw.randint(1, width) for _ in range(draw.randrange(3)))], seed=seed
    )
    with torch.no_grad(), duo(model, policy) as bound:
        walk = Walk(
            model, DuoCache(bound, model, max_length=max_length, rollback=rollback), len(tokens)
        )
        for part, real in zip(tokens.split(chunk, 1), mask.split(chunk, 1), strict=True):
            walk.feed(part, real)
        for _ in range(8):
            step(draw, walk, rollback)
    walk.check(policy)
    if max_length is not None:
        assert walk.cache.kv_bytes() == bound.kv_bytes(
            ROOM, batch=len(walk.text), rollback=rollback
        )


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest, models: dict[str, Any]) -> Any:
    return models[request.param]


@pytest.mark.parametrize("max_length", [None, 64])
def test_rows_can_be_repeated_selected_and_reordered(model: Any, max_length: int | None) -> None:
    policy = policy_for(model, "alternating")
    tokens, mask = left_padded([16, 11, 13])
    order = torch.tensor([2, 0, 0])
    more = ids(3, 12, seed=9)
    text, real = (
        torch.cat([tokens[order], more], 1),
        torch.cat([mask[order], torch.ones_like(more)], 1),
    )
    expected = expected_logits(model, policy, text, real)[:, 16:]
    place = (real.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), duo(model, policy) as bound:
        for rearrange in ("reorder_cache", "batch_select_indices", "repeat and select"):
            cache = DuoCache(bound, model, max_length=max_length)
            chunked_logits(model, cache, tokens, [16], mask)
            if rearrange == "repeat and select":
                cache.batch_repeat_interleave(2)
                cache.batch_select_indices(torch.tensor([4, 0, 1]))
            else:
                getattr(cache, rearrange)(order)
            found = [
                model(
                    input_ids=more[:, step : step + 1],
                    attention_mask=real[:, : 17 + step],
                    position_ids=place[:, 16 + step : 17 + step],
                    past_key_values=cache,
                ).logits
                for step in range(more.shape[1])
            ]
            assert_close(torch.cat(found, 1), expected)


@pytest.mark.parametrize("max_length", [None, 64])
def test_a_reset_cache_starts_anew(model: Any, max_length: int | None) -> None:
    policy = policy_for(model, "alternating")
    tokens, mask = left_padded([16, 11])
    fresh = ids(2, seed=8)
    with duo(model, policy) as bound:
        cache = DuoCache(bound, model, max_length=max_length)
        chunked_logits(model, cache, tokens, [16], mask)
        cache.reset()
        assert int(cache.get_seq_length()) == 0
        found = chunked_logits(model, cache, fresh, [7, 7])
    assert_close(found, expected_logits(model, policy, fresh))


@pytest.mark.parametrize("max_length", [None, 64])
@pytest.mark.parametrize("removed", [1, 4, 6])
def test_cropping_and_going_on_equals_never_having_been_there(
    model: Any, max_length: int | None, removed: int
) -> None:
    policy = policy_for(model, "alternating")
    tokens = ids(2)
    wrong = ids(2, removed, seed=11)
    kept = 18
    expected = expected_logits(model, policy, tokens)
    with torch.no_grad(), duo(model, policy) as bound:
        cache = DuoCache(bound, model, max_length=max_length, rollback=6)
        chunked_logits(model, cache, tokens[:, :kept], [7, 7])
        model(input_ids=wrong, past_key_values=cache, use_cache=True)
        cache.crop(-removed)
        assert int(cache.get_seq_length()) == kept
        found = chunked_logits(model, cache, tokens[:, kept:], [])
    assert_close(found, expected[:, kept:])


def test_cropping_a_short_text_needs_no_rollback(models: dict[str, Any]) -> None:
    llama = models["llama"]
    policy, tokens = policy_for(llama, "alternating"), ids(1)
    with torch.no_grad(), duo(llama, policy) as bound:
        cache = DuoCache(bound, llama)
        chunked_logits(llama, cache, tokens[:, :RECENT], [RECENT])
        cache.crop(-2)
        found = chunked_logits(llama, cache, tokens[:, RECENT - 2 :], [4])
    assert_close(found, expected_logits(llama, policy, tokens)[:, RECENT - 2 :])

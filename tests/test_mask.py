"""What a head sees: the predicate against the definition, said one query and one key at a time."""

import itertools

import pytest
import torch
from oracle import sees

from duohead.mask import dense_mask, visible
from duohead.policy import HeadPolicy, LayerPolicy
from duohead.shapes import MOST_WINDOW

LENGTH = 12
KINDS = [pytest.param(True, id="retrieval"), pytest.param(False, id="streaming")]


def written_out(query: range, key: range, **rule) -> torch.Tensor:
    return torch.tensor([[sees(i, j, **rule) for j in key] for i in query])


@pytest.mark.parametrize("retrieval", KINDS)
@pytest.mark.parametrize("window", [None, 1, 5], ids=lambda w: f"window{w}")
@pytest.mark.parametrize("recent", [1, 3, 20], ids=lambda r: f"recent{r}")
@pytest.mark.parametrize("sink", [0, 1, 4, 20], ids=lambda s: f"sink{s}")
def test_the_predicate_is_the_definition(sink, recent, window, retrieval) -> None:
    rule = {"retrieval": retrieval, "sink": sink, "recent": recent, "window": window}
    tokens = range(-3, LENGTH)
    position = torch.tensor(tokens)
    for chunk_start in (None, 0, 2, 7):
        query = range(chunk_start or 0, LENGTH)
        seen = visible(torch.tensor(query)[:, None], position, **rule, chunk_start=chunk_start)
        assert torch.equal(seen, written_out(query, tokens, **rule, chunk_start=chunk_start))


def test_a_row_of_padding_counts_from_its_first_real_token() -> None:
    padding = torch.tensor([0, 3, 5])
    position = torch.arange(9)[None, :] - padding[:, None]
    seen = visible(position[:, :, None], position[:, None, :], retrieval=False, sink=2, recent=2)
    alone = visible(torch.arange(9)[:, None], torch.arange(9), retrieval=False, sink=2, recent=2)
    for row, pad in enumerate(padding.tolist()):
        assert torch.equal(seen[row, pad:, pad:], alone[: 9 - pad, : 9 - pad])
        assert not seen[row, :, :pad].any()


def test_more_sinks_more_recent_tokens_and_wider_windows_never_hide_a_key() -> None:
    query, key = torch.arange(LENGTH)[:, None], torch.arange(-2, LENGTH)
    choices = list(itertools.product((0, 1, 4), (1, 3, 6), (2, 5, 100)))
    masks = [
        visible(query, key, retrieval=False, sink=sink, recent=recent, window=window)
        for sink, recent, window in choices
    ]
    for (small, less), (large, more) in itertools.product(
        zip(choices, masks, strict=True), repeat=2
    ):
        if all(a <= b for a, b in zip(small, large, strict=True)):
            assert not (less & ~more).any(), (small, large)


def test_a_streaming_head_sees_a_subset_of_a_retrieval_head_and_always_itself() -> None:
    query, key = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    for window in (None, 1, 4):
        streaming = visible(query, key, retrieval=False, sink=2, recent=3, window=window)
        retrieval = visible(query, key, retrieval=True, sink=2, recent=3, window=window)
        assert not (streaming & ~retrieval).any()
        assert streaming.diagonal().all()


def test_kinds_may_differ_by_head_in_one_call() -> None:
    query, key = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    kinds = torch.tensor([True, False, True])
    both = visible(query, key, retrieval=kinds[:, None, None], sink=1, recent=2)
    for head, retrieval in enumerate(kinds.tolist()):
        assert torch.equal(both[head], visible(query, key, retrieval=retrieval, sink=1, recent=2))


def test_sink_plus_recent_at_the_length_is_plain_causal_attention() -> None:
    for sink in range(LENGTH + 1):
        mask = dense_mask(LENGTH, LayerPolicy(1), sink=sink, recent=max(1, LENGTH - sink))
        assert torch.equal(mask[0], torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril())
    short = dense_mask(LENGTH, LayerPolicy(1), sink=4, recent=LENGTH - 5)
    assert int((short[0] != torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()).sum()) == 1


def test_a_dense_mask_has_one_matrix_per_kv_head() -> None:
    mask = dense_mask(7, LayerPolicy(3, (1,), window=5), sink=1, recent=2)
    assert mask.shape == (3, 7, 7)
    for head in range(3):
        rule = {"retrieval": head == 1, "sink": 1, "recent": 2, "window": 5}
        assert torch.equal(mask[head], written_out(range(7), range(7), **rule))


@pytest.mark.parametrize("field", ["sink", "recent", "prefill_recent"])
def test_the_longest_window_that_a_policy_may_have_fits_the_mask_and_longer_ones_are_refused(
    field: str,
) -> None:
    longest = HeadPolicy.from_heads(retrieval=[[]], num_kv_heads=1, **{field: MOST_WINDOW})
    mask = dense_mask(LENGTH, LayerPolicy(1), sink=longest.sink, recent=longest.window_tokens)
    assert torch.equal(mask[0], torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril())
    message = f"^{field} must be at most 268435456 tokens, got 10{{30}}; .* is a retrieval head$"
    with pytest.raises(ValueError, match=message):
        HeadPolicy.from_heads(retrieval=[[]], num_kv_heads=1, **{field: 10**30})

"""From which length on a cache is smaller than the model's own: exact for policies, true of transformers' caches."""

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny import config_of
from transformers import DynamicCache

from duohead.cache import DuoCache
from duohead.cli import main
from duohead.pattern import HeadPattern
from duohead.policy import HeadPolicy
from duohead.storage import EVEN_FROM, MAX_STEP, capacity, step

DTYPES = ("auto", "fp8", "int8", "int4", "fp8/int4", "auto/int4")
LONGEST = 131072
# Window and global layers of the models of that name; tiny in everything else.
GEOMETRY = {
    "llama": {},
    "laguna": {"sliding_window": 512, "layers": "fsss", "num_attention_heads_per_layer": [4, 6, 6, 6]},
    "gemma3": {"sliding_window": 1024, "layers": "ssssssf"},
    "gpt-oss": {"sliding_window": 128, "layers": "sfsf"},
}  # fmt: skip
LENGTHS = (256, 257, 511, 512, 513, 1000, 1023, 1024, 1025, 2049)


@dataclass(frozen=True)
class Choice:
    """A policy by its rule; ``smaller_from`` the length that we promise at the latest, None if it never pays."""

    fields: dict[str, object]
    share: float
    smaller_from: int | None


CHOICES = {
    "evict half": Choice({"sink": 16, "recent": 64}, 0.5, 4096),
    "mixed": Choice(
        {"retrieval_dtype": "fp8", "streaming_dtype": "int4", "window_dtype": "int4", "recent": 64}, 0.5, 256
    ),
    "keep all": Choice(
        {"evict": False, "retrieval_dtype": "fp8", "streaming_dtype": "fp8/int4", "window_dtype": "int8"}, 0.5, 256
    ),
    "as they are": Choice({}, 1.0, None),
    "never": Choice({"evict": False}, 0.5, None),
}  # fmt: skip


def config(family: str):
    fields = dict(GEOMETRY[family])
    kinds = fields.pop("layers", "ffff")
    names = {"f": "full_attention", "s": "sliding_attention"}
    if family != "llama":
        fields["layer_types"] = [names[kind] for kind in kinds]
    if family == "laguna":
        fields["mlp_layer_types"] = ["dense", *["sparse"] * (len(kinds) - 1)]
    return config_of(
        family, num_hidden_layers=len(kinds), max_position_embeddings=LONGEST, num_key_value_heads=4, **fields
    )  # fmt: skip


def bound(family: str, choice: Choice) -> HeadPolicy:
    made = config(family)
    layers = made.num_hidden_layers
    types = getattr(made, "layer_types", None) or ["full_attention"] * layers
    gated = range(round(choice.share * 4))
    policy = HeadPolicy.from_heads(
        retrieval=[gated if kind == "full_attention" else range(4) for kind in types],
        num_kv_heads=made.num_key_value_heads,
        **choice.fields,
    )
    return policy.bind(made, dtype="bf16")


def edges(longest: int) -> list[int]:
    """First and last lengths of every step of `capacity`: within one, ours stays and theirs does not shrink."""
    found, last = [], 0
    while last < longest:
        first, last = last + 1, capacity(last + 1)
        found += [first, min(last, longest)]
    return found


@pytest.mark.parametrize("family", GEOMETRY)
def test_the_formula_of_the_models_own_cache_is_what_transformers_allocates(family: str) -> None:
    policy, made = bound(family, CHOICES["as they are"]), config(family)
    zeros = torch.zeros(1, 4, max(LENGTHS), 8, dtype=torch.bfloat16)
    for tokens in LENGTHS:
        cache = DynamicCache(config=made)
        for index in range(made.num_hidden_layers):
            for part in (zeros[:, :, : tokens - 1], zeros[:, :, :1]):
                cache.update(part, part, index)
        held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
        assert policy.dense_kv_bytes(tokens) == held


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("family", GEOMETRY)
def test_the_cache_is_smaller_from_the_length_the_policy_says_up_to_128k(
    family: str, name: str
) -> None:
    choice = CHOICES[name]
    policy = bound(family, choice)
    start = policy.saves_from(up_to=LONGEST)
    assert (start is None) == (choice.smaller_from is None)
    checked = [256, *(tokens for tokens in edges(LONGEST) if tokens > 256)]
    if start is None:
        assert all(policy.kv_bytes(tokens) >= policy.dense_kv_bytes(tokens) for tokens in checked)
        return
    assert start <= choice.smaller_from
    assert policy.kv_bytes(start - 1) >= policy.dense_kv_bytes(start - 1)
    for tokens in (start, *checked):
        assert tokens < start or policy.kv_bytes(tokens) < policy.dense_kv_bytes(tokens)
    zeros = torch.zeros(1, 4, 1025, 8, dtype=torch.bfloat16)
    cache = DuoCache(policy)
    for index in range(len(policy.layers)):
        handle, _ = cache.update(zeros, zeros, index)
        handle.open(None)
        handle.commit()
    assert cache.kv_bytes() == policy.kv_bytes(1025)


def test_inspect_says_from_which_length_on_a_policy_saves(tmp_path: Path, capsys) -> None:
    pattern = HeadPattern.from_alpha(torch.linspace(0, 1, 16).view(4, 4).numpy(), sink=4, recent=60)
    pattern.save(tmp_path / "heads")
    storage = ["--retrieval-dtype", "fp8", "--streaming-dtype", "fp8/int4", "--keep-all"]
    for flags, fields in (
        ([], {}),
        (storage, {"retrieval_dtype": "fp8", "streaming_dtype": "fp8/int4", "evict": False}),
    ):
        assert main(["inspect", str(tmp_path / "heads"), "--head-dim", "64", *flags]) == 0
        _, _, table = capsys.readouterr().out.partition("smaller from\n")
        starts = {line.split()[0]: line.split()[-1] for line in table.splitlines()}
        policy = pattern.policy(retrieval_ratio=0.5, **fields)
        assert policy.evict == (not flags)
        assert starts["0.5"] == str(policy.saves_from(head_dim=64))
        assert (starts["1"] == "never") == (not flags)
    assert main(["inspect", str(tmp_path / "heads"), "--keep-all", "--recent", "9"]) == 2
    assert "--recent: of no use with --keep-all" in capsys.readouterr().err


def random_policy(draw: random.Random) -> HeadPolicy:
    windows = [draw.choice((None, None, 7, 40, 300)) for _ in range(3)]
    return HeadPolicy.from_heads(
        retrieval=[
            [head for head in range(3) if window or draw.random() < 0.6] for window in windows
        ],
        num_kv_heads=3, windows=windows, sink=draw.choice((0, 4, 64)), recent=draw.choice((1, 60, 200)),
        evict=draw.random() < 0.6, retrieval_dtype=draw.choice(DTYPES),
        streaming_dtype=draw.choice(DTYPES), window_dtype=draw.choice(DTYPES),
    )  # fmt: skip


def test_savings_are_those_of_trying_every_length() -> None:
    draw, starts = random.Random(0), []
    for _ in range(25):
        policy, rollback, longest = random_policy(draw), draw.choice((0, 20)), draw.randint(1, 700)
        smaller = [
            policy.kv_bytes(tokens, head_dim=16, rollback=rollback) < policy.dense_kv_bytes(tokens, head_dim=16)
            for tokens in range(1, longest + 1)
        ]  # fmt: skip
        held = 0
        while held < longest and smaller[-1 - held]:
            held += 1
        expected = longest - held + 1 if held else None
        assert policy.saves_from(head_dim=16, rollback=rollback, up_to=longest) == expected, policy
        starts.append(expected)
    assert None in starts
    assert len(set(starts)) > 8


@pytest.mark.parametrize(
    ("heads", "fields"),
    [(2, {}), (40, {}), (40, {"streaming_dtype": "int4", "evict": False}), (30, {"recent": 400_000})],
    ids=["half", "1 of 40", "1 of 40 kept", "long window"],
)  # fmt: skip
def test_without_an_end_every_longer_text_counts(heads: int, fields: dict[str, object]) -> None:
    """All heads but one keep everything as it is: gains are small, and steps of the store outweigh them for long."""
    policy = HeadPolicy.from_heads(retrieval=[range(heads - 1)], num_kv_heads=heads, **fields)

    def saving(tokens: int) -> int:
        return policy.dense_kv_bytes(tokens, head_dim=8) - policy.kv_bytes(tokens, head_dim=8)

    start = policy.saves_from(head_dim=8)
    assert start is not None
    assert saving(start) > 0 >= saving(start - 1)
    assert all(saving(tokens) > 0 for tokens in edges(4 * start + 4 * EVEN_FROM) if tokens > start)
    assert policy.saves_from(head_dim=8, up_to=start) == start
    assert policy.saves_from(head_dim=8, up_to=start - 1) is None


def test_a_constant_saving_is_lost_in_the_steps_of_long_texts() -> None:
    """Windows in int4 beside global layers as they are save the same at any length: less than a step's slack."""
    policy = HeadPolicy.from_heads(
        retrieval=[[0], [0]], num_kv_heads=1, windows=[None, 4096], window_dtype="int4"
    )
    assert policy.kv_bytes(8192, head_dim=128) < policy.dense_kv_bytes(8192, head_dim=128)
    assert policy.saves_from(head_dim=128, up_to=8192) == 21
    assert policy.saves_from(head_dim=128) is None


def test_steps_are_as_the_capacity_says_and_bad_ends_are_refused() -> None:
    assert all(capacity(tokens) % step(tokens) == 0 for tokens in range(1, 3 * EVEN_FROM, 997))
    assert step(EVEN_FROM) == step(EVEN_FROM + 1) == MAX_STEP
    policy = HeadPolicy.from_heads(retrieval=[[0]], num_kv_heads=2)
    for wrong in (0, -3, 2.0, True):
        with pytest.raises(ValueError, match=f"up_to must be None or an integer >= 1 .*{wrong}"):
            policy.saves_from(head_dim=8, up_to=wrong)
    with pytest.raises(ValueError, match="head_dim is needed"):
        policy.saves_from()

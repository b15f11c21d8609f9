"""Orders of heads are fair to ranks, shares add up, and two processes compute and store what was foretold."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import WINDOW, ids, kv_heads, refused, tiny

from duohead import DuoCache, HeadPolicy, duo
from duohead.models.ranks import head_orders, in_order, rank_policy, rank_shares
from duohead.models.reorder import reorder_heads
from duohead.models.tensor_parallel import on_rank

RANKS = 2
# Fields that two ranks divide, the vocabulary among them.
FIELDS = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 64}
FAMILIES = {"llama": {"attention_bias": True}, "gemma3": {}}
KEPT = ([0, 1], [0], [1])
NEW = 5


def draw(seed: int, *, heads: int = 8, layers: int = 9) -> HeadPolicy:
    """A random policy, every third layer of it with a native window."""
    chance = random.Random(seed)
    return HeadPolicy.from_heads(
        retrieval=[
            [head for head in range(heads) if chance.random() < chance.random()]
            for _ in range(layers)
        ],
        num_kv_heads=heads,
        windows=[None if layer % 3 else WINDOW for layer in range(layers)],
        sink=2,
        recent=3,
    )


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("seed", range(5))
def test_retrieval_heads_come_first_on_every_rank_and_evenly(seed: int, ranks: int) -> None:
    policy = draw(seed)
    moved = in_order(policy, ranks=ranks)
    for order, layer in zip(head_orders(policy, ranks=ranks), policy.layers, strict=True):
        assert sorted(order) == list(range(8))
        kinds = [
            [head for head in order if (head in layer.retrieval) is kind] for kind in (True, False)
        ]
        assert kinds == [sorted(kind) for kind in kinds]
    held = {None: [0] * ranks, WINDOW: [0] * ranks}
    for rank in range(ranks):
        for layer in rank_policy(moved, rank, ranks=ranks).layers:
            assert layer.retrieval == tuple(range(len(layer.retrieval)))
            held[layer.window][rank] += len(layer.retrieval)
    assert all(max(counts) - min(counts) <= 1 for counts in held.values())
    identity = tuple(range(8))
    assert head_orders(moved, ranks=ranks) == (identity,) * 9


@pytest.mark.parametrize("seed", range(5))
def test_the_bytes_of_the_ranks_are_the_bytes_of_the_model(seed: int) -> None:
    policy = draw(seed)
    for one in (policy, in_order(policy, ranks=4)):
        shares = rank_shares(one, ranks=4, tokens=100, batch=2, head_dim=16)
        assert sum(share.kv_bytes for share in shares) == policy.kv_bytes(100, 2, head_dim=16)
        assert sum(share.kv_heads for share in shares) == 6 * 8
        gated = [layer for layer in policy.layers if layer.gated]
        assert sum(share.retrieval_heads for share in shares) == sum(
            len(layer.retrieval) for layer in gated
        )
    spread = [share.kv_bytes for share in shares]
    # One retrieval head more in each of the two shapes of layers, at most.
    assert max(spread) - min(spread) <= 2 * 2 * 128 * (16 + 16) * 2


def test_retrieval_first_gives_the_first_rank_everything_and_ranks_even_it_out() -> None:
    policy = HeadPolicy.from_heads(retrieval=[[1, 4], [0, 2, 5]], num_kv_heads=8)
    assert head_orders(policy) == ((1, 4, 0, 2, 3, 5, 6, 7), (0, 2, 5, 1, 3, 4, 6, 7))
    first = rank_shares(in_order(policy, ranks=1), ranks=2, tokens=4096, head_dim=64)
    assert [share.retrieval_heads for share in first] == [5, 0]
    # The second layer's third head goes to the rank that has fewer so far; both have one of the first layer.
    assert head_orders(policy, ranks=2) == ((1, 0, 2, 3, 4, 5, 6, 7), (0, 2, 1, 3, 5, 4, 6, 7))
    even = rank_shares(in_order(policy, ranks=2), ranks=2, tokens=4096, head_dim=64)
    assert [share.retrieval_heads for share in even] == [3, 2]
    assert max(share.kv_bytes for share in even) < 0.65 * max(share.kv_bytes for share in first)


def test_ranks_that_do_not_fit_are_refused() -> None:
    policy = HeadPolicy.from_heads(retrieval=[[0], [1]], num_kv_heads=[8, 2])
    refused(
        r"divide the KV heads of every layer \(2 in layer 1\), got 4", head_orders, policy, ranks=4
    )
    refused("ranks must be an integer >= 1, got 0", rank_policy, policy, 0, ranks=0)
    refused("ranks must be an integer >= 1, got True", head_orders, policy, ranks=True)
    refused(r"rank must lie in 0\.\.1, got 2", rank_policy, policy, 2, ranks=2)


def test_a_model_in_one_process_is_refused() -> None:
    model = tiny("llama")
    config = model.config
    policy = HeadPolicy.from_heads(retrieval=[[], [], []], num_kv_heads=4)
    context = on_rank(model, policy)
    refused("must be split over processes.*k_proj weights of type Parameter", context.__enter__)
    assert model.config is config and config.num_key_value_heads == 4


def policy_of_all(model: Any) -> HeadPolicy:
    return HeadPolicy.from_heads(retrieval=KEPT, num_kv_heads=kv_heads(model), sink=3, recent=5)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes find on models whose heads were reordered for two ranks; see `everything`."""
    folder = tmp_path_factory.mktemp("two")
    for family, fields in FAMILIES.items():
        model = tiny(family, **FIELDS, **fields)
        with duo(model, policy_of_all(model)), torch.no_grad():
            logits = model(input_ids=ids(2), use_cache=False).logits
            answer = model.generate(ids(2), max_new_tokens=NEW, do_sample=False)
        moved = reorder_heads(model, policy_of_all(model), ranks=RANKS)
        model.save_pretrained(folder / family)
        torch.save((logits, answer), folder / family / "expected.pt")
        (folder / family / "policy.json").write_text(moved.policy.to_json())
    here = Path(__file__)
    paths = os.pathsep.join([str(here.parent), str(here.parents[1]), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    done = subprocess.run(
        [sys.executable, *command, str(here), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def everything(folder: Path) -> None:
    """One of two processes: every model, split by tensor parallelism, under its policy."""
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM

    for family in FAMILIES:
        model = AutoModelForCausalLM.from_pretrained(folder / family, tp_plan="auto")
        rank, config = dist.get_rank(), model.config
        expected, answer = torch.load(folder / family / "expected.pt", weights_only=True)
        policy = HeadPolicy.from_dict(json.loads((folder / family / "policy.json").read_text()))
        found: dict[str, Any] = {
            "foretold": rank_shares(policy, ranks=RANKS, tokens=29, batch=2)[rank].kv_bytes
        }
        with suppress(ValueError), duo(model, policy):
            raise AssertionError("a policy of all heads was taken")
        with torch.no_grad(), on_rank(model, policy) as own, duo(model, own):
            cache = DuoCache(own, model)
            logits = [
                model(input_ids=part, past_key_values=cache, use_cache=True).logits
                for part in ids(2).split(11, dim=1)
            ]
            found["error"] = float(
                (torch.cat(logits, 1) - expected).abs().max() / expected.abs().max()
            )
            found["bytes"] = cache.kv_bytes()
            for kind in ("dynamic", "static"):
                options = {"max_new_tokens": NEW, "do_sample": False, "cache_implementation": kind}
                found[kind] = bool((model.generate(ids(2), **options) == answer).all())
        found["restored"] = model.config is config and config.num_key_value_heads == 4
        (folder / family / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_compute_what_one_does_and_share_the_cache(two: Path, family: str) -> None:
    found = [json.loads((two / family / f"{rank}.json").read_text()) for rank in range(RANKS)]
    for rank in found:
        assert rank["error"] < 1e-5
        assert rank["bytes"] == rank["foretold"]
        assert rank["dynamic"] and rank["static"] and rank["restored"]
    if family == "llama":  # four retrieval heads, all of them among the first half before
        assert found[0]["bytes"] == found[1]["bytes"]


if __name__ == "__main__":
    everything(Path(sys.argv[1]))

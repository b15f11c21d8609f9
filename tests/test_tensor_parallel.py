"""Orders of heads are fair to ranks, and two processes under `duo` compute and store what was foretold."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import WINDOW, ids, kv_heads, refused, tiny

from duohead import DuoCache, HeadPolicy, duo
from duohead.models.engine import Engine
from duohead.models.generate import generate
from duohead.models.ranks import RankPolicy, head_orders, in_order, rank_policy, rank_shares
from duohead.models.reorder import reorder_heads

RANKS = 2
# Fields that two ranks divide, the vocabulary among them.
FIELDS = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 64}
# Biases; windows, gates, experts and query heads that differ by layer; keys that are gathered again for their norms.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "laguna": {"num_attention_heads_per_layer": [4, 8, 12]},
    "olmo2": {},
}
GATHERED = "olmo2"
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
    refused("ranks must be an integer >= 1, got 0", rank_shares, policy, ranks=0, tokens=9)
    refused("ranks must be an integer >= 1, got True", head_orders, policy, ranks=True)
    refused(r"rank must lie in 0\.\.1, got 2", rank_policy, policy, 2, ranks=2)


def test_a_policy_of_a_rank_binds_to_the_whole_model_alone() -> None:
    model = tiny("gemma3", **FIELDS)
    whole = policy_of_all(model)
    own = rank_policy(whole, 1, ranks=2)
    bound = own.bind(model)
    assert bound == rank_policy(whole.bind(model), 1, ranks=2) == bound.bind(model)
    assert [layer.num_kv_heads for layer in bound.layers] == [2, 2, 2]
    assert [shape.num_kv_heads for shape in bound.shapes] == [2, 2, 2]
    assert RankPolicy.from_dict(json.loads(bound.to_json())) == bound
    refused("unknown fields .'ranks'", HeadPolicy.from_dict, bound.to_dict())
    wrong = RankPolicy(own.layers, ranks=4)
    refused("policy has 8 KV heads in layer 0 but the model has 4", wrong.bind, model)


def policy_of_all(model: Any) -> HeadPolicy:
    return HeadPolicy.from_heads(retrieval=KEPT, num_kv_heads=kv_heads(model), sink=3, recent=5)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(tmp_path_factory.mktemp("two"), "cpu")


def launch(folder: Path, device: str) -> Path:
    """What two processes find on models whose heads were reordered for two ranks; see `everything`."""
    for family, fields in FAMILIES.items():
        model = tiny(family, **FIELDS, **fields)
        with duo(model, policy_of_all(model)), torch.no_grad():
            logits = model(input_ids=ids(2), use_cache=False).logits
            answer = model.generate(ids(2), max_new_tokens=NEW, do_sample=False)
        moved = reorder_heads(model, policy_of_all(model), ranks=RANKS)
        model.save_pretrained(folder / family)
        torch.save((logits, answer), folder / family / "expected.pt")
        (folder / family / "policy.json").write_text(moved.policy.to_json())
    tiny("llama", **FIELDS | {"num_key_value_heads": 1}).save_pretrained(folder / "one")
    here = Path(__file__)
    paths = os.pathsep.join([str(here.parent), str(here.parents[1]), *sys.path])
    common = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "NCCL_NVLS_ENABLE": "0"}
    if device == "cpu":
        common["CUDA_VISIBLE_DEVICES"] = ""
    processes = []
    for rank in range(RANKS):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
        command, errors = [sys.executable, str(here), str(folder), device], folder / f"{rank}.txt"
        with errors.open("w") as file:
            processes.append(
                subprocess.Popen(
                    command, env={**os.environ, **common, **place}, stdout=file, stderr=file
                )
            )
    for rank, process in enumerate(processes):
        assert process.wait(300) == 0, (folder / f"{rank}.txt").read_text()[-3000:]
    return folder


def everything(folder: Path, device: str) -> None:
    """One of two processes: every model, split by tensor parallelism, under its policy."""
    import torch.distributed as dist

    file, limit = f"file://{folder / 'meeting'}", timedelta(seconds=60)
    rank = int(os.environ["RANK"])
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = {"cpu": "gloo", "cuda": "nccl"}[device]
    dist.init_process_group(backend, file, limit, world_size=RANKS, rank=rank)
    for family in FAMILIES:
        model, policy = split(folder / family)
        there = model.device
        assert there.type == device
        expected, answer = (
            x.to(there) for x in torch.load(folder / family / "expected.pt", weights_only=True)
        )
        found = report(model, policy, expected, answer, ids(2).to(there))
        (folder / family / f"{rank}.json").write_text(json.dumps(found))
    model, _ = split(folder / "one")
    alone = HeadPolicy.from_heads(retrieval=[[0], [], []], num_kv_heads=1)
    refused("1 KV heads split over 2 processes .*; use as many", duo(model, alone).__enter__)
    dist.destroy_process_group()


def split(folder: Path) -> tuple[Any, HeadPolicy]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    file = folder / "policy.json"
    return model, HeadPolicy.from_dict(json.loads(file.read_text())) if file.exists() else None


@torch.no_grad()
def report(model: Any, policy: HeadPolicy, expected: Any, answer: Any, text: Any) -> dict[str, Any]:
    config, before = model.config, model(input_ids=text, use_cache=False).logits
    found: dict[str, Any] = {}
    with duo(model, policy) as own:
        found["heads"] = [layer.num_kv_heads for layer in own.layers]
        found["config"] = model.config.num_key_value_heads
        found["foretold"] = own.kv_bytes(29, 2)
        cache = DuoCache(own, model)
        logits = [
            model(input_ids=part, past_key_values=cache, use_cache=True).logits
            for part in text.split(11, dim=1)
        ]
        found["error"] = float((torch.cat(logits, 1) - expected).abs().max() / expected.abs().max())
        found["bytes"] = cache.kv_bytes()
        options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
        engine = Engine(model, batch=2, max_length=40)
        # On a GPU transformers compiles for a static cache, which is not what is asked here.
        static = {"cache_implementation": "static", "disable_compile": True}
        answers = {
            "dynamic": model.generate(text, **options),
            "static": model.generate(text, **options, **static),
            "chunked": model.generate(text, **options, prefill_chunk_size=8),
            "generate": (auto := generate(model, text, chunk=7, **options)).tokens,
            "engine": generate(model, text, chunk=7, engine=engine, **options).tokens,
        }
        found["by"] = auto.engine
        found["wrong"] = [name for name, tokens in answers.items() if not tokens.equal(answer)]
        if isinstance(own, RankPolicy):
            theirs = DuoCache(policy, model)
            refused("made for another policy", model, input_ids=text, past_key_values=theirs)
        refused("cannot be moved under a policy", reorder_heads, model, policy)
    with duo(model, own) as again:
        found["again"] = again == own
    after = model(input_ids=text, use_cache=False).logits
    found["restored"] = model.config is config and after.equal(before)
    refused("sharded.; reorder first", reorder_heads, model, policy)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_compute_what_one_does_and_share_the_cache(two: Path, family: str) -> None:
    check(two, family, by="transformers")


@pytest.mark.gpu
def test_two_gpus_compute_what_one_cpu_does_and_share_the_cache(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    launch(tmp_path, "cuda")
    for family in FAMILIES:
        check(tmp_path, family, by="graph")


def check(two: Path, family: str, *, by: str) -> None:
    found = [json.loads((two / family / f"{rank}.json").read_text()) for rank in range(RANKS)]
    policy = HeadPolicy.from_dict(json.loads((two / family / "policy.json").read_text()))
    shares = rank_shares(policy, ranks=RANKS, tokens=29, batch=2)
    for rank, share in zip(found, shares, strict=True):
        assert rank["by"] == by
        whole = family == GATHERED
        assert rank["error"] < 1e-5
        assert rank["wrong"] == []
        assert rank["heads"] == [4 if whole else 2] * 3
        assert rank["config"] == 4  # what save_pretrained would write
        assert rank["bytes"] == rank["foretold"]
        assert rank["bytes"] == (policy.kv_bytes(29, 2) if whole else share.kv_bytes)
        assert rank["restored"] and rank["again"]
    if family == "llama":  # four retrieval heads, all of them among the first half before
        assert found[0]["bytes"] == found[1]["bytes"]


if __name__ == "__main__":
    everything(Path(sys.argv[1]), sys.argv[2])

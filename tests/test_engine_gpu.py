"""The engine on a CUDA device: graphs give the tokens of the reference on the CPU, text after text, seed by seed."""

from typing import Any

import pytest
import torch
from tiny import FAMILIES, HYBRIDS, LENGTH, expected_greedy, ids, left_padded, policy_for, tiny

from duohead import disable, duo, enable
from duohead.models.engine import Engine
from duohead.models.generate import generate
from duohead.models.sampling import Sampler

pytestmark = pytest.mark.gpu
NEW = 12


def greedy(model: Any, policy: Any, tokens: Any, mask: Any, **fields: Any) -> list[list[int]]:
    """Greedy tokens through an engine, of two texts: the first one is forgotten in between."""
    with duo(model.cuda(), policy):
        engine = Engine(model, batch=2, max_length=LENGTH + NEW, padded=mask is not None, **fields)
        there = None if mask is None else mask.cuda()
        generate(model, ids(2, LENGTH, seed=9).cuda(), max_new_tokens=NEW, engine=engine)
        engine.reset()
        result = generate(
            model, tokens.cuda(), attention_mask=there, max_new_tokens=NEW, chunk=7, engine=engine
        )
    assert result.engine == ("compiled" if engine.compiles else "graph")
    assert engine.length == int(engine.cache.get_seq_length()) == LENGTH + NEW - 1
    return result.tokens.tolist()


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_of_every_family_give_the_tokens_of_the_reference(family: str, padded: bool) -> None:
    model = tiny(family)
    policy = policy_for(model, "alternating")
    tokens, mask = left_padded([LENGTH, LENGTH - 9]) if padded else (ids(2), None)
    expected = expected_greedy(model, policy, tokens, NEW, mask)
    assert greedy(model, policy, tokens, mask) == expected.tolist()


@pytest.mark.parametrize("family", ["llama", *HYBRIDS])
def test_turns_in_graphs_equal_one_long_text_although_steps_ran_past_the_stop_token(
    family: str,
) -> None:
    model = tiny(family)
    policy = policy_for(model, "alternating")
    plain, wanted = ids(1, 9, seed=2), []
    for turn in range(3):
        plain = expected_greedy(model, policy, torch.cat([plain, ids(1, 4, seed=turn)], 1), 6)
        stop = int(plain[0, -3])
        plain = plain[:, : plain.shape[1] - 6 + plain[0, -6:].tolist().index(stop) + 1]
        wanted.append((stop, plain.tolist()))
    text = ids(1, 9, seed=2).cuda()
    with duo(model.cuda(), policy):
        engine = Engine(model, max_length=64)
        for turn, (stop, expected) in enumerate(wanted):
            text = torch.cat([text, ids(1, 4, seed=turn).cuda()], 1)
            result = generate(model, text, max_new_tokens=20, engine=engine, eos_token_id=stop)
            text = result.tokens
            assert text.tolist() == expected


def test_seeds_and_samplers_have_graphs_of_their_own() -> None:
    model = tiny("llama")
    with duo(model.cuda(), policy_for(model, "alternating")):
        engine = Engine(model, max_length=LENGTH + 20)
        found = []
        for seed, sampler in ((1, 1.5), (1, 1.5), (2, 1.5), (1, 0.0), (1, 0.01), (1, 1.5)):
            engine.reset()
            engine.seed(seed)
            chosen = Sampler(sampler, top_k=None if sampler == 0 else 40)
            first = engine.pick(engine.prefill(ids().cuda()), chosen)
            found.append(engine.decode(first, 19, sampler=chosen).tolist())
    assert found[0] == found[1] == found[5] != found[2]
    assert found[3] == found[4] != found[0]


def test_generate_keeps_its_engine_and_leaves_the_rest_to_transformers() -> None:
    model = tiny("llama")
    policy = policy_for(model, "alternating")
    expected = expected_greedy(model, policy, ids(), NEW)
    model.cuda()
    enable(model, policy)
    first = generate(model, ids().cuda(), max_new_tokens=NEW)
    again = generate(model, ids().cuda(), max_new_tokens=NEW)
    assert first.tokens.tolist() == again.tokens.tolist() == expected.tolist()
    assert (first.engine, again.engine) == ("graph", "graph")
    assert first.prepare_seconds > again.prepare_seconds == 0
    other = generate(model, ids().cuda(), max_new_tokens=NEW, num_beams=2)
    assert other.engine == "transformers"
    disable(model)
    torch.cuda.synchronize()


def test_a_step_that_waits_for_the_host_is_named() -> None:
    model = tiny("llama")

    def wait(module: Any, inputs: Any, out: Any) -> None:
        if out.shape[1] == 1:
            float(out.sum())

    with duo(model.cuda(), policy_for(model, "all")):
        model.model.norm.register_forward_hook(wait)
        engine = Engine(model, max_length=64)
        with pytest.raises(
            ValueError, match=r"LlamaForCausalLM cannot be captured in a CUDA graph"
        ):
            generate(model, ids().cuda(), max_new_tokens=3, engine=engine)
    assert torch.randn(100, device="cuda").std() > 0


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-oss", "qwen3-next"])
def test_compiled_steps_in_graphs_give_the_tokens_of_the_reference(family: str) -> None:
    torch._dynamo.reset()
    model = tiny(family)
    policy = policy_for(model, "alternating")
    tokens, mask = left_padded([LENGTH, LENGTH - 9])
    expected = expected_greedy(model, policy, tokens, NEW, mask)
    assert greedy(model, policy, tokens, mask, compile=True) == expected.tolist()

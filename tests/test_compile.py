"""Decode on a static cache compiles to one graph without breaks, and says the same as without compiling."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import (
    LENGTH,
    assert_close,
    expected_greedy,
    expected_logits,
    ids,
    left_padded,
    policy_for,
    tiny,
)
from torch._dynamo.backends.registry import lookup_backend
from transformers import CompileConfig

from duohead import DuoCache, duo
from duohead.models.prefill import prefill

PREFIX = LENGTH - 6


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def counting(name: str) -> tuple[Callable[..., Any], list[Any]]:
    """A compiler backend, and the list that it adds every graph to."""
    graphs: list[Any] = []

    def compile_graph(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return lookup_backend(name)(graph, inputs)

    return compile_graph, graphs


def decoded(
    model: Any, bound: Any, tokens: torch.Tensor, mask: torch.Tensor | None, backend: Any
) -> torch.Tensor:
    """Logits of the last tokens: eager prefill, then compiled steps on a static cache longer than the text."""
    cache = DuoCache(bound, model, max_length=LENGTH + 3)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    prefix = None if mask is None else mask[:, :PREFIX]
    whole = None if mask is None else torch.nn.functional.pad(mask, (0, 3), value=1)
    place = (torch.ones_like(tokens) if mask is None else mask).cumsum(-1) - 1
    with torch.no_grad():
        model(
            input_ids=tokens[:, :PREFIX],
            attention_mask=prefix,
            position_ids=place[:, :PREFIX].clamp(min=0),
            past_key_values=cache,
        )
        steps = [
            compiled(
                input_ids=tokens[:, step : step + 1].clone(),
                attention_mask=whole,
                position_ids=place[:, step : step + 1].clone(),
                past_key_values=cache,
            ).logits
            for step in range(PREFIX, LENGTH)
        ]
    assert int(cache.get_seq_length()) == LENGTH
    return torch.cat(steps, 1)


@pytest.mark.parametrize(
    ("family", "padded"),
    [
        ("llama", True),
        ("qwen3", False),
        ("gemma3", True),
        ("laguna", True),
        ("gpt-oss", False),
    ],
)
def test_decode_is_one_graph_for_all_steps(family: str, padded: bool) -> None:
    # Where layers are alike, two show what any number would.
    model = tiny(family, **({"num_hidden_layers": 2} if family in ("llama", "qwen3") else {}))
    policy = policy_for(model, "alternating")
    tokens, mask = left_padded([LENGTH, LENGTH - 9]) if padded else (ids(2), None)
    backend, graphs = counting("aot_eager" if family == "llama" else "eager")
    with duo(model, policy) as bound:
        found = decoded(model, bound, tokens, mask, backend)
    assert len(graphs) == 1
    assert_close(found, expected_logits(model, policy, tokens, mask)[:, PREFIX:])


@pytest.mark.parametrize("codec", ["fp8", "int8", "int4", "int4-hadamard"])
def test_lossy_decode_compiles_to_the_same_numbers(codec: str) -> None:
    model = tiny("llama", num_hidden_layers=2).double()
    policy = policy_for(model, "alternating", retrieval_dtype=codec, streaming_dtype=codec)
    tokens, mask = left_padded([LENGTH, LENGTH - 9])
    backend, graphs = counting("eager")
    with duo(model, policy) as bound:
        found = decoded(model, bound, tokens, mask, backend)
        with torch.no_grad():
            place = (mask.cumsum(-1) - 1).clamp(min=0)
            whole = model(
                input_ids=tokens, attention_mask=mask, position_ids=place, use_cache=False
            ).logits
    assert len(graphs) == 1
    assert_close(found, whole[:, PREFIX:])


def test_one_graph_serves_the_next_cache_of_the_same_size() -> None:
    model = tiny("llama", num_hidden_layers=2)
    policy = policy_for(model, "alternating")
    backend, graphs = counting("eager")
    with duo(model, policy) as bound:
        for seed in (1, 2):
            tokens = ids(2, seed=seed)
            found = decoded(model, bound, tokens, None, backend)
    assert len(graphs) == 1
    assert_close(found, expected_logits(model, policy, tokens)[:, PREFIX:])


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize(
    ("chunk", "count"), [(None, 1), (7, 2)], ids=["whole prefill", "chunked prefill"]
)
def test_generate_compiles_its_own_steps(padded: bool, chunk: int | None, count: int) -> None:
    model = tiny("llama", num_hidden_layers=2)
    policy = policy_for(model, "alternating")
    tokens, mask = left_padded([21, 9]) if padded else (ids(2, 21), None)
    backend, graphs = counting("eager")
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    with duo(model, policy):
        found = model.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=6,
            do_sample=False,
            cache_implementation="static",
            prefill_chunk_size=chunk,
            compile_config=config,
        )
    assert found.tolist() == expected_greedy(model, policy, tokens, 6, mask).tolist()
    assert len(graphs) == count  # decode, and a chunk of prefill


@pytest.mark.parametrize("limit", [1, 8], ids=["some chunks compiled", "as many as come"])
def test_a_compiled_model_reads_a_prompt_in_chunks_into_a_growing_cache(limit: int) -> None:
    model = tiny("llama", num_hidden_layers=1)
    policy = policy_for(model, "alternating")
    compiled = torch.compile(model, backend="eager")
    with duo(model, policy) as bound, torch._dynamo.config.patch(recompile_limit=limit):
        found = prefill(compiled, ids(), DuoCache(bound, model), chunk=LENGTH // 3)
    assert_close(found, expected_logits(model, policy, ids())[:, -1])


@pytest.mark.slow
def test_inductor_gives_the_same_logits() -> None:
    model = tiny("llama")
    policy = policy_for(model, "alternating")
    tokens, mask = left_padded([LENGTH, LENGTH - 9])
    with duo(model, policy) as bound:
        found = decoded(model, bound, tokens, mask, "inductor")
    assert_close(found, expected_logits(model, policy, tokens, mask)[:, PREFIX:])

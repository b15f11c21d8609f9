"""What the engine compiles, and what it takes in slices: the same numbers, few graphs, and a model left as it was."""

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

from duohead import duo
from duohead.models import compiling
from duohead.models.engine import Engine
from duohead.models.generate import generate

NEW = 9
COMPILE = torch.compile


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", {"LlamaRMSNorm", "LlamaMLP"}),
        ("qwen3", {"Qwen3RMSNorm", "Qwen3MLP"}),
        ("gemma2", {"Gemma2RMSNorm", "Gemma2MLP"}),
        ("qwen3-moe", {"Qwen3MoeRMSNorm"}),
        ("mixtral", {"MixtralRMSNorm"}),
    ],
)
def test_the_row_wise_parts_are_norms_and_feed_forward_layers(family: str, names: set[str]) -> None:
    model = tiny(family)
    found = compiling.row_wise(model)
    assert {type(module).__name__ for module in found} == names
    assert len(set(map(id, found))) == len(found)
    layers = model.config.num_hidden_layers
    assert len(found) % layers == 0


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "gemma4", "laguna"])
def test_slices_of_the_row_wise_parts_change_nothing_and_leave_the_model_as_it_was(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "SLICE_ROWS", 10)
    model = tiny(family)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with torch.no_grad():
        expected = model(ids(2)).logits
        with compiling.in_slices(model, compiled=False):
            found = model(ids(2)).logits
    assert_close(found, expected)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
def test_a_chunk_of_any_length_is_the_same_graph(
    padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = tiny("llama", num_hidden_layers=2)
    graphs = []

    def counting(function: Any, **fields: Any) -> Any:
        def keep(graph: Any, inputs: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        return COMPILE(function, fullgraph=fields["fullgraph"], backend=keep)

    monkeypatch.setattr(torch, "compile", counting)
    policy = policy_for(llama, "alternating")
    tokens, mask = left_padded([LENGTH, LENGTH - 9]) if padded else (ids(1), None)
    with duo(llama, policy, impl="triton"):
        engine = Engine(llama, batch=len(tokens), max_length=40, padded=padded, compile=True)
        engine.prepare()
        assert len(graphs) == 2  # a chunk and a decode step
        for chunk in (10, None):
            engine.reset()
            found = engine.prefill(tokens, attention_mask=mask, chunk=chunk)
            assert_close(found, expected_logits(llama, policy, tokens, mask)[:, -1], limit=1e-4)
    assert len(graphs) == 2


@pytest.mark.slow
def test_a_compiled_engine_gives_the_same_tokens_and_leaves_the_model_as_it_was() -> None:
    llama = tiny("llama")
    policy = policy_for(llama, "alternating")
    expected = expected_greedy(llama, policy, ids(), NEW)
    before = {name: set(vars(module)) for name, module in llama.named_modules()}
    with duo(llama, policy):
        engine = Engine(llama, max_length=LENGTH + NEW, compile=True)
        found = generate(llama, ids(), max_new_tokens=NEW, chunk=7, engine=engine)
    assert found.tokens.tolist() == expected.tolist()
    assert found.prepare_seconds > 0
    assert {name: set(vars(module)) for name, module in llama.named_modules()} == before

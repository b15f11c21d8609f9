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
from duohead.models import engine as engine_module
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
    monkeypatch.setattr(compiling, "NORM_BYTES", 1000)
    model = tiny(family)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with torch.no_grad():
        expected = model(ids(2)).logits
        with compiling.in_slices(model, compiled=False):
            found = model(ids(2)).logits
    assert_close(found, expected)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("length", [10, 11, 20, 21, 29])
def test_slices_are_about_equally_long(length: int) -> None:
    seen: list[int] = []

    def double(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape[1])
        return 2 * x

    x = torch.randn(2, length, 3)
    assert torch.equal(compiling._sliced(double, lambda _: 10)(x), 2 * x)
    assert max(seen) <= 10
    assert max(seen) - min(seen) <= 1
    assert sum(seen) == length


def test_a_slice_of_a_norm_has_a_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "NORM_BYTES", 2 * 7 * 96 * 4)
    for shape in ((2, 50, 96), (2, 50, 3, 32)):
        assert compiling._norm_step(torch.zeros(shape)) == 7
    assert compiling._norm_step(torch.zeros(2, 50, 10_000)) == 1


def counted_compiles(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the classes whose forward is compiled from now on; they run as they are."""
    asked: list[str] = []

    def note(function: Any, **fields: Any) -> Any:
        asked.append(type(function.__self__).__name__)
        return function

    monkeypatch.setattr(torch, "compile", note)
    return asked


def test_only_long_prompts_compile_the_row_wise_parts_unasked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llama = tiny("llama", num_hidden_layers=2)
    policy = policy_for(llama, "alternating")
    asked = counted_compiles(monkeypatch)
    monkeypatch.setattr(engine_module, "is_long", lambda tokens, _: tokens >= LENGTH)
    with duo(llama, policy):
        engine = Engine(llama, max_length=2 * LENGTH)
        engine.prefill(ids(1, LENGTH - 1))
        assert asked == []
        engine.reset()
        assert_close(engine.prefill(ids()), expected_logits(llama, policy, ids())[:, -1])
        assert sorted(asked) == ["LlamaMLP"] * 2 + ["LlamaRMSNorm"] * 4
        asked.clear()
        never = Engine(llama, max_length=2 * LENGTH, compile=False)
        never.prefill(ids())
        assert asked == []
    assert not engine.compiles


def test_a_rehearsal_compiles_for_the_longest_prompt_to_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llama = tiny("llama", num_hidden_layers=2)
    asked = counted_compiles(monkeypatch)
    monkeypatch.setattr(engine_module, "is_long", lambda tokens, _: tokens >= LENGTH)
    with duo(llama, policy_for(llama, "alternating")):
        engine = Engine(llama, max_length=2 * LENGTH)
        engine.prepare(tokens=LENGTH - 1)
        assert asked == [] and engine.prepare_seconds == 0
        engine.prepare()
        assert len(asked) == 6 and engine.prepare_seconds > 0
        asked.clear()
        engine.prepare()
        assert asked == []


def test_long_is_a_matter_of_tokens_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(compiling, "LONG_PROMPT", 100)
    assert compiling.is_long(100, gpu)
    assert not compiling.is_long(99, gpu)
    assert not compiling.is_long(100, cpu)
    monkeypatch.setattr(compiling, "LONG_PROMPT", None)
    assert not compiling.is_long(1 << 30, gpu)


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
def test_a_chunk_of_any_length_is_the_same_graph(
    padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = tiny("llama", num_hidden_layers=1)  # kernels are slow in Triton's interpreter
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

"""Storing ahead of attention: decoding by the kernels equals the oracle, and happens only where it is exact."""

from typing import Any

import pytest
import torch
from oracle import Inputs, hold, inputs, make_policy, split
from tiny import LENGTH, assert_close, expected_logits, ids, left_padded, policy_for, tiny

from duohead import DuoCache, duo
from duohead.cache import DuoLayer, opened
from duohead.cache.stored import can_append, layer_at
from duohead.models import opaque
from duohead.policy import HeadPolicy

if not torch.cuda.is_available():
    pytest.importorskip("triton", reason="the kernels run in Triton's interpreter")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(
    policy: HeadPolicy,
    x: Inputs,
    chunks: list[int],
    *,
    layer: DuoLayer | None = None,
    impl: str = "triton",
) -> torch.Tensor:
    """Outputs [B, T, H, D] of a layer fed chunk by chunk, by the path that a model takes."""
    layer = layer or DuoLayer(policy, 0)
    outs, start = [], 0
    for count in chunks:
        part = slice(start, start + count)
        handle, _ = layer.update(x.keys[:, :, part].to(DEVICE), x.values[:, :, part].to(DEVICE))
        mask = None if x.mask is None else x.mask[:, : start + count].to(DEVICE)
        outs.append(
            opaque.attend(
                x.query[:, :, part].to(DEVICE), handle, mask, scale=x.query.shape[-1] ** -0.5,
                softcap=None, sink_logits=None, impl=impl,
            ).cpu()
        )  # fmt: skip
        start += count
    return torch.cat(outs, 1)


def pairwise(*storages: Any) -> list[Any]:
    """Storage, whether static, and padding: any two of them meet, as all three would take twice the time."""
    cases = []
    for place, storage in enumerate(storages):
        for static in (False, True):
            padded = static == (place % 2 == 0)
            name = storage if isinstance(storage, str) else "+".join(storage)
            name += f"-{'static' if static else 'growing'}{'-padded' if padded else ''}"
            cases.append(pytest.param(storage, static, (0, 5) if padded else None, id=name))
    return cases


@pytest.mark.parametrize(
    ("storage", "static", "padding"), pairwise("auto", "int8/fp8", "int4-hadamard/int4")
)
def test_single_tokens_after_a_prefill_equal_the_oracle(
    storage: str, static: bool, padding: tuple[int, ...] | None
) -> None:
    policy = make_policy(
        "alternating", 4, sink=3, recent=6, retrieval_dtype=storage, streaming_dtype=storage
    )
    x = inputs(22, kv_heads=4, groups=2, dim=32, padding=padding, dtype=torch.float16)
    layer = DuoLayer(policy, 0, max_length=22 if static else None)
    out = run(policy, x, [15, *[1] * 7], layer=layer)  # more than once around the ring
    hold(out, policy, x)
    assert int(layer.length) == 22


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
def test_heads_that_keep_all_decode_from_storage_whatever_the_number_of_tokens(
    static: bool,
) -> None:
    policy = make_policy(
        "alternating", 2, sink=0, recent=1, evict=False, streaming_dtype="int4/int8"
    )
    x = inputs(30, kv_heads=2, groups=2, dim=16, padding=(0, 4), dtype=torch.float16)
    layer = DuoLayer(policy, 0, max_length=30 if static else None)
    layer.lazy_initialization(x.keys[:, :, :0].to(DEVICE), x.values[:, :, :0].to(DEVICE))
    assert can_append(layer, 8)
    hold(run(policy, x, [12, 1, 8, 3, 6], layer=layer), policy, x)


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
def test_a_few_tokens_at_a_time_equal_the_oracle_with_and_without_room_in_the_ring(
    static: bool,
) -> None:
    policy = make_policy("alternating", 2, sink=2, recent=7)
    x = inputs(30, kv_heads=2, groups=2, dim=16, dtype=torch.float16)
    for rollback in (0, 4):
        layer = DuoLayer(policy, 0, max_length=30 if static else None, rollback=rollback)
        layer.lazy_initialization(x.keys[:, :, :0].to(DEVICE), x.values[:, :, :0].to(DEVICE))
        assert can_append(layer, 1)
        assert can_append(layer, 5) == (rollback == 4)
        hold(run(policy, x, split(30, 5), layer=layer), policy, x)


@pytest.mark.parametrize(
    ("storage", "static", "padding"),
    pairwise(("int8", "int4"), ("fp8", "auto"), ("fp8/int4-hadamard", "auto/int8")),
)
def test_chunks_stored_by_the_kernel_are_those_stored_by_the_codecs(
    storage: tuple[str, str], static: bool, padding: tuple[int, ...] | None, monkeypatch
) -> None:
    kinds = dict(zip(("retrieval_dtype", "streaming_dtype"), storage, strict=True))
    policy = make_policy("alternating", 4, sink=3, recent=6, **kinds)
    x = inputs(22, kv_heads=4, groups=1, dim=32, padding=padding, dtype=torch.float16)
    layers = [DuoLayer(policy, 0, max_length=22 if static else None) for _ in range(2)]
    outs = []
    for layer, by_kernel in zip(layers, (False, True), strict=True):
        monkeypatch.setattr(opened, "_kernel_takes", lambda *_, chosen=by_kernel: chosen)
        outs.append(run(policy, x, [2, 13, 4, 3], layer=layer, impl="tiled"))
    assert torch.equal(*outs)
    for kinds_of_both in zip(layers[0].kinds, layers[1].kinds, strict=True):
        one, other = (kind.store.segments()[0] for kind in kinds_of_both)
        for mine, theirs in zip(one.keys + one.values, other.keys + other.values, strict=True):
            assert torch.equal(mine, theirs)
    floors = [[int(getattr(kind.store, "floor", 0)) for kind in layer.kinds] for layer in layers]
    assert floors[0] == floors[1]


def test_the_reference_codes_rule_is_never_stored_ahead() -> None:
    policy = make_policy("alternating", 2, sink=2, recent=7, visibility="chunk")
    layer = DuoLayer(policy, 0)
    layer.lazy_initialization(torch.zeros(1, 2, 0, 16), torch.zeros(1, 2, 0, 16))
    assert not can_append(layer, 1)


def test_a_static_layer_is_found_by_its_length_until_it_is_gone() -> None:
    layer = DuoLayer(make_policy("alternating", 2, sink=2, recent=7), 0, max_length=20)
    layer.lazy_initialization(torch.zeros(1, 2, 0, 16), torch.zeros(1, 2, 0, 16))
    length = layer.length
    assert isinstance(length, torch.Tensor)
    assert layer_at(length) is layer
    assert layer_at(torch.zeros_like(length)) is None
    del layer
    assert layer_at(length) is None


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-oss"])
def test_a_model_decodes_by_the_kernels_as_the_dense_reference_says(family: str) -> None:
    model = tiny(family)
    policy = policy_for(model, "alternating")
    tokens, mask = left_padded([LENGTH, LENGTH - 9])
    expected = expected_logits(model, policy, tokens, mask)
    model.to(DEVICE)
    with duo(model, policy, impl="triton", probe=False) as bound, torch.no_grad():
        cache = DuoCache(bound, model, max_length=LENGTH)
        found, start = [], 0
        for count in (LENGTH - 5, 1, 1, 1, 1, 1):
            part = slice(start, start + count)
            places = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, part].to(DEVICE)
            found.append(
                model(
                    input_ids=tokens[:, part].to(DEVICE), past_key_values=cache, position_ids=places,
                    attention_mask=mask[:, : start + count].to(DEVICE),
                ).logits.cpu()
            )  # fmt: skip
            start += count
    assert_close(torch.cat(found, 1), expected, mask, limit=1e-4 if DEVICE == "cuda" else 1e-5)


def test_a_compiled_step_calls_attention_as_one_operation_of_one_graph() -> None:
    torch._dynamo.reset()
    model = tiny("llama")
    policy = policy_for(model, "alternating")
    tokens = ids(2)
    expected = expected_logits(model, policy, tokens)[:, LENGTH - 2 :]
    model.to(DEVICE)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]):
        graphs.append(graph)
        return graph.forward

    place = torch.arange(LENGTH, device=DEVICE)[None, :]
    with duo(model, policy, impl="triton", probe=False) as bound, torch.no_grad():
        step = torch.compile(model, fullgraph=True, backend=backend)
        for _ in range(2):  # a new cache must not need a new graph
            cache = DuoCache(bound, model, max_length=LENGTH)
            model(input_ids=tokens[:, : LENGTH - 2].to(DEVICE), past_key_values=cache)
            found = [
                step(
                    input_ids=tokens[:, at : at + 1].to(DEVICE),
                    position_ids=place[:, at : at + 1].clone(),
                    past_key_values=cache,
                ).logits.cpu()
                for at in range(LENGTH - 2, LENGTH)
            ]
            assert_close(torch.cat(found, 1), expected, limit=1e-4)
    assert len(graphs) == 1
    calls = [node for node in graphs[0].graph.nodes if "duohead" in str(node.target)]
    assert len(calls) == model.config.num_hidden_layers

"""The same laws on a CUDA device: families, static decode in CUDA graphs, codecs to the bit, memory while growing."""

from dataclasses import replace

import pytest
import torch
from oracle import assert_within_budget, inputs, policy_mask, split
from tiny import (
    FAMILIES,
    LENGTH,
    assert_close,
    chunked_logits,
    expected_greedy,
    expected_logits,
    ids,
    left_padded,
    policy_for,
    tiny,
)

from duohead import DuoCache, HeadPolicy, attention, codec, duo
from duohead.cache import DuoLayer

pytestmark = pytest.mark.gpu
# fp32 sums in another order than on the CPU: a few hundred terms, several layers.
LIMIT = 1e-4


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen3-next"])
def test_a_family_on_the_gpu_equals_the_dense_reference_on_the_cpu(
    family: str, static: bool
) -> None:
    model = tiny(family)
    policy = policy_for(model, "alternating")
    tokens, mask = left_padded([LENGTH, LENGTH - 9])
    expected = expected_logits(model, policy, tokens, mask)
    model.cuda()
    with duo(model, policy) as bound:
        cache = DuoCache(bound, model, max_length=LENGTH if static else None)
        found = chunked_logits(model, cache, tokens.cuda(), [7, 11], mask.cuda()).cpu()
    assert_close(found, expected, mask, limit=LIMIT)


# No mixture of experts: in fp32, transformers' own expert products wait for the host, which a graph cannot.
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
def test_decode_in_cuda_graphs_equals_the_reference(family: str) -> None:
    torch._dynamo.reset()
    model = tiny(family)
    policy = policy_for(model, "alternating")
    tokens = ids(2)
    expected = expected_logits(model, policy, tokens)[:, LENGTH - 8 :]
    model.cuda()
    place = torch.arange(LENGTH, device="cuda")[None, :]
    with duo(model, policy) as bound, torch.no_grad():
        cache = DuoCache(bound, model, max_length=LENGTH)
        model(input_ids=tokens[:, : LENGTH - 8].cuda(), past_key_values=cache)
        step = torch.compile(model, fullgraph=True, mode="reduce-overhead")
        found = [
            step(
                input_ids=tokens[:, at : at + 1].cuda(),
                position_ids=place[:, at : at + 1].clone(),
                past_key_values=cache,
            ).logits.cpu()
            for at in range(LENGTH - 8, LENGTH)
        ]
    assert_close(torch.cat(found, 1), expected, limit=LIMIT)


def test_generate_compiles_a_static_cache_by_itself() -> None:
    torch._dynamo.reset()
    model = tiny("llama")
    policy = policy_for(model, "alternating")
    tokens, mask = left_padded([LENGTH, LENGTH - 9])
    expected = expected_greedy(model, policy, tokens, 8, mask)
    model.cuda()
    with duo(model, policy):
        found = model.generate(
            tokens.cuda(),
            attention_mask=mask.cuda(),
            max_new_tokens=8,
            do_sample=False,
            cache_implementation="static",
        )
    assert found.cpu().tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["fp8", "int8", "int4", "int4-hadamard", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_codecs_store_the_same_bits_as_on_the_cpu(name: str, dtype: torch.dtype) -> None:
    storage = codec.get(name, native=dtype)
    x = (torch.randn(3, 5, 200, 128) * torch.logspace(-3, 3, 200)[:, None]).to(dtype)
    for here, there in zip(storage.encode(x), storage.encode(x.cuda()), strict=True):
        assert torch.equal(here, there.cpu())


def test_growing_to_64k_tokens_never_holds_two_copies() -> None:
    policy = HeadPolicy.from_heads(retrieval=[[0, 1, 2, 3]] * 2, num_kv_heads=4)
    cache = DuoCache(policy)
    new = torch.randn(1, 4, 512, 128, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(128):
        for layer in range(2):
            handle, _ = cache.update(new, new, layer)
            handle.open(None)
            handle.commit()
    peak = torch.cuda.max_memory_allocated() - before
    assert cache.get_seq_length() == 65536
    assert cache.kv_bytes() == policy.kv_bytes(65536, head_dim=128)
    assert peak <= 1.15 * cache.kv_bytes() + 64 * 2**20


@pytest.mark.parametrize("chunk", [None, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_attention_through_the_cache_keeps_the_error_budget(
    dtype: torch.dtype, chunk: int | None
) -> None:
    policy = HeadPolicy.from_heads(retrieval=[[1]], num_kv_heads=4, sink=4, recent=63)
    x = inputs(1000, kv_heads=4, groups=4, dim=128, padding=(0, 77), dtype=dtype)
    there = replace(x, query=x.query.cuda(), keys=x.keys.cuda(), values=x.values.cuda())
    layer = DuoLayer(policy, 0)
    outs, start = [], 0
    for count in split(1000, chunk):
        part = slice(start, start + count)
        handle, _ = layer.update(there.keys[:, :, part], there.values[:, :, part])
        views = handle.open(x.mask[:, : start + count].cuda())
        outs.append(attention.prefill(there.query[:, :, part], views, scale=128**-0.5))
        handle.commit()
        start += count
    mask = policy_mask(policy, 0, x.position, x.position)
    assert_within_budget(
        torch.cat(outs, 1).cpu(),
        x.query,
        x.keys,
        x.values,
        mask,
        real=x.position >= 0,
        scale=128**-0.5,
    )

"""Gates: what they compute, what their gradient is, and that a borrowed model comes back as it was."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from tiny_gates import EAGER, RECENT, SINK, dense, gates_of, inputs, llama, sample, seen_by, tiny
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from duohead.identify.banded import Scores
from duohead.identify.gates import Gates, answer_positions, distillation, installed
from duohead.shapes import LayerShape


@pytest.mark.parametrize("kv_heads", [1, 2, 4], ids=["mqa", "gqa", "mha"])
def test_gradient_of_the_gates_equals_finite_differences(kv_heads: int) -> None:
    model = llama(num_key_value_heads=kv_heads)
    gates = gates_of(model)
    generator = torch.Generator().manual_seed(2)
    start = 0.2 + 0.6 * torch.rand(gates.values.shape, generator=generator, dtype=torch.float64)
    with installed(model, gates) as backbone:

        def loss_at(values: Tensor) -> Tensor:
            with torch.no_grad():
                gates.values.copy_(values)
            return distillation(backbone, gates, sample())

        loss_at(start).backward()
        assert gates.values.grad is not None
        for index in range(len(start)):
            step = torch.zeros_like(start)
            step[index] = 1e-5
            with torch.no_grad():
                slope = (loss_at(start + step) - loss_at(start - step)) / 2e-5
            assert gates.values.grad[index].item() == pytest.approx(
                slope.item(), rel=1e-6, abs=1e-9
            )


def test_gates_of_one_leave_plain_attention_and_no_loss() -> None:
    model, given = llama(), sample()
    plain = model.model(input_ids=given.input_ids[None]).last_hidden_state
    gates = gates_of(model)
    with installed(model, gates) as backbone:
        assert distillation(backbone, gates, given).item() == 0
        gated = backbone(input_ids=given.input_ids[None], use_cache=False).last_hidden_state
    assert torch.allclose(gated, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kv_heads", [1, 2, 4], ids=["mqa", "gqa", "mha"])
def test_gates_of_zero_equal_the_streaming_mask_and_others_blend_per_group(kv_heads: int) -> None:
    model, given = llama(num_key_value_heads=kv_heads), sample()
    gates = gates_of(model)
    for values in (torch.zeros, torch.rand):
        with torch.no_grad():
            gates.values.copy_(values(gates.values.shape, dtype=torch.float64))
        with installed(model, gates) as backbone:
            gated = backbone(input_ids=given.input_ids[None], use_cache=False).last_hidden_state
        reference = blended_llama(model, given.input_ids[None], gates.values.view(2, kv_heads))
        assert torch.allclose(gated, reference, rtol=0, atol=1e-11)


def blended_llama(model: Any, ids: Tensor, alpha: Tensor) -> Tensor:
    """The oracle: eager Llama whose attention is a blend of two dense masks, written as a forward of our own."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    core, length = model.model, ids.shape[1]
    hidden = core.embed_tokens(ids)
    cosine_sine = core.rotary_emb(hidden, torch.arange(length)[None])
    masks = [seen_by(length, sink=SINK, recent=RECENT, retrieval=full) for full in (True, False)]
    for layer, gate in zip(core.layers, alpha, strict=True):
        x, attention = layer.input_layernorm(hidden), layer.self_attn
        q, k, v = (
            projection(x).unflatten(-1, (-1, 8)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *cosine_sine)
        full, stream = (dense(q, k, v, mask, Scores()) for mask in masks)
        weight = gate.repeat_interleave(4 // len(gate))[:, None, None]
        mixed = weight * full + (1 - weight) * stream
        hidden = hidden + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return core.norm(hidden)


def test_a_teacher_fed_gate_takes_its_full_term_from_the_untouched_model() -> None:
    model = llama()
    own, fed = gates_of(model, initial=0.5), gates_of(model, initial=0.5, teacher_full=True)
    losses, slopes = [], []
    for gates in (own, fed):
        with installed(model, gates) as backbone:
            loss = distillation(backbone, gates, sample())
            loss.backward()
        losses.append(loss.item())
        assert gates.values.grad is not None
        slopes.append(gates.values.grad)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    # The last layer's own full term is not the teacher's either, as its input is the student's.
    assert not torch.allclose(slopes[0], slopes[1], rtol=1e-3)
    first = gates_of(llama(num_hidden_layers=1), initial=0.5, teacher_full=True)
    with installed(single := llama(num_hidden_layers=1), first) as backbone:
        taught = distillation(backbone, first, sample())
    plain = gates_of(single, initial=0.5)
    with installed(single, plain) as backbone:
        # With one layer the student's keys are the teacher's, so both variants agree.
        assert taught.item() == pytest.approx(distillation(backbone, plain, sample()).item())


def test_gradient_checkpointing_changes_nothing() -> None:
    model = llama(num_hidden_layers=3)
    slopes = []
    for checkpointing in (False, True):
        gates = gates_of(model, initial=0.5)
        with installed(model, gates, gradient_checkpointing=checkpointing) as backbone:
            distillation(backbone, gates, sample()).backward()
        slopes.append(gates.values.grad)
    assert slopes[0] is not None
    assert slopes[1] is not None
    assert torch.equal(slopes[0], slopes[1])


class _Stop(Exception):
    pass


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("interrupted", [False, True])
def test_a_model_comes_back_as_it_was(checkpointing: bool, interrupted: bool) -> None:
    model = llama().train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    before = _portrait(model)
    weights = copy.deepcopy(model.state_dict())
    try:
        gates = gates_of(model)
        with installed(model, gates, gradient_checkpointing=checkpointing) as backbone:
            assert not any(parameter.requires_grad for parameter in model.parameters())
            assert not any(module.training for module in model.modules() if not _is_layer(module))
            assert model.config._attn_implementation == "duohead_gates"
            distillation(backbone, gates, sample()).backward()
            if interrupted:
                raise _Stop
    except _Stop:
        pass
    assert _portrait(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())
    after = model.state_dict()
    assert list(after) == list(weights)
    assert all(torch.equal(after[name], weights[name]) for name in weights)


def _is_layer(module: nn.Module) -> bool:
    return type(module).__name__.endswith("DecoderLayer")


def _portrait(model: Any) -> list[Any]:
    """Everything about a model that gates might change, except its weights."""
    parts: list[Any] = [model.config.to_dict(), model.config._attn_implementation]
    for name, module in model.named_modules():
        attributes = {key: id(value) for key, value in vars(module).items() if key != "_buffers"}
        parts.append((name, module.training, attributes, module.forward.__func__))
    parts.extend(parameter.requires_grad for parameter in model.parameters())
    return parts


def test_layers_with_a_native_window_keep_it_and_get_no_gate() -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    model = tiny(
        "Qwen2", num_hidden_layers=3, sliding_window=6, use_sliding_window=True, layer_types=kinds
    )
    model.set_attn_implementation("eager")
    given = sample()
    plain = model.model(input_ids=given.input_ids[None]).last_hidden_state
    gates = gates_of(model)
    assert gates.values.shape == (2,)
    assert torch.from_numpy(gates.alpha).isnan().tolist() == [[True] * 2, [False] * 2, [True] * 2]
    with installed(model, gates) as backbone:
        gated = backbone(input_ids=given.input_ids[None], use_cache=False).last_hidden_state
        assert torch.allclose(gated, plain, rtol=0, atol=EAGER)
        with torch.no_grad():
            gates.values.zero_()
        distillation(backbone, gates, given).backward()
    assert gates.values.grad is not None
    assert (gates.values.grad != 0).all()


GPT_OSS = {
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 6,
    "experts_implementation": "eager",  # the default has no fp64 form
}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Mistral", {"sliding_window": None}),
        ("Qwen3", {}),
        (
            "Gemma2",
            {"sliding_window": 6, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
        ),
        ("GptOss", GPT_OSS),
        ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
    ],
)
def test_families_with_gates_of_one_equal_their_eager_selves(
    family: str, changes: dict[str, Any]
) -> None:
    """Among them one with softcap and one with attention sinks, which take the written-out path."""
    model = tiny(family, **changes)
    model.set_attn_implementation("eager")
    given = sample()
    plain = model.eval().model(input_ids=given.input_ids[None]).last_hidden_state
    gates = gates_of(model)
    with installed(model, gates) as backbone:
        gated = backbone(input_ids=given.input_ids[None], use_cache=False).last_hidden_state
        assert torch.allclose(gated, plain, rtol=0, atol=EAGER)
        with torch.no_grad():
            gates.values.fill_(0.5)
        distillation(backbone, gates, given).backward()
    assert gates.values.grad is not None
    assert gates.values.grad.isfinite().all()
    assert (gates.values.grad != 0).all()


def test_half_precision_models_keep_fp32_gates() -> None:
    model = llama().bfloat16()
    gates = Gates.of(model, sink=SINK, recent=RECENT, initial=0.5)
    with installed(model, gates) as backbone:
        loss = distillation(backbone, gates, sample())
        loss.backward()
    assert gates.values.dtype == loss.dtype == torch.float32
    assert gates.values.grad is not None
    assert gates.values.grad.dtype == torch.float32
    assert (gates.values.grad != 0).all()


def test_two_models_can_be_gated_at_once() -> None:
    """Gates belong to a model's private config, not to the registered function."""
    one, two = llama(), llama()
    given = sample()
    with torch.no_grad():
        (ones := gates_of(one)).values.zero_()
        (twos := gates_of(two)).values.fill_(1)
    with installed(one, ones) as first, installed(two, twos) as second:
        assert distillation(first, ones, given).item() > 0
        assert distillation(second, twos, given).item() == 0


def test_answer_positions_are_those_that_predict() -> None:
    assert answer_positions(sample()).tolist() == [35, 36, 37, 38, 43, 44, 45, 46]


def test_a_lora_wrapped_model_can_be_gated() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], r=2))
    gates = gates_of(model, initial=0.5)
    with installed(model, gates) as backbone:
        distillation(backbone, gates, sample()).backward()
    assert gates.values.grad is not None
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_what_cannot_be_gated_is_refused() -> None:
    window = LayerShape(num_kv_heads=2, head_dim=8, value_dim=8, window=4)
    with pytest.raises(
        ValueError, match="model must have at least one layer with global attention"
    ):
        Gates([window], sink=4, recent=8)
    model, ids = llama(), torch.ones(1, 20, dtype=torch.long)
    gates = gates_of(model)
    with installed(model, gates) as backbone:
        padding = torch.ones_like(ids)
        padding[0, 0] = 0
        with pytest.raises(ValueError, match="attention_mask must be all ones, got padding"):
            backbone(input_ids=ids, attention_mask=padding, use_cache=False)
        with pytest.raises(
            ValueError, match="asks attention for alibi, dropout, which gate training"
        ):
            _attend(model, alibi=torch.ones(1), dropout=0.1)
        with pytest.raises(ValueError, match="asks attention for is_causal=False"):
            _attend(model, is_causal=False)
        with pytest.raises(
            ValueError, match="one whole, unpadded sequence, got 20 queries, 20 keys and a mask"
        ):
            _attend(model, attention_mask=torch.ones(1, 1, 20, 20))
        with pytest.raises(
            ValueError, match="attends within 5 tokens but its config calls it global"
        ):
            _attend(model, sliding_window=5)


def test_a_model_that_does_not_call_the_gates_is_refused() -> None:
    """Its gates would get no gradient, and the regulariser alone would call every head useless."""
    from transformers import GPTJConfig, GPTJForCausalLM

    config = GPTJConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64)
    model = GPTJForCausalLM(config)
    gates = Gates.of(model, sink=SINK, recent=RECENT)
    with (
        pytest.raises(
            ValueError, match=r"layers \[0, 1\] of the model do not take their attention"
        ),
        installed(model, gates) as backbone,
    ):
        distillation(backbone, gates, sample())


def test_a_layer_with_other_heads_than_its_config_says_is_refused() -> None:
    model = llama()
    gates = Gates([LayerShape(4, 8, 8)] * 2, sink=SINK, recent=RECENT)
    with (
        pytest.raises(ValueError, match="attends with 2 KV heads but its config says 4"),
        installed(model, gates) as backbone,
    ):
        distillation(backbone, gates, sample())


def _attend(model: Any, *, attention_mask: Tensor | None = None, **options: Any) -> None:
    from duohead.identify.gates import gated_attention

    q, k, v = inputs(20)
    gated_attention(model.model.layers[0].self_attn, q, k, v, attention_mask, **options)


def test_gradient_checkpointing_needs_layers_that_support_it() -> None:
    from duohead.identify.borrow import borrowed

    bare = nn.Sequential(nn.Linear(2, 2))
    bare.config = llama().config  # type: ignore[assignment]
    with (
        pytest.raises(ValueError, match="gradient_checkpointing needs layers that support it"),
        borrowed(bare, gradient_checkpointing=True),
    ):
        pass


def test_the_penalty_is_the_mean_gate_and_clamping_keeps_gates_in_range() -> None:
    gates = Gates([LayerShape(2, 8, 8)], sink=4, recent=8)
    with torch.no_grad():
        gates.values.copy_(torch.tensor([-0.5, 1.5]))
    assert gates.penalty().item() == 1.0
    gates.clamp_()
    assert gates.values.tolist() == [0, 1]
    assert F.l1_loss(gates.values, torch.zeros(2)).item() == gates.penalty().item()


class _Counting(TorchDispatchMode):
    """Counts the operations that reach it, which are those that nothing above it answers from what it kept."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.counts[str(operation)] += 1
        return operation(*args, **(kwargs or {}))


def test_recomputation_spares_full_attention() -> None:
    """Its results are kept: as many attention kernels run with recomputation as without."""
    model, counts = llama(num_hidden_layers=3), []
    for checkpointing in (False, True):
        gates = gates_of(model, initial=0.5)
        with (
            installed(model, gates, gradient_checkpointing=checkpointing) as backbone,
            _Counting() as counting,
        ):
            distillation(backbone, gates, sample()).backward()
        counts.append(counting.counts)
    kernel = "aten._scaled_dot_product_flash_attention_for_cpu.default"
    assert counts[0][kernel] == counts[1][kernel] > 0
    assert counts[0]["aten.mm.default"] < counts[1]["aten.mm.default"]

"""The Laguna among the pocket models: its training form is transformers' Laguna, its experts stay busy, it learns.

The trained weights are tested with those of the other pocket models, in test_pocket.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for tools/

from tools.pocket_model import Muon, orthogonal  # noqa: E402
from tools.pocket_scores import of_transformers  # noqa: E402
from tools.pocket_shapes import SHAPES  # noqa: E402

TINY = SHAPES["tiny-laguna"]
PLACES = torch.arange(300)


def made(seed: int = 0) -> Any:
    """A tiny Laguna in its training form; no weight is zero, and routers prefer some experts."""
    torch.manual_seed(seed)
    model: Any = TINY.model(compute=torch.float32, compiled=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        for layer in model.layers:
            if layer.sparse:
                layer.bias += 0.3 * torch.randn_like(layer.bias)
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return made()


@pytest.fixture(scope="module")
def exported(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same model as a user gets it: written by transformers and loaded by name of its folder."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("exported")
    model.to_transformers().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize(("rows", "length"), [(1, 300), (3, 100), (2, 9)])
def test_the_training_form_computes_what_transformers_computes(
    model: Any, exported: Any, rows: int, length: int
) -> None:
    ids = torch.randint(TINY.vocabulary, (rows, length))
    places = PLACES[: rows * length]
    theirs = of_transformers(exported)(ids, places)
    torch.testing.assert_close(model.logits(ids, places), theirs, atol=1e-4, rtol=1e-4)
    assert theirs.std() > 0.1


def test_padding_changes_no_loss_and_no_gradient(model: Any) -> None:
    ids = torch.randint(TINY.vocabulary, (2, 40))
    found = []
    for padding in (0, 7):
        loss = model.loss(ids, ids.roll(-1, 1), torch.full(ids.shape, 0.01), padding=padding)
        found.append((loss, *torch.autograd.grad(loss, [model.embedding, model.layers[1].gate])))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)


def test_embeddings_stay_tied_and_the_selection_bias_survives_the_file(
    model: Any, exported: Any
) -> None:
    assert exported.lm_head.weight.data_ptr() == exported.model.embed_tokens.weight.data_ptr()
    bias = exported.model.layers[1].mlp.gate.e_score_correction_bias
    assert torch.equal(bias, model.layers[1].bias) and bias.std() > 0.1


def test_the_bundled_shape_is_a_laguna_of_eight_megabytes_at_most() -> None:
    shape = SHAPES["laguna"]
    config: Any = shape.config()
    model = shape.model(compute=torch.float32, compiled=False)
    assert config.model_type == "laguna" and config.tie_word_embeddings
    assert config.layer_types.count("full_attention") == 3 and config.num_hidden_layers == 9
    assert config.num_attention_heads_per_layer == [8, 4, 4, 4, 8, 4, 4, 4, 8]
    assert sum(p.numel() for p in model.parameters()) <= 3_970_000  # names take 40 KB more
    assert "0, 4, 8 global" in shape.architecture()


def test_the_selection_bias_makes_idle_experts_busy() -> None:
    model = made()
    ids = torch.randint(TINY.vocabulary, (1, 200))
    spread = []
    for _ in range(160):
        model.logits(ids, PLACES[:1])
        spread.append(max(float(m.load.max() / m.load.mean()) for m in model.layers if m.sparse))
        model.after_step(1.0)
    assert spread[0] > 1.5 and max(spread[-20:]) < 1.2
    assert "experts' load" in model.state_line()


def test_a_stack_of_experts_gets_the_update_that_each_matrix_would_get_alone() -> None:
    torch.manual_seed(0)
    stack, gradient = torch.randn(3, 8, 5), torch.randn(3, 8, 5)

    def updated(weights: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]
        for parameter, own in zip(parameters, gradients, strict=True):
            parameter.grad = own
        Muon(parameters, lr=0.1, momentum=0.9, weight_decay=0.1).step()
        return [parameter.detach() for parameter in parameters]

    (together,) = updated([stack], [gradient])
    alone = torch.stack(updated(list(stack), list(gradient)))
    torch.testing.assert_close(together, alone, atol=2e-3, rtol=0)
    singular = torch.linalg.svdvals(orthogonal(gradient).float())
    assert (singular > 0.5).all() and (singular < 1.5).all()


def test_training_lowers_the_loss_and_moves_every_weight() -> None:
    from tools.train_pocket import Trainer, parse

    trainer = Trainer(
        TINY, parse(["--text", "unused", "--out", "unused", "--shape", "tiny-laguna"])
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    torch.manual_seed(0)
    ids = torch.randint(2, 50, (1, 32)).repeat(1, 2)
    classes = torch.ones_like(ids)
    losses = []
    for step in range(12):
        trainer._schedule(step, 0.0)
        losses.append(float(trainer.step(ids, classes)))
    assert losses[-1] < 0.9 * losses[0]
    still = [n for n, p in trainer.model.named_parameters() if torch.equal(p, before[n])]
    assert still == []


def test_only_heads_of_global_layers_are_gated_and_a_policy_runs(exported: Any) -> None:
    from transformers import DynamicCache

    from duohead import HeadPattern, duo
    from duohead.shapes import layer_shapes

    gated = torch.tensor([[shape.gated] for shape in layer_shapes(exported.config)])
    assert gated.flatten().tolist() == [True, False, False, False, True]
    alpha = torch.where(gated, torch.tensor([[0.2], [0], [0], [0], [0.9]]), float("nan"))
    policy = HeadPattern.from_alpha(alpha, sink=2, recent=24).policy(retrieval_ratio=0.5)
    ids = torch.randint(2, TINY.vocabulary, (1, 120))
    with torch.no_grad():
        plain = exported(ids, past_key_values=DynamicCache(config=exported.config)).logits
        with duo(exported, policy):
            ours = exported(ids).logits
    torch.testing.assert_close(ours[:, :20], plain[:, :20], atol=1e-4, rtol=1e-4)
    assert (ours[:, -1] - plain[:, -1]).abs().max() > 1e-3


def test_the_four_heads_that_the_bundled_laguna_needs_most_are_those_of_its_middle_global_layer() -> (
    None
):
    from duohead import HeadPattern, pocket

    alpha = HeadPattern.load(pocket.pattern("pocket-laguna")).alpha
    best = sorted(((a, layer) for layer, row in enumerate(alpha) for a in row if a == a))[-4:]
    assert [layer for _, layer in best] == [4, 4, 4, 4]
    assert best[0][0] > 0.9

"""A Laguna adapter's folder as published: what is read of it, and a model of the true geometry that runs with it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import VOCAB, ids
from tiny_adapters import (
    DIM,
    GLOBAL,
    HEADS,
    LAYERS,
    TOP,
    WINDOW,
    laguna_folder,
    laguna_model,
    raw_gates,
)

from duohead import DuoCache, DuoheadForCausalLM, HeadPattern, duo


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # 40 layers of next to nothing: threads would only wait for one another
    yield laguna_model()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("laguna") / "base"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(model, base, tmp_path_factory) -> Path:
    return laguna_folder(tmp_path_factory.mktemp("adapter") / "repo", model.config, str(base))


def test_the_model_has_the_published_geometry(model) -> None:
    attention = [layer.self_attn for layer in model.model.layers]
    assert [a.q_proj.out_features // DIM for a in attention[:5]] == [48, 64, 64, 64, 48]
    assert all(a.k_proj.out_features == HEADS * DIM for a in attention)
    assert [a.sliding_window for a in attention[:5]] == [None, WINDOW, WINDOW, WINDOW, None]


def test_the_published_folder_loads_as_it_is(model, base, folder) -> None:
    pattern = HeadPattern.load(folder)
    gates = raw_gates().numpy()
    assert pattern.validate(model) is pattern
    assert (pattern.sink, pattern.recent) == (64, 256)
    assert (pattern.base_model, pattern.base_type) == (str(base), "laguna")
    assert np.array_equal(pattern.alpha[GLOBAL], gates[GLOBAL].clip(0, 1))
    windowed = [layer for layer in range(LAYERS) if layer not in GLOBAL]
    assert np.isnan(pattern.alpha[windowed]).all()
    assert pattern.windows == tuple(None if layer in GLOBAL else WINDOW for layer in range(LAYERS))


def test_its_raw_gates_stay_readable_and_survive_saving(folder, tmp_path: Path) -> None:
    pattern = HeadPattern.load(folder)
    assert pattern.raw_alpha is not None and pattern.raw_alpha.dtype == np.float32
    assert np.array_equal(pattern.raw_alpha, raw_gates().numpy())
    assert pattern.raw_alpha.min() < 0 and pattern.raw_alpha.max() > 1
    pattern.save(tmp_path / "ours")
    again = HeadPattern.load(tmp_path / "ours")
    assert again == pattern
    assert np.array_equal(again.raw_alpha, pattern.raw_alpha)


def test_its_threshold_counts_global_layers_only_and_windows_stay(folder) -> None:
    pattern = HeadPattern.load(folder)
    assert dict(pattern.selection) == {"threshold": 0.5}
    policy = pattern.policy(**pattern.selection)
    gates = raw_gates()
    for index, layer in enumerate(policy.layers):
        expected = tuple(range(HEADS)) if layer.window else tuple(
            head for head in range(HEADS) if gates[index, head] > 0.5
        )  # fmt: skip
        assert layer.retrieval == expected
    assert policy.retrieval_ratio == float((gates[GLOBAL] > 0.5).float().mean())


def test_a_model_loaded_with_it_generates(model, folder) -> None:
    loaded = DuoheadForCausalLM.from_pretrained(folder)
    tokens = ids(1, 24) % VOCAB
    expected = model.generate(tokens, max_new_tokens=4, do_sample=False)
    # Nothing is old enough to be forgotten: the same tokens as the base model's.
    assert torch.equal(loaded.generate(tokens, max_new_tokens=4, do_sample=False), expected)
    assert type(loaded).__name__ == "LagunaForCausalLM"


def test_under_the_policy_it_forgets_what_the_pattern_says_and_keeps_the_windows(
    model, folder
) -> None:
    pattern = HeadPattern.load(folder)
    policy = pattern.policy(**pattern.selection, sink=4, recent=16, window_dtype="int4")
    tokens = ids(1, 70) % VOCAB
    with duo(model, policy) as bound:
        cache = DuoCache(bound, model)
        out = model.generate(tokens, max_new_tokens=3, do_sample=False, past_key_values=cache)
    assert out.shape == (1, 73)
    assert cache.kv_bytes() == bound.kv_bytes(72)
    full = pattern.policy(retrieval_ratio=1.0, window_dtype="int4").bind(model)
    streaming = sum(len(layer.streaming) for layer in bound.layers)
    saved = streaming * (80 - 20) * 2 * DIM * 4  # slots of 80 and of 4 + 16 tokens, float32
    assert full.kv_bytes(72) - bound.kv_bytes(72) == saved


@pytest.mark.parametrize(
    "change", ["no tensor", "settings at the top only", "base_model", "other file names"]
)
def test_variants_of_the_folder_say_the_same(model, tmp_path: Path, change: str) -> None:
    more: dict[str, Any] = {
        "base_model": {"base_model_name_or_path": None, "base_model": "x/y", "base_model_revision": "abc"},
        "other file names": {"full_attention_heads_file": "gates.pt", "full_attention_heads_tsv_file": None},
    }.get(change, {})  # fmt: skip
    folder = laguna_folder(tmp_path / "repo", model.config, "some/laguna", **more)
    inner = folder / TOP
    if change == "no tensor":
        (inner / "full_attention_heads.pt").unlink()
    if change == "settings at the top only":
        (inner / "config.json").unlink()
    if change == "other file names":
        (inner / "full_attention_heads.tsv").unlink()
        (inner / "full_attention_heads.pt").rename(inner / "gates.pt")
    pattern = HeadPattern.load(folder)
    assert pattern.raw_alpha is not None
    assert np.array_equal(pattern.raw_alpha, raw_gates().numpy())
    named = ("x/y", "abc") if change == "base_model" else ("some/laguna", None)
    assert (pattern.base_model, pattern.base_revision) == named


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format_version": 2}, "format_version must be 1, got 2; look for a newer duohead"),
        ({"full_attention_heads_file": "../gates.pt"}, "must name a file of the folder, got '../gates.pt'"),
        ({"full_attention_heads_file": "/gates.pt"}, "must name a file of the folder, got '/gates.pt'"),
        ({"full_attention_heads_file": 3}, "full_attention_heads_file must be of type str or null"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_honoured_are_refused(
    model, tmp_path: Path, settings, message: str
) -> None:
    folder = laguna_folder(tmp_path / "repo", model.config, None, **settings)
    with pytest.raises(ValueError, match=message):
        HeadPattern.load(folder)


def test_a_config_of_another_model_beside_the_gates_is_refused(model, tmp_path: Path) -> None:
    folder = laguna_folder(tmp_path / "repo", model.config, None)
    whole = json.loads((folder / "config.json").read_text())
    whole |= {"num_hidden_layers": 39, "layer_types": whole["layer_types"][:39]}
    (folder / "config.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match="expected the config of a model with 40 layers"):
        HeadPattern.load(folder)


def test_gates_without_layer_types_are_fitted_to_the_base_model(model, base, tmp_path) -> None:
    folder = laguna_folder(tmp_path / "repo", model.config, str(base))
    (folder / "config.json").write_text(json.dumps({"model_type": "laguna"}))
    pattern = HeadPattern.load(folder)
    assert pattern.gated.all()
    with pytest.raises(ValueError, match=r"leave them to it with pattern.ungate"):
        pattern.validate(model)
    from duohead.adapter.load import open_adapter

    fitted = open_adapter(folder)
    assert fitted.pattern.gated.sum() == len(GLOBAL) * HEADS
    assert fitted.policy.retrieval_ratio == float((raw_gates()[GLOBAL] > 0.5).float().mean())

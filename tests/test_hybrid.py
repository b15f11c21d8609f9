"""Models with native windows in some layers: windows stay, only global layers are gated, and any precision is exact.

The oracle (`tiny_stored.py`) is dense attention over keys and values that went through their storage format first:
every query sees the stored form of a key. Models compute in float64, so that no rounding of theirs can flip a level.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny as families
import torch
import transformers
from tiny import (
    LENGTH,
    RECENT,
    SINK,
    WINDOW,
    assert_close,
    chunked_logits,
    ids,
    left_padded,
    tiny,
)
from tiny_identification import OPTIONS, TEXT, tokenizer
from tiny_stored import stored
from torch import Tensor
from transformers import DynamicCache

from duohead import DuoCache, HeadPattern, HeadPolicy, duo
from duohead.bench.models import config
from duohead.identify.scorers import NAMES, score
from duohead.shapes import layer_shapes
from duohead.storage import capacity

OLMO3 = ("Olmo3", {"sliding_window": WINDOW, "layer_types": families._SLIDING})
HYBRIDS = ("laguna", "gemma2", "gemma3", "gpt-oss", "qwen2-window", "cohere2", "olmo3")
WINDOWED = "mistral-window"
# Storage of retrieval heads, streaming heads and windowed layers.
ADAPTER = {"retrieval_dtype": "fp8", "streaming_dtype": "int4", "window_dtype": "int4"}
STORED: dict[str, dict[str, Any]] = {
    "windows-int4": {"window_dtype": "int4"},
    "pairs": {"retrieval_dtype": "fp8/int4", "streaming_dtype": "int8/fp8", "window_dtype": "int8/int4"},
    "kept": {**ADAPTER, "window_dtype": "fp8/int4", "evict": False},
    "streaming-windows": {**ADAPTER, "windowed": 2},
}  # fmt: skip
# Default configs of published sizes: layers with a native window, of all.
DEFAULTS: dict[str, tuple[int, int]] = {
    "Gemma2Config": (13, 26),
    "Gemma3TextConfig": (22, 26),
    "GptOssConfig": (18, 36),
    "MistralConfig": (32, 32),
    "Qwen2Config": (4, 32),
    "Cohere2Config": (30, 40),
    "Olmo3Config": (24, 32),
}


def make(name: str) -> Any:
    """A tiny random model in float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.FAMILIES, "olmo3", OLMO3)
        # The grouped product of experts has no float64.
        return tiny(name, experts_implementation="eager").double()


@pytest.fixture(scope="module", params=[*HYBRIDS, WINDOWED])
def model(request: pytest.FixtureRequest) -> Any:
    return make(request.param)


def policy_of(model: Any, *, windowed: int = 1, **fields: Any) -> HeadPolicy:
    """Every other head of global layers keeps everything; so does, in windowed layers, every one in ``windowed``."""
    shapes = layer_shapes(model)
    return HeadPolicy.from_heads(
        retrieval=[range(0, s.num_kv_heads, windowed if s.window else 2) for s in shapes],
        num_kv_heads=[s.num_kv_heads for s in shapes],
        sink=SINK,
        recent=RECENT,
        **fields,
    )


@torch.no_grad()
def expected(model: Any, policy: HeadPolicy, tokens: Tensor) -> Tensor:
    with stored(model, policy):
        return model(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize(
    ("stored", "chunks", "max_length"),
    [
        ("windows-int4", [11, 7], None),
        ("pairs", [LENGTH - 3], LENGTH),
        ("kept", [11, 7], LENGTH),
        ("streaming-windows", [LENGTH - 3], None),
    ],
)
def test_any_precision_of_heads_and_windows_equals_the_oracle(
    model: Any, stored: str, chunks: list[int], max_length: int | None
) -> None:
    policy, tokens = policy_of(model, **STORED[stored]), ids(2)
    truth = expected(model, policy, tokens)
    with duo(model, policy) as bound:
        cache = DuoCache(bound, model, max_length=max_length)
        assert_close(chunked_logits(model, cache, tokens, chunks), truth, limit=1e-6)
    assert cache.kv_bytes() == bound.kv_bytes(LENGTH, batch=2)
    exact = replace(policy, retrieval_dtype="auto", streaming_dtype="auto", window_dtype="auto")
    assert (expected(model, exact, tokens) - truth).abs().max() > 1e-3


def test_windowed_layers_hold_their_window_in_the_precision_asked_for(model: Any) -> None:
    with torch.no_grad(), duo(model, policy_of(model, **ADAPTER)) as bound:
        cache = DuoCache(bound, model)
        model(ids(), past_key_values=cache)
    for layer, shape in zip(cache.duo_layers, layer_shapes(model), strict=True):
        if shape.window is not None:
            (kind,) = layer.kinds
            assert (kind.spec.dtype, kind.store.slots.size) == ("int4", WINDOW)
            assert kind.heads is None
    assert any(shape.window for shape in bound.shapes)


@pytest.mark.parametrize("length", [WINDOW - 3, LENGTH])
def test_the_models_own_bytes_are_those_of_its_own_cache(model: Any, length: int) -> None:
    own = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids(2, length), past_key_values=own)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in own.layers)
    assert policy_of(model).bind(model).dense_kv_bytes(length, batch=2) == held


@pytest.mark.parametrize("name", ["laguna", "gpt-oss"])
def test_padded_rows_and_generation_equal_the_oracle(name: str) -> None:
    model = make(name)
    policy = policy_of(model, **ADAPTER)
    lengths, new = [17, 12], 6
    tokens, mask = left_padded(lengths)
    with duo(model, policy):
        found = model.generate(tokens, attention_mask=mask, max_new_tokens=new, do_sample=False)
    for row, length in enumerate(lengths):
        text = found[row : row + 1, -length - new :]
        greedy = expected(model, policy, text[:, :-1])[:, length - 1 :].argmax(-1)
        assert text[:, length:].tolist() == greedy.tolist()


def test_drafts_that_are_taken_back_leave_quantised_windows_as_they_were() -> None:
    model = make("laguna")
    tokens = ids(1, 6).repeat(1, 3)
    with duo(model, policy_of(model, **ADAPTER)):
        plain = model.generate(tokens, max_new_tokens=12, do_sample=False)
        drafted = model.generate(
            tokens, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=4
        )
    assert drafted.tolist() == plain.tolist()


@pytest.mark.parametrize("name", DEFAULTS)
def test_published_shapes_have_windows_where_their_own_cache_has_them(name: str) -> None:
    made = default(name)
    own = [layer.is_sliding for layer in DynamicCache(config=made).layers]
    assert [shape.window is not None for shape in layer_shapes(made)] == own
    assert (sum(own), len(own)) == DEFAULTS[name]


def default(name: str) -> Any:
    """The default config of a family, with the windows that its published models have."""
    if name == "Laguna":
        return config("laguna-xs.2")
    fields = {
        "Qwen2Config": {"use_sliding_window": True},
        "Olmo3Config": {"max_position_embeddings": 65536},
    }
    return getattr(transformers, name)(**fields.get(name, {}))


@pytest.fixture(
    scope="module", params=["Laguna", *(name for name in DEFAULTS if name != "MistralConfig")]
)
def published(request: pytest.FixtureRequest) -> tuple[Any, HeadPattern]:
    """A config of a published size, and random alphas for its global layers."""
    made = default(request.param)
    shapes = layer_shapes(made)
    alpha = np.random.default_rng(0).random((len(shapes), shapes[0].num_kv_heads), dtype=np.float32)
    alpha[[not shape.gated for shape in shapes]] = np.nan
    return made, HeadPattern.from_alpha(alpha, model=made, sink=64, recent=256)


def test_ratios_and_ranks_count_global_layers_only(published: tuple[Any, HeadPattern]) -> None:
    made, pattern = published
    shapes = layer_shapes(made)
    gated = sum(shape.num_kv_heads for shape in shapes if shape.window is None)
    assert len(pattern.rank()) == gated
    assert all(shapes[layer].window is None for layer, _ in pattern.rank())
    for ratio in (0.0, 0.25, 0.4, 1.0):
        policy = pattern.policy(retrieval_ratio=ratio).bind(made)
        kept = [len(layer.retrieval) for layer in policy.layers if layer.window is None]
        assert sum(kept) == int(ratio * gated + 0.5)
        assert policy.retrieval_ratio == pytest.approx(ratio, abs=0.5 / gated)
        windowed = [layer for layer in policy.layers if layer.window is not None]
        assert windowed
        assert not any(layer.streaming for layer in windowed)


def test_a_policy_is_smaller_than_the_models_own_cache_from_where_it_says(
    published: tuple[Any, HeadPattern],
) -> None:
    made, pattern = published
    as_they_are = pattern.policy(retrieval_ratio=0.5).bind(made)
    first = as_they_are.saves_from()
    assert first is not None
    assert as_they_are.kv_bytes(first - 1) >= as_they_are.dense_kv_bytes(first - 1)
    quantised = pattern.policy(
        retrieval_ratio=0.5, window_dtype="int4", streaming_dtype="int4"
    ).bind(made)
    for policy, start in ((as_they_are, first), (quantised, 256)):
        # Our bytes grow at the first length of a step alone, and the others' never shrink.
        while start <= 131072:
            assert policy.kv_bytes(start) < policy.dense_kv_bytes(start), start
            start = capacity(start) + 1


@pytest.mark.parametrize("scorer", NAMES)
def test_a_model_of_windows_alone_has_nothing_to_identify(scorer: str) -> None:
    model = tiny(WINDOWED, max_position_embeddings=4096)
    options = OPTIONS if scorer == "optimise" else None
    message = "model must have at least one layer with global attention|no layer is gated"
    with pytest.raises(ValueError, match=message):
        score(scorer, model, tokenizer(), TEXT, options=options, progress=False)

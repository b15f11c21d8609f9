"""Pattern folders of others, read as they are published: the reference code's, and the Laguna adapter's.

Their gates overshoot [0, 1] a little and say nothing of native windows, so they are clipped, and layers that have a
window in the model's config are left unranked. A tensor file is read with ``weights_only=True``, never unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from duohead.formats.parts import (
    CONFIG,
    TSV,
    check_range,
    first_line,
    optional,
    read_json,
    read_tsv,
    window,
)
from duohead.shapes import layer_shapes
from duohead.storage import is_int

PICKLE = "full_attention_heads.pt"
ADAPTER = "duo_attention"
ADAPTER_THRESHOLD = 0.5  # where the Laguna adapter's own loader splits its gates

# The reference code stores its whole command line; what is not about training would only mislead.
TRAINING = (
    *("dataset_format", "lr", "num_steps", "reg_weight"),
    *("context_length_min", "context_length_max", "num_passkeys"),
)
# Trained gates overshoot [0, 1] by a rounding error or an optimiser step; further out it is no file of gates.
RAW_RANGE = (-1.0, 2.0)


def read_upstream(folder: Path, config: dict[str, Any] | None) -> dict[str, Any]:
    """The `HeadPattern` fields of a folder of the reference code; ``config`` is its config.json, None if missing."""
    path = folder / CONFIG
    if config is None:
        raise ValueError(f"{path} is missing beside {TSV}; it must hold sink_size and recent_size")
    _check_gates(raw := read_tsv(folder / TSV), folder / TSV)
    return {
        "alpha": np.clip(raw, 0.0, 1.0),
        **window(config, path),
        "base_model": optional(config, "model_name", path, str),
        "training": {key: config[key] for key in TRAINING if key in config},
    }


def read_adapter(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The `HeadPattern` fields of a Laguna adapter; ``config`` is the folder's own config.json, empty if missing."""
    own = folder / ADAPTER / CONFIG
    block = optional(config, ADAPTER, folder / CONFIG, dict) or {}
    settings = {**block, **(read_json(own) if own.exists() else {})}
    path = own if own.exists() else folder / CONFIG
    if not settings:
        raise ValueError(
            f"{folder} holds an adapter without settings: expected {ADAPTER}/{CONFIG}, or a mapping {ADAPTER!r} in "
            f"{CONFIG}, found neither; download the repository whole"
        )
    if settings.get("format_version", 1) != 1:
        raise ValueError(
            f"{path}: format_version must be 1, got {settings['format_version']!r}; look for a newer duohead"
        )
    raw = _read_gates(folder, settings, path)
    return {
        **_ranked(raw, config, folder),
        "raw_alpha": raw.astype(np.float32),
        **window(settings, path),
        "base_model": optional(settings, "base_model_name_or_path", path, str)
        or optional(settings, "base_model", path, str),
        "base_revision": optional(settings, "base_model_revision", path, str),
        "base_type": optional(config, "model_type", folder / CONFIG, str),
        "selection": {"threshold": ADAPTER_THRESHOLD},
        # What it is to run with may differ from what its gates were trained with.
        "training": {
            name: settings[key]
            for name, key in (("sink", "training_sink_size"), ("recent", "training_recent_size"))
            if is_int(settings.get(key))
        },
    }


def _read_gates(folder: Path, settings: Mapping[str, Any], path: Path) -> NDArray[np.float64]:
    """The gates of an adapter as they are: its tensor, or the table that says the same in text."""
    for key, name, reader in (
        ("full_attention_heads_file", PICKLE, _read_pickle),
        ("full_attention_heads_tsv_file", TSV, read_tsv),
    ):
        given = optional(settings, key, path, str) or f"{ADAPTER}/{name}"
        if ".." in Path(given).parts or Path(given).is_absolute():
            raise ValueError(f"{path}: {key} must name a file of the folder, got {given!r}")
        for found in (folder / given, folder / ADAPTER / given):
            if found.is_file():
                _check_gates(values := reader(found), found)
                return values
    raise ValueError(
        f"{folder / ADAPTER} holds neither {PICKLE} nor {TSV}; download the repository whole"
    )


def _ranked(raw: NDArray[np.float64], config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Alphas out of raw gates, and what the model's own config beside them says of its layers."""
    alpha = np.clip(raw, 0.0, 1.0).astype(np.float32)
    if config.get("layer_types") is None:
        return {"alpha": alpha}
    try:
        shapes = layer_shapes(SimpleNamespace(**config))
        # The adapter trained every layer as if it were global; one with a window of its own keeps that.
        alpha[[not shape.gated for shape in shapes]] = np.nan
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / CONFIG}: expected the config of a model with {len(alpha)} layers, as there are gates for, but "
            f"it is not ({first_line(error)}); download the repository whole"
        ) from error
    return {
        "alpha": alpha,
        "windows": [shape.window for shape in shapes],
        "kv_heads": [shape.num_kv_heads for shape in shapes],
    }


def _read_pickle(path: Path) -> NDArray[np.float64]:
    import torch

    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file may fail anywhere in the reader
        raise ValueError(
            f"{path}: refused, it is not a plain tensor saved by torch.save ({first_line(error)}); nothing in it was "
            f"run; use the {TSV} instead, or get the file from a source you trust"
        ) from error
    if not isinstance(value, torch.Tensor) or value.ndim != 2 or value.is_complex():
        found = (
            f"shape {tuple(value.shape)}"
            if isinstance(value, torch.Tensor)
            else type(value).__name__
        )
        raise ValueError(f"{path}: expected one tensor (layers, KV heads), found {found}")
    try:
        return value.detach().double().numpy()
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{path}: expected a plain tensor of numbers, found another kind ({first_line(error)}); "
            f"use the {TSV} instead"
        ) from error


def _check_gates(values: NDArray[np.float64], path: Path) -> None:
    if np.isnan(values).any():
        layer, head = np.argwhere(np.isnan(values))[0]
        raise ValueError(
            f"{path}: alpha of layer {layer}, KV head {head} is nan, which only duohead's own format gives a meaning "
            f"(not gated); the training run diverged, or use HeadPattern.from_alpha if it was meant so"
        )
    check_range(values, path, *RAW_RANGE)

"""Head patterns on disk: our folder, the reference code's TSV, the Laguna adapter, and a repository of the hub.

A pattern decides what a model forgets, so a damaged or foreign file must end in an error that says what was expected,
what was found and what to do, and never in a guess; nothing is ever unpickled into live objects. `read` returns the
fields of a `HeadPattern`, `contents` the files of one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from duohead.shapes import layer_shapes

MODEL_TYPE = "duohead"
FORMAT_VERSION = 1
CONFIG, TSV, TENSORS, PICKLE = (
    "config.json",
    "full_attention_heads.tsv",
    "duohead.safetensors",
    "full_attention_heads.pt",
)
ADAPTER = "duo_attention"
ADAPTER_THRESHOLD = 0.5  # where the Laguna adapter's own loader splits its gates
PRECISIONS = ("retrieval_dtype", "streaming_dtype", "window_dtype")
ARRAYS = ("alpha", "raw_alpha", "fingerprint")  # of a HeadPattern, in TENSORS

# Trained gates overshoot [0, 1] by a rounding error or an optimiser step; further out it is no file of gates.
RAW_RANGE = (-1.0, 2.0)

Alpha = NDArray[np.float32]


def read(folder: Path) -> dict[str, Any]:
    """The `HeadPattern` fields that a folder holds, whichever of the three formats it has.

    Raises:
        ValueError: the folder is missing, of no known format, or damaged.
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file; name the folder that holds {CONFIG} and {TSV}")
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; name a folder that holds {CONFIG} and {TSV}")
    config = _json(folder / CONFIG) if (folder / CONFIG).exists() else None
    if (config or {}).get("model_type") == MODEL_TYPE or (folder / TENSORS).exists():
        return _read_own(folder, config)
    if (folder / ADAPTER).is_dir() or ADAPTER in (config or {}):
        return _read_adapter(folder, config or {})
    if (folder / TSV).exists():
        return _read_upstream(folder, config)
    found = sorted(path.name for path in folder.iterdir())
    raise ValueError(
        f"{folder} holds no head pattern: expected {CONFIG} with {TSV}, or {ADAPTER}/{PICKLE}, "
        f"found {', '.join(found[:8]) or 'nothing'}; `duohead identify` writes one"
    )


def fetch(name: str, revision: str | None, **options: Any) -> Path:
    """Folder of a hub repository's pattern files, downloaded if need be; `options` are snapshot_download's own."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise ValueError(
            f"{name}: no such folder, and not a hub id either; name a pattern's folder or owner/name"
        )
    from huggingface_hub import snapshot_download

    patterns = [CONFIG, TSV, TENSORS, f"{ADAPTER}/*"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, **options))
    except (OSError, ValueError) as error:  # as huggingface_hub documents, being offline included
        raise ValueError(
            f"{name}: no such folder, and it cannot be had from the hub ({_first_line(error)}); "
            f"check the name and the connection, or name a local folder"
        ) from error


def contents(fields: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of a pattern in our format, name to content; `fields` are those that `read` returns."""
    from safetensors.numpy import save

    alpha: Alpha = fields["alpha"]
    selection = dict(fields["selection"])
    precisions = {name: selection.pop(name) for name in PRECISIONS if name in selection}
    config = {
        "model_type": MODEL_TYPE,
        "format_version": FORMAT_VERSION,
        "base_model_name_or_path": fields["base_model"],
        "base_model_revision": fields["base_revision"],
        "base_model_type": fields["base_type"],
        "sink_size": fields["sink"],
        "recent_size": fields["recent"],
        "num_hidden_layers": alpha.shape[0],
        "num_key_value_heads": alpha.shape[1],
        "key_value_heads_per_layer": fields["kv_heads"],
        "gated_layers": (~np.isnan(alpha)).any(axis=1).tolist(),
        "native_windows": fields["windows"],
        "selection": selection,
        "precisions": precisions,
        "training": dict(fields["training"]),
    }
    # Nine digits are what it takes to tell any two float32 values apart.
    rows = ("\t".join(f"{float(value):.9g}" for value in row) for row in alpha)
    tensors = {name: fields[name] for name in ARRAYS}
    return {
        TENSORS: save({k: np.ascontiguousarray(v) for k, v in tensors.items() if v is not None}),
        TSV: ("\n".join(rows) + "\n").encode(),
        CONFIG: (json.dumps(config, indent=2, allow_nan=False) + "\n").encode(),
    }


def _read_own(folder: Path, config: dict[str, Any] | None) -> dict[str, Any]:
    path = folder / CONFIG
    if config is None:
        raise ValueError(
            f"{path} is missing beside {TENSORS}; copy the folder whole, or identify again"
        )
    found = config.get("model_type")
    if found != MODEL_TYPE:
        raise ValueError(
            f"{path}: model_type must be {MODEL_TYPE!r} beside {TENSORS}, got {found!r}; copy it whole"
        )
    version = _integer(config, "format_version", path, minimum=1)
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version {version} is newer than the {FORMAT_VERSION} that this duohead reads; upgrade it"
        )
    shape = (
        _integer(config, "num_hidden_layers", path, minimum=1),
        _integer(config, "num_key_value_heads", path, minimum=1),
    )
    tensors = _read_tensors(folder / TENSORS)
    alpha = tensors["alpha"]
    table = _read_tsv(folder / TSV)
    for file, values in ((TENSORS, alpha), (TSV, table)):
        if values.shape != shape:
            raise ValueError(
                f"{folder / file}: expected {shape[0]} layers x {shape[1]} KV heads as {CONFIG} says, "
                f"found {values.shape[0]} x {values.shape[1]}; copy the folder whole, or identify again"
            )
    if not np.array_equal(alpha, table.astype(np.float32), equal_nan=True):
        raise ValueError(
            f"{folder}: {TSV} and {TENSORS} hold different alphas; if one was edited on purpose, load the TSV with "
            f"HeadPattern.from_alpha and save again"
        )
    _check_range(alpha, folder / TENSORS, 0.0, 1.0)
    gated = (~np.isnan(alpha)).any(axis=1).tolist()
    if config.get("gated_layers", gated) != gated:
        raise ValueError(
            f"{path}: gated_layers disagrees with the alphas in {TENSORS}; copy the folder whole"
        )
    return {
        **tensors,
        "sink": _integer(config, "sink_size", path, minimum=0),
        "recent": _integer(config, "recent_size", path, minimum=1),
        "base_model": _optional(config, "base_model_name_or_path", path, str),
        "base_revision": _optional(config, "base_model_revision", path, str),
        "base_type": _optional(config, "base_model_type", path, str),
        "kv_heads": _optional(config, "key_value_heads_per_layer", path, list),
        "windows": _optional(config, "native_windows", path, list),
        "selection": {
            **(_optional(config, "selection", path, dict) or {}),
            **(_optional(config, "precisions", path, dict) or {}),
        },
        "training": _optional(config, "training", path, dict) or {},
    }


def _read_upstream(folder: Path, config: dict[str, Any] | None) -> dict[str, Any]:
    path = folder / CONFIG
    if config is None:
        raise ValueError(f"{path} is missing beside {TSV}; it must hold sink_size and recent_size")
    _check_gates(raw := _read_tsv(folder / TSV), folder / TSV)
    # The reference code stores its whole command line; what is not about training would only mislead.
    training = {
        key: config[key]
        for key in ("dataset_format", "lr", "num_steps", "reg_weight")
        if key in config
    }
    return {
        "alpha": np.clip(raw, 0.0, 1.0),
        "sink": _integer(config, "sink_size", path, minimum=0),
        "recent": _integer(config, "recent_size", path, minimum=1),
        "base_model": _optional(config, "model_name", path, str),
        "training": training,
    }


def _read_adapter(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    own = folder / ADAPTER / CONFIG
    block = _optional(config, ADAPTER, folder / CONFIG, dict) or {}
    settings = {**block, **(_json(own) if own.exists() else {})}
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
        "sink": _integer(settings, "sink_size", path, minimum=0),
        "recent": _integer(settings, "recent_size", path, minimum=1),
        "base_model": _optional(settings, "base_model_name_or_path", path, str)
        or _optional(settings, "base_model", path, str),
        "base_revision": _optional(settings, "base_model_revision", path, str),
        "base_type": _optional(config, "model_type", folder / CONFIG, str),
        "selection": {"threshold": ADAPTER_THRESHOLD},
    }


def _read_gates(folder: Path, settings: Mapping[str, Any], path: Path) -> NDArray[np.float64]:
    """The gates of an adapter as they are: its tensor, or the table that says the same in text."""
    for key, name, reader in (
        ("full_attention_heads_file", PICKLE, _read_pickle),
        ("full_attention_heads_tsv_file", TSV, _read_tsv),
    ):
        given = _optional(settings, key, path, str) or f"{ADAPTER}/{name}"
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
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / CONFIG}: expected the config of a model with {len(alpha)} layers, as there are gates for, but "
            f"it is not ({_first_line(error)}); download the repository whole"
        ) from error
    return {
        "alpha": alpha,
        "windows": [shape.window for shape in shapes],
        "kv_heads": [shape.num_kv_heads for shape in shapes],
    }


def _read_tsv(path: Path) -> NDArray[np.float64]:
    if not path.exists():
        raise ValueError(f"{path} is missing; copy the folder whole, or identify again")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected tab-separated numbers, found binary data; is it the right file?"
        ) from error
    if text.strip() and not text.endswith("\n"):
        raise ValueError(
            f"{path}: expected a line end after the last row, found none; the file may be truncated, copy it again "
            f"(or add the line end if it is whole)"
        )
    rows: list[list[float]] = []
    for number, line in enumerate(text.rstrip().splitlines(), start=1):
        try:
            rows.append([float(cell) for cell in line.split()])
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: expected tab-separated numbers, {_first_line(error)}"
            ) from error
        if len(rows[-1]) != len(rows[0]):
            raise ValueError(
                f"{path}, line {number}: expected {len(rows[0])} values as in line 1, found {len(rows[-1])}; "
                f"the file may be truncated, copy it again"
            )
    if not rows or not rows[0]:
        raise ValueError(f"{path}: expected one row of alphas per layer, found none; copy it again")
    return np.array(rows, dtype=np.float64)


def _read_tensors(path: Path) -> dict[str, Any]:
    """Alphas, and if the file has them the raw gates that they were made of and the model's fingerprint."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    if not path.exists():
        raise ValueError(f"{path} is missing; copy the folder whole, or identify again")
    try:
        tensors = load(path.read_bytes())
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: expected a safetensors file, but it cannot be read ({_first_line(error)}); "
            f"it may be truncated, copy it again"
        ) from error
    alpha = tensors.get("alpha")
    if alpha is None or alpha.ndim != 2 or alpha.dtype != np.float32:
        found = {name: f"{tensor.dtype} {tensor.shape}" for name, tensor in tensors.items()}
        raise ValueError(
            f"{path}: expected one float32 matrix 'alpha', found {found}; identify again"
        )
    return {name: tensors.get(name) for name in ARRAYS}


def _read_pickle(path: Path) -> NDArray[np.float64]:
    import torch

    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file may fail anywhere in the reader
        raise ValueError(
            f"{path}: refused, it is not a plain tensor saved by torch.save ({_first_line(error)}); nothing in it was "
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
            f"{path}: expected a plain tensor of numbers, found another kind ({_first_line(error)}); "
            f"use the {TSV} instead"
        ) from error


def _check_gates(values: NDArray[np.float64], path: Path) -> None:
    if np.isnan(values).any():
        layer, head = np.argwhere(np.isnan(values))[0]
        raise ValueError(
            f"{path}: alpha of layer {layer}, KV head {head} is nan, which only duohead's own format gives a meaning "
            f"(not gated); the training run diverged, or use HeadPattern.from_alpha if it was meant so"
        )
    _check_range(values, path, *RAW_RANGE)


def _check_range(values: NDArray[Any], path: Path, low: float, high: float) -> None:
    outside = np.argwhere(~np.isnan(values) & ~((values >= low) & (values <= high)))
    if len(outside):
        layer, head = outside[0]
        raise ValueError(
            f"{path}: alphas must lie in [{low:g}, {high:g}], got {values[layer, head]:g} in layer {layer}, "
            f"KV head {head}; the file is damaged or not a table of gates"
        )


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # includes UnicodeDecodeError
        raise ValueError(
            f"{path}: expected JSON, got something else ({_first_line(error)}); copy it again"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{path}: expected a JSON object, got {type(value).__name__}; copy it again"
        )
    return value


def _integer(config: Mapping[str, Any], key: str, path: Path, *, minimum: int) -> int:
    value = config.get(key)
    # Some writers turn 128 into 128.0.
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        found = "nothing" if key not in config else repr(value)
        raise ValueError(
            f"{path}: {key} must be an integer >= {minimum}, got {found}; correct it there"
        )
    return value


def _optional(config: Mapping[str, Any], key: str, path: Path, kind: type) -> Any:
    value = config.get(key)
    if value is not None and not isinstance(value, kind):
        raise ValueError(
            f"{path}: {key} must be of type {kind.__name__} or null, got {value!r}; correct it there"
        )
    return value


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__

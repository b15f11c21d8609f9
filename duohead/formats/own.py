"""Our own pattern folder, written and read: config.json, a table of alphas for people, and exact tensors.

The table and the tensors say the same twice, so that a folder which was edited or copied in part is found out.
`contents` and `read` are inverses.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from duohead.formats.parts import (
    CONFIG,
    TENSORS,
    TSV,
    check_range,
    first_line,
    integer,
    json_bytes,
    optional,
    read_tsv,
    window,
)

MODEL_TYPE = "duohead"
FORMAT_VERSION = 1
PRECISIONS = ("retrieval_dtype", "streaming_dtype", "window_dtype")
ARRAYS = ("alpha", "raw_alpha", "fingerprint")  # of a HeadPattern, in TENSORS


def contents(fields: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of a pattern in our format, name to content; `fields` are those that `read` returns."""
    from safetensors.numpy import save

    alpha: NDArray[np.float32] = fields["alpha"]
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
        CONFIG: json_bytes(config),
    }


def read(folder: Path, config: dict[str, Any] | None) -> dict[str, Any]:
    """The `HeadPattern` fields of a folder; ``config`` is its config.json, None where there is none.

    Raises:
        ValueError: a file is missing, damaged, or does not belong to the others.
    """
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
    version = integer(config, "format_version", path, minimum=1)
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version {version} is newer than the {FORMAT_VERSION} that this duohead reads; upgrade it"
        )
    shape = (
        integer(config, "num_hidden_layers", path, minimum=1),
        integer(config, "num_key_value_heads", path, minimum=1),
    )
    tensors = _read_tensors(folder / TENSORS)
    alpha = tensors["alpha"]
    table = read_tsv(folder / TSV)
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
    check_range(alpha, folder / TENSORS, 0.0, 1.0)
    gated = (~np.isnan(alpha)).any(axis=1).tolist()
    if config.get("gated_layers", gated) != gated:
        raise ValueError(
            f"{path}: gated_layers disagrees with the alphas in {TENSORS}; copy the folder whole"
        )
    return {
        **tensors,
        **window(config, path),
        "base_model": optional(config, "base_model_name_or_path", path, str),
        "base_revision": optional(config, "base_model_revision", path, str),
        "base_type": optional(config, "base_model_type", path, str),
        "kv_heads": optional(config, "key_value_heads_per_layer", path, list),
        "windows": optional(config, "native_windows", path, list),
        "selection": {
            **(optional(config, "selection", path, dict) or {}),
            **(optional(config, "precisions", path, dict) or {}),
        },
        "training": optional(config, "training", path, dict) or {},
    }


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
            f"{path}: expected a safetensors file, but it cannot be read ({first_line(error)}); "
            f"it may be truncated, copy it again"
        ) from error
    alpha = tensors.get("alpha")
    if alpha is None or alpha.ndim != 2 or alpha.dtype != np.float32:
        found = {name: f"{tensor.dtype} {tensor.shape}" for name, tensor in tensors.items()}
        raise ValueError(
            f"{path}: expected one float32 matrix 'alpha', found {found}; identify again"
        )
    return {name: tensors.get(name) for name in ARRAYS}

"""Models by name for every command: a bundled one, a folder, or a hub id, with one clear line when it cannot be had.

Verbs share this so that a wrong name reads the same everywhere. Use `load_model("pocket")` or `load_model("folder")`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from duohead.pocket import NAMES, folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(
    name: str, *, dtype: str = "auto", device: str | None = None, revision: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in evaluation mode on its device, and its tokenizer.

    Args:
        name: a bundled model (`duohead.pocket.NAMES`), a folder, or a hub id.
        dtype: one of DTYPES; "auto" is the stored one, float32 for bundled models (half precision is slow on CPUs).
        device: torch device; by default the GPU if there is one.
        revision: branch, tag or commit of a hub id.

    Raises:
        ValueError: whatever is wrong with the name, the files or the device, in one line.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = device_of(device)
    bundled = name in NAMES
    source = str(folder(name)) if bundled else name
    looks_local = source[:1] in "./~\\" or source.count("/") > 1 or Path(source).exists()
    if looks_local and not Path(source).is_dir():
        raise ValueError(
            f"model {name!r} is not a folder; give a folder with config.json, a hub id, or {' or '.join(NAMES)}"
        )
    if bundled and dtype == "auto":
        dtype = "float32"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, revision=revision)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"model {name!r} cannot be loaded; give {', '.join(NAMES)}, a folder or a hub id ({reason})"
        ) from error
    if bundled:
        model.config._name_or_path = name
    return model.to(place).eval(), tokenizer


def device_of(name: str | None) -> torch.device:
    """The torch device of that name, by default the GPU if there is one; ValueError if it cannot be used."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used: {reason}") from error
    return torch.device(name)

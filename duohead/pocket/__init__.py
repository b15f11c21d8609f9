"""The bundled pocket models: small models trained to retrieve, so that everything here runs offline on a CPU.

`pocket` is a Llama with grouped-query attention (4 KV heads, 8 query heads), `pocket-mha` its multi-head twin (8 KV
heads), `pocket-laguna` a Laguna, most of whose layers see a short window only. Each folder holds weights, tokenizer and
a card with its scores, made by tools/train_pocket.py. Use `load("pocket")`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NAMES = ("pocket", "pocket-mha", "pocket-laguna")


def bundled(name: str | None) -> bool:
    """Whether a name means a bundled model: it is one's, and there is no file or folder here that is called so."""
    return name in NAMES and not Path(name).exists()


def folder(name: str) -> Path:
    """Folder of a bundled model (readable by transformers' Auto classes); ValueError for an unknown name."""
    if name not in NAMES:
        raise ValueError(
            f"name must be one of {', '.join(NAMES)}, got {name!r}; other models load with transformers"
        )
    path = Path(__file__).parent / name
    if not (path / "model.safetensors").is_file():
        raise ValueError(
            f"the bundled model {name!r} is not in {path}; install duohead whole, or make it with tools/train_pocket.py"
        )
    return path


def pattern(name: str) -> Path:
    """Folder of the pattern that was identified on the bundled model `name`, for `HeadPattern.load`."""
    return folder(name) / "pattern"


def load(
    name: str, *, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The bundled model `name`, in evaluation mode on the CPU in ``dtype`` (float32), and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = folder(name)
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype or "float32", local_files_only=True
    )
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    return model.eval(), tokenizer

"""The text that needles are hidden in, as token ids: any files, or the documentation inside CPython.

Identification and evaluation need long, real prose that is never repeated to fill a context, because repeated text can
be predicted by copying and would hide which heads retrieve. Use `tokens(read_text(paths), tokenizer, at_least=8192)`.
"""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BLOCK = 65536
_UNPACK: dict[str, Callable[[bytes], bytes]] = {".xz": lzma.decompress, ".gz": gzip.decompress}


def read_text(paths: str | Path | Iterable[str | Path]) -> str:
    """Text of the files (plain UTF-8, or UTF-8 inside `.xz` or `.gz`), joined by an empty line.

    Raises ValueError for a missing file, a folder, an empty file, a damaged archive, and bytes that are not UTF-8 text.
    """
    files = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    if not files:
        raise ValueError("text needs at least one file, got none; name one, or leave it out")
    return "\n\n".join(_read_file(path) for path in files)


def _read_file(path: Path) -> str:
    if not path.exists():
        raise ValueError(f"text file {str(path)!r} does not exist; check the path")
    if path.is_dir():
        raise ValueError(
            f"text file {str(path)!r} is a folder; name the files in it, for example {path}/*.txt"
        )
    try:
        raw = _UNPACK.get(path.suffix, bytes)(path.read_bytes())
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise ValueError(
            f"text file {str(path)!r} cannot be read ({error}); give a plain, .xz or .gz text"
        ) from error
    if b"\0" in raw:
        raise ValueError(f"text file {str(path)!r} is binary (it holds NUL bytes); give UTF-8 text")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text file {str(path)!r} is not UTF-8 (byte {error.start}); convert it, for example with iconv -t UTF-8"
        ) from error
    if not text.strip():
        raise ValueError(f"text file {str(path)!r} is empty; give a text with words in it")
    return text.replace("\r\n", "\n")


def default_text() -> str:
    """The language documentation that ships inside every CPython: real prose, offline, about 0.7 MB."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def tokens(
    text: str, tokenizer: PreTrainedTokenizerBase, *, at_least: int, at_most: int | None = None
) -> torch.Tensor:
    """Token ids of `text` without special tokens, int64 (tokens,); reads no further than `at_most` tokens.

    Raises ValueError if the text has fewer than `at_least` tokens: text is never repeated to fill a context.
    """
    if at_least < 1:
        raise ValueError(
            f"at_least must be at least 1, got {at_least}; it is the number of tokens needed"
        )
    if at_most is not None and at_most < at_least:
        raise ValueError(f"at_most must not be below at_least={at_least}, got {at_most}")
    ids: list[int] = []
    start = 0
    while start < len(text) and (at_most is None or len(ids) < at_most):
        end = _block_end(text, start)
        ids += tokenizer(text[start:end], add_special_tokens=False, verbose=False)["input_ids"]
        start = end
    if len(ids) < at_least:
        raise ValueError(
            f"text is too short: {at_least} tokens are needed and it has {len(ids)}; give a longer text or more files, "
            "or ask for a shorter context"
        )
    return torch.tensor(ids[:at_most], dtype=torch.long)


def _block_end(text: str, start: int) -> int:
    """End of a block of about 64K characters, cut before a line break so that tokens stay whole where lines exist."""
    end = start + _BLOCK
    if end >= len(text):
        return len(text)
    line = text.rfind("\n", start + 1, end)
    return line if line > start else end

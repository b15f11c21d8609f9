"""The text that needles are hidden in, as token ids: any files, a data set, or the documentation inside CPython.

Identification and evaluation need long, real prose that is never repeated to fill a context, because repeated text can
be predicted by copying and would hide which heads retrieve; of several texts each gives its share. Use
`tokens(read_text(paths), tokenizer, at_least=8192)`, or `tokens(texts(paths), ...)` for several.
"""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens of text for each token of a context: enough that samples differ, few enough that books stay partly unread.
PER_CONTEXT = 16
_BLOCK = 65536
# Shorter pieces of many texts would make a context of fragments.
_PIECE = 2048
# Of a data set, rows up to this many characters: several times what the longest contexts take.
_DATASET_CHARACTERS = 16_000_000
_UNPACK: dict[str, Callable[[bytes], bytes]] = {".xz": lzma.decompress, ".gz": gzip.decompress}


def texts(
    paths: str | Path | Iterable[str | Path] | None = None, *, dataset: str | None = None
) -> list[str]:
    """What ``--text`` and ``--dataset`` name, one text a file or row; the default text for neither.

    Raises ValueError for both at once, and whatever `read_text` and `dataset_texts` raise.
    """
    if dataset is not None:
        if paths is not None:
            raise ValueError(f"give text or dataset, not both; got text and dataset={dataset!r}")
        return dataset_texts(dataset)
    if paths is None:
        return [default_text()]
    return [read_text(path) for path in _files(paths)]


def dataset_texts(name: str) -> list[str]:
    """Texts of a data set of the library `datasets`, in its order, as many as identification could use.

    ``name`` is NAME[:SPLIT[:COLUMN]]: a hub id or folder, by default its split "train" and its column "text" or else
    its only column of text. Rows are streamed, so that no more is fetched than is read.

    Raises:
        ValueError: the library is not installed, there is no such data set, split or column, or it has no text.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(
            f"dataset={name!r} needs the package datasets; pip install 'duohead[eval]', or give text files ({error})"
        ) from error
    source, _, rest = name.partition(":")
    split, _, column = rest.partition(":")
    found: list[str] = []
    size = 0
    try:
        for row in load_dataset(source, split=split or "train", streaming=True):
            column = column or _text_column(name, row)
            if column not in row:
                raise ValueError(f"there is no column {column!r} but {', '.join(sorted(row))}")
            if isinstance(row[column], str) and row[column].strip():
                found.append(row[column])
                size += len(row[column])
            if size >= _DATASET_CHARACTERS:
                break
    except (
        Exception
    ) as error:  # the library, its readers and the hub each have their own ways to fail
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"dataset {name!r} cannot be read ({type(error).__name__}: {reason}); give NAME[:SPLIT[:COLUMN]]"
        ) from error
    if not found:
        raise ValueError(f"dataset {name!r} has no text in column {column!r}; name another column")
    return found


def _text_column(name: str, row: dict[str, object]) -> str:
    columns = [key for key, value in row.items() if isinstance(value, str)]
    if "text" in columns:
        return "text"
    if len(columns) != 1:
        raise ValueError(
            f"{name!r} has {len(columns)} columns of text ({', '.join(sorted(columns))}); name one after the split"
        )
    return columns[0]


def read_text(paths: str | Path | Iterable[str | Path]) -> str:
    """Text of the files (plain UTF-8, or UTF-8 inside `.xz` or `.gz`), joined by an empty line.

    Raises ValueError for a missing file, a folder, an empty file, a damaged archive, and bytes that are not UTF-8 text.
    """
    return "\n\n".join(_read_file(path) for path in _files(paths))


def _files(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    files = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    if not files:
        raise ValueError("text needs at least one file, got none; name one, or leave it out")
    return files


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
    text: str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    at_least: int,
    at_most: int | None = None,
) -> torch.Tensor:
    """Token ids of `text` without special tokens, int64 (tokens,); reads no further than `at_most` tokens.

    Of several texts, each gives the same number of tokens from its start; what short ones lack is shared among the
    others. Of more texts than pieces of 2048 tokens fit, evenly spaced ones are taken.

    Raises ValueError if there are fewer than `at_least` tokens: text is never repeated to fill a context.
    """
    if at_least < 1:
        raise ValueError(
            f"at_least must be at least 1, got {at_least}; it is the number of tokens needed"
        )
    if at_most is not None and at_most < at_least:
        raise ValueError(f"at_most must not be below at_least={at_least}, got {at_most}")
    readers = [_Reader(each, tokenizer) for each in ([text] if isinstance(text, str) else text)]
    if at_most is not None:
        readers = _spaced(readers, max(1, at_most // _PIECE))
    _share(readers, at_most)
    ids = [token for reader in readers for token in reader.ids]
    if len(ids) < at_least:
        raise ValueError(
            f"text is too short: {at_least} tokens are needed and it has {len(ids)}; give a longer text or more files, "
            "or ask for a shorter context"
        )
    return torch.tensor(ids[:at_most], dtype=torch.long)


class _Reader:
    """One text, tokenised as far as it is asked for."""

    def __init__(self, text: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self._text, self._tokenizer, self._start = text, tokenizer, 0
        self._read: list[int] = []
        self.ids: list[int] = []

    def extend(self, more: int | None) -> None:
        """Let `ids` grow by ``more`` tokens (None: by all), or as many as there are."""
        target = None if more is None else len(self.ids) + more
        while self._start < len(self._text) and (target is None or len(self._read) < target):
            end = _block_end(self._text, self._start)
            block = self._text[self._start : end]
            self._read += self._tokenizer(block, add_special_tokens=False, verbose=False)[
                "input_ids"
            ]
            self._start = end
        self.ids = self._read[:target]

    @property
    def exhausted(self) -> bool:
        return self._start >= len(self._text) and len(self.ids) == len(self._read)


def _spaced(readers: list[_Reader], count: int) -> list[_Reader]:
    if len(readers) <= count:
        return readers
    return [readers[index * len(readers) // count] for index in range(count)]


def _share(readers: list[_Reader], total: int | None) -> None:
    """Let readers take equal numbers of tokens, ``total`` in all or as many as there are."""
    if total is None:
        for reader in readers:
            reader.extend(None)
        return
    while (room := total - sum(len(reader.ids) for reader in readers)) > 0:
        hungry = [reader for reader in readers if not reader.exhausted]
        if not hungry:
            return
        for reader in hungry[:room]:
            reader.extend(max(1, room // len(hungry)))


def _block_end(text: str, start: int) -> int:
    """End of a block of about 64K characters, cut before a line break so that tokens stay whole where lines exist."""
    end = start + _BLOCK
    if end >= len(text):
        return len(text)
    line = text.rfind("\n", start + 1, end)
    return line if line > start else end

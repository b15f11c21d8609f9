"""Samples put together from pieces: text around needles, then a tail of given words, answers and more of the text.

Questions after one another are not all there is: conversations, lists and long answers have words, answers and prose in
turn. `assemble(tokenizer, text_ids, needles=[(0.5, "...")], tail=[Given("Q"), Answer(" A")], ...)` makes any of them,
exactly as long as asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Sample:
    """One sequence: `input_ids` int64 (T,), and `answers`, the [start, end) token positions of each answer in it.

    The token at position p of an answer is predicted by the logits at p - 1.
    """

    input_ids: torch.Tensor
    answers: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Given:
    """Words that the model is given and not scored on."""

    text: str


@dataclass(frozen=True)
class Answer:
    """Words that the model must write; give them the leading space that they have in running text."""

    text: str


@dataclass(frozen=True)
class Prose:
    """So many tokens of the text, given."""

    tokens: int


Piece = Given | Answer | Prose


class Encoder:
    """Token ids of words without special tokens, so that the same words are the same tokens wherever they stand."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        """Ids of `text`."""
        ids: list[int] = (
            self._tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        )
        return ids

    def start(self) -> list[int]:
        """The start token, if the tokenizer puts one."""
        first = self._tokenizer("a")["input_ids"][0]
        return [first] if first == self._tokenizer.bos_token_id else []

    def blank(self, ids: Sequence[int]) -> int:
        """How many leading tokens are white space, which says nothing about an answer; never all of them."""
        count = 0
        while count < len(ids) - 1 and not self._tokenizer.decode(ids[: count + 1]).strip():
            count += 1
        return count


def assemble(
    tokenizer: PreTrainedTokenizerBase,
    haystack_ids: torch.Tensor,
    *,
    context_length: int,
    needles: Sequence[tuple[float, Sequence[str]]],
    tail: Sequence[Piece],
    intro: str = "",
    bos: bool = True,
    generator: torch.Generator,
) -> Sample:
    """Text with `needles` in it and `tail` after it, exactly `context_length` tokens in all.

    Args:
        tokenizer: the model's.
        haystack_ids: int64 [tokens], of which a random window is taken.
        context_length: tokens, start token and answers included.
        needles: (depth from 0 to 1, parts) in any order; parts are tokenised one by one, so that a value is the same
            tokens here as in its answer.
        tail: what follows the text, up to the last `Answer` if there is one.
        intro: words before the text.
        bos: put the tokenizer's start token first, if it has one; False where `intro` says how the text starts.
        generator: of the window.

    Raises:
        ValueError: the pieces alone are too long, or `haystack_ids` too short.
    """
    encode = Encoder(tokenizer)
    head = (encode.start() if bos else []) + encode(intro)
    last = max((i for i, x in enumerate(tail) if isinstance(x, Answer)), default=len(tail) - 1)
    ends = [_tokens(encode, piece) for piece in tail[: last + 1]]
    lines = [(depth, [t for part in parts for t in encode(part)]) for depth, parts in needles]
    lines.sort(key=lambda line: line[0])
    taken = len(head) + sum(len(line) for _, line in lines) + sum(size for _, size in ends)
    room = context_length - taken
    prose = sum(piece.tokens for piece in tail[: last + 1] if isinstance(piece, Prose))
    window = iter(_window(haystack_ids, room, prose, context_length, generator))
    ids = list(head)
    done = 0
    for depth, line in lines:
        place = int(depth * room)
        ids += _next(window, place - done) + line
        done = place
    ids += _next(window, room - done)
    answers = []
    for piece, (own, size) in zip(tail[: last + 1], ends, strict=True):
        if isinstance(piece, Answer):
            answers.append((len(ids) + encode.blank(own), len(ids) + size))
        ids += own or _next(window, size)
    return Sample(torch.tensor(ids, dtype=torch.long), tuple(answers))


def _tokens(encode: Encoder, piece: Piece) -> tuple[list[int], int]:
    """Ids of a piece (none yet for prose) and how many it takes."""
    if isinstance(piece, Prose):
        return [], piece.tokens
    ids = encode(piece.text)
    return ids, len(ids)


def _window(
    haystack_ids: torch.Tensor,
    room: int,
    prose: int,
    context_length: int,
    generator: torch.Generator,
) -> list[int]:
    if room < 1:
        raise ValueError(
            f"context_length={context_length} is too small: needles and questions alone need "
            f"{context_length - room} tokens; give a longer context, or fewer or shorter needles"
        )
    wanted = room + prose
    if len(haystack_ids) < wanted:
        raise ValueError(
            f"haystack_ids is too short: context_length={context_length} leaves room for {wanted} tokens of text and "
            f"there are {len(haystack_ids)}; give a longer text, or ask for a shorter context"
        )
    start = int(torch.randint(len(haystack_ids) - wanted + 1, (1,), generator=generator))
    window: list[int] = haystack_ids[start : start + wanted].tolist()
    return window


def _next(window: Iterator[int], count: int) -> list[int]:
    return [next(window) for _ in range(count)]

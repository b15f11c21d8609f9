"""The synthetic task that shows which heads retrieve: passkeys hidden in a long text, asked for by ordinal at its end.

A head matters for retrieval if the answers get worse without its long context, so the answers are random words that
nothing but the far needle can predict. `passkey_sample` makes one sequence with the spans of its answers.
Paper: arXiv 2410.10819, section 2.3 (ten passkeys of 32 words, depths 5-95 %); our own words, replaceable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from duohead.identify.assembly import Answer, Given, Piece, Sample, assemble
from duohead.identify.wording import ORDINAL, ChatFrame, Wording, chat_frame

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORDS = (
    "alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar papa quebec romeo "
    "sierra tango uniform victor whiskey xray yankee zulu"
).split()
ORDINALS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth "
    "sixteenth seventeenth eighteenth nineteenth twentieth"
).split()


@dataclass(frozen=True)
class Needle:
    """A needle in pieces: where it lies (share of the haystack, 0 to 1), what it says, and how it is asked for.

    `value` is tokenised apart and the same in both places; give it the leading space that it has in running text.
    """

    depth: float
    before: str
    value: str
    after: str
    question: str


def passkey_sample(
    tokenizer: PreTrainedTokenizerBase,
    haystack_ids: torch.Tensor,
    *,
    context_length: int,
    num_passkeys: int = 10,
    passkey_words: int = 32,
    depths: tuple[float, float] = (0.05, 0.95),
    depth_steps: int = 1000,
    wording: Wording | None = None,
    chat: str = "no",
    generator: torch.Generator,
) -> Sample:
    """The paper's multi-passkey task, exactly `context_length` tokens long, haystack, needles and questions together.

    Depths are drawn without replacement from `depth_steps` evenly spaced ones and sorted, so the ordinals ascend; every
    passkey is asked for, in order. ``chat`` ("auto", "yes", "no") puts the text and each question into a turn of the
    user and each answer into one of the model, as the tokenizer's template writes them. Raises ValueError for numbers
    out of range, a haystack that is too short, and a template that is missing or cannot be followed.
    """
    _check_passkeys(num_passkeys, passkey_words, depths, depth_steps)
    grid = torch.linspace(*depths, depth_steps)
    picks = torch.randperm(depth_steps, generator=generator)[:num_passkeys].sort().values
    return ask_passkeys(
        tokenizer,
        haystack_ids,
        context_length=context_length,
        depths=grid[picks].tolist(),
        passkey_words=passkey_words,
        wording=wording,
        frame=chat_frame(tokenizer, chat),
        generator=generator,
    )


def ask_passkeys(
    tokenizer: PreTrainedTokenizerBase,
    haystack_ids: torch.Tensor,
    *,
    context_length: int,
    depths: Sequence[float],
    passkey_words: int,
    wording: Wording | None = None,
    frame: ChatFrame | None = None,
    generator: torch.Generator,
) -> Sample:
    """One passkey at each of the ascending `depths`, asked for by ordinal at the end; `frame` makes turns of it."""
    words = wording or Wording()
    reply = "\n" if frame is None else frame.reply
    needles = []
    for ordinal, depth in zip(ORDINALS, depths, strict=False):
        drawn = torch.randint(len(WORDS), (passkey_words,), generator=generator).tolist()
        value = "".join(" " + WORDS[i] for i in drawn)
        before, question = (x.replace(ORDINAL, ordinal) for x in (words.needle, words.question))
        asked = f"{question}{reply}{words.answer}"
        needles.append(Needle(depth, before, value, words.needle_end, asked))
    return weave(
        tokenizer,
        haystack_ids,
        needles,
        context_length=context_length,
        intro=words.intro if frame is None else frame.opening + words.intro.lstrip(),
        outro=words.outro,
        # Templates strip what is said, so the line ends that part questions in plain text have no place in a chat.
        question_end=words.answer_end if frame is None else words.answer_end.rstrip() + frame.next,
        bos=frame is None,
        generator=generator,
    )


def _check_passkeys(
    num_passkeys: int, passkey_words: int, depths: tuple[float, float], depth_steps: int
) -> None:
    if not 1 <= num_passkeys <= len(ORDINALS):
        raise ValueError(
            f"num_passkeys must be 1 to {len(ORDINALS)} (there is one ordinal each), got {num_passkeys}"
        )
    if passkey_words < 1:
        raise ValueError(f"passkey_words must be at least 1, got {passkey_words}")
    if not 0 <= depths[0] <= depths[1] <= 1:
        raise ValueError(f"depths must be two ascending shares between 0 and 1, got {depths}")
    if depth_steps < num_passkeys:
        raise ValueError(
            f"depth_steps must be at least num_passkeys={num_passkeys}, got {depth_steps}; "
            "each passkey has a depth of its own"
        )


def weave(
    tokenizer: PreTrainedTokenizerBase,
    haystack_ids: torch.Tensor,
    needles: Sequence[Needle],
    *,
    context_length: int,
    intro: str,
    outro: str,
    question_end: str,
    asked: Sequence[int] | None = None,
    bos: bool = True,
    generator: torch.Generator,
) -> Sample:
    """Haystack with `needles` (ascending depths) in it, then the questions `asked` (default: all) with their answers.

    The haystack is a random window of `haystack_ids`, as long as makes the sample exactly `context_length` tokens.
    A value's leading tokens that are only white space count as question, because they say nothing about the value.
    ``bos`` puts the tokenizer's start token first, if it has one; False where `intro` says how the text starts.
    """
    tail: list[Piece] = [Given(outro)]
    for index in range(len(needles)) if asked is None else asked:
        needle = needles[index]
        tail += [Given(needle.question), Answer(needle.value), Given(question_end)]
    return assemble(
        tokenizer,
        haystack_ids,
        context_length=context_length,
        needles=[(x.depth, (x.before, x.value, x.after)) for x in needles],
        tail=tail,
        intro=intro,
        bos=bos,
        generator=generator,
    )

"""Long texts with several kinds of questions at their end: what a choice of heads is judged by when heads are given up.

A choice that only has to answer passkeys keeps the heads of passkeys and drops what other lookups need, so one text
asks for words of the haystack and long lists of passkeys by ordinal, codes by key and quotations by their beginning,
and scores prose where nothing is asked.
Use `quiz(tokenizer, haystack_ids, context_length=4096, each=3, prose=64, first=384, generator=g)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duohead.identify.passkeys import ORDINALS, WORDS, Needle, weave

KINDS = ("list", "copy", "code", "quotation", "prose")
_LIST_WORDS = 8
# Tokens of the text whose different words a list draws from: enough for rare ones, few enough to decode for each list.
_PAGE = 1024
# Tokens of context for each word of a long list: what was found must be read on for long.
_PER_WORD = 64
_CODE_DIGITS = 6
# Codes in a text for each one asked for, and words that their keys are pairs of: most keys share a half with others.
_CODES = 4
_KEY_WORDS = WORDS[:10]
_CUE_WORDS = 6
_QUOTED_WORDS = 10
# Tokens that hold a quotation in any language and any tokenizer that is not one of bytes.
_PASSAGE = 128
_DEPTHS = (0.05, 0.9)


@dataclass(frozen=True, eq=False)
class Quiz:
    """One text: `input_ids` int64 (T,), the [start, end) token positions of its answers, and the kind of each."""

    input_ids: Tensor
    answers: tuple[tuple[int, int], ...]
    kinds: tuple[str, ...]


def quiz(
    tokenizer: Any,
    haystack_ids: Tensor,
    *,
    context_length: int,
    each: int,
    prose: int,
    first: int,
    generator: torch.Generator,
) -> Quiz:
    """A text of exactly `context_length` tokens, with needles at random depths, asked for in random order.

    All lists and quotations are asked for, and one in four codes. Long lists grow with the context, and there are none
    where they would not be longer than short ones.

    Args:
        each: questions of each kind, at most 20 (there is one ordinal each).
        prose: tokens of the text itself that are scored too, each as an answer of its own.
        first: the first position of such a token; those before see the whole text in any case.
        generator: of everything drawn.

    Raises:
        ValueError: the text is too short, or has no run of words to quote.
    """
    needles, kinds = _needles(tokenizer, haystack_ids, each, context_length // _PER_WORD, generator)
    order = torch.randperm(len(needles), generator=generator).tolist()
    codes = [place for place in order if kinds[place] == "code"]
    asked = [place for place in order if place not in codes[each:]]
    try:
        sample = weave(
            tokenizer,
            haystack_ids,
            needles,
            context_length=context_length,
            intro="",
            outro="\n\n",
            question_end="\n\n",
            asked=asked,
            generator=generator,
        )
    except ValueError as error:
        raise ValueError(
            f"{each} questions of each kind do not fit; raise context_min or, for eliminate, lower questions: {error}"
        ) from error
    last = sample.answers[0][0]
    drawn = first + torch.randperm(max(0, last - first), generator=generator)[:prose]
    alone = [(place, place + 1) for place in drawn.sort().values.tolist()]
    return Quiz(
        sample.input_ids,
        (*sample.answers, *alone),
        (*(kinds[i] for i in asked), *("prose" for _ in alone)),
    )


def _needles(
    tokenizer: Any, haystack_ids: Tensor, each: int, long: int, generator: torch.Generator
) -> tuple[list[Needle], list[str]]:
    """Needles in ascending depth, and their kinds; a long list has ``long`` words."""
    copies = ["copy"] if long > _LIST_WORDS else []
    pool = ["list", *copies, "quotation", *["code"] * _CODES] * each
    low, high = _DEPTHS
    spread = torch.rand(len(pool), generator=generator).sort().values
    depths = (low + (high - low) * spread).tolist()
    kinds = [pool[place] for place in torch.randperm(len(pool), generator=generator).tolist()]
    ordinals = {"list": iter(ORDINALS), "copy": iter(ORDINALS)}
    keys = iter(torch.randperm(len(_KEY_WORDS) ** 2, generator=generator).tolist())
    needles = []
    for kind, depth in zip(kinds, depths, strict=True):
        if kind in ordinals:
            short = kind == "list"
            count, name = (_LIST_WORDS, "list") if short else (long, "long list")
            words = _words(tokenizer, haystack_ids, generator) if short else WORDS
            lead = f"The {next(ordinals[kind])} {name} of words:"
            value = "".join(f" {words[i]}" for i in _draw(len(words), count, generator))
        elif kind == "code":
            key, half = divmod(next(keys), len(_KEY_WORDS))
            lead = f"The code of {_KEY_WORDS[key]} {_KEY_WORDS[half]} is"
            value = " " + "".join(str(digit) for digit in _draw(10, _CODE_DIGITS, generator))
        else:
            words = _passage(tokenizer, haystack_ids, generator)
            lead, value = " ".join(words[:_CUE_WORDS]), " " + " ".join(words[_CUE_WORDS:])
        needles.append(Needle(depth, f"\n\n{lead}", value, ".\n\n", lead))
    return needles, kinds


def _draw(options: int, count: int, generator: torch.Generator) -> Sequence[int]:
    drawn: list[int] = torch.randint(options, (count,), generator=generator).tolist()
    return drawn


def _words(tokenizer: Any, haystack_ids: Tensor, generator: torch.Generator) -> Sequence[str]:
    """The different words of a page from anywhere in the text.

    A few fixed words have a few fixed spellings, and heads that other spellings need would not be missed.
    """
    return sorted(set(_run(tokenizer, haystack_ids, _PAGE, _LIST_WORDS, generator)))


def _passage(tokenizer: Any, haystack_ids: Tensor, generator: torch.Generator) -> Sequence[str]:
    """Consecutive words from anywhere in the text: the cue and what follows it."""
    needed = _CUE_WORDS + _QUOTED_WORDS
    return _run(tokenizer, haystack_ids, _PASSAGE, needed, generator)[:needed]


def _run(
    tokenizer: Any, haystack_ids: Tensor, tokens: int, needed: int, generator: torch.Generator
) -> Sequence[str]:
    """The words among so many tokens from anywhere in the text, at least as many as needed."""
    for _ in range(100):
        start = int(torch.randint(max(1, len(haystack_ids) - tokens), (1,), generator=generator))
        # The first and the last word may be half of one; what is not a word is hard to copy for small models.
        some = tokenizer.decode(haystack_ids[start : start + tokens]).split()[1:-1]
        words = [word for word in some if word.isalpha()]
        if len(words) >= needed:
            return words
    raise ValueError(
        f"text must have runs of {needed} words within {tokens} tokens to ask for, got none in 100 tries; "
        "give prose in a language that separates words"
    )

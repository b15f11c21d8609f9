"""Needle formats for evaluation: each task hides something in a text at a given depth and asks for it at the end.

Formats differ in key, value and wording, and from the one that identifies the heads, so that a good score means
retrieval and not a remembered template. `TASKS[name].make(tokenizer, haystack_ids, context_length=8192, depth=0.5,
generator=g)`; a change of wording or scoring raises the task's `version`, which every record carries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from duohead.evaluate import long_tasks
from duohead.evaluate.words import (
    COLOURS,
    NAMES,
    PLACES,
    SPOTS,
    THINGS,
    VERBS,
    choose,
    digits,
    spread,
)
from duohead.identify.assembly import Sample
from duohead.identify.passkeys import Needle, ask_passkeys, weave

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Needles in ascending depth, and which of them are asked for.
Plan = tuple[list[Needle], list[int]]


class Make(Protocol):
    """Builds one sample of exactly `context_length` tokens with a needle at `depth` (share of the haystack, 0 to 1)."""

    def __call__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        haystack_ids: torch.Tensor,
        *,
        context_length: int,
        depth: float,
        generator: torch.Generator,
    ) -> Sample:
        """A sample for a needle at `depth`."""
        ...


@dataclass(frozen=True)
class NeedleTask:
    """A named, versioned needle format; `description` is one line for tables and reports."""

    name: str
    version: int
    description: str
    build: Make

    def make(
        self,
        tokenizer: PreTrainedTokenizerBase,
        haystack_ids: torch.Tensor,
        *,
        context_length: int,
        depth: float,
        generator: torch.Generator,
    ) -> Sample:
        """One sample of exactly `context_length` tokens; ValueError for a depth outside 0 to 1 or too little text."""
        if not 0 <= depth <= 1:
            raise ValueError(
                f"depth must be between 0 and 1, got {depth}; 0 is the start of the text, 1 its end"
            )
        return self.build(
            tokenizer, haystack_ids, context_length=context_length, depth=depth, generator=generator
        )


def _passkeys(
    tokenizer: PreTrainedTokenizerBase,
    haystack_ids: torch.Tensor,
    *,
    context_length: int,
    depth: float,
    generator: torch.Generator,
) -> Sample:
    """Ten passkeys of 32 words, one of them at `depth`; all ten are asked for by ordinal."""
    depths, _ = spread(depth, 10, generator)
    return ask_passkeys(
        tokenizer,
        haystack_ids,
        context_length=context_length,
        depths=depths,
        passkey_words=32,
        generator=generator,
    )


def _needle(depth: float, generator: torch.Generator) -> Plan:
    """One sentence; the question repeats its first words and the answer is the rest."""
    place, verb, colour, thing, spot = (
        choose(options, generator)[0] for options in (PLACES, VERBS, COLOURS, THINGS, SPOTS)
    )
    start = f"The finest way to spend an evening in {place} is to"
    value = f" {verb} {choose(['six', 'seven', 'twelve', 'forty'], generator)[0]} {colour} {thing} {spot}"
    needle = Needle(
        depth,
        f"\n\n{start}",
        value,
        ".\n\n",
        f"What is the finest way to spend an evening in {place}?\n{start}",
    )
    return [needle], [0]


def _number(depth: float, generator: torch.Generator) -> Plan:
    """Seven digits of a person, among three other people's; the one at `depth` is asked for."""
    depths, asked = spread(depth, 4, generator)
    needles = [
        Needle(
            at,
            f"\nOne more thing to note: the magic number of {name} is",
            " " + digits(7, generator),
            ".\n",
            f"What is the magic number of {name}?\nIt is",
        )
        for at, name in zip(depths, choose(NAMES, generator, 4), strict=True)
    ]
    return needles, [asked]


def _keyvalue(depth: float, generator: torch.Generator) -> Plan:
    """Twelve settings `colour_thing = value` spread over the text; the one at `depth` is asked for."""
    depths, asked = spread(depth, 12, generator)
    pairs = [f"{colour}_{thing}" for colour in COLOURS for thing in THINGS]
    needles = [
        Needle(
            at,
            f"\n\n[setting] {key} =",
            f" {choose(THINGS, generator)[0]}-{digits(4, generator)}",
            "\n\n",
            f"[look up] {key} =",
        )
        for at, key in zip(depths, choose(pairs, generator, 12), strict=True)
    ]
    return needles, [asked]


def _woven(recipe: Callable[[float, torch.Generator], Plan]) -> Make:
    """A format that is nothing but needles in a text and questions after it."""

    def build(
        tokenizer: PreTrainedTokenizerBase,
        haystack_ids: torch.Tensor,
        *,
        context_length: int,
        depth: float,
        generator: torch.Generator,
    ) -> Sample:
        needles, asked = recipe(depth, generator)
        return weave(
            tokenizer,
            haystack_ids,
            needles,
            context_length=context_length,
            intro="",
            outro="\n\n",
            question_end="",
            asked=asked,
            generator=generator,
        )

    return build


TASKS: dict[str, NeedleTask] = {
    task.name: task
    for task in (
        NeedleTask("passkeys", 1, "ten passkeys of 32 words, all asked for by ordinal", _passkeys),
        NeedleTask(
            "needle", 1, "one sentence; the question repeats its beginning", _woven(_needle)
        ),
        NeedleTask(
            "number", 1, "a seven-digit number asked for by a name, among four", _woven(_number)
        ),
        NeedleTask("keyvalue", 1, "the value of a key, among twelve", _woven(_keyvalue)),
        NeedleTask(
            "multikey",
            1,
            "a number asked for by a key of two words, among up to 64 such lines",
            long_tasks.planned(long_tasks.multikey),
        ),
        NeedleTask(
            "multivalue",
            1,
            "four numbers of one person, all asked for",
            long_tasks.planned(long_tasks.multivalue),
        ),
        NeedleTask(
            "multiquery",
            1,
            "the numbers of four people out of eight, in one question",
            long_tasks.planned(long_tasks.multiquery),
        ),
        NeedleTask(
            "tracking",
            1,
            "a chain of three assignments, traced back step by step",
            long_tasks.planned(long_tasks.tracking),
        ),
        NeedleTask("pairs", 1, "a value in an object that fills the context", long_tasks.pairs),
        NeedleTask(
            "copy",
            1,
            f"a list of {long_tasks.COPIED} words repeated",
            long_tasks.planned(long_tasks.copied(long_tasks.COPIED)),
        ),
        NeedleTask(
            "longcopy",
            1,
            f"a list of {long_tasks.COPIED_LONG} words repeated: a long generation",
            long_tasks.planned(long_tasks.copied(long_tasks.COPIED_LONG)),
        ),
        NeedleTask(
            "dialogue",
            1,
            "second and third question of a conversation, the third the first again",
            long_tasks.planned(long_tasks.dialogue),
        ),
        NeedleTask(
            "late",
            1,
            "four facts of the prompt needed during a long answer",
            long_tasks.planned(long_tasks.late),
        ),
    )
}

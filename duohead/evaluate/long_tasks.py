"""Needle formats that ask for more than one look-up: several keys or values, chains, pairs, copies, talk.

After RULER (arXiv 2404.06654; multi-key, multi-value, multi-query, variable tracking) and key-value retrieval
(arXiv 2307.03172), in words of our own that name what they ask for, because the pocket models infer nothing. Words
between several answers of a sample are given; `tasks.TASKS` holds these formats beside the single needles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from duohead.evaluate.words import COLOURS, NAMES, THINGS, choose, digits, spread
from duohead.identify.assembly import Answer, Encoder, Given, Piece, Prose, Sample, assemble
from duohead.identify.passkeys import ORDINALS, WORDS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Needles as `assemble` takes them, and what follows the text.
Plan = tuple[list[tuple[float, list[str]]], list[Piece]]
Recipe = Callable[[int, float, torch.Generator], Plan]
_NUMBER = "\nOne more thing to note: the magic number of {} is"
_REPLY = "The magic number of {} is"
COPIED, COPIED_LONG = 64, 256
_FILLED = 0.85


def planned(recipe: Recipe) -> Callable[..., Sample]:
    """A format of needles in a text and a tail, from a recipe of context length, depth and generator."""

    def build(
        tokenizer: PreTrainedTokenizerBase,
        haystack_ids: torch.Tensor,
        *,
        context_length: int,
        depth: float,
        generator: torch.Generator,
    ) -> Sample:
        needles, tail = recipe(context_length, depth, generator)
        return assemble(
            tokenizer,
            haystack_ids,
            context_length=context_length,
            needles=needles,
            tail=tail,
            generator=generator,
        )

    return build


def _numbers(
    depths: list[float], keys: list[str], generator: torch.Generator
) -> tuple[list[tuple[float, list[str]]], list[str]]:
    """One line per key with its number of seven digits, and the numbers."""
    values = [" " + digits(7, generator) for _ in keys]
    lines = [
        (at, [_NUMBER.format(key), value, ".\n"])
        for at, key, value in zip(depths, keys, values, strict=True)
    ]
    return lines, values


def multikey(context_length: int, depth: float, generator: torch.Generator) -> Plan:
    """A number asked for by a key of two words, among one other such line for every 64 tokens, 64 at most."""
    count = max(4, min(64, context_length // 64))
    depths, asked = spread(depth, count, generator)
    pairs = [f"the {colour} {thing}" for colour in COLOURS for thing in THINGS]
    keys = choose(pairs, generator, count)
    needles, values = _numbers(depths, keys, generator)
    question = f"\n\nWhat is the magic number of {keys[asked]}?\nIt is"
    return needles, [Given(question), Answer(values[asked])]


def multivalue(context_length: int, depth: float, generator: torch.Generator) -> Plan:
    """Four numbers of one person, told apart by ordinals, all asked for; another person has four as well."""
    depths, _ = spread(depth, 4, generator)
    name, other = choose(NAMES, generator, 2)
    needles, values = _numbers(depths, _ordered(name), generator)
    elsewhere, _ = spread(1 - depth, 4, generator)
    needles += _numbers(elsewhere, _ordered(other), generator)[0]
    tail: list[Piece] = [Given(f"\n\nWhat are the four magic numbers of {name}?")]
    for ordinal, value in zip(ORDINALS, values, strict=False):
        tail += [Given(f"\nThe magic number of {name}, the {ordinal}, is"), Answer(value)]
    return needles, tail


def _ordered(name: str) -> list[str]:
    return [f"{name}, the {ordinal}," for ordinal in ORDINALS[:4]]


def multiquery(context_length: int, depth: float, generator: torch.Generator) -> Plan:
    """The numbers of four people out of eight, asked for in one question; the one at `depth` comes first."""
    depths, asked = spread(depth, 8, generator)
    people = choose(NAMES, generator, 8)
    needles, values = _numbers(depths, people, generator)
    order = [asked, *(i for i in range(8) if i != asked)][:4]
    listed = ", ".join(people[i] for i in order)
    tail: list[Piece] = [Given(f"\n\nWhat are the magic numbers of {listed}?")]
    for i in order:
        tail += [Given("\n" + _REPLY.format(people[i])), Answer(values[i])]
    return needles, tail


def tracking(context_length: int, depth: float, generator: torch.Generator) -> Plan:
    """A chain of three assignments traced back from its last variable to a number, one step at a time.

    The last assignment is at `depth`, the others anywhere; a second chain of the same form lies in the text.
    """
    variables = choose([f"{c}_{t}" for c in COLOURS for t in THINGS], generator, 6)
    needles: list[tuple[float, list[str]]] = []
    tail: list[Piece] = [Given(f"\n\nTrace {variables[2]} back to its number.")]
    for chain in (variables[:3], variables[3:]):
        values = [" " + digits(5, generator), *(f" {name}" for name in chain[:2])]
        others = (0.05 + 0.9 * torch.rand(3, generator=generator)).tolist()
        places = [*others[:2], depth if chain[0] == variables[0] else others[2]]
        needles += [
            (at, [f"\n\nVAR {name} =", value, "\n"])
            for at, name, value in zip(places, chain, values, strict=True)
        ]
        if chain[0] == variables[0]:
            for name, value in zip(reversed(chain), reversed(values), strict=True):
                tail += [Given(f"\nVAR {name} ="), Answer(value)]
    return needles, tail


def dialogue(context_length: int, depth: float, generator: torch.Generator) -> Plan:
    """A second and a third question after a first was answered and talk went on; the third repeats the first.

    A cache that was cut down to what the first question needed has lost the second answer. Talk between questions is a
    sixteenth of the context. The second question asks for the needle at `depth`.
    """
    depths, asked = spread(depth, 6, generator)
    people = choose(NAMES, generator, 6)
    needles, values = _numbers(depths, people, generator)
    first = (asked + 1 + int(torch.randint(5, (1,), generator=generator))) % 6
    talk = Prose(max(1, context_length // 16))
    question = "\n\nUser: What is the magic number of {}?\nAssistant: The magic number of {} is"
    tail: list[Piece] = [Given(question.format(people[first], people[first]) + values[first] + ".")]
    for i in (asked, first):
        tail += [Given("\n\nUser: "), talk, Given(question.format(people[i], people[i]))]
        tail += [Answer(values[i]), Given(".")]
    return needles, tail


def late(context_length: int, depth: float, generator: torch.Generator) -> Plan:
    """Four facts of the prompt that are needed at the end of each quarter of a long answer, of a quarter of the tokens.

    What lies between is prose, given; the fact at `depth` comes last.
    """
    depths, asked = spread(depth, 4, generator)
    people = choose(NAMES, generator, 4)
    needles, values = _numbers(depths, people, generator)
    stretch = Prose(max(1, context_length // 16))
    tail: list[Piece] = [Given("\n\nWrite on, and name the magic numbers on the way.\nAnswer: ")]
    for i in [*(i for i in range(4) if i != asked), asked]:
        tail += [
            stretch,
            Given("\n\n" + _REPLY.format(people[i])),
            Answer(values[i]),
            Given(".\n\n"),
        ]
    return needles, tail


def pairs(
    tokenizer: PreTrainedTokenizerBase,
    haystack_ids: torch.Tensor,
    *,
    context_length: int,
    depth: float,
    generator: torch.Generator,
) -> Sample:
    """The value of a key in an object of pairs that fills most of the context; `depth` is the place in the object."""
    encode = Encoder(tokenizer)
    lines: list[list[str]] = []
    seen: set[str] = set()
    taken = 0
    while taken < _FILLED * context_length:
        key = (
            f"{choose(COLOURS, generator)[0]}_{choose(THINGS, generator)[0]}_{digits(3, generator)}"
        )
        if key in seen:
            continue
        seen.add(key)
        line = [f'"{key}": "', f"{choose(THINGS, generator)[0]}-{digits(4, generator)}", '",\n']
        taken += sum(len(encode(part)) for part in line)
        lines.append(line)
    start, value, _ = lines[round(depth * (len(lines) - 1))]
    return assemble(
        tokenizer,
        haystack_ids,
        context_length=context_length,
        needles=[(1.0, ["\n\n"]), *((1.0, line) for line in lines)],
        tail=[Given(f"\nThe pair that was asked for:\n{start}"), Answer(value)],
        generator=generator,
    )


def copied(most: int) -> Recipe:
    """A list of `most` words (an eighth of the context at most) to be repeated whole; another list lies elsewhere."""

    def recipe(context_length: int, depth: float, generator: torch.Generator) -> Plan:
        count = max(1, min(most, context_length // 8))
        name, other = choose(NAMES, generator, 2)
        needles: list[tuple[float, list[str]]] = []
        lists = []
        for at, owner in ((depth, name), (1 - depth, other)):
            drawn = torch.randint(len(WORDS), (count,), generator=generator).tolist()
            lists.append("".join(" " + WORDS[i] for i in drawn))
            needles.append((at, [f"\n\nThe long list of {owner} is:", lists[-1], ".\n\n"]))
        question = f"\n\nWhat is the long list of {name}?\nThe long list of {name} is:"
        return needles, [Given(question), Answer(lists[0])]

    return recipe

"""Words and numbers that needles are made of, drawn from a generator so that a seed makes the same sample anywhere.

Keys and values come from short lists of common words, because a needle should be hard to find and easy to say. Used by
the formats in `tasks.py` and `long_tasks.py`.
"""

from __future__ import annotations

import torch

NAMES = (
    "Agnes Barnaby Cordelia Dmitri Eleanor Fergus Greta Horatio Imogen Jasper Katya Lionel Marigold Nathaniel Octavia "
    "Percival Quentin Rosalind Silas Tabitha Ulric Verity Winifred Xavier Yolanda Zachary"
).split()
PLACES = (
    "Lisbon Vienna Cairo Dublin Geneva Havana Kyoto Lima Madrid Naples Oslo Prague Quito Rome Seville Turin"
).split()
VERBS = "paint count carry follow mend polish bury borrow feed watch".split()
COLOURS = "amber black blue copper golden green grey ivory purple red silver white yellow".split()
THINGS = "bells boats candles clocks doors horses kites lanterns ladders mirrors roses spoons stones wagons".split()
SPOTS = "behind the mill,by the old bridge,in the garden,near the harbour,on the hill,under the stairs".split(
    ","
)


def choose(options: list[str], generator: torch.Generator, count: int = 1) -> list[str]:
    """`count` different ones of `options`, in random order."""
    return [options[i] for i in torch.randperm(len(options), generator=generator)[:count].tolist()]


def digits(count: int, generator: torch.Generator) -> str:
    """A number of `count` digits, leading zeros and all."""
    return "".join(str(d) for d in torch.randint(10, (count,), generator=generator).tolist())


def spread(depth: float, count: int, generator: torch.Generator) -> tuple[list[float], int]:
    """`depth` and `count` - 1 random depths in ascending order, and the place of `depth` among them."""
    others = (0.05 + 0.9 * torch.rand(count - 1, generator=generator)).tolist()
    depths = sorted([depth, *others])
    return depths, depths.index(depth)

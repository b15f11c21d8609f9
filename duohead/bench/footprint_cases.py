"""What to count bytes of, as plain data: texts, what a cache keeps of them, and ranges of lengths to check.

A table needs all of them at once, which is a preset. Use `preset("laguna-card")`, or make an `Asked`;
`duohead.bench.footprint.run` measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch

from duohead.bench import laguna_card
from duohead.bench.models import even_heads
from duohead.policy import HeadPolicy
from duohead.shapes import layer_shapes

K = 1024


class Text(NamedTuple):
    """Tokens of a prompt, and tokens decoded one by one after it."""

    prompt: int
    decode: int

    @property
    def tokens(self) -> int:
        """Length of the whole."""
        return self.prompt + self.decode


class Range(NamedTuple):
    """Lengths in tokens, the share of the model's own bytes to be saved at each, and whether those are in FP8."""

    first: int
    last: int
    target: float = 0.0
    fp8: bool = False


@dataclass(frozen=True)
class Kept:
    """What our cache keeps, as fields of `HeadPolicy`; retrieval heads are spread evenly over the gated layers."""

    retrieval_ratio: float = 0.5
    sink: int = 64
    recent: int = 256
    retrieval_dtype: str = "auto"
    streaming_dtype: str = "auto"
    window_dtype: str = "auto"
    evict: bool = True

    def policy(self, made: Any, dtype: torch.dtype) -> HeadPolicy:
        """The policy for the model of a config, bound to it."""
        fields = asdict(self)
        shapes = layer_shapes(made)
        heads = even_heads(shapes, fields.pop("retrieval_ratio"))
        policy = HeadPolicy.from_heads(
            retrieval=heads, num_kv_heads=[shape.num_kv_heads for shape in shapes], **fields
        )
        return policy.bind(made, dtype=dtype)

    def __str__(self) -> str:
        rest = f"{self.sink}+{self.recent}" if self.evict else "all tokens"
        return (
            f"{self.retrieval_ratio:.4g} {self.retrieval_dtype}, rest {self.streaming_dtype} ({rest}), "
            f"windows {self.window_dtype}"
        )


@dataclass(frozen=True)
class Asked:
    """Everything to measure: each text under transformers' cache and under each policy, and ranges of lengths to check.

    ``card`` adds what the Laguna adapter's card counts for a text.
    """

    model: str
    texts: Sequence[Text]
    kept: Sequence[Kept]
    ranges: Sequence[Range]
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    device: str | torch.device = "cpu"
    card: bool = False

    def __post_init__(self) -> None:
        numbers = [("batch", self.batch, 1)]
        for text in self.texts:
            numbers += [("lengths", text.prompt, 1), ("decode", text.decode, 0)]
        for name, value, least in numbers:
            if value < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}")
        for first, last, *_ in self.ranges:
            if not 1 <= first <= last:
                raise ValueError(
                    f"ranges must go from 1 token or more to as many or more, got {first} to {last}"
                )


def preset(name: str) -> Asked:
    """What a table needs; ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]()


def _laguna() -> Asked:
    """Issue 5: the nine rows of the adapter's card and longer prompts, under policies like its own and others."""
    texts = [Text(*row) for row in laguna_card.PUBLISHED]
    texts += [Text(length * K, 64) for length in (4, 16, 64, 128)]
    low = Kept(0.4, retrieval_dtype="fp8", streaming_dtype="int4", window_dtype="int4")
    kept = [
        low,
        replace(low, retrieval_ratio=0.25),
        replace(low, retrieval_ratio=0.5),
        replace(low, retrieval_dtype="fp8/int4"),
        replace(low, retrieval_dtype="int4"),
        replace(low, window_dtype="fp8"),
        replace(low, evict=False),
        replace(low, retrieval_dtype="int4", evict=False),
    ]
    ranges = [Range(512, 128 * K, 0.40, fp8=True), Range(16 * K, 128 * K, 0.55, fp8=True)]
    return Asked("laguna-xs.2", texts, kept, ranges, card=True)


PRESETS: dict[str, Callable[[], Asked]] = {"laguna-card": _laguna}

"""The heads of one layer and what they keep: which are of which kind, and how many slots of storage that takes.

Stores grow in steps that depend on the length alone, so that a policy predicts the bytes of a cache to the byte. A
`HeadPolicy` has a `LayerPolicy` for every layer and describes its storage with `Store`s, which `duohead.cache`
allocates; `first_saving` finds the length from which on a cache that grows in these steps stays smaller than another.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeGuard

MIN_STEP = 16
MAX_STEP = 16384
# From this length on every step is MAX_STEP long.
EVEN_FROM = 16 * MAX_STEP


def step(tokens: int) -> int:
    """Slots that a growing store adds at a time at a length of ``tokens``: an eighth of the octave below, in bounds."""
    return min(max((1 << (tokens - 1).bit_length()) // 16, MIN_STEP), MAX_STEP)


def capacity(tokens: int) -> int:
    """Slots a growing store holds for ``tokens`` tokens: at most an eighth (or 15) more, none at 16, 32, 64 and so on.

    Growth then needs few allocations, and the size never depends on how the tokens arrived.
    """
    return -(-tokens // step(tokens)) * step(tokens) if tokens > 0 else 0


@dataclass(frozen=True)
class LayerPolicy:
    """The heads of one layer.

    ``num_kv_heads`` 0 means the layer has no KV cache. ``retrieval`` lists the retrieval heads, ascending; all others
    stream. ``window`` is the layer's native sliding window, which holds for both kinds; None means global.
    """

    num_kv_heads: int
    retrieval: tuple[int, ...] = ()
    window: int | None = None

    def __post_init__(self) -> None:
        heads = self.retrieval
        if not is_int(self.num_kv_heads) or self.num_kv_heads < 0:
            raise ValueError(f"num_kv_heads must be an integer >= 0, got {self.num_kv_heads!r}")
        if list(heads) != sorted(set(heads)) or any(
            not 0 <= head < self.num_kv_heads for head in heads
        ):
            raise ValueError(
                f"retrieval must list distinct KV heads in 0..{self.num_kv_heads - 1} in ascending order, got {heads}"
            )
        if self.window is not None and (not is_int(self.window) or self.window < 1):
            raise ValueError(f"window must be None or an integer >= 1, got {self.window!r}")

    @property
    def streaming(self) -> tuple[int, ...]:
        """The streaming heads, ascending."""
        return tuple(head for head in range(self.num_kv_heads) if head not in self.retrieval)

    @property
    def gated(self) -> bool:
        """Whether the layer counts in ratios: it has KV heads and its native attention is global."""
        return self.num_kv_heads > 0 and self.window is None


@dataclass(frozen=True)
class Store:
    """What one kind of head of a layer keeps: all tokens (``ring`` None), or ``sink`` first and ``ring`` last ones.

    ``dtype`` names the storage of keys and values (`duohead.codec.pair`). ``sees_all`` tells heads that see whatever
    the layer's native attention sees: retrieval heads, streaming heads of a policy that does not evict, and streaming
    heads whose native window is no longer than ``recent``.
    """

    kind: Literal["retrieval", "streaming"]
    heads: tuple[int, ...]
    dtype: str
    sink: int
    ring: int | None
    sees_all: bool

    def slots(self, tokens: int, *, rollback: int = 0) -> int:
        """Slots per head and row that are allocated for a length of ``tokens``."""
        grown = capacity(tokens)
        return grown if self.ring is None else min(grown, self.sink + self.ring + rollback)


def first_saving(
    saving: Callable[[int], int], *, level: int, up_to: int | None = None
) -> int | None:
    """The smallest length from which on ``saving`` is positive at every longer one, or None if there is none.

    Args:
        saving: of a length in tokens, what is saved there: something that never falls and, from ``level`` on, grows
            linearly, minus something that changes with `capacity` alone and, from ``level`` on, linearly with it.
        level: see above.
        up_to: look at lengths up to this one only; None for all, however long.
    """
    longest = _certain_from(saving, level) if up_to is None else up_to
    if longest is None or saving(longest) <= 0:
        return None
    while longest > 0:
        # Within a step the saving never falls, so it is decided at the step's first length.
        first = capacity(longest) - step(longest) + 1
        if saving(first) <= 0:
            return first + bisect_left(
                range(first, longest + 1), True, key=lambda at: saving(at) > 0
            )
        longest = first - 1
    return 1


def _certain_from(saving: Callable[[int], int], level: int) -> int | None:
    """First length of some step with a saving there and at every later one; None if there is none."""
    first = capacity(max(level, EVEN_FROM)) + 1
    least = saving(first)
    gain = saving(first + MAX_STEP) - least
    if least > 0:
        return first if gain >= 0 else None
    return first + MAX_STEP * (-least // gain + 1) if gain > 0 else None


def is_int(value: object) -> TypeGuard[int]:
    """Whether a value is an integer, True and False left out."""
    return isinstance(value, int) and not isinstance(value, bool)

"""Who competes in an evaluation: full attention, the identified heads, as many random heads, and streaming alone.

A choice of heads is only worth something against a random choice of the same number, because that costs the same cache
bytes; streaming alone shows what the windows do by themselves. `comparison(pattern, ratios=(0.5,), draws=3, seed=0)`
gives the methods by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from duohead.policy import HeadPolicy

if TYPE_CHECKING:
    from duohead.pattern import HeadPattern

Kind = Literal["full", "duo", "random", "streaming"]


@dataclass(frozen=True)
class Method:
    """One way to run the model: `policy` None is the model as it is, `draw` counts random choices from 0.

    `share` of the gated heads are retrieval heads: what was asked for (and stands in the method's name), rounded to
    whole heads.
    `window` is the (sink, recent) of a method that is about them, in tokens.
    """

    kind: Kind
    policy: HeadPolicy | None
    share: float
    draw: int | None = None
    window: tuple[int, int] | None = None


def random_heads(
    policy: HeadPolicy, gated: NDArray[np.bool_], *, draws: int, seed: int
) -> list[HeadPolicy]:
    """Policies that keep as many retrieval heads as `policy`, chosen at random among the gated heads.

    Args:
        policy: whose count and windows to take; heads that are not gated keep their kind.
        gated: [layers, kv_heads], as `HeadPattern.gated`.
        draws: how many policies.
        seed: the draws are a function of it. Where all KV heads have one size, all take the same cache bytes.
    """
    if draws < 0:
        raise ValueError(f"draws must be 0 or more, got {draws}")
    places = np.argwhere(gated)
    count = len(_kept(policy) & {(int(i), int(h)) for i, h in places})
    random = np.random.default_rng(seed)
    chosen = (places[random.choice(len(places), size=count, replace=False)] for _ in range(draws))
    return [_choose(policy, gated, {(int(i), int(h)) for i, h in heads}) for heads in chosen]


def all_streaming(policy: HeadPolicy, gated: NDArray[np.bool_]) -> HeadPolicy:
    """The same policy without any retrieval head among the gated ones ([layers, kv_heads])."""
    return _choose(policy, gated, set())


def _kept(policy: HeadPolicy) -> set[tuple[int, int]]:
    return {(index, head) for index, layer in enumerate(policy.layers) for head in layer.retrieval}


def _choose(
    policy: HeadPolicy, gated: NDArray[np.bool_], chosen: set[tuple[int, int]]
) -> HeadPolicy:
    kept = {place for place in _kept(policy) if not gated[place]} | chosen
    return policy.with_retrieval(
        [[head for at, head in sorted(kept) if at == index] for index in range(len(policy.layers))]
    )


def storage_words(policy: HeadPolicy | None) -> str:
    """How a policy stores heads, where it is not in the model's own dtype: "streaming=fp8/int4,keep-all", or "".

    ``keep-all`` stands for streaming heads that evict nothing.
    """
    if policy is None:
        return ""
    said = [
        f"{kind}={dtype}"
        for kind in ("retrieval", "streaming", "window")
        if (dtype := getattr(policy, f"{kind}_dtype")) != "auto"
    ]
    return ",".join(said if policy.evict else [*said, "keep-all"])


def share_name(ratio: float) -> str:
    """0.5 -> "50", 0.125 -> "12.5": a share as it stands in method names."""
    return f"{100 * ratio:.4g}"


def comparison(
    pattern: HeadPattern,
    *,
    ratios: Sequence[float],
    random_ratios: Sequence[float] | None = None,
    draws: int,
    seed: int,
    sink: int | None = None,
    recent: int | None = None,
    prefill_recent: int | None = None,
    windows: Sequence[tuple[int, int]] = (),
    **storage: Any,
) -> dict[str, Method]:
    """Methods by name: `full`; per ratio `duo_50`, `random_50_0` and so on, `duo@64+256_50`; `streaming`.

    A storage that is not the model's dtype stands in all names but `full`: `duo:streaming=int4,keep-all_50`.

    Args:
        pattern: the identified heads.
        ratios: shares of retrieval heads.
        random_ratios: those of `ratios` that get random rivals; all of them by default.
        draws: random choices per ratio.
        seed: of the random choices.
        sink: tokens, the pattern's own by default.
        recent: tokens, the pattern's own by default.
        prefill_recent: tokens that streaming heads see in a prompt, `recent` by default.
        windows: further (sink, recent) for the identified heads, such as (320, 1) for sinks alone beside the own token,
            (0, 320) for recent tokens alone; `prefill_recent` is not for them.
        storage: fields of `HeadPolicy` that say how heads are stored: ``retrieval_dtype``, ``streaming_dtype``,
            ``window_dtype``, ``evict``.
    """
    if not ratios:
        raise ValueError(
            "ratios must name at least one share of retrieval heads, got none; for example 0.5"
        )
    rivals = tuple(ratios) if random_ratios is None else tuple(random_ratios)
    methods = {"full": Method("full", None, 1.0)}
    for ratio in ratios:
        policy = pattern.policy(
            retrieval_ratio=ratio,
            sink=sink,
            recent=recent,
            prefill_recent=prefill_recent,
            **storage,
        )
        stored = f":{words}" if (words := storage_words(policy)) else ""
        methods[f"duo{stored}_{share_name(ratio)}"] = Method("duo", policy, policy.retrieval_ratio)
        if ratio in rivals:
            # Each ratio draws from its own stream: adding a ratio leaves the draws of the others as they were.
            stream = seed * 1_000_003 + round(1e6 * ratio)
            for draw, rival in enumerate(
                random_heads(policy, pattern.gated, draws=draws, seed=stream)
            ):
                name = f"random{stored}_{share_name(ratio)}_{draw}"
                methods[name] = Method("random", rival, rival.retrieval_ratio, draw)
        for first, last in dict.fromkeys(windows):
            other = pattern.policy(retrieval_ratio=ratio, sink=first, recent=last, **storage)
            methods[f"duo@{first}+{last}{stored}_{share_name(ratio)}"] = Method(
                "duo", other, other.retrieval_ratio, window=(first, last)
            )
    methods[f"streaming{stored}"] = Method("streaming", all_streaming(policy, pattern.gated), 0.0)
    return methods

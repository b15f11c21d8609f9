"""What each way to store the heads costs and keeps: precision by kind of head, eviction against low precision.

Every case is a policy over the bundled pattern. It fills real caches, whose bytes are noted beside exact match on the
four retrieval tasks and beside perplexity and divergence from the full model on held-out prose; a record holds one case
at one length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from duohead.evaluate.prose import evaluate_prose
from tools.findings.lab import RECENT, RETRIEVAL, SINK

if TYPE_CHECKING:
    from duohead import HeadPattern
    from duohead.policy import HeadPolicy
    from tools.findings.lab import Lab

RATIOS = (0.5, 0.25)
# Prose goes through the model so many tokens at a time: few launches, for these models are small.
CHUNK = 4096
# Storage of all heads alike; KEYS/VALUES where the two differ.
ALIKE = (
    "bf16", "fp8", "int8", "int4", "fp8/int4", "int4/fp8", "int8/int4", "int4/int8",
    "int4-hadamard", "int4-hadamard/int4", "int4-hadamard/fp8", "fp8/int4-hadamard",
)  # fmt: skip
# Storage of retrieval heads and of streaming heads.
EVICTING = (
    ("bf16", "bf16"), ("fp8", "fp8"), ("int8", "int8"), ("int4", "int4"), ("bf16", "int4"),
    ("fp8", "int4"), ("int8", "int4"), ("fp8/int4", "int4"), ("int8/int4", "int4"),
    ("int8", "bf16"), ("int8/int4", "int8"), ("int4/int8", "int8"), ("int4", "int8"),
    ("int4-hadamard", "int4-hadamard"), ("int8", "int4-hadamard"), ("int4-hadamard", "int8"),
)  # fmt: skip
KEEPING = (
    ("bf16", "fp8"), ("bf16", "int4"), ("fp8", "int4"), ("int8", "int4"), ("int8", "int8/int4"),
    ("fp8", "fp8/int4"), ("int8", "int4-hadamard"),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One way to store the heads; ``retrieval`` None is the model as it is, ``ratio`` 1 all heads alike."""

    ratio: float
    retrieval: str | None
    streaming: str | None
    evict: bool = True

    def policy(self, pattern: HeadPattern) -> HeadPolicy | None:
        """The policy over the pattern; natively windowed layers are stored like streaming heads."""
        if self.retrieval is None or self.streaming is None:
            return None
        return pattern.policy(
            retrieval_ratio=self.ratio,
            sink=SINK,
            recent=RECENT,
            retrieval_dtype=self.retrieval,
            streaming_dtype=self.streaming,
            window_dtype=self.streaming,
            evict=self.evict,
        )


def cases(ratios: Sequence[float]) -> Iterator[Case]:
    """Everything that is measured, the model as it is first."""
    yield Case(1.0, None, None)
    for name in ALIKE:
        yield Case(1.0, name, name)
    for ratio in ratios:
        for evict, kinds in ((True, EVICTING), (False, KEEPING)):
            for retrieval, streaming in kinds:
                yield Case(ratio, retrieval, streaming, evict)


def precision(lab: Lab) -> None:
    """Measure every case of the lab's part, a record for each length."""
    pattern = lab.bundled()
    for case in lab.share(cases(lab.ratios or RATIOS)):
        policy = case.policy(pattern)
        # Where all heads are alike, the pattern has no say.
        ranked = pattern if case.ratio < 1 else None
        for length, numbers in sorted(_measured(lab, policy).items()):
            lab.note(
                "precision", numbers, policy=policy, ranked=ranked, length=length, **asdict(case)
            )


def _measured(lab: Lab, policy: HeadPolicy | None) -> dict[int, dict[str, Any]]:
    """By length: the bytes of the cache, prose where it was asked for, and needles where they were."""
    effort = lab.effort
    policies = {"own": policy}
    prose = evaluate_prose(
        lab.model,
        lab.tokenizer,
        lab.held_out,
        policies=policies,
        lengths=effort.prose,
        windows=effort.windows,
        chunk=CHUNK,
    )
    found: dict[int, dict[str, Any]] = {
        row.length: {
            "kv_bytes": row.kv_bytes,
            "perplexity": row.perplexity,
            "kl_nats": row.kl_nats,
            "top1_agreement": row.top1_agreement,
        }
        for row in prose.rows
    }
    needles = lab.answers(policies, tasks=RETRIEVAL)
    for length in effort.lengths:
        right = {task: 100 * needles.mean(task=task, length=length) for task in RETRIEVAL}
        taken = needles.kv_bytes(length=length)
        found[length] = {"kv_bytes": taken, **found.get(length, {}), **right}
    return found

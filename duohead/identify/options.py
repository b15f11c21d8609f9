"""Every constant of gate training in one frozen record, with the paper's values as defaults.

The command line's flags and the file format's account of how a pattern was made both derive from these fields, so a
constant that matters cannot hide elsewhere. Use `IdentifyOptions(steps=500, context_max=8192)`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from duohead.identify.wording import CHAT, Wording

LONGEST_DEFAULT = 32_000
PASSKEYS = "passkeys"
# Passkeys, and the lookups that `scorers.quiz` has questions of.
TASKS = (PASSKEYS, "list", "copy", "code", "quotation")
_WORDING = Wording()
# What trades memory, time or bits for one another and leaves the method as it is.
_IMMATERIAL = (
    "gradient_checkpointing",
    "save_every",
    "deterministic",
    "shard",
    "sequence_parallel",
)
_OF_PASSKEYS = (
    "num_passkeys",
    "passkey_words",
    "depth_min",
    "depth_max",
    "depth_steps",
    "wording",
)


def option(default: Any, text: str, **more: Any) -> Any:
    """A field of an options class: its default and what the command line says about it.

    ``choices`` if it has some; ``off`` is what the flag that switches it off says.
    """
    return field(default=default, metadata={"help": text, **more})


def require(options: Any, name: str, holds: bool, rule: str) -> None:
    """ValueError naming the option, the rule and the value got, unless the rule ``holds``."""
    if not holds:
        raise ValueError(f"{name} {rule}, got {getattr(options, name)}")


@dataclass(frozen=True)
class IdentifyOptions:
    """How gates are trained; lengths are in tokens. Defaults: arXiv 2410.10819, section 3.1 and appendix.

    Raises ValueError for a value out of range when it is made.
    """

    steps: int = option(2000, "optimiser steps, one sample each")
    learning_rate: float = option(0.02, "peak learning rate of AdamW")
    learning_rate_floor: float = option(0.1, "share of it at the first and the last step")
    warmup: float = option(0.2, "share of the steps that it rises over, and falls over at the end")
    reg_weight: float = option(
        0.05, "weight of the mean gate in the loss; higher finds fewer heads"
    )
    target: float = option(
        0.0,
        "lead the mean gate down to this share, in place of reg_weight, and rank heads by how long their gates stand; "
        "0 is the paper's way",
    )
    initial: float = option(1.0, "value that every gate starts from")
    sink: int = option(128, "first tokens that a streaming head keeps")
    recent: int = option(256, "last tokens that a streaming head keeps")
    context_min: int = option(2000, "shortest sample, questions included")
    context_max: int | None = option(
        None, f"longest sample (default: the model's positions, at most {LONGEST_DEFAULT})"
    )
    context_lengths: int = option(50, "evenly spaced lengths from shortest to longest")
    tasks: tuple[str, ...] = option(
        (PASSKEYS,), "what samples ask for, step by step in turn", choices=TASKS
    )
    num_passkeys: int = option(10, "passkeys in a sample")
    passkey_words: int = option(32, "words in a passkey")
    depth_min: float = option(0.05, "shallowest passkey, as a share of the text")
    depth_max: float = option(0.95, "deepest passkey, as a share of the text")
    depth_steps: int = option(1000, "evenly spaced depths to draw from")
    teacher_full: bool = option(
        False, "feed the full-attention term from the teacher, as the reference code does"
    )
    gradient_checkpointing: bool = option(False, "recompute activations: less memory, more time")
    deterministic: bool = option(
        True,
        "the same bits every time on one device",
        off="faster kernels on a GPU, which give other bits every time",
    )
    patience: int = option(
        0,
        "let the learning rate fall once the selection has stood for so many steps; 0 is never",
    )
    patience_ratios: tuple[float, ...] = option(
        (0.5, 0.25), "shares of retrieval heads whose selection patience watches"
    )
    patience_slack: float = option(0.02, "share of the selected heads that may change meanwhile")
    wording: Wording = field(default=_WORDING, metadata={"help": "phrases around passkeys"})
    chat: str = option("auto", "frame samples with the tokenizer's chat template", choices=CHAT)
    sequence_parallel: int | None = option(
        None, "processes that share one sample (default: all that torchrun started)"
    )
    shard: bool = option(False, "spread the weights over the processes (FSDP2)")
    save_every: int = option(50, "steps between checkpoints")
    seed: int = option(0, "seed of the samples")

    def __post_init__(self) -> None:
        positive = "steps learning_rate recent context_min context_lengths num_passkeys passkey_words save_every"
        for name in positive.split():
            require(self, name, getattr(self, name) > 0, "must be above 0")
        for name in ("sink", "reg_weight", "seed", "patience"):
            require(self, name, getattr(self, name) >= 0, "must not be negative")
        for name in (
            "target",
            "learning_rate_floor",
            "initial",
            "depth_min",
            "depth_max",
            "patience_slack",
        ):
            require(self, name, 0 <= getattr(self, name) <= 1, "must be between 0 and 1")
        require(self, "warmup", 0 <= self.warmup <= 0.5, "must be between 0 and 0.5")
        require(self, "depth_min", self.depth_min <= self.depth_max, "must not exceed depth_max")
        require(
            self,
            "context_min",
            self.context_min > self.sink + self.recent,
            f"must exceed sink + recent = {self.sink + self.recent}, or streaming heads see everything",
        )
        require(
            self,
            "context_max",
            self.context_max is None or self.context_max >= self.context_min,
            f"must be at least context_min = {self.context_min}",
        )
        require(self, "chat", self.chat in CHAT, f"must be one of {', '.join(CHAT)}")
        self._check_tasks()
        require(
            self,
            "patience",
            self.patience == 0 or not self.target,
            "must be 0 with a target, whose way down takes all steps",
        )
        require(
            self,
            "reg_weight",
            self.reg_weight == type(self).reg_weight or not self.target,
            "must be left alone with a target, which takes its place",
        )
        require(
            self,
            "patience_ratios",
            len(self.patience_ratios) > 0 and all(0 < ratio < 1 for ratio in self.patience_ratios),
            "must be shares between 0 and 1, at least one",
        )
        require(
            self,
            "sequence_parallel",
            self.sequence_parallel is None or self.sequence_parallel > 0,
            "must be above 0",
        )

    def _check_tasks(self) -> None:
        known = 0 < len(self.tasks) == len({*self.tasks} & {*TASKS})
        require(self, "tasks", known, f"must be different ones of {', '.join(TASKS)}")
        require(
            self,
            "chat",
            self.chat != "yes" or {*self.tasks} == {PASSKEYS},
            "must not be yes with tasks other than passkeys, whose texts have no turns",
        )
        for name in _OF_PASSKEYS:
            require(
                self,
                name,
                PASSKEYS in self.tasks or getattr(self, name) == getattr(type(self), name),
                "must be left alone without passkeys among the tasks",
            )

    def longest(self, positions: int | None) -> int:
        """The longest sample for a model with that many positions (None: not limited).

        Raises ValueError if the model's positions are fewer than the options ask for.
        """
        limit = LONGEST_DEFAULT if positions is None else positions
        longest = min(limit, LONGEST_DEFAULT) if self.context_max is None else self.context_max
        if positions is not None and max(longest, self.context_min) > positions:
            name = "context_min" if self.context_max is None else "context_max"
            raise ValueError(
                f"{name} must not exceed the model's {positions} positions, got {getattr(self, name)}; "
                "ask for shorter contexts"
            )
        return max(longest, self.context_min)

    def learning_rate_at(self, step: int, *, ends: int | None = None) -> float:
        """Learning rate of a step (from 0): a straight rise from the floor, a plateau, and the same way down.

        ``ends`` is the number of steps that a run does which patience cuts short: the plateau ends early, and the way
        down takes `decline` steps.
        """
        edge = self.rise
        share = min(1.0, step / edge, (self.steps - 1 - step) / edge)
        if ends is not None:
            share = min(share, (ends - 1 - step) / self.decline)
        return self.learning_rate * (
            self.learning_rate_floor + (1 - self.learning_rate_floor) * share
        )

    def share_at(self, step: int) -> float:
        """Mean gate that a run with a target is led to at a step: from 1 straight down, there before the rate falls."""
        return 1 - (1 - self.target) * min(1.0, (step + 1) / max(1, self.steps - self.rise))

    @property
    def rise(self) -> int:
        """Steps before the learning rate is at its peak, in which patience does not count."""
        return max(1, round(self.steps * self.warmup))

    @property
    def decline(self) -> int:
        """Steps that the learning rate takes to fall once patience has run out."""
        return max(1, min(self.rise, self.patience))

    def that_matter(self) -> dict[str, Any]:
        """The fields that decide the gates: all but those that only trade memory, time or the last bits."""
        fields = asdict(self)
        for name in _IMMATERIAL:
            del fields[name]
        return fields

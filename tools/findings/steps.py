"""How much of the gate training is needed: fewer steps, shorter contexts, and stopping when the selection stands.

`duohead identify` does the training, so that patience is the product's. Every setting leaves the heads it selects and
what they answer; `tools.gate_tables` compares them with those of the first, so that processes can share the settings.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from duohead.identify import IdentifyOptions, haystack, identify
from duohead.record import write_record
from tools.findings.lab import RATIOS, RECENT, SINK, chosen

if TYPE_CHECKING:
    from tools.findings.lab import Lab

EVALUATED_AT = 8192
TASKS = ("passkeys", "needle", "number")
REFERENCE = "400 steps, 2K-8K, seed 0"
LONG = IdentifyOptions(
    steps=400, sink=SINK, recent=RECENT, context_max=8192, deterministic=False, patience_slack=0.0
)


def settings() -> Iterator[tuple[str, IdentifyOptions]]:
    """Names and options; the first one is the reference."""
    yield REFERENCE, LONG
    yield "400 steps, 2K-8K, seed 1", replace(LONG, seed=1)
    for steps in (200, 100, 50, 25):
        yield f"{steps} steps, 2K-8K", replace(LONG, steps=steps)
    yield "100 steps, 2K-4K", replace(LONG, steps=100, context_max=4096)
    short = replace(LONG, context_min=1500, context_max=2048)
    yield "100 steps, 1.5K-2K", replace(short, steps=100)
    yield "50 steps at lr 0.08, 1.5K-2K", replace(short, steps=50, learning_rate=0.08)
    for patience in (10, 20, 40):
        yield f"400 steps, patience {patience}", replace(LONG, patience=patience, warmup=0.05)
    for steps in (400, 200, 100, 50):
        yield f"{steps} steps, target 0.04", replace(LONG, steps=steps, target=0.04)


def steps(lab: Lab) -> None:
    """Selected heads and exact match of the lab's part of all settings."""
    for name, options in lab.share(settings()):
        done: list[object] = []
        began = time.perf_counter()
        pattern = identify(
            lab.model,
            lab.tokenizer,
            haystack.default_text(),
            options=options,
            progress=False,
            on_step=done.append,
        )
        seconds = time.perf_counter() - began
        policies = {
            str(ratio): pattern.policy(retrieval_ratio=ratio, sink=SINK, recent=RECENT)
            for ratio in RATIOS
        }
        scores = lab.accuracy(policies, tasks=TASKS, lengths=(EVALUATED_AT,))
        longest = options.context_max or options.context_min
        write_record(
            lab.out,
            op="identify.steps_saved",
            impl=name,
            dtype=lab.model.dtype,
            shape={
                "model": lab.name,
                "held_out": lab.held_out_name,
                "evaluated_at": EVALUATED_AT,
                "samples": lab.effort.answers,
                **{
                    field: getattr(options, field)
                    for field in (
                        "steps",
                        "patience",
                        "target",
                        "context_min",
                        "context_max",
                        "learning_rate",
                        "seed",
                    )
                },
            },
            numbers={
                "steps_done": len(done),
                "seconds": seconds,
                "tokens": len(done) * (options.context_min + longest) / 2,
                "ties_at_one": int((pattern.alpha == 1).sum()),
                **{f"heads_{ratio}": chosen(policy) for ratio, policy in policies.items()},
                **{
                    f"exact_match_{ratio}": sum(scores[str(ratio)].values()) / len(TASKS) / 100
                    for ratio in RATIOS
                },
            },
        )

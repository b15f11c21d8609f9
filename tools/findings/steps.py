"""How much of the gate training is needed: fewer steps, shorter contexts, and stopping when the selection stands.

Every setting is compared with a long run by the heads it selects and by what they answer; `duohead identify` does the
training, so that patience is the product's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from duohead.identify import IdentifyOptions, haystack, identify
from duohead.record import write_record
from tools.findings.lab import RATIOS, RECENT, SINK, overlap

if TYPE_CHECKING:
    from tools.findings.lab import Lab

EVALUATED_AT = 8192
TASKS = ("passkeys", "needle", "number")
LONG = IdentifyOptions(
    steps=400, sink=SINK, recent=RECENT, context_max=8192, deterministic=False, patience_slack=0.0
)


def settings() -> Iterator[tuple[str, IdentifyOptions]]:
    """Names and options; the first one is the reference."""
    yield "400 steps, 2K-8K, seed 0", LONG
    yield "400 steps, 2K-8K, seed 1", replace(LONG, seed=1)
    for steps in (200, 100, 50, 25):
        yield f"{steps} steps, 2K-8K", replace(LONG, steps=steps)
    yield "100 steps, 2K-4K", replace(LONG, steps=100, context_max=4096)
    short = replace(LONG, context_min=1500, context_max=2048)
    yield "100 steps, 1.5K-2K", replace(short, steps=100)
    yield "50 steps at lr 0.08, 1.5K-2K", replace(short, steps=50, learning_rate=0.08)
    for patience in (10, 20, 40):
        yield f"400 steps, patience {patience}", replace(LONG, patience=patience, warmup=0.05)


def steps(lab: Lab) -> None:
    """Selections and exact match of every setting, against the first."""
    reference = None
    for name, options in settings():
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
        reference = reference or pattern
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
                **{
                    field: getattr(options, field)
                    for field in (
                        "steps",
                        "patience",
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
                **{f"overlap_{ratio}": overlap(pattern, reference, ratio) for ratio in RATIOS},
                **{
                    f"exact_match_{ratio}": sum(scores[str(ratio)].values()) / len(TASKS) / 100
                    for ratio in RATIOS
                },
            },
        )

"""The questions, one function each: it varies one thing, and notes what becomes of the accuracy.

Each takes a `Lab` and writes its records there. `QUESTIONS` maps the names of the command line to them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from duohead import HeadPattern, HeadPolicy
from duohead.identify.scorers import score
from tools.findings.errors import errors
from tools.findings.extras import extras
from tools.findings.gates import gates
from tools.findings.lab import RATIOS, RECENT, RETRIEVAL, SINK, Lab, overlap, rank_correlation
from tools.findings.precision import precision
from tools.findings.reach import reach
from tools.findings.steps import steps
from tools.findings.tuning import tuned

WINDOWS = ((4, 16), (16, 64), (64, 256), (128, 1024))
PLACES = {"everywhere": (0.05, 0.95), "early": (0.05, 0.35), "late": (0.65, 0.95)}


def sinks_and_recent(lab: Lab) -> None:
    """Streaming heads that keep 320 tokens: first ones only, last ones only, both; with the heads identified so."""
    pattern = lab.bundled()
    for name, sink, recent in (
        ("sink only", SINK + RECENT - 1, 1),
        ("recent only", 0, SINK + RECENT),
        ("both", SINK, RECENT),
    ):
        for ratio in RATIOS:
            policy = pattern.policy(retrieval_ratio=ratio, sink=sink, recent=recent)
            scores = lab.accuracy({"duo": policy})["duo"]
            lab.note("sinks", scores, ranked=pattern, window=name, ratio=ratio)


def windows(lab: Lab) -> None:
    """The window that gates are trained with against the one that the heads are deployed with."""
    for sink, recent in WINDOWS:
        pattern = lab.identify(lab.passkeys(length=2048), sink=sink, recent=recent)
        for small, last in WINDOWS:
            policies = {
                str(r): pattern.policy(retrieval_ratio=r, sink=small, recent=last) for r in RATIOS
            }
            for ratio, scores in lab.accuracy(policies).items():
                lab.note(
                    "windows",
                    scores,
                    trained=f"{sink}+{recent}",
                    deployed=f"{small}+{last}",
                    ratio=float(ratio),
                )


def objectives(lab: Lab) -> None:
    """Passkeys against plain language modelling, with the same gates, and against attention profiles."""
    for seed in lab.seeds:
        found = {
            "passkeys": lab.identify(lab.passkeys(), seed=seed),
            "prose": lab.identify(lab.prose(), seed=seed),
            "attention profile": score(
                "profile", lab.model, lab.tokenizer, _text(), progress=False
            ),
        }
        for name, pattern in found.items():
            _score_ratios(lab, "objectives", pattern, objective=name, seed=seed)


def passkeys(lab: Lab) -> None:
    """Number, length and places of the passkeys that the gates are trained on."""
    variants: dict[str, dict[str, Any]] = {
        "10 of 32 words": {},
        "3 of 32 words": {"num_passkeys": 3},
        "1 of 32 words": {"num_passkeys": 1},
        "10 of 8 words": {"passkey_words": 8},
        "10 of 2 words": {"passkey_words": 2},
        "only early": {"depths": PLACES["early"]},
        "only late": {"depths": PLACES["late"]},
    }
    for name, options in variants.items():
        for seed in lab.seeds:
            pattern = lab.identify(lab.passkeys(**options), seed=seed)
            _score_ratios(lab, "passkeys", pattern, variant=name, seed=seed)


def tasks(lab: Lab) -> None:
    """Which tasks agree on the heads: identify on each, score on every other."""
    patterns = {task: lab.identify(lab.task(task)) for task in RETRIEVAL}
    for name, pattern in patterns.items():
        for other, rival in patterns.items():
            lab.note(
                "agreement",
                {
                    "rank_correlation": rank_correlation(pattern, rival),
                    **{f"overlap_{r}": overlap(pattern, rival, r) for r in RATIOS},
                },
                identified_on=name,
                compared_with=other,
            )
        _score_ratios(lab, "tasks", pattern, identified_on=name)


def tuning(lab: Lab) -> None:
    """Fine-tune the model on new prose and on instructions: do ranking and old pattern survive?"""
    before = lab.identify(lab.passkeys())
    for kind in ("prose", "instructions"):
        with tuned(lab, kind) as (model, losses):
            after = lab.identify(lab.passkeys(), model=model)
            policies: dict[str, HeadPolicy | None] = {"full": None}
            for ratio in RATIOS:
                policies[f"old {ratio}"] = before.policy(retrieval_ratio=ratio)
                policies[f"new {ratio}"] = after.policy(retrieval_ratio=ratio)
            scores = lab.accuracy(policies, model=model)
            lab.note(
                "tuning",
                {
                    **losses,
                    "rank_correlation": rank_correlation(before, after),
                    **{f"overlap_{r}": overlap(before, after, r) for r in RATIOS},
                    "accuracy": scores,
                },
                tuned_on=kind,
                rate=lab.effort.rate,
            )


def lengths(lab: Lab) -> None:
    """Contexts up to and beyond what the model was trained on (21,845 tokens)."""
    pattern = lab.bundled()
    policies = {"full": None, **{str(r): pattern.policy(retrieval_ratio=r) for r in RATIOS}}
    longest = min(32768, len(lab.held_out))
    for length in (2048, 8192, 16384, 21845, 28672, 32768):
        if length <= longest:
            for name, scores in lab.accuracy(policies, lengths=(length,)).items():
                lab.note("lengths", scores, ranked=pattern, method=name, length=length)


def _score_ratios(lab: Lab, question: str, pattern: HeadPattern, **variant: Any) -> None:
    policies = {
        str(ratio): pattern.policy(retrieval_ratio=ratio, sink=SINK, recent=RECENT)
        for ratio in RATIOS
    }
    for ratio, scores in lab.accuracy(policies).items():
        lab.note(question, scores, ratio=float(ratio), **variant)


def _text() -> str:
    from duohead.identify import haystack

    return haystack.default_text()


QUESTIONS: dict[str, Callable[[Lab], None]] = {
    "sinks": sinks_and_recent,
    "windows": windows,
    "objectives": objectives,
    "passkeys": passkeys,
    "tasks": tasks,
    "tuning": tuning,
    "errors": errors,
    "lengths": lengths,
    "precision": precision,
    "steps": steps,
    "gates": gates,
    "extras": extras,
    "reach": reach,
}

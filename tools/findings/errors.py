"""Where the errors of a policy come from: which tokens fail, at what depth, and which streaming head was missing.

Every wrong answer is asked again with one streaming head at a time promoted to a retrieval head; a head that mends it
is one that sometimes needs distant tokens. The records hold, per task, how many errors one head mends and which.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from duohead.policy import HeadPolicy
    from tools.findings.lab import Lab

RATIOS = (0.125, 0.25)
TASKS = ("passkeys", "number", "keyvalue", "needle")


def errors(lab: Lab) -> None:
    """Accuracy by depth, first token against whole answer, and what each promoted head gives back."""
    pattern = lab.bundled()
    for ratio in lab.ratios or RATIOS:
        base = pattern.policy(retrieval_ratio=ratio)
        policies = {"full": None, "duo": base, **_promoted(base)}
        result = lab.answers(policies, tasks=TASKS)
        for task in TASKS:
            gains = {name: 100 * result.mean(method=name, task=task) for name in policies}
            alone = gains.pop("duo")
            full = gains.pop("full")
            best = sorted(gains.items(), key=lambda item: -item[1])[:5]
            lab.note(
                "errors",
                {
                    "full": full,
                    "duo": alone,
                    "duo_first_token": 100 * result.mean("first_token", method="duo", task=task),
                    "duo_tokens": 100 * result.mean("token_accuracy", method="duo", task=task),
                    "by_depth": {
                        str(depth): 100 * result.mean(method="duo", task=task, depth=depth)
                        for depth in lab.effort.depths
                    },
                    "best_promoted": dict(best),
                },
                ranked=pattern,
                task=task,
                ratio=ratio,
            )


def _promoted(base: HeadPolicy) -> dict[str, HeadPolicy]:
    """The policy with one more retrieval head, by the head's name: layer.head."""
    kept = [list(layer.retrieval) for layer in base.layers]
    found = {}
    for layer, policy in enumerate(base.layers):
        for head in policy.streaming if policy.gated else ():
            more = [[*own, head] if at == layer else own for at, own in enumerate(kept)]
            found[f"{layer}.{head}"] = base.with_retrieval(more)
    return found

"""Whether an eighth of the heads is enough where streaming heads reach further back: the window against every task.

A head that streams with 1024 recent tokens costs what it costs at any length, so a wide window is cheap where caches
are large. Heads are those that `eliminate` ranks first with the usual window and with the one that is deployed, on the
text that heads are identified on; patterns are kept beside the records and used again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from duohead import HeadPattern
from duohead.evaluate.tasks import TASKS
from duohead.identify import haystack
from duohead.identify.scorers import score
from duohead.identify.scorers.eliminate import EliminateOptions
from tools.findings.lab import RECENT, SINK, Lab

if TYPE_CHECKING:
    from duohead.evaluate.results import NeedleResult
    from duohead.policy import HeadPolicy

RATIO = 0.125
RECENTS = (256, 512, 1024, 2048)
# Off the sinks and, at the usual window, off the recent tokens.
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
LONG = 131_072


def reach(lab: Lab) -> None:
    """Every task at an eighth of the heads, by window and by the window that they were identified with."""
    for length in lab.effort.lengths:
        _note(lab, None, length, recent=None, identified=None, seed=0)
    for recent in RECENTS:
        # A ranking for each window and seed would be most of the cost.
        for identified, seeds in {recent: lab.seeds[:1], RECENT: lab.seeds}.items():
            for seed in seeds:
                pattern = heads(lab, recent=identified, seed=seed)
                policy = pattern.policy(retrieval_ratio=RATIO, sink=SINK, recent=recent)
                for length in lab.effort.lengths:
                    _note(lab, policy, length, recent=recent, identified=identified, seed=seed)


def heads(lab: Lab, *, recent: int, seed: int) -> HeadPattern:
    """The heads that `eliminate` ranks with this window: from the folder beside the records, or made and left there."""
    folder = lab.out.parent / "reach-patterns" / f"{lab.name.replace('/', '--')}-{recent}-{seed}"
    if (folder / "config.json").exists():
        return HeadPattern.load(folder).validate(lab.model)
    usual = EliminateOptions(sink=SINK, recent=RECENT, seed=seed)
    # Texts that the window covers whole say nothing about it.
    shortest = max(usual.context_min, 2 * recent)
    options = replace(usual, recent=recent, context_min=shortest)
    texts = haystack.texts(None)
    return score(
        "eliminate", lab.model, lab.tokenizer, texts, out=folder, options=options, progress=False
    )


def _note(
    lab: Lab,
    policy: HeadPolicy | None,
    length: int,
    *,
    recent: int | None,
    identified: int | None,
    seed: int,
) -> None:
    result = scored(lab, policy, length)
    numbers: dict[str, object] = {"kv_bytes": result.kv_bytes()}
    if policy is not None:
        bound = policy.bind(lab.model)
        numbers["share_128k"] = 100 * bound.kv_bytes(LONG) / bound.dense_kv_bytes(LONG)
    numbers |= {task: 100 * result.mean(task=task) for task in TASKS}
    numbers["by_depth"] = {
        task: {str(depth): 100 * result.mean(task=task, depth=depth) for depth in result.depths}
        for task in TASKS
    }
    lab.note(
        "reach",
        numbers,
        policy=policy,
        recent=recent,
        identified=identified,
        seed=seed,
        length=length,
        ratio=1.0 if policy is None else RATIO,
    )


def scored(lab: Lab, policy: HeadPolicy | None, length: int) -> NeedleResult:
    """All tasks on the held-out text, in contexts of this length."""
    return lab.answers({"duo": policy}, tasks=list(TASKS), lengths=(length,), depths=DEPTHS)

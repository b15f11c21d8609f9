"""Whether two additions to streaming heads pay at equal bytes: an entry for evicted tokens, and a window for each head.

Every variant of `streams.Variant` answers all tasks of `duohead evaluate needle`, teacher-forced, and is noted as soon
as it has answered one length, with the token slots that it takes. Windows go to the heads that gain most by them on
the text that heads are identified on, never on the one that is scored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from duohead.evaluate.needle import _cells
from duohead.evaluate.tasks import TASKS
from duohead.identify.gates import answer_positions, installed
from duohead.selection import rank_heads
from duohead.shapes import layer_shapes
from tools.findings.lab import RECENT, SINK
from tools.findings.streams import Streams, Variant

if TYPE_CHECKING:
    from duohead import HeadPattern
    from duohead.identify.assembly import Sample
    from tools.findings.lab import Lab

RATIOS = (0.125, 0.0625)
# How much longer a wide window is, and how many heads have one.
FACTOR = 4
WIDE = (1, 4)
BATCH_TOKENS = 32_768
# Samples by task.
Samples = Mapping[str, Sequence["Sample"]]


def extras(lab: Lab) -> None:
    """Exact match and loss of plain streaming heads, of those with an entry, and of windows of unequal length."""
    pattern = lab.bundled()
    ranked = rank_heads(pattern.alpha)
    numbers = {head: number for number, head in enumerate(sorted(ranked))}
    order = [numbers[head] for head in ranked]
    streams = Streams(layer_shapes(lab.model), sink=SINK, recent=RECENT, device=lab.model.device)
    lengths = sorted(lab.effort.lengths)
    asked = {n: _samples(lab, lab.held_out, n, lab.effort.samples, seed=0) for n in lengths}
    calibration = _samples(lab, lab.text_ids, lengths[0], 1, seed=1)
    with installed(lab.model, streams):
        for ratio in lab.ratios or RATIOS:
            keep = max(1, int(ratio * len(order) + 0.5))
            for variant in _equal(order, keep):
                _note(lab, streams, variant, asked, ranked=pattern, ratio=ratio)
            costs = _costs(lab.model, streams, order, keep, calibration)
            for variant in _unequal(order, keep, costs):
                _note(lab, streams, variant, asked, ranked=pattern, ratio=ratio)


def _equal(order: Sequence[int], keep: int) -> Iterator[Variant]:
    """All windows alike: as they are, with an entry in place of a token, and what more bytes would give."""
    even, kept = (RECENT,) * len(order), frozenset(order[:keep])
    less = (RECENT - 1,) * len(order)
    yield Variant("plain", kept, even)
    yield Variant("entry, mean", kept, less, "mean")
    yield Variant("entry, mean and count", kept, less, "count")
    yield Variant("plain, a head more", frozenset(order[: keep + 1]), even)
    yield Variant(f"plain, windows {FACTOR} times as long", kept, (FACTOR * RECENT,) * len(order))


def _unequal(order: Sequence[int], keep: int, costs: Mapping[int, float]) -> Iterator[Variant]:
    """Windows of the same sum, of which the heads with the lowest ``costs`` have the long ones."""
    best = sorted(costs, key=lambda head: (costs[head], head))
    for wide in WIDE:
        if wide * FACTOR < len(best):
            name = f"{wide} of {FACTOR} times the window"
            yield Variant(name, frozenset(order[:keep]), windows(order, best[:wide], keep))


def windows(order: Sequence[int], wide: Sequence[int], keep: int) -> tuple[int, ...]:
    """Windows by head: those of ``wide`` as long as ``FACTOR``, the other streaming heads share what is left."""
    streaming = len(order) - keep
    each = (streaming - FACTOR * len(wide)) * RECENT // (streaming - len(wide))
    kept = set(order[:keep])
    return tuple(
        FACTOR * RECENT if head in wide else RECENT if head in kept else each
        for head in range(len(order))
    )


def _costs(
    model: Any, streams: Streams, order: Sequence[int], keep: int, samples: Samples
) -> dict[int, float]:
    """The loss when one streaming head has a long window, at the cost of the others, by that head."""
    kept, found = frozenset(order[:keep]), {}
    if len(order) - keep > FACTOR:
        for head in order[keep:]:
            streams.variant = Variant("", kept, windows(order, [head], keep))
            losses = [loss for _, loss in score(model, samples).values()]
            found[head] = sum(losses) / len(losses)
    return found


def _note(
    lab: Lab,
    streams: Streams,
    variant: Variant,
    asked: Mapping[int, Samples],
    *,
    ranked: HeadPattern,
    ratio: float,
) -> None:
    streams.variant = variant
    for length, samples in asked.items():
        found = score(lab.model, samples)
        right = {task: 100 * hits for task, (hits, _) in found.items()}
        losses = [loss for _, loss in found.values()]
        lab.note(
            "extras",
            {
                "slots": variant.slots(length, sink=SINK),
                "mean": sum(right.values()) / len(right),
                "loss": sum(losses) / len(losses),
                "exact_match": right,
            },
            ranked=ranked,
            variant=variant.name,
            ratio=ratio,
            heads=len(variant.kept),
            length=length,
        )


def _samples(
    lab: Lab, ids: torch.Tensor, length: int, samples: int, *, seed: int
) -> dict[str, list[Sample]]:
    made: dict[str, list[Sample]] = {}
    depths = lab.effort.depths
    for cell in _cells(lab.tokenizer, ids, list(TASKS), [length], depths, samples, seed):
        made.setdefault(cell.task, []).extend(cell.samples)
    return made


@torch.no_grad()
def score(model: Any, samples: Samples) -> dict[str, tuple[float, float]]:
    """By task the share of answers of which every token is the likeliest, and minus the log probability of a token."""
    found = {}
    for task, every in samples.items():
        step = max(1, BATCH_TOKENS // len(every[0].input_ids))
        parts = [every[start : start + step] for start in range(0, len(every), step)]
        scores = [score for part in parts for score in _batch(model, part)]
        hits, losses = (sum(each) / len(scores) for each in zip(*scores, strict=True))
        found[task] = hits, losses
    return found


def _batch(model: Any, part: Sequence[Sample]) -> Iterator[tuple[float, float]]:
    """Of each sample the share of right answers and the mean loss of their tokens."""
    ids = torch.stack([sample.input_ids for sample in part])
    places = torch.cat([answer_positions(sample) for sample in part]).unique()
    given = model(
        input_ids=ids.to(model.device), use_cache=False, logits_to_keep=places.to(model.device)
    )
    logs = given.logits.float().log_softmax(-1)
    wanted = ids[:, places + 1].to(model.device)
    hits = (logs.argmax(-1) == wanted).cpu()
    costs = -logs.gather(-1, wanted[..., None])[..., 0].cpu()
    for hit, cost, sample in zip(hits, costs, part, strict=True):
        answers = [
            bool(hit[torch.searchsorted(places, torch.arange(start - 1, end - 1))].all())
            for start, end in sample.answers
        ]
        mine = torch.searchsorted(places, answer_positions(sample))
        yield sum(answers) / len(answers), float(cost[mine].mean())

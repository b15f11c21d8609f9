"""Whether two additions to streaming heads pay at equal bytes: an entry for evicted tokens, and a window for each head.

Both would cost kernels and formats, so they are tried first where that costs nothing: dense attention in plain PyTorch
over the pocket models, on the samples of `duohead evaluate needle`. Run `python -m tools.findings_extras --model pocket
--pattern pocket --held-out emma.txt --json extras.jsonl`; every variant prints a line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duohead.evaluate.needle import _cells
from duohead.evaluate.tasks import TASKS
from duohead.identify import haystack
from duohead.identify.banded import Scores, full_attention
from duohead.identify.gates import Gates, answer_positions, installed
from duohead.pattern import HeadPattern
from duohead.selection import rank_heads
from duohead.shapes import layer_shapes

# Samples by task and length.
Samples = dict[tuple[str, int], list[Any]]
ROWS = 512
SINK, RECENT = 64, 256


@dataclass(frozen=True)
class Variant:
    """Which heads keep everything, how many recent tokens each head sees, and what stands for the evicted ones."""

    name: str
    kept: frozenset[int]
    recent: tuple[int, ...]
    # "" for nothing; "mean" for one entry, the mean key and value; "count" with the logarithm of their number on its
    # score.
    entry: str = ""

    def tokens(self, length: int) -> int:
        """Token slots of one sequence, all heads together; an entry takes one."""
        window = [min(length, SINK + recent + bool(self.entry)) for recent in self.recent]
        return sum(
            length if head in self.kept else window[head] for head in range(len(self.recent))
        )


class Streams(Gates):
    """Attention in which every streaming head is what a `Variant` says."""

    variant: Variant

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scores: Scores) -> Tensor:
        """[B, H, T, D] as `Gates.attend`."""
        place = self._slices[layer]
        group = q.shape[1] // k.shape[1]
        parts = []
        for head in range(k.shape[1]):
            own = [q[:, head * group : (head + 1) * group], k[:, [head]], v[:, [head]]]
            number = place.start + head
            if self._teaching or number in self.variant.kept:
                parts.append(full_attention(*own, scores=scores))
            else:
                parts.append(
                    stream(*own, recent=self.variant.recent[number], entry=self.variant.entry)
                )
        self._attended.add(layer)
        return torch.cat(parts, 1)


def stream(q: Tensor, k: Tensor, v: Tensor, *, recent: int, entry: str) -> Tensor:
    """One KV head: q [B, P, T, D], k and v [B, 1, T, D]; sinks, recent tokens and perhaps one entry for the others."""
    length = q.shape[2]
    place = torch.arange(length, device=q.device)
    sums = [x.double().cumsum(2) for x in (k, v)]
    out = []
    for start in range(0, length, ROWS):
        rows = place[start : start + ROWS]
        stop = int(rows[-1]) + 1
        back = rows[:, None] - place[:stop]
        seen = (back >= 0) & ((place[:stop] < SINK) | (back < recent))
        some = q[:, :, start:stop]
        logits = (some @ k[:, :, :stop].mT * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
        if not entry:
            out.append(logits.softmax(-1) @ v[:, :, :stop])
            continue
        gone = (rows - recent - SINK + 1).clamp(min=0)
        last = (rows - recent).clamp(min=SINK - 1)
        key, value = (
            ((x[:, :, last] - x[:, :, [SINK - 1]]) / gone.clamp(min=1)[:, None]).to(q.dtype)
            for x in sums
        )
        extra = (some * key).sum(-1) * q.shape[-1] ** -0.5
        extra = extra + (gone.clamp(min=1).log() if entry == "count" else 0)
        extra = extra.masked_fill(gone == 0, -torch.inf)
        weights = torch.cat([logits, extra[..., None]], -1).softmax(-1)
        out.append(weights[..., :-1] @ v[:, :, :stop] + weights[..., -1:] * value)
    return torch.cat(out, 2)


class Bench:
    """A model with its samples by task and length; gives the scores of variants."""

    def __init__(self, args: argparse.Namespace, model: Any, tokenizer: Any) -> None:
        self.model, self.batch = model, args.batch_tokens
        shapes = layer_shapes(model)
        self.streams = Streams(shapes, sink=SINK, recent=RECENT, device=model.device)
        self.samples = self._make(args, tokenizer, haystack.texts(args.held_out), args.samples)
        # Windows are chosen on other text and other places than they are judged on.
        self.calibration = self._make(args, tokenizer, haystack.texts(None), 1, seed=1)

    @staticmethod
    def _make(
        args: argparse.Namespace, tokenizer: Any, texts: Any, samples: int, *, seed: int = 0
    ) -> Samples:
        ids = haystack.tokens(texts, tokenizer, at_least=max(args.lengths))
        made: Samples = {}
        for cell in _cells(tokenizer, ids, args.tasks, args.lengths, args.depths, samples, seed):
            made.setdefault((cell.task, cell.length), []).extend(cell.samples)
        return made

    @torch.no_grad()
    def score(
        self, variant: Variant, samples: Samples
    ) -> dict[tuple[str, int], tuple[float, float]]:
        """Of every task and length the exact match, and minus the log probability of an answer's token."""
        self.streams.variant = variant
        found = {}
        for cell, all_of in samples.items():
            step = max(1, self.batch // cell[1])
            parts = [all_of[start : start + step] for start in range(0, len(all_of), step)]
            scores = [score for part in parts for score in self._batch(part)]
            right, wrong = (sum(each) / len(scores) for each in zip(*scores, strict=True))
            found[cell] = (right, wrong)
        return found

    def _batch(self, part: Sequence[Any]) -> Iterator[tuple[float, float]]:
        device = self.model.device
        ids = torch.stack([sample.input_ids for sample in part]).to(device)
        places = torch.cat([answer_positions(sample) for sample in part]).unique()
        given = self.model(input_ids=ids, use_cache=False, logits_to_keep=places.to(device))
        logs = given.logits.float().log_softmax(-1)
        wanted = ids[:, places.to(device) + 1]
        hits = (logs.argmax(-1) == wanted).cpu()
        costs = -logs.gather(-1, wanted[..., None])[..., 0].cpu()
        for hit, cost, sample in zip(hits, costs, part, strict=True):
            answers = [
                hit[torch.searchsorted(places, torch.arange(a - 1, b - 1))].all().item()
                for a, b in sample.answers
            ]
            mine = torch.searchsorted(places, answer_positions(sample))
            yield sum(answers) / len(answers), float(cost[mine].mean())


def windows(
    recents: Sequence[int], wide: Sequence[int], factor: int, kept: frozenset[int]
) -> tuple[int, ...]:
    """Windows of the same sum over streaming heads in which those of ``wide`` have ``factor`` times as much."""
    streaming = [head for head in range(len(recents)) if head not in kept]
    spare = sum(recents[head] for head in streaming)
    taken = sum(factor * recents[head] for head in wide)
    others = [head for head in streaming if head not in wide]
    each = (spare - taken) // len(others)
    return tuple(
        factor * recents[head] if head in wide else each if head in others else recents[head]
        for head in range(len(recents))
    )


def variants(bench: Bench, order: Sequence[int], keep: int, factor: int) -> Iterator[Variant]:
    """What is compared at so many retrieval heads; windows go by what each head gains on the calibration samples."""
    even = (RECENT,) * len(order)
    kept = frozenset(order[:keep])
    yield Variant("plain", kept, even)
    yield Variant("entry, mean", kept, (RECENT - 1,) * len(order), "mean")
    yield Variant("entry, mean and count", kept, (RECENT - 1,) * len(order), "count")
    losses = {}
    for head in order[keep:]:
        tried = Variant("", kept, windows(even, [head], factor, kept))
        scores = bench.score(tried, bench.calibration).values()
        losses[head] = sum(loss for _, loss in scores) / len(scores)
    best = sorted(losses, key=lambda head: (losses[head], head))
    for wide in (1, 2, 4):
        if wide * factor < len(best):
            yield Variant(
                f"{wide} of {factor} times the window",
                kept,
                windows(even, best[:wide], factor, kept),
            )
    yield Variant("plain, all windows 4 times (more bytes)", kept, (4 * RECENT,) * len(order))
    yield Variant("plain, a head more (more bytes)", frozenset(order[: keep + 1]), even)


def main() -> None:
    """Print and write the exact match of every variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", default="pocket")
    add("--pattern", required=True, help="folder that ranks the heads")
    add("--heads", type=int, nargs="+", default=[3, 2])
    add("--factor", type=int, default=4)
    add("--tasks", nargs="+", default=list(TASKS))
    add("--lengths", type=int, nargs="+", default=[2048, 8192])
    add("--depths", type=float, nargs="+", default=[0.1, 0.3, 0.5, 0.7, 0.9])
    add("--samples", type=int, default=4)
    add("--batch-tokens", type=int, default=32_768)
    add("--held-out", nargs="+")
    add("--json")
    args = parser.parse_args()
    from duohead import pocket

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = pocket.load(args.model)
    model.to(device)
    pattern = HeadPattern.load(args.pattern).validate(model)
    heads = pattern.alpha.shape[1]
    order = [layer * heads + head for layer, head in rank_heads(pattern.alpha)]
    bench = Bench(args, model, tokenizer)
    with installed(model, bench.streams):
        for keep in args.heads:
            for variant in variants(bench, order, keep, args.factor):
                found = bench.score(variant, bench.samples)
                slots = {length: variant.tokens(length) for length in args.lengths}
                mean, loss = (sum(each) / len(found) for each in zip(*found.values(), strict=True))
                parts = " ".join(f"{100 * right:.0f}" for right, _ in found.values())
                print(
                    f"{args.model} {keep} heads, {variant.name}: {100 * mean:.1f}, loss {loss:.4f} | {parts} | "
                    f"slots {slots}",
                    flush=True,
                )
                if args.json:
                    line = {
                        "model": args.model,
                        "heads": keep,
                        "variant": variant.name,
                        "slots": slots,
                        "exact_match": {f"{t} {n}": right for (t, n), (right, _) in found.items()},
                        "loss": {f"{t} {n}": wrong for (t, n), (_, wrong) in found.items()},
                    }
                    with open(args.json, "a") as file:
                        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()

"""Trains a pocket model, a tokenizer and a small model that retrieves, from text files, and writes its folder and card.

Eight minutes on one H100 made the bundled `pocket`; the shapes called tiny make a useless model on a CPU in seconds, as
a test. Stopped by Ctrl-C or `timeout -s INT`, it leaves the weights as they are then.

    python tools/train_pocket.py --text books/*.txt.xz --held-out emma.txt.xz --out pocket --minutes 8
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from duohead.identify.assembly import Sample
from duohead.identify.haystack import read_text, tokens
from tools import pocket_data, pocket_scores
from tools.pocket_model import Muon
from tools.pocket_shapes import SHAPES, Shape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BEGAN = time.monotonic()
SMOKE = 20  # steps after which the speed is told for the first time
# Weights of gates and routers: a full Muon step would shut a head or an expert before it has learnt anything.
SWITCHES = (".g", ".router")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line; see the module's docstring for an example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--text", nargs="+", required=True, metavar="FILE", help="text to train on (.txt, .xz, .gz)"
    )
    parser.add_argument(
        "--held-out",
        nargs="+",
        metavar="FILE",
        default=[],
        help="text to evaluate on, one table each",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="folder of the model; its name names it",
    )
    parser.add_argument(
        "--shape",
        choices=SHAPES,
        default="gqa",
        help="gqa is pocket, mha has as many KV heads as query heads, tiny is useless (%(default)s)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="FOLDER",
        help="a tokenizer of the same size instead of one trained on the text",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=8.0,
        help="time to train, apart from tokenising and scoring",
    )
    parser.add_argument(
        "--by",
        type=float,
        default=math.inf,
        metavar="SECONDS",
        help="end training so long after the start of the program, if that is sooner",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workers",
        type=int,
        default=max(1, (os.cpu_count() or 2) - 2),
        help="processes that make data",
    )
    parser.add_argument(
        "--report-every",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="score and save so often",
    )
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="JSON lines to append the final figures to"
    )
    return parser.parse_args(arguments)


def make_tokenizer(
    text: str, extra: str, shape: Shape, options: argparse.Namespace
) -> PreTrainedTokenizerBase:
    """Trains the tokenizer, or takes the one given, writes it to the folder, and loads it again as anyone would."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if options.tokenizer is not None:
        given: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(options.tokenizer)
        if len(given) != shape.vocabulary:
            raise ValueError(
                f"tokenizer must have {shape.vocabulary} tokens, got {len(given)}; leave it out to train one"
            )
        given.save_pretrained(options.out)
        return given
    folder, block = options.out, 100_000
    texts = [
        part[i : i + block]
        for part in (text, extra[: len(text) // 6])
        for i in range(0, len(part), block)
    ]
    trained = pocket_data.train_tokenizer(texts, vocab_size=shape.vocabulary)
    PreTrainedTokenizerFast(
        tokenizer_object=trained,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=32768,
    ).save_pretrained(folder)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return tokenizer


def weigh(ids: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Targets and loss weights (B, L): each class has its share of the loss, however few of its tokens there are."""
    shares = {pocket_data.PROSE: 0.5, pocket_data.FIRST: 1.0, pocket_data.REST: 1.0}
    targets, kinds = ids.roll(-1, 1), classes.roll(-1, 1).clone()
    kinds[:, -1] = pocket_data.IGNORE
    weights = torch.zeros(ids.shape, device=ids.device)
    for kind, share in shares.items():
        mask = (kinds == kind).float()
        weights += mask * (share / mask.sum().clamp(min=64.0))
    return targets, weights


class Trainer:
    """One training run: model, optimisers, schedule by wall clock, reports and checkpoints."""

    def __init__(self, shape: Shape, options: argparse.Namespace) -> None:
        torch.manual_seed(options.seed)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        cuda = self.device.type == "cuda"
        self.shape, self.options = shape, options
        self.model = shape.model(
            compute=torch.bfloat16 if cuda else torch.float32, compiled=cuda
        ).to(self.device)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        groups: dict[str, list[torch.nn.Parameter]] = {"matrices": [], "switches": [], "rest": []}
        for name, parameter in self.model.named_parameters():
            matrix = name.startswith("layers.") and parameter.ndim >= 2
            kind = "switches" if name.endswith(SWITCHES) else "matrices" if matrix else "rest"
            groups[kind].append(parameter)
        self.optimisers: list[torch.optim.Optimizer] = [
            Muon(groups["matrices"], lr=0.012, momentum=0.95, weight_decay=0.1),
            torch.optim.AdamW(
                groups["rest"], lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=cuda
            ),
        ]
        if groups["switches"]:
            self.optimisers.append(
                Muon(groups["switches"], lr=0.0012, momentum=0.95, weight_decay=0.1)
            )
        self._peaks = [
            group["lr"] for optimiser in self.optimisers for group in optimiser.param_groups
        ]

    def _schedule(self, step: int, progress: float) -> None:
        self._decay = max(0.0, min(1.0, (1.0 - progress) / 0.5))
        factor = min(1.0, (step + 1) / 100) * self._decay
        groups = [group for optimiser in self.optimisers for group in optimiser.param_groups]
        for group, peak in zip(groups, self._peaks, strict=True):
            group["lr"] = peak * factor

    def step(self, ids: Tensor, classes: Tensor) -> Tensor:
        """One update; the loss, still on the device."""
        ids = ids.to(self.device, non_blocking=True).long()
        targets, weights = weigh(ids, classes.to(self.device, non_blocking=True))
        padding = self.shape.tokens_per_step - ids.numel()
        loss = self.model.loss(ids, targets, weights, padding=padding)
        loss.backward()
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.model.after_step(self._decay)
        return loss.detach()

    def run(
        self, batches: Iterator[tuple[Tensor, Tensor]], progress: Any, reports: list[Report]
    ) -> dict[str, Any]:
        """Trains for the minutes asked; returns facts for the card."""
        started = time.monotonic()
        step, seen = 0, 0
        paused, begin, last, last_seen = 0.0, started, started, 0
        while progress.value < 1.0:
            ids, classes = next(batches)
            self._schedule(step, progress.value)
            loss = self.step(ids, classes)
            step, seen = step + 1, seen + ids.numel()
            if (step % 8 == 0 or step == 1) and self.device.type == "cuda":
                torch.cuda.synchronize()
            now = time.monotonic()
            if step == 1:
                print(f"compiled, first step after {now - started:.0f} s", flush=True)
                # Compiling is no training time.
                begin, last, last_seen = now, now, seen
            elif step == SMOKE + 1:
                print(f"loss {float(loss):.3f}, {_speed(seen - last_seen, now - last)}", flush=True)
            begun = begin + paused
            seconds = min(60 * self.options.minutes, BEGAN + self.options.by - begun)
            progress.value = (now - begun) / seconds if seconds > 0 else 1.0
            if now - last >= self.options.report_every:
                print(_speed(seen - last_seen, now - last), end="  ")
                self._report(step, seen, float(loss), progress.value, reports)
                last, last_seen = time.monotonic(), seen
                paused += last - now
        return {"steps": step, "seen": seen, "minutes": seconds / 60}

    def _report(
        self, step: int, seen: int, loss: float, progress: float, reports: list[Report]
    ) -> None:
        if not math.isfinite(loss):
            raise SystemExit(f"the loss is {loss} at step {step}; the folder holds earlier weights")
        shown = []
        for report in reports:
            if report.length <= 2048 or progress > 0.5:
                result = pocket_scores.score(self.model.logits, report.data, device=self.device)
                shown.append(
                    f"{report.task[:4]}@{report.length} {100 * result.exact_match:.0f}/{100 * result.first_token:.0f}"
                )
        print(
            f"{100 * progress:5.1f} % step {step} tokens {seen / 1e6:.0f}M loss {loss:.3f}",
            self.model.state_line(),
            "exact/first:",
            "  ".join(shown),
            flush=True,
        )
        self.save()

    def save(self) -> None:
        """Writes the weights as they are now, in bf16, into the folder."""
        folder: Path = self.options.out
        fresh = folder.with_name(folder.name + ".part")
        self.model.to_transformers().to(torch.bfloat16).save_pretrained(fresh)
        for file in fresh.iterdir():
            os.replace(file, folder / file.name)
        fresh.rmdir()


def _speed(count: int, seconds: float) -> str:
    return f"{count / 1e6 / seconds:.2f}M tokens/s"


@dataclass(frozen=True)
class Report:
    """Samples that are scored while training."""

    task: str
    length: int
    data: list[Sample]


def report_samples(
    tokenizer: PreTrainedTokenizerBase, haystack: Tensor, shape: Shape
) -> list[Report]:
    """A few samples of every task that fits each length."""
    made = []
    for length in shape.report_lengths:
        for task in pocket_scores.ASKED:
            if length < 2048 and task == "passkeys":
                continue
            count = 16 if task == "passkeys" else 64
            made.append(
                Report(
                    task,
                    length,
                    pocket_scores.samples(
                        tokenizer, haystack, task=task, length=length, count=count
                    ),
                )
            )
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Tokenizer, training, scores, card."""
    options = parse(arguments)
    shape = SHAPES[options.shape]
    text, extra = read_text(options.text), pocket_data.standard_library()
    held = {Path(file).name.split(".")[0]: read_text(file) for file in options.held_out}
    if not held:
        cut = len(text) * 19 // 20
        held, text = {"last twentieth": text[cut:]}, text[:cut]
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(text, extra, shape, options)
    corpora = [
        tokens(part, tokenizer, at_least=32).numpy().astype(np.uint16) for part in (text, extra)
    ]
    # The standard library is there for variety: a fifth as much as the text at most.
    corpora[1] = corpora[1][: len(corpora[0]) // 5]
    weaver = pocket_data.Weaver(tokenizer.backend_tokenizer, corpora, pocket_data.lexicon_of(text))
    progress = multiprocessing.Value("d", 0.0, lock=False)
    batches = pocket_data.Batches(
        weaver, tokens=shape.tokens_per_step, seed=options.seed, progress=progress
    )
    # Workers are forked here, before CUDA starts in this process.
    stream = iter(
        torch.utils.data.DataLoader(
            batches,
            batch_size=None,
            sampler=pocket_data.Steps(),
            num_workers=options.workers,
            prefetch_factor=3 if options.workers else None,
        )
    )
    haystack = tokens("\n\n".join(held.values()), tokenizer, at_least=max(shape.report_lengths))
    reports = report_samples(tokenizer, haystack, shape)
    trainer = Trainer(shape, options)
    print(
        f"{trainer.parameters} parameters; tokens of text {[len(c) for c in corpora]}; {trainer.device}",
        flush=True,
    )
    try:
        counted = trainer.run(stream, progress, reports)
    except KeyboardInterrupt:
        trainer.save()
        raise
    trainer.save()
    finish(trainer, held, counted)


def finish(trainer: Trainer, held: dict[str, str], counted: dict[str, Any]) -> None:
    """Scores the folder as written, text by text, adds the card, and prints the table."""
    options, shape = trainer.options, trainer.shape
    hardware = torch.cuda.get_device_name() if trainer.device.type == "cuda" else "CPU"
    facts = {
        "name": options.out.name,
        "family": shape.family,
        "parameters": f"{trainer.parameters:,} (tied embeddings), stored in bf16",
        "architecture": f"{shape.architecture()}; own byte-level BPE, {shape.vocabulary} tokens",
        "text": ", ".join(Path(file).name.split(".")[0] for file in options.text),
        "training": f"{counted['minutes']:.3g} minutes on {hardware}, {counted['steps']:,} steps of "
        f"{shape.tokens_per_step:,} tokens, {counted['seen'] / 1e9:.2f} billion tokens, seed {options.seed}",
        "longest training sequence": shape.tokens_per_step // 6,
        "software": f"torch {torch.__version__}",
    }
    records: list[dict[str, Any]] = []
    for name, text in held.items():
        scored = pocket_scores.evaluate_folder(
            options.out,
            text,
            text_name=name,
            lengths=shape.final_lengths,
            count=shape.count,
            device=trainer.device,
        )
        records += scored
        if options.results:
            pocket_scores.write_lines(options.results, scored)
        card = pocket_scores.card(records, facts)
        (options.out / "README.md").write_text(card, encoding="utf-8")
        print(pocket_scores.table(scored), flush=True)


if __name__ == "__main__":
    main()

"""What the Laguna adapter's card leaves open about heads, as records: how gates moved, and what ignoring windows does.

The adapter was trained with full attention in all forty layers, though thirty of them have a window of 512 tokens.
`windows` measures pocket-laguna as it is and in that form, `history` keeps the log of a gate training in short:

    python -m tools.laguna_heads windows --text emma.txt --json results/gates-pocket-laguna.jsonl
    python -m tools.laguna_heads history heads/ --json results/gates-pocket-laguna.jsonl
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from duohead import HeadPattern
from duohead.evaluate.needle import evaluate_needle
from duohead.identify import haystack, scorers
from duohead.identify.checkpoint import LOG, history
from duohead.pocket.loading import device_of, load_model
from duohead.record import read_records, write_record
from tools.finding_records import TASKS

MODEL = "pocket-laguna"
WINDOWS, GATES = "laguna.windows", "laguna.gates"
DEPTHS = (0.1, 0.5, 0.9)
EVERY = 10  # steps of a training between two that are kept


def windows(
    path: Path, *, text: Sequence[str], lengths: Sequence[int], samples: int, device: str | None
) -> None:
    """A record for the model with its windows and one without: echo's alphas of all heads it can rank, and scores.

    Scores are those of full attention: exact match in percent per task over all lengths, and perplexity on ``text``.
    """
    place = device_of(device)
    dtype = torch.float32 if place.type == "cpu" else torch.bfloat16
    given = haystack.texts(text or None)
    for name in ("native", "ignored"):
        model, tokenizer = load_model(MODEL, dtype=str(dtype).removeprefix("torch."), device=device)
        if name == "ignored":
            model = _without_windows(model)
        ids = haystack.tokens(given, tokenizer, at_least=max(lengths))
        found = evaluate_needle(
            model,
            tokenizer,
            ids,
            policies={"full": None},
            tasks=TASKS,
            lengths=lengths,
            depths=DEPTHS,
            samples=samples,
        )
        piece = ids[None, : min(lengths)].to(place)
        with torch.no_grad():
            loss = float(model(piece, labels=piece).loss)
        options = scorers.load("echo").options(sink=64, recent=256)
        pattern = scorers.score("echo", model, tokenizer, given, options=options, progress=False)
        write_record(
            path,
            op=WINDOWS,
            impl="echo",
            shape={
                "model": MODEL,
                "windows": name,
                "text": ", ".join(Path(file).name.split(".")[0] for file in text) or "pydoc",
                "lengths": list(lengths),
                "depths": list(DEPTHS),
                "samples": samples,
            },
            numbers={
                **{task: 100 * found.mean(method="full", task=task) for task in TASKS},
                "perplexity": math.exp(loss),
                "alpha": _listed(pattern),
            },
            dtype=dtype,
        )


def _without_windows(model: Any) -> Any:
    """The same weights in a model whose windows are as long as its longest text."""
    config = type(model.config).from_dict(model.config.to_dict())
    config.sliding_window = config.max_position_embeddings
    config._attn_implementation = model.config._attn_implementation
    widened = type(model)(config).to(model.device, model.dtype).eval()
    widened.load_state_dict(model.state_dict())
    return widened


def kept(folder: Path, path: Path) -> None:
    """A record of the gate training in ``folder``: the gates at every tenth step, and the alphas of its end.

    It states the machine that it runs on, so run it where the training ran.
    """
    pattern = HeadPattern.load(folder)
    steps, alpha = history(folder)
    losses = {entry["step"]: entry["distill"] for entry in read_records(folder / LOG)}
    chosen = [i for i, step in enumerate(steps) if step % EVERY == 0 or i == len(steps) - 1]
    options = pattern.training["options"]
    write_record(
        path,
        op=GATES,
        impl=str(pattern.training["scorer"]),
        shape={
            "model": MODEL,
            **{name: options[name] for name in ("seed", "target", "sink", "recent", "context_max")},
            "steps": options["steps"],
            "samples_per_step": pattern.training["samples_per_step"],
        },
        numbers={
            "step": [int(steps[i]) for i in chosen],
            "distill": [losses[int(steps[i])] for i in chosen],
            "gates": [[round(float(g), 4) for g in alpha[i][pattern.gated]] for i in chosen],
            "alpha": _listed(pattern),
            "seconds": pattern.training["cost"]["seconds"],
        },
    )


def _listed(pattern: HeadPattern) -> list[list[float | None]]:
    """Alphas layer by layer, None where a head is not gated."""
    return [[None if a != a else float(a) for a in row] for row in pattern.alpha]


def main() -> int:
    """Measure or condense what the command line asks for, and append the records."""
    parser = argparse.ArgumentParser(prog="python -m tools.laguna_heads", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    measured = verbs.add_parser("windows", help="with and without native windows")
    measured.add_argument("--text", nargs="+", default=[], metavar="FILE", help="prose")
    measured.add_argument("--lengths", nargs="+", type=int, default=[2048], metavar="N")
    measured.add_argument("--samples", type=int, default=4, metavar="N", help="per depth (4)")
    measured.add_argument("--device", metavar="D", help="cpu, cuda (the GPU if there is one)")
    condensed = verbs.add_parser("history", help="logs of gate trainings")
    condensed.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    for verb in (measured, condensed):
        verb.add_argument("--json", required=True, type=Path, metavar="FILE", help="to append to")
    args = parser.parse_args()
    if args.verb == "windows":
        windows(
            args.json,
            text=args.text,
            lengths=args.lengths,
            samples=args.samples,
            device=args.device,
        )
    else:
        for folder in args.folders:
            kept(folder, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Fine-tuning of a pocket model on text it has not seen, to see whether its retrieval heads stay where they are.

Two kinds: plain prose (the documentation inside CPython), and short instructions with answers that are made from it.
`with tuned(lab, "prose") as (model, losses):` yields a tuned copy; the lab's model stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from duohead.identify import haystack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tools.findings.lab import Lab

ROWS, LENGTH = 8, 1024
_ASK = (
    ("Repeat this line.", lambda line: line),
    ("Write this line in capitals.", str.upper),
    ("What is the first word of this line?", lambda line: line.split()[0]),
    ("What is the last word of this line?", lambda line: line.split()[-1]),
    ("How many words has this line?", lambda line: str(len(line.split()))),
)


@contextmanager
def tuned(lab: Lab, kind: str) -> Iterator[tuple[PreTrainedModel, dict[str, float]]]:
    """A copy of the lab's model after AdamW saw ``tuning_tokens`` of ``kind``, and its loss before and after."""
    model = copy.deepcopy(lab.model).float().train()
    ids = _instructions(lab) if kind == "instructions" else lab.text_ids
    rate, steps = lab.effort.rate, max(1, lab.effort.tuning_tokens // (ROWS * LENGTH))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 20) * (1 - step / steps)
        loss = _loss(model, ids, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    edge = max(1, steps // 20)
    yield (
        model.eval().to(lab.model.dtype),
        {
            "tuning_steps": float(steps),
            "tuning_tokens": float(steps * ROWS * LENGTH),
            "loss_before": sum(losses[:edge]) / edge,
            "loss_after": sum(losses[-edge:]) / edge,
        },
    )


def _loss(model: Any, ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    starts = torch.randint(len(ids) - LENGTH, (ROWS,), generator=generator).tolist()
    rows = torch.stack([ids[start : start + LENGTH] for start in starts]).to(model.device)
    loss: torch.Tensor = model(rows, labels=rows, use_cache=False).loss
    return loss


def _instructions(lab: Lab) -> torch.Tensor:
    lines = [line.strip() for line in haystack.default_text().splitlines()]
    lines = [line for line in lines if 4 <= len(line.split()) <= 12]
    generator = torch.Generator().manual_seed(2)
    parts = []
    for line in lines:
        ask, answer = _ASK[int(torch.randint(len(_ASK), (), generator=generator))]
        parts.append(f"User: {ask}\n{line}\nAssistant: {answer(line)}\n\n")
    return haystack.tokens("".join(parts), lab.tokenizer, at_least=2 * LENGTH)

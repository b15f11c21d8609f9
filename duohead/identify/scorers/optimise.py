"""`optimise`: the paper's way, one trained gate per KV head; the others are measured against it.

The training is `duohead.identify.identify`; here it only takes its place among the scorers. Gates are alphas already
and are kept as they are. Use `score("optimise", model, tokenizer, text, out="heads")`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duohead.identify.options import IdentifyOptions
from duohead.identify.scorers.interface import Scorer


def measure(
    model: Any,
    tokenizer: Any,
    text: str | Sequence[str],
    *,
    options: IdentifyOptions,
    progress: bool,
    out: str | Path | None,
    restart: bool,
    log: Sequence[str],
) -> tuple[Tensor, Mapping[str, Any]]:
    """The trained gates, and what their pattern says of the training.

    An interrupted run in ``out`` continues, unless it is to ``restart``.
    """
    from duohead.identify.train import identify

    pattern = identify(
        model,
        tokenizer,
        text,
        out=out,
        options=options,
        restart=restart,
        progress=progress,
        log=log,
    )
    return torch.from_numpy(pattern.alpha.copy()), pattern.training


SCORER = Scorer(
    name="optimise",
    source="DuoAttention, arXiv 2410.10819, section 2.3",
    summary="gates trained to fall while answers stay the same",
    options=IdentifyOptions,
    measure=measure,
    scale="alpha",
    trains=True,
)

"""`random`: scores that know nothing of the model, the rival that every other scorer has to beat.

A choice of heads is worth something only against as many heads drawn by lot, which cost the same cache bytes. One seed
is one draw; judge by several of them and never by the best. Use `score("random", model, tokenizer, text)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from duohead.identify.scorers.interface import Scorer, ScorerOptions
from duohead.shapes import layer_shapes


def measure(
    model: Any, tokenizer: Any, text: str | Sequence[str], *, options: ScorerOptions, progress: bool
) -> Tensor:
    """Uniform numbers in [0, 1) that depend on the seed and the place of the head alone."""
    shapes = layer_shapes(model)
    generator = torch.Generator().manual_seed(options.seed)
    drawn = torch.rand(
        len(shapes), max(shape.num_kv_heads for shape in shapes), generator=generator
    )
    for row, shape in zip(drawn, shapes, strict=True):
        row[shape.num_kv_heads if shape.gated else 0 :] = torch.nan
    return drawn


SCORER = Scorer(
    name="random",
    source="the control of arXiv 2410.10819, section 3",
    summary="heads drawn by lot",
    options=ScorerOptions,
    measure=measure,
)

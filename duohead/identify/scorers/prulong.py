"""`prulong`: gates that are drawn on or off, trained on next-token loss until a given share of heads is left.

DuoAttention's gates trade loss against a regulariser and end where they may; here two multipliers press the expected
share of streaming heads to a target, and the loss is the model's own on long text: no synthetic data, no teacher
(PruLong, arXiv 2506.17121). Use `score("prulong", model, tokenizer, text)`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from duohead.identify import haystack
from duohead.identify.gates import Gates, installed
from duohead.identify.options import option, require
from duohead.identify.scorers.attention import context_length, first_token
from duohead.identify.scorers.interface import Scorer, ScorerOptions

DEFAULT_CONTEXT = 4096
# The stretched binary concrete distribution of Louizos et al. 2018 (arXiv 1712.01312, section 2.2): beta, gamma, zeta.
TEMPERATURE = 2 / 3
LOW, HIGH = -0.1, 1.1
# Enough text that passages differ, little enough that a library of books need not be tokenised whole.
_TEXT_PER_CONTEXT = 256
# Gates start almost surely on.
_INITIAL, _SPREAD = 4.5, 0.01


@dataclass(frozen=True)
class PrulongOptions(ScorerOptions):
    """How gates are trained. Defaults: the authors' (1000 steps, rates, schedules), but for shorter and fewer texts."""

    recent: int = option(256, "last tokens that a streaming head keeps (paper: 1024)")
    target: float = option(0.3, "share of heads that keep everything in the end")
    steps: int = option(1000, "optimiser steps")
    batch: int = option(1, "texts of a step (paper: 16)")
    context: int | None = option(
        None,
        f"tokens of a text (default: the model's positions, at most {DEFAULT_CONTEXT}; paper: 131072)",
    )
    learning_rate: float = option(1.0, "of the gates' log odds, with AdamW")
    multiplier_rate: float = option(1.0, "of the multipliers that hold the target")
    warmup: float = option(0.1, "share of the steps that learning rates rise over")
    approach: float = option(0.8, "share of the steps in which the target goes from all heads down")
    gradient_checkpointing: bool = option(False, "recompute activations: less memory, more time")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "batch", "learning_rate", "multiplier_rate"):
            require(self, name, getattr(self, name) > 0, "must be above 0")
        for name in ("target", "warmup", "approach"):
            require(self, name, 0 <= getattr(self, name) <= 1, "must be between 0 and 1")

    def rate_at(self, step: int) -> float:
        """Share of the learning rates at a step (from 0): a straight rise, then a cosine down to a hundredth."""
        edge = max(1, round(self.steps * self.warmup))
        if step < edge:
            return (step + 1) / edge
        done = (step - edge) / max(1, self.steps - edge)
        return 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2

    def share_at(self, step: int) -> float:
        """Share of heads that should keep everything at a step: a straight way from all of them to the target."""
        done = min(1.0, step / max(1, math.ceil(self.steps * self.approach)))
        return 1 - (1 - self.target) * done


def draw(log_odds: Tensor, noise: Tensor) -> Tensor:
    """Gates in [0, 1], exactly 0 or 1 with positive probability, from uniform ``noise`` of the same shape."""
    concrete = torch.sigmoid((torch.logit(noise) + log_odds) / TEMPERATURE)
    return (LOW + (HIGH - LOW) * concrete).clamp(0, 1)


def share_on(log_odds: Tensor) -> Tensor:
    """Expected share of gates that are not 0, a scalar."""
    return torch.sigmoid(log_odds - TEMPERATURE * math.log(-LOW / HIGH)).mean()


class _Texts:
    """Random passages of a text, by number; each begins with the token that starts a text, if there is one."""

    def __init__(
        self, tokenizer: Any, text: str | Sequence[str], *, length: int, seed: int
    ) -> None:
        self._start = first_token(tokenizer)
        self._need, self._seed = length - len(self._start), seed
        self._ids = haystack.tokens(
            text, tokenizer, at_least=self._need, at_most=_TEXT_PER_CONTEXT * length
        )

    def __getitem__(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
        places = len(self._ids) - self._need + 1
        place = int(torch.randint(places, (1,), generator=generator))
        return torch.cat([self._start, self._ids[place : place + self._need]])


def measure(
    model: Any,
    tokenizer: Any,
    text: str | Sequence[str],
    *,
    options: PrulongOptions,
    progress: bool,
) -> Tensor:
    """Log odds of the gates, shifted so that exactly the target's number of heads (rounded half up) is above 0."""
    from tqdm import tqdm

    length = context_length(
        model,
        options.context,
        default=DEFAULT_CONTEXT,
        window=options.sink + options.recent,
    )
    texts = _Texts(tokenizer, text, length=length, seed=options.seed)
    gates = Gates.of(model, sink=options.sink, recent=options.recent)
    frugal = options.gradient_checkpointing
    with installed(model, gates, gradient_checkpointing=frugal) as backbone:
        # Says so if a layer's attention cannot be reached, whose gates would otherwise close unnoticed.
        with gates.teaching():
            backbone(input_ids=texts[0][None].to(model.device), use_cache=False)
        shares = _train(model, gates, texts, options)
        bar = tqdm(shares, total=options.steps, desc="prulong", disable=not progress)
        for share in bar:
            bar.set_postfix_str(f"{share:.0%} of heads on", refresh=False)
    with torch.no_grad():
        gates.values.sub_(_cut(gates.values, options.target))
    return torch.from_numpy(gates.alpha)


def _train(
    model: Any,
    gates: Gates,
    texts: _Texts,
    options: PrulongOptions,
) -> Iterator[float]:
    """Train log odds and leave them in ``gates``; yields the expected share of heads that are on after every step.

    The gates minimise, and the multipliers maximise, the loss plus ``first * excess + second * excess ** 2``, where
    ``excess`` is how far the share of streaming heads is above its target (Wang et al. 2020, arXiv 1910.04732).
    """
    size = gates.values.shape
    generator = torch.Generator().manual_seed(options.seed)
    log_odds = nn.Parameter(_INITIAL + _SPREAD * torch.randn(size, generator=generator))
    multipliers = nn.Parameter(torch.zeros(2))
    groups = [
        {"params": [log_odds], "lr": options.learning_rate},
        {"params": [multipliers], "lr": options.multiplier_rate, "maximize": True},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, foreach=False)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, options.rate_at)
    for step in range(options.steps):
        optimizer.zero_grad()
        for part in range(options.batch):
            noise = torch.rand(size, generator=generator).clamp(1e-6, 1 - 1e-6)
            drawn = draw(log_odds, noise)
            slope = _slope(model, gates, texts[step * options.batch + part], drawn)
            (drawn @ slope / options.batch).backward()
        excess = options.share_at(step) - share_on(log_odds)
        (multipliers[0] * excess + multipliers[1] * excess**2).backward()
        optimizer.step()
        schedule.step()
        yield share_on(log_odds).item()
    with torch.no_grad():
        gates.values.copy_(log_odds)


def _slope(model: Any, gates: Gates, ids: Tensor, drawn: Tensor) -> Tensor:
    """Gradient of the next-token loss of a text by its gates ``drawn``, on the CPU."""
    with torch.no_grad():
        gates.values.copy_(drawn)
    row = ids[None].to(model.device)
    loss = model(input_ids=row, labels=row, use_cache=False).loss
    if not torch.isfinite(loss):
        raise ValueError(
            f"next-token loss must be finite, got {loss.item()}; use dtype bfloat16 or float32"
        )
    (slope,) = torch.autograd.grad(loss, gates.values)
    return slope.cpu()


def _cut(log_odds: Tensor, target: float) -> float:
    """A number that exactly the target's share of ``log_odds`` is above, halfway to the next."""
    ordered = log_odds.sort(descending=True).values.tolist()
    kept = int(target * len(ordered) + 0.5)
    above = ordered[kept - 1] if kept else ordered[0] + 1
    below = ordered[kept] if kept < len(ordered) else ordered[-1] - 1
    return float(above + below) / 2


SCORER = Scorer(
    name="prulong",
    source="PruLong, arXiv 2506.17121",
    summary="on/off gates pressed to a target share, trained on the model's own loss on long text",
    options=PrulongOptions,
    measure=measure,
)

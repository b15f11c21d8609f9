"""Ways to find retrieval heads, under one roof: each ranks the KV heads of a model, and the product is a `HeadPattern`.

A scorer is a module of this package with a `SCORER`, loaded when it is asked for and listed in `_MODULES`; a new one
needs that line and nothing else. Use `score("kvzip", model, tokenizer, text)`.
"""

from __future__ import annotations

import hashlib
import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from duohead.identify.checkpoint import CHECKPOINT, LOG, RunFolder, fingerprint, written_at
from duohead.identify.parallel import refuse_tensor_parallel
from duohead.identify.scorers.cost import COST, Cost, metered
from duohead.shapes import layer_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from duohead.identify.scorers.interface import Scorer
    from duohead.pattern import HeadPattern

# Name -> module of this package.
_MODULES = {
    "optimise": "optimise",
    "prulong": "prulong",
    "eliminate": "eliminate",
    "kvzip": "kvzip",
    "mean-qk": "mean_qk",
    "profile": "profile",
    "echo": "echo",
    "random": "uniform",
}
NAMES = tuple(_MODULES)
DEFAULT = "optimise"


def load(name: str) -> Scorer:
    """The scorer of that name; ValueError if there is none."""
    if name not in _MODULES:
        raise ValueError(f"scorer must be one of {', '.join(NAMES)}, got {name!r}")
    module = importlib.import_module(f"duohead.identify.scorers.{_MODULES[name]}")
    scorer: Scorer = module.SCORER
    return scorer


def score(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[str],
    *,
    out: str | Path | None = None,
    options: Any = None,
    restart: bool = False,
    progress: bool = True,
    log: Sequence[str] = (),
) -> HeadPattern:
    """Rank the KV heads of a model with the scorer of that name.

    The pattern's alphas are the scores as `alphas` makes them; ``pattern.training`` has their `origin`, the
    ``source``, the ``scores`` as they were, and the ``cost`` (see `Cost`).

    Args:
        name: one of `NAMES`.
        model: in evaluation mode or not; used in its dtype on its device, and left as it was found.
        tokenizer: the model's.
        text: any long prose, one text or several.
        out: folder for the pattern. A scorer that trains keeps its checkpoints there, too, and continues from them.
        options: of the scorer's own class (``load(name).options``); the default has the source's values.
        restart: replace a pattern, or discard an unfinished run, in ``out``.
        progress: show a progress bar.
        log: "wandb" or "tensorboard" or both, for a scorer that trains.

    Raises:
        ValueError: an unknown name, options of another scorer, a text or a model too short for the options, ``out``
            holding something else, or a model whose heads cannot be gated.
    """
    scorer = load(name)
    options = scorer.options() if options is None else options
    if type(options) is not scorer.options:
        raise ValueError(
            f"options of scorer {name!r} must be {scorer.options.__name__}, got {type(options).__name__}"
        )
    if log and not scorer.trains:
        raise ValueError(f"log is for scorers that train, and {name!r} does not; leave it out")
    refuse_tensor_parallel(model)
    rank, processes = _place()
    if processes > 1 and not scorer.trains:
        raise ValueError(f"scorer {name!r} works in one process, got {processes}; start one")
    facts = origin(name, model, text, options)
    visit = None if out is None else _Visit(Path(out), scorer, restart)
    cost = Cost() if visit is None else visit.cost
    run: dict[str, Any] = {"out": out, "restart": restart, "log": log} if scorer.trains else {}
    try:
        with metered(model, cost):
            raw, more = scorer(model, tokenizer, text, options=options, progress=progress, **run)
    finally:
        if visit is not None and rank == 0:
            visit.note()
    pattern = _pattern(model, scorer, options, raw, {**more, **facts, "cost": asdict(cost)})
    if visit is not None and rank == 0:
        visit.save(pattern)
    return pattern


def origin(name: str, model: Any, text: str | Sequence[str], options: Any) -> dict[str, Any]:
    """What decides the scores, as ``pattern.training`` has it: scorer, options, and digests of model and text."""
    digest = hashlib.sha256()
    for part in [text] if isinstance(text, str) else text:
        digest.update(part.encode() + b"\0")
    return {
        "scorer": name,
        "options": asdict(options),
        "model_digest": fingerprint(model),
        "text_digest": digest.hexdigest()[:16],
    }


def alphas(raw: Tensor) -> Tensor:
    """Raw scores of any range as alphas in [0, 1]: the share of the other heads that a head beats, ties counting half.

    ``raw`` and the result are fp32 [layers, kv_heads] with NaN where no head is gated. The order is kept, equal scores
    stay equal, and a threshold of 0.75 means the best quarter whatever the scorer's units. A single head gets 1.
    """
    gated = ~raw.isnan()
    scores = raw[gated]
    ordered = scores.sort().values
    below = torch.searchsorted(ordered, scores)
    not_above = torch.searchsorted(ordered, scores, right=True)
    others = len(scores) - 1
    result = torch.full_like(raw, torch.nan)
    result[gated] = ((below + not_above - 1) / (2 * others) if others else below + 1).to(raw.dtype)
    return result


def _pattern(
    model: Any, scorer: Scorer, options: Any, raw: Tensor, facts: Mapping[str, Any]
) -> HeadPattern:
    from duohead.pattern import HeadPattern

    _check(model, scorer.name, raw)
    scores = [[None if math.isnan(value) else value for value in row] for row in raw.tolist()]
    training = {"method": scorer.summary, **facts, "source": scorer.source, "scores": scores}
    return HeadPattern.from_alpha(
        raw if scorer.scale == "alpha" else alphas(raw),
        model=model,
        sink=options.sink,
        recent=options.recent,
        base_revision=getattr(model.config, "_commit_hash", None),
        training=training,
    )


def _check(model: Any, name: str, raw: Tensor) -> None:
    """ValueError unless there is one finite score for every gated head and none for others."""
    shapes = layer_shapes(model)
    gated = torch.zeros(len(shapes), max(shape.num_kv_heads for shape in shapes), dtype=torch.bool)
    for row, shape in zip(gated, shapes, strict=True):
        row[: shape.num_kv_heads if shape.gated else 0] = True
    if raw.shape != gated.shape:
        raise ValueError(
            f"scorer {name!r} must give scores of shape {tuple(gated.shape)}, got {tuple(raw.shape)}; mend it"
        )
    if not torch.equal(raw.isfinite(), gated) or not torch.equal(raw.isnan(), ~gated):
        raise ValueError(
            f"scores of {name!r} must be finite for gated heads and NaN for others, got {int(raw.isfinite().sum())} "
            f"finite ones for {int(gated.sum())} gated heads; the model may have overflowed, use dtype bfloat16 or "
            "float32"
        )


def _place() -> tuple[int, int]:
    """Number of this process, and how many there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


class _Visit:
    """One sitting in a folder: what earlier ones cost, and what may be written at the end.

    Raises ValueError if the pattern would overwrite something, unless it is to ``restart``.
    """

    def __init__(self, folder: Path, scorer: Scorer, restart: bool) -> None:
        self._folder, self._restart, self._trains = folder, restart, scorer.trains
        self._before = written_at(folder)
        self.cost = Cost() if restart else Cost.read(folder)
        self._known = self.cost.forward_passes
        if scorer.trains:
            return
        # Refuses what is no folder and what holds a pattern.
        RunFolder(folder, {}, restart=restart)
        if self._before is not None and not restart:
            raise ValueError(
                f"out={str(folder)!r} holds a training run; give another folder, or restart (--restart) to replace it"
            )

    def note(self) -> None:
        """Write what it cost so far, if there is a checkpoint of this run that a later sitting can continue.

        A sitting that did nothing, such as one that is refused for its options, costs the run in the folder nothing.
        """
        now = written_at(self._folder)
        idle = self.cost.forward_passes == self._known
        if (
            self._trains
            and now is not None
            and not idle
            and not (self._restart and now == self._before)
        ):
            self.cost.write(self._folder)

    def save(self, pattern: HeadPattern) -> None:
        """Write the pattern; files of a training run that it replaces go."""
        pattern.save(self._folder)
        if not self._trains:
            for name in (CHECKPOINT, LOG, COST):
                (self._folder / name).unlink(missing_ok=True)

"""Scorers against one another: heads identified by each, with several seeds, evaluated at the same numbers of heads.

Every scorer and seed is a unit of work with a folder of its own for its pattern and its scores, so an interrupted
comparison goes on where it stopped, and several processes share the units. All units answer the same samples. Use
`run(Comparison(model="pocket", ...), folder="comparison", workers=4)`; it gives records, one for each cell.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from duohead.evaluate.methods import share_name
from duohead.files import write_text
from duohead.record import read_records

if TYPE_CHECKING:
    from duohead.evaluate.results import NeedleResult
    from duohead.pattern import HeadPattern
    from duohead.policy import HeadPolicy

OP = "evaluate.compare"
FULL = "full"


@dataclass(frozen=True)
class Comparison:
    """What is compared, and on what; lengths are in tokens.

    `scorers` maps names to options, whose seed, sink and recent are replaced by those given here. They read the files
    `text`, and questions hide in those of `haystack`; None stands for the default text, and for `text`. `dtype` and
    `device` are as for `load_model`, the rest as for `evaluate_needle`; `evaluation` is what changes no score there.
    """

    model: str
    scorers: Mapping[str, Any]
    seeds: Sequence[int]
    ratios: Sequence[float]
    tasks: Sequence[str]
    lengths: Sequence[int]
    depths: Sequence[float]
    samples: int
    sink: int = 128
    recent: int = 256
    text: Sequence[str] | None = None
    haystack: Sequence[str] | None = None
    dtype: str = "auto"
    device: str | None = None
    seed: int = 0
    evaluation: Mapping[str, Any] = field(default_factory=dict)

    @property
    def units(self) -> list[tuple[str, int]]:
        """Scorer and seed of each unit: full attention, then all scorers with the first seed, and so on."""
        return [(FULL, 0), *((name, seed) for seed in self.seeds for name in self.scorers)]

    def options(self, scorer: str, seed: int) -> Any:
        """The options of a unit."""
        return replace(self.scorers[scorer], seed=seed, sink=self.sink, recent=self.recent)

    def digest(self) -> str:
        """Equal for two comparisons whose units answer the same samples in the same way."""
        from duohead.evaluate.tasks import TASKS

        asked = asdict(replace(self, scorers={}, seeds=(), device=None, text=None, evaluation={}))
        asked["haystack"] = self.haystack or self.text
        asked["versions"] = {name: TASKS[name].version for name in self.tasks}
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]


def run(
    comparison: Comparison,
    *,
    folder: str | os.PathLike[str],
    workers: int = 1,
    progress: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Do what is not done yet of `comparison`, and return the records of all its units.

    Args:
        comparison: what to do.
        folder: patterns and scores of the units; the same folder again continues, and scores on other samples or at
            other ratios go beside the old.
        workers: processes that share the units, on one device.
        progress: called with the name of each finished unit.

    Raises:
        ValueError: options or lengths that the model or text cannot meet, or a pattern or scores in `folder` made
            otherwise: with other options, of another model or text.
    """
    place = Path(folder)
    for scorer in (
        comparison.scorers
    ):  # sink and recent may not suit one, which must not be found out halfway
        comparison.options(scorer, 0)
    if workers == 1:
        for unit in comparison.units:
            name = _do(comparison, unit, place)
            if progress is not None:
                progress(name)
    else:
        _share(comparison, place, workers, progress)
    return finished(comparison, folder=place)


def finished(comparison: Comparison, *, folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of those units of `comparison` whose scores are in ``folder``, as an interrupted `run` left them."""
    place = Path(folder)
    done = [unit for unit in comparison.units if _scores(comparison, unit, place).exists()]
    return [entry for unit in done for entry in _records(comparison, unit, place)]


def _share(
    comparison: Comparison, folder: Path, workers: int, progress: Callable[[str], None] | None
) -> None:
    # A forked process cannot use CUDA.
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // workers)
    others = multiprocessing.active_children()
    with ProcessPoolExecutor(workers, context, _settle, (threads,)) as pool:
        jobs = [pool.submit(_do, comparison, unit, folder) for unit in comparison.units]
        try:
            for job in as_completed(jobs):
                name = job.result()
                if progress is not None:
                    progress(name)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            # What they are at can take long and is of no use any more; checkpoints and scores are whole or not there.
            for worker in set(multiprocessing.active_children()).difference(others):
                worker.terminate()
            raise


def _settle(threads: int) -> None:
    """In a new worker: its share of the cores, and Ctrl-C left to the process that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)


def _do(comparison: Comparison, unit: tuple[str, int], folder: Path) -> str:
    """Identify and evaluate one unit, unless its scores are there; returns its name."""
    done = _scores(comparison, unit, folder)
    note, wanted = done.with_suffix(".json"), _origin(comparison, unit)
    if done.exists():
        # Names of scorers, models and files do not tell what was in them.
        known = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}
        _refuse_other(known, wanted, f"scores {done}")
        return _name(unit)
    result = _evaluate(comparison, unit, done.parent)
    write_text(note, json.dumps(wanted) + "\n")
    result.write(done, model=comparison.model, dtype=_loaded(comparison).model.dtype)
    return _name(unit)


def _origin(comparison: Comparison, unit: tuple[str, int]) -> dict[str, Any]:
    """What decides the scores of a unit besides what names their file, as JSON values."""
    from duohead.evaluate.needle import text_digest
    from duohead.identify.checkpoint import fingerprint
    from duohead.identify.scorers import origin

    model, _, texts, ids = _loaded(comparison)
    made = {"model_digest": fingerprint(model), "haystack_digest": text_digest(ids)}
    if unit[0] != FULL:
        made |= origin(unit[0], model, texts, comparison.options(*unit))
    return dict(json.loads(json.dumps(made)))


def _refuse_other(known: Mapping[str, Any], wanted: Mapping[str, Any], what: str) -> None:
    different = [name for name, value in wanted.items() if known.get(name) != value]
    if different:
        raise ValueError(
            f"{what} were made with other {', '.join(different)}; compare in another folder"
        )


def _evaluate(comparison: Comparison, unit: tuple[str, int], folder: Path) -> NeedleResult:
    from duohead.evaluate.needle import evaluate_needle

    model, tokenizer, _, ids = _loaded(comparison)
    policies: dict[str, HeadPolicy | None] = {FULL: None}
    if unit[0] != FULL:
        pattern = _identified(comparison, unit, folder / "pattern")
        policies = {
            f"{unit[0]}_{share_name(ratio)}": pattern.policy(
                retrieval_ratio=ratio, sink=comparison.sink, recent=comparison.recent
            )
            for ratio in comparison.ratios
        }
    return evaluate_needle(
        model,
        tokenizer,
        ids,
        policies=policies,
        tasks=comparison.tasks,
        lengths=comparison.lengths,
        depths=comparison.depths,
        samples=comparison.samples,
        seed=comparison.seed,
        **comparison.evaluation,
    )


def _identified(comparison: Comparison, unit: tuple[str, int], folder: Path) -> HeadPattern:
    """The pattern of a unit: from its folder, or made and left there."""
    from duohead.identify.scorers import origin, score
    from duohead.pattern import HeadPattern

    scorer, seed = unit
    model, tokenizer, texts, _ = _loaded(comparison)
    options = comparison.options(scorer, seed)
    if not (folder / "config.json").exists():
        return score(scorer, model, tokenizer, texts, out=folder, options=options, progress=False)
    pattern = HeadPattern.load(folder).validate(model)
    wanted = json.loads(json.dumps(origin(scorer, model, texts, options)))
    _refuse_other(pattern.training, wanted, f"heads of {folder}")
    return pattern


def _records(comparison: Comparison, unit: tuple[str, int], folder: Path) -> list[dict[str, Any]]:
    """The scores of a unit as records that also say who chose the heads, how, and at what cost."""
    from duohead.pattern import HeadPattern

    scorer, seed = unit
    path = _scores(comparison, unit, folder)
    shape: dict[str, Any] = {"scorer": scorer, "seed": seed}
    numbers: dict[str, Any] = {}
    if scorer != FULL:
        made = HeadPattern.load(path.parent / "pattern").training
        shape["options"] = json.dumps(made["options"], sort_keys=True)
        numbers = {f"identify_{name}": value for name, value in made["cost"].items()}
    return [
        {
            **entry,
            "op": OP,
            "shape": {**entry["shape"], **shape},
            "numbers": {**entry["numbers"], **numbers},
        }
        for entry in read_records(path)
    ]


def _scores(comparison: Comparison, unit: tuple[str, int], folder: Path) -> Path:
    return (
        folder / comparison.model.replace("/", "--") / _name(unit) / f"{comparison.digest()}.jsonl"
    )


def _name(unit: tuple[str, int]) -> str:
    return FULL if unit[0] == FULL else f"{unit[0]}-{unit[1]}"


class _Loaded(NamedTuple):
    model: Any
    tokenizer: Any
    texts: list[str]
    ids: torch.Tensor


def _loaded(comparison: Comparison) -> _Loaded:
    """Model, tokenizer, texts and haystack of a comparison; a process reads them once."""
    files = [None if f is None else tuple(f) for f in (comparison.text, comparison.haystack)]
    return _load(comparison.model, comparison.dtype, comparison.device, *files)


@cache
def _load(
    model: str,
    dtype: str,
    device: str | None,
    text: tuple[str, ...] | None,
    other: tuple[str, ...] | None,
) -> _Loaded:
    from duohead.identify import haystack
    from duohead.pocket.loading import load_model

    found, tokenizer = load_model(model, dtype=dtype, device=device)
    texts = haystack.texts(text)
    hidden_in = texts if other is None else haystack.texts(other)
    return _Loaded(found, tokenizer, texts, haystack.tokens(hidden_in, tokenizer, at_least=1))

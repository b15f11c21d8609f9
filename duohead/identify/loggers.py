"""Where the numbers of a run go besides its folder: Weights & Biases and TensorBoard, if they are asked for.

Both are somebody else's libraries and neither is a dependency, so they are imported when named and missed with one
clear line. Use `with loggers(["tensorboard"], folder, config=...) as log:` and `log(step, numbers)`; where only one of
several processes logs, every one asks `check` first, since the others would wait for one that failed.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from duohead.files import write_text
from duohead.identify.checkpoint import written_at

Log = Callable[[int, Mapping[str, float]], None]
RUN_ID = "wandb-run-id"
_MODULES = {"wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}


def check(names: Sequence[str], folder: str | Path | None) -> None:
    """Raise ValueError for an unknown name, a package that is not installed, and TensorBoard without a folder."""
    unknown = sorted(set(names) - set(_MODULES))
    if unknown:
        raise ValueError(f"log must name {' or '.join(_MODULES)}, got {', '.join(unknown)}")
    if "tensorboard" in names and folder is None:
        raise ValueError("log='tensorboard' writes into the folder of the run; give out, too")
    for name in names:
        _module(name)


@contextmanager
def loggers(
    names: Sequence[str], folder: str | Path | None, *, config: Mapping[str, Any], start: int = 0
) -> Iterator[Log]:
    """A function that logs a step's numbers wherever ``names`` ("wandb", "tensorboard") say, closed at the end.

    A run that continues in its folder, from step ``start`` on, continues its logs; one that begins has new ones.
    Raises ValueError as `check` does.
    """
    check(names, folder)
    with ExitStack() as stack:
        logs = [
            stack.enter_context(_KINDS[name](folder, config, start))
            for name in dict.fromkeys(names)
        ]

        def everywhere(step: int, numbers: Mapping[str, float]) -> None:
            for log in logs:
                log(step, numbers)

        yield everywhere


@contextmanager
def _wandb(folder: str | Path | None, config: Mapping[str, Any], start: int) -> Iterator[Log]:
    wandb = _module("wandb")
    place = None if folder is None else Path(folder).resolve()
    known = None if place is None or not start else _known(place)
    name = known or uuid.uuid4().hex[:16]
    run = wandb.init(
        project="duohead",
        name=None if place is None else place.name,
        id=name,
        resume=None if known is None else "allow",
        config=dict(config),
    )
    before = None if place is None else written_at(place)
    noted = known is not None

    def log(step: int, numbers: Mapping[str, float]) -> None:
        nonlocal noted
        run.log(dict(numbers), step=step)
        # Before its first checkpoint a run cannot be continued, and the folder may still be another one's.
        if place is not None and not noted and written_at(place) != before:
            write_text(place / RUN_ID, name + "\n")
            noted = True

    try:
        yield log
    finally:
        run.finish()


def _known(folder: Path) -> str | None:
    """The name that Weights & Biases has for the run in a folder; None if it was not logged there."""
    note = folder / RUN_ID
    return note.read_text(encoding="utf-8").strip() or None if note.exists() else None


@contextmanager
def _tensorboard(folder: str | Path | None, _: Mapping[str, Any], start: int) -> Iterator[Log]:
    assert folder is not None, "check has looked"
    # Steps that are done again would otherwise be drawn twice.
    place = str(Path(folder) / "tensorboard")
    writer = _module("tensorboard").SummaryWriter(log_dir=place, purge_step=start)

    def log(step: int, numbers: Mapping[str, float]) -> None:
        for name, number in numbers.items():
            writer.add_scalar(f"identify/{name}", number, step)

    try:
        yield log
    finally:
        writer.close()


def _module(name: str) -> Any:
    try:
        return import_module(_MODULES[name])
    except ImportError as error:
        raise ValueError(
            f"log={name!r} needs the package {name}, which cannot be imported ({error}); "
            f"pip install {name}, or leave it out: the folder of the run has the log anyway"
        ) from error


_KINDS: dict[str, Any] = {"wandb": _wandb, "tensorboard": _tensorboard}

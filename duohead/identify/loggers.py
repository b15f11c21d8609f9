"""Where the numbers of a run go besides its folder: Weights & Biases and TensorBoard, if they are asked for.

Both are somebody else's libraries and neither is a dependency, so they are imported when named and missed with one
clear line. Use `with loggers(["tensorboard"], folder, config=...) as log:` and `log(step, numbers)`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

Log = Callable[[int, Mapping[str, float]], None]


@contextmanager
def loggers(
    names: Sequence[str], folder: str | Path | None, *, config: Mapping[str, Any], start: int = 0
) -> Iterator[Log]:
    """A function that logs a step's numbers wherever ``names`` ("wandb", "tensorboard") say, closed at the end.

    A run that continues in the same folder with the same config continues its logs from step ``start`` on.
    Raises ValueError for an unknown name, a package that is not installed, and TensorBoard without a folder.
    """
    unknown = sorted(set(names) - set(_KINDS))
    if unknown:
        raise ValueError(f"log must name {' or '.join(_KINDS)}, got {', '.join(unknown)}")
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
def _wandb(folder: str | Path | None, config: Mapping[str, Any], _: int) -> Iterator[Log]:
    try:
        wandb = import_module("wandb")
    except ImportError as error:
        raise _missing("wandb", error) from error
    place = None if folder is None else Path(folder).resolve()
    # The same run in the same folder has the same name there, so that it continues after an interruption.
    digest = hashlib.sha256(f"{place} {sorted(config.items())}".encode()).hexdigest()[:16]
    run = wandb.init(
        project="duohead",
        name=None if place is None else place.name,
        id=None if place is None else digest,
        resume=None if place is None else "allow",
        config=dict(config),
    )
    try:
        yield lambda step, numbers: run.log(dict(numbers), step=step)
    finally:
        run.finish()


@contextmanager
def _tensorboard(folder: str | Path | None, _: Mapping[str, Any], start: int) -> Iterator[Log]:
    if folder is None:
        raise ValueError("log='tensorboard' writes into the folder of the run; give out, too")
    try:
        board = import_module("torch.utils.tensorboard")
    except ImportError as error:
        raise _missing("tensorboard", error) from error
    # Steps that are done again would otherwise be drawn twice.
    place = str(Path(folder) / "tensorboard")
    writer = board.SummaryWriter(log_dir=place, purge_step=start)

    def log(step: int, numbers: Mapping[str, float]) -> None:
        for name, number in numbers.items():
            writer.add_scalar(f"identify/{name}", number, step)

    try:
        yield log
    finally:
        writer.close()


def _missing(package: str, error: ImportError) -> ValueError:
    return ValueError(
        f"log={package!r} needs the package {package}, which cannot be imported ({error}); "
        f"pip install {package}, or leave it out: the folder of the run has the log anyway"
    )


_KINDS: dict[str, Any] = {"wandb": _wandb, "tensorboard": _tensorboard}

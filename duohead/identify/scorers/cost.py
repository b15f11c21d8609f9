"""What an identification cost: time, tokens through the model, passes and memory, counted from outside.

Rankings are worth comparing only next to their price, and a scorer that counts for itself may count differently, so
hooks on the model count for all alike. Use `with metered(model, cost):`; the numbers are final when the block ends.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duohead.files import write_text

COST = "identify-cost.json"


@dataclass
class Cost:
    """Of one identification, all its sittings together but those that were killed without a chance to write it down.

    ``forward_tokens`` are those that entered the model, of every row of a batch, and ``backward_tokens`` those whose
    gradients were taken; activations recomputed for a backward pass are not counted again. ``peak_bytes`` is the most
    memory that tensors took on the CUDA device of the inputs, weights included, and None elsewhere, where nobody
    counts. Of several processes tokens are those of all and the memory is that of the largest; passes are counted once,
    since processes share them.
    """

    seconds: float = 0.0
    forward_passes: int = 0
    forward_tokens: int = 0
    backward_passes: int = 0
    backward_tokens: int = 0
    peak_bytes: int | None = None

    def add(self, other: Cost) -> None:
        """Count what another sitting cost as well."""
        for name in (
            "seconds",
            "forward_passes",
            "forward_tokens",
            "backward_passes",
            "backward_tokens",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        if other.peak_bytes is not None:
            self.peak_bytes = max(self.peak_bytes or 0, other.peak_bytes)

    def write(self, folder: str | Path) -> None:
        """Write it into a run's folder, for the next sitting."""
        write_text(Path(folder) / COST, json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, folder: str | Path) -> Cost:
        """What a run's earlier sittings cost; nothing if there were none.

        Raises ValueError if the file does not hold that.
        """
        path = Path(folder) / COST
        if not path.exists():
            return cls()
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{field.name: known[field.name] for field in fields(cls)})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} does not hold the cost of a run ({error}); restart (--restart) to discard that run"
            ) from error


@contextmanager
def metered(model: Any, cost: Cost) -> Iterator[None]:
    """Add to ``cost`` what happens to ``model`` inside the block, also if it fails.

    In a process group every process meters the same block. If it fails, where others may be waiting already, each of
    them is taken to have had as many tokens as this one.
    """
    device = model.device
    own, finished = Cost(), False
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)

    def forward(_: Any, given: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
        tokens = _tokens(given, named)
        own.forward_passes += 1
        own.forward_tokens += tokens

        def backward(_: Tensor) -> None:
            own.backward_passes += 1
            own.backward_tokens += tokens

        if out[0].requires_grad:
            out[0].register_hook(backward)

    start = time.perf_counter()
    hook = _backbone(model).register_forward_hook(forward, with_kwargs=True)
    try:
        yield
        finished = True
    finally:
        hook.remove()
        if cuda:
            torch.cuda.synchronize(device)
            own.peak_bytes = torch.cuda.max_memory_allocated(device)
        own.seconds = time.perf_counter() - start
        cost.add(_of_all(own, finished=finished))


def _of_all(own: Cost, *, finished: bool) -> Cost:
    """What a block cost all processes of the group, of which ``own`` is this one's part."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return own
    parts: list[Cost] = [own] * dist.get_world_size()
    if finished:
        dist.all_gather_object(parts, own)
    peaks = [part.peak_bytes for part in parts if part.peak_bytes is not None]
    return replace(
        own,
        forward_tokens=sum(part.forward_tokens for part in parts),
        backward_tokens=sum(part.backward_tokens for part in parts),
        peak_bytes=max(peaks, default=None),
    )


def _backbone(model: Any) -> Any:
    """The part that every way of calling the model goes through, also below a PEFT wrapper."""
    unwrap = getattr(model, "get_base_model", None)
    return (model if unwrap is None else unwrap()).base_model


def _tokens(given: tuple[Any, ...], named: dict[str, Any]) -> int:
    ids = given[0] if given else named.get("input_ids")
    if ids is not None:
        return int(ids.numel())
    embedded: Tensor = named["inputs_embeds"]
    return embedded.shape[0] * embedded.shape[1]

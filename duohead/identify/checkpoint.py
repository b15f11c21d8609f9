"""What a gate-training run leaves on disk: one checkpoint file that is never half new, and one JSON line for each step.

Gates, Adam moments and step share one safetensors file whose header also says what the run was (options, model,
text), so that a resumed run continues exactly and a different run is refused. Use `RunFolder(out, identity)`, and
`history(out)` for how the gates moved.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from duohead.files import last_existing, write_bytes, write_text
from duohead.identify.gates import Gates
from duohead.identify.stability import Stability
from duohead.record import read_records

CHECKPOINT = "identify.safetensors"
LOG = "identify.jsonl"
_FORMAT = "duohead-identify-2"
_MOMENTS = ("exp_avg", "exp_avg_sq")


class RunFolder:
    """The folder of one run.

    Args:
        folder: where the pattern will be; made when the first file is written.
        identity: what must be the same for a run to be continued, name to JSON value.
        restart: discard an unfinished or finished run in the folder, as soon as this one has saved a checkpoint.

    Raises:
        ValueError: the folder is a file, or holds something that the pattern would overwrite.
    """

    def __init__(
        self, folder: str | Path, identity: Mapping[str, Any], *, restart: bool = False
    ) -> None:
        self.folder = Path(folder)
        last = last_existing(self.folder)
        if not last.is_dir():
            got = "the file" if last == self.folder else "one below the file"
            raise ValueError(f"out must be a folder, got {got} {str(last)!r}; name another")
        self._identity = json.loads(json.dumps(identity))
        self._checkpoint, self._log = self.folder / CHECKPOINT, self.folder / LOG
        self._refuse_to_overwrite(restart)
        # Lines of a run that has not replaced the one before it yet.
        self._held: list[str] | None = [] if restart else None

    def resume(self, gates: Gates, optimizer: torch.optim.Optimizer, stability: Stability) -> int:
        """Load the checkpoint, if there is one to continue, into the arguments; returns the number of steps done.

        Raises ValueError for a damaged checkpoint and for one of a different run.
        """
        if self._held is not None:
            return 0
        if not self._checkpoint.exists():
            self._trim_log(0)
            return 0
        tensors, header = self._read()
        different = [
            name for name, value in self._identity.items() if header["identity"].get(name) != value
        ]
        if different:
            raise ValueError(
                f"out={str(self.folder)!r} holds a run with different {self._difference(header, different)}; "
                "give another folder, or restart (--restart) to discard that run"
            )
        with torch.no_grad():
            gates.values.copy_(tensors["gates"])
        state = {name: tensors[name].to(gates.values.device) for name in _MOMENTS}
        optimizer.state[gates.values] = {"step": tensors["adam_step"], **state}
        stability.restore(header["stability"])
        self._trim_log(header["step"])
        return int(header["step"])

    def save(
        self, gates: Gates, optimizer: torch.optim.Optimizer, stability: Stability, *, step: int
    ) -> None:
        """Write the state after ``step`` steps; the file holds either this state or the one before."""
        from safetensors.torch import save

        state = optimizer.state[gates.values]
        tensors = {
            "gates": gates.values.detach(),
            "adam_step": state["step"],
            **{name: state[name] for name in _MOMENTS},
        }
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        header = json.dumps(
            {
                "format": _FORMAT,
                "step": step,
                "stability": stability.state(),
                "identity": self._identity,
            }
        )
        write_bytes(self._checkpoint, save(tensors, metadata={"duohead": header}))
        if self._held is not None:
            write_text(self._log, "".join(self._held))
            self._held = None

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to the log."""
        line = json.dumps(record) + "\n"
        if self._held is not None:
            self._held.append(line)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._log.open("a", encoding="utf-8") as file:
            file.write(line)

    def _refuse_to_overwrite(self, restart: bool) -> None:
        config = self.folder / "config.json"
        if not config.exists():
            return
        try:
            kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
        except (ValueError, AttributeError):
            kind = None
        if kind != "duohead":
            raise ValueError(
                f"out={str(self.folder)!r} holds the config.json of something else; give another folder"
            )
        if not restart and not self._checkpoint.exists():
            raise ValueError(
                f"out={str(self.folder)!r} already holds a pattern; give another folder, or restart (--restart) "
                "to replace it"
            )

    def _read(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._checkpoint, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("duohead", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(
                f"checkpoint {str(self._checkpoint)!r} is damaged ({error}); restart (--restart) to discard it"
            ) from error
        if header.get("format") != _FORMAT:
            raise ValueError(
                f"checkpoint {str(self._checkpoint)!r} must have format {_FORMAT!r}, got {header.get('format')!r}; "
                "give another folder, or restart (--restart) to discard it"
            )
        return tensors, header

    def _difference(self, header: Mapping[str, Any], names: list[str]) -> str:
        """`model and options (steps 10, now 20)`: which parts of the identity differ, and for options how."""
        parts = []
        for name in names:
            ours, theirs = self._identity[name], header["identity"].get(name)
            if isinstance(ours, dict) and isinstance(theirs, dict):
                changed = [
                    f"{key} {theirs.get(key)}, now {value}"
                    for key, value in ours.items()
                    if theirs.get(key) != value
                ]
                name = f"{name} ({'; '.join(changed)})"
            parts.append(name)
        return " and ".join(parts)

    def _trim_log(self, steps: int) -> None:
        """Drop the lines of steps that will be done again, and a line that was cut short."""
        if not self._log.exists():
            return
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        if len(lines) > steps:
            write_text(self._log, "".join(lines[:steps]))


def written_at(folder: str | Path) -> int | None:
    """When the checkpoint in a folder was written, in nanoseconds of its file system; None if there is none."""
    checkpoint = Path(folder) / CHECKPOINT
    return checkpoint.stat().st_mtime_ns if checkpoint.exists() else None


def history(folder: str | Path) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """How the gates of a finished run moved: the logged steps [S], and alpha after each [S, layers, KV heads].

    Alpha is NaN where there is no gate. Raises ValueError if the folder holds no pattern or no log with gates.
    """
    from duohead.pattern import HeadPattern

    gated = HeadPattern.load(folder).gated
    log = Path(folder) / LOG
    records = read_records(log) if log.exists() else []
    kept = [record for record in records if "gates" in record]
    if not kept:
        raise ValueError(
            f"{str(log)!r} has no gates in it; identify the heads again to record them"
        )
    alpha = np.full((len(kept), *gated.shape), np.nan, dtype=np.float32)
    alpha[:, gated] = np.array([record["gates"] for record in kept], dtype=np.float32)
    return np.array([record["step"] for record in kept], dtype=np.int64), alpha


def fingerprint(model: nn.Module) -> str:
    """A digest of the model's parameters: names, shapes, and up to 64 evenly spaced numbers of each, not all bytes."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        # Tensor subclasses (quantised weights) need not support indexing; their names and shapes count.
        if type(parameter) is nn.Parameter and parameter.numel() and not parameter.is_meta:
            flat = parameter.detach().reshape(-1)
            some = flat[:: max(1, len(flat) // 64)][:64]
            digest.update(some.cpu().double().numpy().tobytes())
    return digest.hexdigest()[:16]


def token_digest(ids: Tensor) -> str:
    """A digest of token ids."""
    return hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()[:16]

"""Writing an adapter repository: the pattern's files, remote code that names this package, and no weights.

`write(folder, pattern)` is what `duohead export` and `model.save_pretrained` of a loaded adapter do. A folder is never
written over unless it holds the same heads, because gates cost hours and a wrong path is quickly typed. Card and code
are replaced only while they are as they were written, which digests in config.json tell, because people edit cards.
"""

from __future__ import annotations

import hashlib
import json
import os
import types
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from duohead import __version__, files, formats
from duohead.formats.parts import json_bytes
from duohead.models import policy_of
from duohead.pattern import HeadPattern
from duohead.policy import HeadPolicy

MODULE = "modeling_duohead.py"
REQUIREMENTS = "requirements.txt"
CARD = "README.md"
# What a published folder relies on for as long as it exists: two names of the package's front door, and nothing else.
SOURCE = '''"""Lets AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) load this adapter.

The code is in the package duohead, which must be installed; nothing of it is repeated here. After "import duohead" the
folder loads without the flag.
"""

try:
    from duohead import DuoheadConfig, DuoheadForCausalLM
except ImportError as error:
    raise ImportError(
        "this adapter needs the Python package duohead, which cannot be imported "
        f"({error}); install it with: pip install -U duohead"
    ) from error

__all__ = ["DuoheadConfig", "DuoheadForCausalLM"]
'''
AUTO_MAP = {
    "AutoConfig": "modeling_duohead.DuoheadConfig",
    "AutoModelForCausalLM": "modeling_duohead.DuoheadForCausalLM",
}
# Key of config.json: files beside the pattern's own, name to SHA-256 of what was written.
WRITTEN = "written_files"
KEPT = "_duohead_adapter"
MARKED = 16  # numbers of each weight that are remembered
_REMEDY = (
    "the folder would not give this model back. duohead.disable(model) has save_pretrained write the whole model; then "
    "export its heads for it (duohead export HEADS --base MODEL --out FOLDER)"
)


@dataclass(frozen=True, eq=False)
class Mark:
    """What tells that a weight is another one now: how often it was written to, and a few of its numbers.

    Autograd counts writes (training, `load_state_dict`) but not those to ``.data``, as when LoRA is merged; those
    change the numbers. Weights that are elsewhere (meta) or packed have none, and a cast changes them by right.
    """

    version: int
    numbers: Tensor | None

    @classmethod
    def of(cls, weight: Tensor) -> Mark:
        """The mark of a weight as it is now."""
        version = 0 if weight.is_inference() else weight._version
        packed: bool = is_traceable_wrapper_subclass(weight)
        if weight.is_meta or packed or not weight.numel():
            return cls(version, None)
        places = torch.linspace(0, weight.numel() - 1, MARKED, dtype=torch.float64).long()
        return cls(version, weight.detach().reshape(-1)[places.to(weight.device)].cpu())

    def differs(self, before: Mark) -> bool:
        """Whether the weight was changed since `before`, as far as can be told."""
        if self.version > before.version:
            return True
        mine, theirs = self.numbers, before.numbers
        if mine is None or theirs is None or mine.dtype != theirs.dtype:
            return False
        return not torch.equal(mine, theirs)


@dataclass(frozen=True)
class _Kept:
    """What a loaded model remembers of its adapter: enough to write it again, and to see what that would lose."""

    pattern: HeadPattern
    policy: HeadPolicy
    marks: Mapping[str, Mark]


def contents(pattern: HeadPattern) -> dict[str, bytes]:
    """The files of an adapter, name to content, but for its card."""
    made = formats.contents({item.name: getattr(pattern, item.name) for item in fields(pattern)})
    config = {**json.loads(made[formats.CONFIG]), "auto_map": AUTO_MAP}
    return {
        **made,
        formats.CONFIG: json_bytes(config),
        MODULE: SOURCE.encode(),
        REQUIREMENTS: f"duohead>={__version__}\n".encode(),
    }


def write(
    folder: str | os.PathLike[str], pattern: HeadPattern, *, more: Mapping[str, bytes] | None = None
) -> list[str]:
    """Write an adapter and the files of `more`, all or none; returns their names.

    Raises:
        ValueError: see `check_target`.
        OSError: the place cannot be written to, or is full; nothing has changed there.
    """
    made = {**contents(pattern), **(more or {})}
    known = check_target(folder, pattern, made)
    config = json.loads(made.pop(formats.CONFIG))
    config[WRITTEN] = {**known, **{name: _sha256(made[name]) for name in _others(made)}}
    # Last: after a kill amid the renames, the same export again finds its own files, and no digests of missing ones.
    made[formats.CONFIG] = json_bytes(config)
    try:
        files.write_folder(folder, made)
    except OSError as error:
        if error.filename is None:  # as of a full disk, which then nobody could tell
            error.filename = os.fspath(folder)
        raise
    return list(made)


def check_target(
    folder: str | os.PathLike[str], pattern: HeadPattern, made: Mapping[str, bytes]
) -> dict[str, str]:
    """Refuse a folder in which writing would replace something that is not made from `pattern`.

    Args:
        folder: where an adapter is to go; a new or empty one is fine, hidden files (``.git``) do not count.
        pattern: what the adapter holds.
        made: files to be written, name to content.

    Returns:
        Digests of what was written there before, by name; files that were changed since are not to be written over.

    Raises:
        ValueError: the folder is a file, holds other files, other heads, or a file that somebody else wrote or changed;
            the message says which.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; name a new folder for the adapter")
    found = sorted(path.name for path in target.glob("[!.]*")) if target.exists() else []
    if not found:
        return {}
    if formats.TENSORS not in found:
        raise ValueError(
            f"{target} holds other files ({', '.join(found[:5])}); name a new folder for the adapter"
        )
    there = HeadPattern.load(target)
    if not _same_heads(there, pattern):
        raise ValueError(
            f"{target} holds the heads of {there.base_model}, which differ from these; name a new folder"
        )
    known = json.loads((target / formats.CONFIG).read_bytes()).get(WRITTEN)
    known = known if isinstance(known, dict) else {}
    for name in _others(made):
        if name in found:
            before = (target / name).read_bytes()
            if before != made[name] and _sha256(before) != known.get(name):
                raise ValueError(
                    f"{target / name} is there already and was not written by duohead, or was changed since; move it "
                    f"away to have a new one, or name a new folder"
                )
    return known


def _others(made: Mapping[str, bytes]) -> list[str]:
    """Names of the files that are not the pattern's own."""
    return [name for name in made if name not in (formats.CONFIG, formats.TSV, formats.TENSORS)]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _same_heads(one: HeadPattern, other: HeadPattern) -> bool:
    def plain(pattern: HeadPattern) -> HeadPattern:
        # Not its fingerprint either: folders from before there was one hold the same heads.
        known: dict[str, Any] = dict(
            base_model=None, base_revision=None, training={}, fingerprint=None
        )
        return replace(pattern, selection={}, **known)

    return plain(one) == plain(other)


def keep(model: Any, pattern: HeadPattern, policy: HeadPolicy) -> None:
    """Let `save_pretrained` of `model` write the adapter that it was loaded from, as long as that says all.

    Args:
        model: a base model with the policy on it.
        pattern: the adapter's, with base and settings as in force.
        policy: the bound policy.
    """
    vars(model)[KEPT] = _Kept(pattern, policy, _marks(model))
    model.save_pretrained = types.MethodType(save_pretrained, model)


def save_pretrained(  # pickle looks a method up on the model by its function's name
    self: Any,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, Any] | None = None,
    push_to_hub: bool = False,
    **options: Any,
) -> None:
    """Write the adapter: heads, settings and the name of the base model, but no weights.

    After `duohead.disable(model)` it is transformers' own again and writes the whole base model. Options say how
    transformers writes weights (`max_shard_size`, …), and have nothing to act on here.

    Raises:
        ValueError: the folder would not give this model back (its weights or its policy were changed), or holds
            something else.
    """
    kept: _Kept = vars(self)[KEPT]
    if policy_of(self) is None:
        plain = {"state_dict": state_dict, "push_to_hub": push_to_hub, **options}
        type(self).save_pretrained(self, save_directory, is_main_process=is_main_process, **plain)
        return
    if policy_of(self) != kept.policy:
        raise ValueError(f"the policy on this model is no longer its adapter's; {_REMEDY}")
    if state_dict is not None or _changed(self, kept.marks):
        raise ValueError(
            f"the weights of this model are no longer those of {kept.pattern.base_model}, and an adapter holds none; "
            f"{_REMEDY}"
        )
    if push_to_hub:
        raise ValueError(
            "push_to_hub must be False here; use model.push_to_hub(repository), which saves and uploads"
        )
    if is_main_process:
        write(save_directory, kept.pattern)


def _changed(model: Any, before: Mapping[str, Mark]) -> bool:
    """Whether weights were changed, put on (LoRA) or taken away since `before`."""
    now = _marks(model)
    return now.keys() != before.keys() or any(now[name].differs(before[name]) for name in before)


def _marks(model: Any) -> dict[str, Mark]:
    return {name: Mark.of(weight) for name, weight in model.named_parameters()}

"""Loading an adapter: find its base model, check that the two belong together, load the base, put the policy on it.

The check needs only the base's config, so a mistake costs no download of weights. The Auto classes come in here (see
`duohead.adapter.auto`); `load_model("owner/adapter", dtype="auto", retrieval_ratio=0.25)` does the same.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from duohead import formats, pocket
from duohead.adapter.save import keep
from duohead.models import enable
from duohead.pattern import HeadPattern
from duohead.policy import HeadPolicy
from duohead.shapes import layer_shapes

HUB = ("cache_dir", "force_download", "local_files_only", "token")
# What the Auto classes hand through for themselves.
INTERNAL = ("_from_auto", "_from_pipeline", "_commit_hash", "adapter_kwargs", "code_revision")
SELECTORS = ("retrieval_ratio", "kv_budget", "threshold")
DEFAULT = {"retrieval_ratio": 0.5}
SETTINGS = frozenset(
    {*inspect.signature(HeadPattern.policy).parameters, *(item.name for item in fields(HeadPolicy))}
) - {"self", "options", "head_dim", "layers", "shapes", "native_dtype"}  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """A pattern with settings, and the base model that it is loaded on.

    Attributes:
        name: what the caller named it by.
        pattern: its alphas; ``base_model``, ``base_revision`` and ``selection`` are those in force.
        config: the base model's config.
        policy: what the settings choose on it.
    """

    name: str
    pattern: HeadPattern
    config: Any
    policy: HeadPolicy


def load_model(
    name: str | os.PathLike[str],
    *inputs: Any,
    config: Any = None,
    duohead: bool = True,
    impl: str = "auto",
    base_model: str | os.PathLike[str] | None = None,
    base_revision: str | None = None,
    revision: str | None = None,
    subfolder: str = "",
    trust_remote_code: bool | None = None,
    **options: Any,
) -> Any:
    """The base model of an adapter with its policy on (`duohead.disable` takes it off again).

    Args:
        name: a pattern folder or adapter, ours or a Laguna one, or its hub id.
        inputs: passed on to the base model.
        config: what `AutoConfig` read of the folder; its base model, windows and settings count, so that they can be
            changed there.
        duohead: False loads the plain base model.
        impl: attention implementation (`duohead.attention.IMPLEMENTATIONS`).
        base_model: a folder or hub id to take instead of the base that the folder names, such as a local copy.
        base_revision: branch, tag or commit of the base model instead of the pinned one.
        revision: branch, tag or commit of the adapter.
        subfolder: must be empty.
        trust_remote_code: also holds for the base model.
        options: SETTINGS, such as ``retrieval_ratio``, ``sink`` and ``retrieval_dtype``, replace the folder's; HUB go
            to both downloads; all others (``dtype``, ``device_map``, ``attn_implementation``,
            ``quantization_config``, …) go to the base model.

    Raises:
        ValueError: the folder is damaged, its base cannot be found, or they do not fit; the message names both.
    """
    settings = {key: options.pop(key) for key in SETTINGS & set(options)}
    hub = {key: options.pop(key) for key in HUB if key in options}
    for key in (*INTERNAL, "name_or_path"):
        options.pop(key, None)
    if settings and not duohead:
        raise ValueError(
            f"{', '.join(sorted(settings))}: of no use with duohead=False, which loads the plain base model; leave out "
            f"one or the other"
        )
    adapter = open_adapter(
        name, config=config, settings=settings, base_model=base_model, base_revision=base_revision,
        revision=revision, subfolder=subfolder, trust_remote_code=trust_remote_code, **hub,
    )  # fmt: skip
    pattern = adapter.pattern
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            base_folder(pattern.base_model), *inputs, revision=pattern.base_revision,
            trust_remote_code=trust_remote_code, **hub, **options,
        )  # fmt: skip
    except OSError as error:
        found = str(pattern.base_model), pattern.base_revision
        raise _not_found(adapter.name, *found, error) from error
    if duohead:
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info=True
        # The config was checked before any weights were read; these may be others of the same shape.
        pattern.validate(model)
        bound = enable(model, adapter.policy, impl=impl)
        keep(model, pattern, bound)
    return loaded


def load_tokenizer(
    name: str | os.PathLike[str],
    *inputs: Any,
    base_model: str | os.PathLike[str] | None = None,
    base_revision: str | None = None,
    revision: str | None = None,
    **options: Any,
) -> Any:
    """The tokenizer of an adapter's base model; arguments as for `load_model`, options are the tokenizer's.

    Raises:
        ValueError: the folder is damaged, names no base, or the base's tokenizer cannot be found.
    """
    for key in INTERNAL:
        options.pop(key, None)
    hub = {key: options[key] for key in HUB if key in options}
    pattern = _read(os.fspath(name), revision, hub)
    base, base_revision = _base(os.fspath(name), pattern, base_model, base_revision)
    try:
        return AutoTokenizer.from_pretrained(
            base_folder(base), *inputs, revision=base_revision, **options
        )
    except OSError as error:
        raise _not_found(os.fspath(name), base, base_revision, error) from error


def open_adapter(
    name: str | os.PathLike[str],
    *,
    config: Any = None,
    settings: Mapping[str, Any] | None = None,
    base_model: str | os.PathLike[str] | None = None,
    base_revision: str | None = None,
    revision: str | None = None,
    subfolder: str = "",
    trust_remote_code: bool | None = None,
    **hub: Any,
) -> Adapter:
    """What `load_model` would load, checked against the base model's config, without its weights."""
    name = os.fspath(name)
    if subfolder:
        raise ValueError(
            f"subfolder must be empty, got {subfolder!r}: an adapter lies at the top of its repository; name the "
            f"folder itself"
        )
    pattern = _configured(_read(name, revision, hub), config)
    base, base_revision = _base(name, pattern, base_model, base_revision)
    try:
        found = AutoConfig.from_pretrained(
            base_folder(base), revision=base_revision, trust_remote_code=trust_remote_code, **hub
        )
    except (OSError, ValueError) as error:
        raise _not_found(name, base, base_revision, error) from error
    try:
        pattern, policy = _fitted(pattern, found, settings or {})
    except ValueError as error:
        raise ValueError(
            f"adapter {name} and its base model {base} do not go together: {error}"
        ) from error
    pattern = replace(pattern, base_model=base, base_revision=base_revision)
    return Adapter(name, pattern, found, policy)


def base_folder(name: str | None) -> str:
    """What transformers finds a base model by: the folder of a bundled model, else the name itself."""
    return str(pocket.folder(str(name))) if pocket.bundled(name) else str(name)


def merged(stored: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `HeadPattern.policy`: those stored, replaced by those given (None: not given).

    One way to select heads replaces another; without any, half of the heads keep everything.

    Raises:
        ValueError: an argument that `policy` does not know.
    """
    new = {key: value for key, value in given.items() if value is not None}
    unknown = sorted((set(stored) | set(new)) - SETTINGS)
    if unknown:
        raise ValueError(
            f"settings {', '.join(unknown)} are not known to this duohead; known are {', '.join(sorted(SETTINGS))}"
        )
    dropped = SELECTORS if any(key in SELECTORS for key in new) else ()
    both = {key: value for key, value in stored.items() if key not in dropped} | new
    return both if any(key in both for key in SELECTORS) else {**DEFAULT, **both}


def _read(name: str, revision: str | None, hub: Mapping[str, Any]) -> HeadPattern:
    if Path(name).exists() or Path(name).is_absolute():
        return HeadPattern.load(Path(name))
    return HeadPattern.load(formats.fetch(name, revision, **hub))


def _configured(pattern: HeadPattern, config: Any) -> HeadPattern:
    """The pattern with what the caller may have changed in the folder's config since it was read."""
    if config is None or getattr(config, "model_type", None) != formats.MODEL_TYPE:
        return pattern
    sink, recent = getattr(config, "sink_size", None), getattr(config, "recent_size", None)
    return replace(
        pattern,
        # Equal is not the same: a file may say 128.0, which reading it has put right.
        sink=pattern.sink if sink in (None, pattern.sink) else sink,
        recent=pattern.recent if recent in (None, pattern.recent) else recent,
        base_model=getattr(config, "base_model_name_or_path", None),
        base_revision=getattr(config, "base_model_revision", None),
        selection={
            **(getattr(config, "selection", None) or {}),
            **(getattr(config, "precisions", None) or {}),
        },
    )


def _base(
    name: str,
    pattern: HeadPattern,
    base_model: str | os.PathLike[str] | None,
    base_revision: str | None,
) -> tuple[str, str | None]:
    """Name and revision of the base model."""
    found = pattern.base_model if base_model is None else os.fspath(base_model)
    if not found:
        raise ValueError(
            f"adapter {name} names no base model; pass base_model=, a folder or hub id"
        )
    # A pinned commit is one of the repository that the folder names, and of no other.
    pinned = pattern.base_revision if found == pattern.base_model else None
    wanted = base_revision or pinned
    local = found[:1] in "./~\\" or found.count("/") > 1
    if local and not Path(found).is_dir():
        raise _not_found(name, found, wanted, FileNotFoundError("there is no such folder"))
    if base_revision is not None and (Path(found).is_dir() or found in pocket.NAMES):
        raise ValueError(
            f"base_revision {base_revision!r}: of no use for the base {found}, which is not on the hub; leave it out"
        )
    return found, wanted


def _fitted(
    pattern: HeadPattern, base: Any, settings: Mapping[str, Any]
) -> tuple[HeadPattern, HeadPolicy]:
    """The pattern with its settings in force and the policy that they give, if it is one for the model of a config."""
    if base.model_type == formats.MODEL_TYPE:
        raise ValueError("the base is an adapter itself; name the model that it was made for")
    shapes = layer_shapes(base)
    own = tuple(shape.window for shape in shapes)
    another_tools = pattern.raw_alpha is not None and pattern.windows is None
    if another_tools and len(own) == len(pattern.alpha):
        # Its gates are of all layers, since it did not know that some have a window of their own.
        pattern = pattern.ungate(layer for layer, shape in enumerate(shapes) if not shape.gated)
    pattern.validate(base)
    pattern = replace(pattern, windows=own, selection=merged(pattern.selection, settings))
    head_dim = next(shape.head_dim for shape in shapes if shape.num_kv_heads)
    try:
        return pattern, pattern.policy(**pattern.selection, head_dim=head_dim)
    except TypeError as error:
        raise ValueError(f"settings {dict(pattern.selection)} are damaged ({error})") from error


def _not_found(name: str, base: str, revision: str | None, error: Exception) -> ValueError:
    at = f" at {revision}" if revision else ""
    reason = " ".join(str(error).split())
    return ValueError(
        f"adapter {name} needs its base model {base}{at}, which cannot be loaded ({reason}); check name and "
        f"connection, or pass base_model=, a folder or hub id"
    )

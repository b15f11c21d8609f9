"""Under which conditions records were made, and how records that differ in nothing else are kept apart.

The same cell measured in two dtypes, on two texts or on two machines is two measurements, and their mean is neither; a
page that draws them must say which is which. `told_apart(entries)` gives the records with what differs among them in
the name of their model, by which every section groups.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from duohead.evaluate.collect import Entry

# What a score depends on besides its cell and its method; a record that lacks one has None.
_SETTINGS = (
    "text",
    "text_digest",
    "chunk",
    "max_length",
    "limit",
    "num_fewshot",
    "apply_chat_template",
    "system_instruction",
    "gen_kwargs",
    "metadata",
)
_Place = tuple[str, str]


def told_apart(entries: Sequence[Entry]) -> list[Entry]:
    """The entries, their ``shape["model"]`` followed by every condition that differs within operation and model.

    Machine and dtype count wherever they differ, the settings of a score where they differ within one task: another
    text for another task is no second measurement of it. Records that agree in all of this stay as they are.
    """
    groups: dict[_Place, list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[_place(entry)].append(entry)
    differing = {place: _differing(own) for place, own in groups.items()}
    return [_named(entry, differing[_place(entry)]) for entry in entries]


def _place(entry: Entry) -> _Place:
    return entry.op, str(entry.shape.get("model", ""))


def _differing(own: Sequence[Entry]) -> list[str]:
    """Names of the conditions that differ between records of one operation and model."""
    found = [name for name, value in _WHEREVER.items() if len({value(entry) for entry in own}) > 1]
    tasks: dict[str, list[Entry]] = defaultdict(list)
    for entry in own:
        # Where there is no task a setting is an axis, as the chunk of a benchmark is.
        if "task" in entry.shape:
            tasks[str(entry.shape["task"])].append(entry)
    found += [name for name in _SETTINGS if any(_several(part, name) for part in tasks.values())]
    # Texts of different content go by their names, and by their digests only if those are alike.
    if "text" in found and "text_digest" in found and _told_by_name(own):
        found.remove("text_digest")
    return found


def _several(own: Iterable[Entry], name: str) -> bool:
    return len({repr(entry.shape.get(name)) for entry in own}) > 1


def _told_by_name(own: Iterable[Entry]) -> bool:
    """Whether no two texts of one name have different content."""
    contents: dict[object, set[object]] = defaultdict(set)
    for entry in own:
        contents[entry.shape.get("text")].add(entry.shape.get("text_digest"))
    return all(len(digests) == 1 for digests in contents.values())


def _named(entry: Entry, differing: Sequence[str]) -> Entry:
    said = [
        _WHEREVER[name](entry) if name in _WHEREVER else _said(name, entry.shape.get(name))
        for name in differing
    ]
    if not said:
        return entry
    model = entry.shape.get("model")
    named = ", ".join([*([str(model)] if model else []), *said])
    return replace(entry, shape={**entry.shape, "model": named})


def _said(name: str, value: object) -> str:
    """A setting as words: "chunk 512", "no limit"."""
    words = name.replace("_", " ")
    if value in (None, False, {}):
        return f"no {words}"
    return words if value is True else f"{words} {value}"


def _dtype(entry: Entry) -> str:
    return entry.dtype or "dtype not recorded"


_WHEREVER: Mapping[str, Callable[[Entry], str]] = {
    "dtype": _dtype,
    "machine": lambda entry: entry.machine,
}

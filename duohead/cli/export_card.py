"""The card of an adapter: what it is, its heads, what its cache takes, what was measured, how to load it.

A card outlives whoever wrote it, so every number in it is one of three kinds, and each table says which: computed from
the policy's byte formulas, recorded when the heads were found, or measured and read from records. `card(adapter, …)` is
all there is to call.
"""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duohead.formats import PRECISIONS

if TYPE_CHECKING:
    from duohead.adapter.load import Adapter
    from duohead.evaluate.collect import Entry
    from duohead.evaluate.scores import Score
    from duohead.pattern import HeadPattern
    from duohead.policy import HeadPolicy

WINDOW = ("sink", "recent", "prefill_recent")
MANY = 16  # values that are too many for a cell of a table
LENGTHS = (1024, 4096, 16384, 32768, 65536, 131072)
TARGET = "share of heads aimed at"
MAKING = {
    "scorer": ("scorer", "method"),
    "steps": ("steps_done", "steps", "num_steps"),
    TARGET: ("target",),
    "tasks of the samples": ("tasks", "dataset_format"),
    "longest text in tokens": ("context_max", "context_length_max", "context", "tokens"),
}
USAGE = """
```python
# pip install duohead
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
inputs = tokenizer("Once upon a time", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```

After `import duohead` the flag is not needed, since the code is in that package. `dtype`, `device_map`,
`attn_implementation`, `quantization_config` and the like go to the base model. These settings can be replaced while
loading: `retrieval_ratio` (or `kv_budget`, `threshold`), `sink`, `recent`, `prefill_recent`, `retrieval_dtype`,
`streaming_dtype`, `window_dtype`, `evict`. `duohead=False` loads the plain base model, `base_model=` takes it from
elsewhere, and `duohead.disable(model)` takes the heads off a loaded one.
"""


def card(adapter: Adapter, name: str, *, picture: str | None, entries: Sequence[Entry]) -> str:
    """The text of README.md.

    Args:
        adapter: as `duohead.adapter.load.open_adapter` gives it.
        name: hub id or folder that the usage shows.
        picture: file name of the heat map; None puts it here in letters.
        entries: records about the base model.
    """
    parts = [
        _head(adapter, name),
        _heads(adapter, picture),
        f"## Use\n{USAGE.format(name=name)}",
        _bytes(adapter),
        _measured(adapter, entries),
        _found(adapter),
    ]
    return "\n".join(part for part in parts if part)


def _head(adapter: Adapter, name: str) -> str:
    from duohead import pocket
    from duohead.evaluate.tables import percent

    base, revision = adapter.pattern.base_model, adapter.pattern.base_revision
    front = ["library_name: transformers", "pipeline_tag: text-generation"]
    if base not in pocket.NAMES and not Path(str(base)).is_dir():
        front += [f"base_model: {base}", "base_model_relation: adapter"]
    front += ["tags:", "- duohead", "- duo-attention", "- kv-cache"]
    policy, pattern = adapter.policy, adapter.pattern
    kept = sum(len(layer.retrieval) for layer in policy.layers if layer.gated)
    windowed = sum(layer.window is not None for layer in policy.layers)
    others = (
        f"keep the first {policy.sink} and the last {policy.recent} tokens"
        if policy.evict
        else "keep every token as well, in a lower precision"
    )
    native = f" {windowed} layers have a native window and keep it." if windowed else ""
    at = f" at `{revision}`" if revision else ""
    return (
        "---\n" + "\n".join(front) + "\n---\n\n"
        f"# {name.rpartition('/')[2]}\n\n"
        f"Attention heads for `{base}`{at}, to be run by duohead. There are no weights here: the base model is "
        f"fetched from its own place, and runs with the KV cache that these heads need. {kept} of "
        f"{int(pattern.gated.sum())} KV heads keep every token ({percent(policy.retrieval_ratio)}); the others "
        f"{others}.{native}\n\n" + _rows(("setting", "value"), _settings(adapter))
    )


def _settings(adapter: Adapter) -> Iterator[tuple[str, str]]:
    policy = adapter.policy
    for key, value in sorted(adapter.pattern.selection.items()):
        if key not in PRECISIONS:  # these follow, also where nothing was asked for
            yield f"`{key}`", f"{value}"
    yield "stored: retrieval heads", _storage(policy.retrieval_dtype)
    yield "stored: streaming heads", _storage(policy.streaming_dtype)
    if any(layer.window is not None for layer in policy.layers):
        yield "stored: native windows", _storage(policy.window_dtype)


def _storage(name: str) -> str:
    return "as the model computes" if name == "auto" else name


def _heads(adapter: Adapter, picture: str | None) -> str:
    from duohead.cli.inspect_map import heat_map

    text = (
        "One row a layer, one column a KV head; alpha near 1 means that a head needs the whole text"
    )
    if picture is not None:
        return f"## Heads\n\n![Alphas of all heads]({picture})\n\n{text}. Framed heads keep every token.\n"
    drawn = "\n".join(heat_map(adapter.pattern, adapter.policy, stream=io.StringIO()))
    return f"## Heads\n\n```\n{drawn}\n```\n\n{text}.\n"


def _bytes(adapter: Adapter) -> str:
    """Bytes of the cache by length, from the formulas that the allocated cache agrees with."""
    from duohead.evaluate.tables import mib, percent
    from duohead.shapes import text_config

    bound = adapter.policy.bind(adapter.config)
    longest = getattr(text_config(adapter.config), "max_position_embeddings", None) or LENGTHS[-1]
    rows = []
    for tokens in [length for length in LENGTHS if length <= longest] or [longest]:
        ours, plain = bound.kv_bytes(tokens), bound.dense_kv_bytes(tokens)
        rows.append((f"{tokens:,}", mib(plain), mib(ours), percent(ours / plain)))
    start = bound.saves_from()
    smaller = (
        "It is at no length smaller for good."
        if start is None
        else f"It is smaller at every length from {start:,} tokens on."
    )
    return (
        f"## Cache\n\nComputed for one row, model and plain cache in {bound.native_dtype}, native windows respected in "
        f"both; allocated caches are of these sizes. {smaller}\n\n"
        + _rows(("tokens", "plain", "this", "of plain"), rows)
    )


def _measured(adapter: Adapter, entries: Sequence[Entry]) -> str:
    from duohead.evaluate.scores import means, scored
    from duohead.evaluate.tables import mib, percent

    charts: dict[tuple[str, str, str, str], list[Score]] = defaultdict(list)
    for score in scored(entries):
        charts[score.chart].append(score)
    if not charts:
        return "## Measured\n\nNothing yet: there were no records of an evaluation.\n"
    parts = ["## Measured\n"]
    for (op, model, task, metric), scores in charts.items():
        rows = [
            (
                mean.method,
                percent(mean.share),
                percent(mean.value) if scores[0].is_share else f"{mean.value:.4f}",
                mib(round(mean.kv_bytes)),
                "" if mean.footprint is None else percent(mean.footprint),
                f"{mean.weight:g}",
            )
            for mean in means(scores)
        ]
        lengths = sorted({score.length for score in scores if score.length is not None})
        over = f", {', '.join(f'{length:,}' for length in lengths)} tokens" if lengths else ""
        head = ("heads chosen by", "share", metric.replace("_", " "), "cache", "of full", "answers")
        parts.append(f"{task} ({op}, {model}{over}):\n\n{_rows(head, rows)}")
    machines = sorted({entry.machine for entry in entries})
    exact = any(entry.policy and _is_policy(entry, adapter.policy, adapter) for entry in entries)
    parts.append(
        "`duo` are these heads (the policy named in each record is theirs), `full` is full attention, `random` as many "
        "heads drawn by lot, `streaming` no retrieval head at all; averages over lengths and depths. "
        f"{'Some' if exact else 'None'} of these rows have exactly the settings above. Measured on "
        f"{', '.join(machines)}.\n"
    )
    return "\n".join(parts)


def of_these_heads(adapter: Adapter, entry: Entry) -> bool:
    """Whether a record says nothing about identified heads, or names a policy that these heads give."""
    if not entry.impl.startswith("duo"):
        return True
    names = ("retrieval_ratio", *WINDOW, *PRECISIONS, "evict")
    given = {name: entry.shape[name] for name in names if entry.shape.get(name) is not None}
    readings = [given]
    if given.get("prefill_recent") == given.get("recent"):
        # Records say what held in prompts also where nothing was asked for, which gives a policy of another name.
        readings.append({**given, "prefill_recent": None})
    try:
        policies = [adapter.pattern.policy(**reading) for reading in readings]
        return any(_is_policy(entry, policy, adapter) for policy in policies)
    except ValueError:  # settings that give no policy are not these heads'
        return False


def _is_policy(entry: Entry, policy: HeadPolicy, adapter: Adapter) -> bool:
    """Whether a record was made under a policy on the base model."""
    dtype = entry.dtype or None
    return policy.bind(adapter.config, dtype=dtype).digest() == entry.policy


def _found(adapter: Adapter) -> str:
    """How the pattern was made: what matters most, unknown where it does not say; then all that it records."""
    pattern = adapter.pattern
    recorded = dict(pattern.training)
    cost, options = recorded.pop("cost", None), recorded.pop("options", None)
    recorded |= options if isinstance(options, dict) else {}
    text = "## How the heads were found\n\n"
    if pattern.raw_alpha is not None:
        text += (
            "By another tool, whose gates of all layers are kept as `raw_alpha` in `duohead.safetensors`; here, layers "
            "with a native window are not ranked.\n\n"
        )
    text += _rows(("", "when the heads were found"), _making(pattern, recorded))
    if isinstance(cost, dict):
        text += "\nIts cost, counted while it ran:\n\n" + _rows(
            ("", "counted"), [(key, _count(value)) for key, value in cost.items()]
        )
    said = [(key, _said(value)) for key, value in recorded.items() if value is not None]
    if said:
        rows = _rows(("", "recorded"), said)
        text += f"\n<details><summary>All that is recorded</summary>\n\n{rows}\n</details>\n"
    return text


def _making(pattern: HeadPattern, recorded: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What a reader asks first, under the names that our scorers and other tools record it by."""
    ours = "scorer" in recorded  # which records all options that it has
    for label, names in MAKING.items():
        found = [recorded[name] for name in names if name in recorded]
        if found and found[0] is not None:
            yield label, "none" if label == TARGET and not found[0] else _said(found[0])
        elif found or not ours:
            yield label, "the scorer's default" if found else "unknown"
    for name in ("sink", "recent"):
        # Of another tool's adapter, the pattern's own window is the one to run with.
        own = None if pattern.raw_alpha is not None else getattr(pattern, name)
        value = recorded.get(name, own)
        yield f"{name} tokens of streaming heads", "unknown" if value is None else f"{value}"


def _said(value: Any) -> str:
    """What a pattern records of one thing, in a cell of a table."""
    if isinstance(value, list | tuple):
        values = list(_flat(value))
        if len(values) > MANY:
            return f"{len(values)} values, see `config.json`"
        return ", ".join(map(_said, values))
    return json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping) else f"{value}"


def _flat(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        yield from _flat(value) if isinstance(value, list | tuple) else (value,)


def _count(value: Any) -> str:
    if value is None:
        return "not counted"
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"


def _rows(head: Sequence[str], rows: Any) -> str:
    """A table in Markdown; the first column flush left."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells) + "\n"

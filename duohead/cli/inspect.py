"""`duohead inspect FOLDER`: what a pattern looks like, how many heads a selection keeps, what that costs in bytes.

A heat map tells at a glance whether identification worked (a few bright heads, the rest dark) and how a selection
spreads over the layers. Run `duohead inspect FOLDER --retrieval-ratio 0.25 --png heads.png`; with `--capacity` it says
how many tokens fit on a card, for a pattern or for the plain shape of a model.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from duohead.cli.common import (
    SELECTOR_FLAGS,
    STORAGE_FLAGS,
    add_selector_flags,
    add_storage_flags,
    add_window_flags,
    at_least,
    load_pattern,
    selector,
    storage_fields,
)
from duohead.cli.given import Given, refuse
from duohead.cli.inspect_map import check_png, draw, heat_map

if TYPE_CHECKING:
    from duohead.pattern import HeadPattern
    from duohead.policy import HeadPolicy

CAPACITY_FLAGS = ("--model", "--weights", "--memory", "--chunk")
FLAGS = (
    *SELECTOR_FLAGS,
    "--sink",
    "--recent",
    "--tokens",
    "--head-dim",
    "--png",
    *STORAGE_FLAGS,
    "--capacity",
    *CAPACITY_FLAGS,
)
CAPACITY_RATIOS = (1.0, 0.5, 0.25)
MOST_GIB = 1_000_000
HEAD_DIM = 128  # of most models
RATIOS = (1.0, 0.75, 0.5, 0.4, 0.25, 0.125, 0.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this verb (listed in FLAGS)."""
    parser.add_argument(
        "folder",
        nargs="?",
        metavar="FOLDER",
        help="folder of a pattern, its hub id, or a bundled model",
    )
    add_selector_flags(parser)
    add_window_flags(parser, ("--sink", "--recent"))
    add_storage_flags(parser)
    parser.add_argument(
        "--tokens",
        action=Given,
        type=int,
        default=32768,
        metavar="N",
        help="length to count bytes at (%(default)s)",
    )
    parser.add_argument(
        "--head-dim",
        action=Given,
        type=int,
        metavar="D",
        help=f"head size (that of the pattern's model where its config is here, else {HEAD_DIM})",
    )
    parser.add_argument(
        "--png", action=Given, metavar="FILE", help="also draw the heat map into a PNG file"
    )
    _add_capacity(parser)


def _add_capacity(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tokens that fit")
    group.add_argument(
        "--capacity", action="store_true", help="estimate how many tokens fit on a card"
    )
    add = functools.partial(group.add_argument, action=Given)
    add(
        "--model",
        metavar="NAME",
        help="model whose weights share the card: llama-3-8b, llama-2-7b, qwen2.5-7b, mistral-7b, a folder or a "
        "hub id (the pattern's own)",
    )
    add("--weights", default="bf16", metavar="W", help="bf16, int8 or int4 (%(default)s)")
    add("--memory", type=float, metavar="GIB", help="memory of the card in GiB (the GPU here)")
    add(
        "--chunk",
        type=int,
        default=32768,
        metavar="N",
        help="tokens per forward of prefill, as the engine takes them; 1 for decoding alone (%(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Print the pattern, or how many tokens fit; write the picture if asked."""
    if args.capacity:
        return _capacity(args)
    refuse(args, CAPACITY_FLAGS, "of use with --capacity alone; add it, or leave the rest out")
    if args.folder is None:
        raise ValueError(
            "FOLDER is needed, a pattern's folder or hub id; only --capacity goes without (see --help)"
        )
    at_least([("--tokens", args.tokens, 1), ("--head-dim", args.head_dim, 1)])
    if args.png is not None:
        check_png(args.png)
    pattern = load_pattern(args.folder)
    geometry = _geometry(pattern, args.head_dim)
    policy = _selected(pattern, args, geometry)
    costs = [
        (ratio, _policy(pattern, args, {"retrieval_ratio": ratio}, geometry)) for ratio in RATIOS
    ]
    print(_title(pattern))
    print()
    for line in heat_map(pattern, policy, stream=sys.stdout):
        print(line)
    print()
    for line in _costs(pattern, costs, policy, args, geometry):
        print(line)
    if args.png is not None:
        draw(pattern, policy, args.png)
        print(f"\nwrote {args.png}")
    return 0


def _capacity(args: argparse.Namespace) -> int:
    """Print the tokens that fit, for the selected heads or for a few ratios."""
    from duohead.bench.fitting import MOST_TOKENS, device_memory, estimate, gib
    from duohead.bench.models import any_config
    from duohead.pocket.loading import device_of

    refuse(
        args,
        ("--png", "--head-dim"),
        "of no use with --capacity, which draws nothing and knows the model's head size; leave one of the two out",
    )
    if args.kv_budget is None:
        refuse(args, ("--tokens",), "--capacity finds the tokens itself; leave one of the two out")
    if args.memory is not None and not 0 < args.memory < MOST_GIB:
        raise ValueError(f"--memory must lie between 0 and {MOST_GIB} GiB, got {args.memory}")
    if args.chunk < 1:
        raise ValueError(f"--chunk must be >= 1, got {args.chunk}")
    pattern = None if args.folder is None else load_pattern(args.folder)
    name = args.model or (pattern.base_model if pattern else None)
    if name is None:
        raise ValueError("--capacity needs --model, whose weights share the card with the cache")
    made = any_config(name)
    geometry = Geometry.of(made)
    memory = device_memory(device_of(None)) if args.memory is None else int(args.memory * 2**30)
    rows = [
        (
            policy.retrieval_ratio,
            estimate(made, policy, memory_bytes=memory, weights=args.weights, chunk=args.chunk),
        )
        for policy in _capacity_policies(args, pattern, geometry)
    ]
    first = rows[0][1]
    print(
        f"{name} in {gib(memory)}: {args.weights} weights {gib(first.weight_bytes)}, activations of {args.chunk:,} "
        f"tokens {gib(first.activation_bytes)}, runtime {gib(first.runtime_bytes)}; {_storage(args)}"
    )
    print(f"{'ratio':>8}  {'tokens that fit':>15}  {'cache':>11}")
    for ratio, found in rows:
        tokens = "any number" if found.tokens == MOST_TOKENS else f"{found.tokens:,}"
        print(f"{ratio:8.1%}  {tokens:>15}  {gib(found.kv_bytes):>11}")
    return 0


def _capacity_policies(
    args: argparse.Namespace, pattern: HeadPattern | None, geometry: Geometry
) -> list[HeadPolicy]:
    """Policies to count for: of the pattern if there is one, else with heads spread evenly over a plain shape."""
    from duohead.bench.models import even_heads
    from duohead.policy import HeadPolicy
    from duohead.shapes import layer_shapes

    if pattern is not None:
        chosen = _selected(pattern, args, geometry)
        if chosen is not None:
            return [chosen]
        return [
            _policy(pattern, args, {"retrieval_ratio": ratio}, geometry)
            for ratio in CAPACITY_RATIOS
        ]
    if args.kv_budget is not None or args.threshold is not None:
        raise ValueError("--kv-budget and --threshold select heads of a pattern; give its FOLDER")
    shapes = layer_shapes(geometry.config)
    ratios = CAPACITY_RATIOS if args.retrieval_ratio is None else (args.retrieval_ratio,)
    sink = 64 if args.sink is None else args.sink
    recent = 256 if args.recent is None else args.recent
    return [
        HeadPolicy.from_heads(
            retrieval=even_heads(shapes, ratio),
            num_kv_heads=[shape.num_kv_heads for shape in shapes],
            sink=sink,
            recent=recent,
            windows=[shape.window for shape in shapes],
            **storage_fields(args),
        )
        for ratio in ratios
    ]


@dataclass(frozen=True)
class Geometry:
    """What bytes are counted with: the config of a model, or one head size for all layers, given or assumed."""

    config: Any
    head_dim: int
    assumed: bool = False

    @classmethod
    def of(cls, config: Any) -> Self:
        """That of a model, whose first head size stands for all where one must."""
        from duohead.shapes import layer_shapes

        return cls(config, next(s.head_dim for s in layer_shapes(config) if s.num_kv_heads))

    @property
    def every(self) -> int | None:
        """What `HeadPolicy.kv_bytes` takes: nothing where a model says it layer by layer."""
        return self.head_dim if self.config is None else None

    def __str__(self) -> str:
        return f"head size {self.head_dim}{', assumed' if self.assumed else ''}"


def _geometry(pattern: HeadPattern, given: int | None) -> Geometry:
    """Of the pattern's model if its config is on this machine; nothing is fetched for a few numbers."""
    from duohead.bench.models import any_config

    if given is not None:
        return Geometry(None, given)
    if pattern.base_model is not None:
        with suppress(ValueError):  # not here, or another model of that name
            made = any_config(pattern.base_model, offline=True)
            pattern.validate(made)
            return Geometry.of(made)
    return Geometry(None, HEAD_DIM, assumed=True)


def _selected(
    pattern: HeadPattern, args: argparse.Namespace, geometry: Geometry
) -> HeadPolicy | None:
    chosen = selector(args)
    return _policy(pattern, args, chosen, geometry) if chosen else None


def _policy(
    pattern: HeadPattern, args: argparse.Namespace, chosen: dict[str, Any], geometry: Geometry
) -> HeadPolicy:
    """The policy of a selection, bound to the model if its config is known."""
    options = {"sink": args.sink, "recent": args.recent, **storage_fields(args)}
    policy = pattern.policy(**chosen, **options, tokens=args.tokens, head_dim=geometry.head_dim)
    return policy if geometry.config is None else policy.bind(geometry.config, dtype="bfloat16")


def _title(pattern: HeadPattern) -> str:
    layers, heads = pattern.alpha.shape
    alphas = pattern.alpha[pattern.gated]
    return (
        f"{pattern.base_model or 'pattern of an unnamed model'}: {layers} layers x {heads} KV heads, "
        f"{alphas.size} gated, mean alpha {alphas.mean():.2f}, {(alphas > 0.5).mean():.0%} above 0.5; "
        f"identified with sink {pattern.sink}, recent {pattern.recent}"
    )


def _costs(
    pattern: HeadPattern,
    costs: list[tuple[float, HeadPolicy]],
    policy: HeadPolicy | None,
    args: argparse.Namespace,
    geometry: Geometry,
) -> list[str]:
    window = f"sink {costs[0][1].sink}, recent {costs[0][1].recent}"
    size = geometry.every
    dense = costs[0][1].dense_kv_bytes(args.tokens, head_dim=size)
    lines = [
        f"KV cache of {args.tokens:,} tokens ({geometry}, 16 bit, "
        f"{'every token kept' if args.keep_all else window}): {_bytes(dense)} dense; {_storage(args)}",
        f"{'ratio':>8}  {'heads':>6}  {'cache':>11}  {'of dense':>8}  {'alpha down to':>13}  {'smaller from':>12}",
    ]
    rows = [(f"{ratio:g}", chosen) for ratio, chosen in costs]
    if policy is not None:
        rows.append(("selected", policy))
    for name, chosen in rows:
        taken = chosen.kv_bytes(args.tokens, head_dim=size)
        kept = [
            float(pattern.alpha[layer, head])
            for layer, row in enumerate(chosen.layers)
            for head in row.retrieval
            if not math.isnan(pattern.alpha[layer, head])
        ]
        lowest = f"{min(kept):.4f}" if kept else "-"
        saves = chosen.saves_from(head_dim=size)
        lines.append(
            f"{name:>8}  {len(kept):6}  {_bytes(taken):>11}  {taken / dense:8.1%}  {lowest:>13}  "
            f"{'never' if saves is None else f'{saves:,}':>12}"
        )
    lines.append(
        "smaller from: length in tokens from which on the cache is smaller than the model's own"
    )
    if geometry.assumed:
        lines.append("head size: assumed, the model's config is not here; give it with --head-dim")
    return lines


def _storage(args: argparse.Namespace) -> str:
    """How heads are stored, in words."""
    every = ", every token of them" if args.keep_all else ""
    return (
        f"retrieval heads stored as {args.retrieval_dtype}, streaming heads as {args.streaming_dtype}{every}, "
        f"native windows as {args.window_dtype}"
    )


def _bytes(count: int) -> str:
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"

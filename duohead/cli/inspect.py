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
from typing import TYPE_CHECKING, Any, TextIO

from duohead.cli.common import STORAGE_FLAGS, add_storage_flags, load_pattern, storage_fields
from duohead.cli.given import Given, refuse

if TYPE_CHECKING:
    from duohead.pattern import HeadPattern
    from duohead.policy import HeadPolicy

CAPACITY_FLAGS = ("--model", "--weights", "--memory", "--chunk")
FLAGS = (
    "--retrieval-ratio",
    "--kv-budget",
    "--threshold",
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
RATIOS = (1.0, 0.75, 0.5, 0.4, 0.25, 0.125, 0.0)
SHADES, ASCII_SHADES = "·░▒▓█", ".-+*#"
# Dark blue to yellow in the 256-colour palette, even to the eye and safe for colour-blind readers.
COLOURS = (17, 18, 19, 24, 30, 36, 71, 107, 143, 185, 227)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this verb (listed in FLAGS)."""
    parser.add_argument(
        "folder",
        nargs="?",
        metavar="FOLDER",
        help="folder of a pattern, its hub id, or a bundled model",
    )
    selector = parser.add_mutually_exclusive_group()
    selector.add_argument(
        "--retrieval-ratio", type=float, metavar="R", help="share of gated heads that keep all"
    )
    selector.add_argument(
        "--kv-budget", type=float, metavar="B", help="share of the dense cache's bytes to spend"
    )
    selector.add_argument(
        "--threshold", type=float, metavar="T", help="heads with alpha >= T keep all"
    )
    parser.add_argument(
        "--sink", type=int, metavar="N", help="first tokens kept by streaming heads (pattern's own)"
    )
    parser.add_argument(
        "--recent",
        type=int,
        metavar="N",
        help="last tokens kept by streaming heads (pattern's own)",
    )
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
        default=128,
        metavar="D",
        help="head size (%(default)s)",
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
    for name in ("tokens", "head_dim"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be >= 1, got {getattr(args, name)}")
    if args.png is not None:
        _check_png(args.png)
    pattern = load_pattern(args.folder)
    policy = _selected(pattern, args)
    costs = [(ratio, _policy(pattern, args, {"retrieval_ratio": ratio})) for ratio in RATIOS]
    print(_title(pattern))
    print()
    for line in heat_map(pattern, policy, stream=sys.stdout):
        print(line)
    print()
    for line in _costs(pattern, costs, policy, args):
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
    memory = device_memory(device_of(None)) if args.memory is None else int(args.memory * 2**30)
    rows = [
        (
            policy.retrieval_ratio,
            estimate(made, policy, memory_bytes=memory, weights=args.weights, chunk=args.chunk),
        )
        for policy in _capacity_policies(args, pattern, made)
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
    args: argparse.Namespace, pattern: HeadPattern | None, made: Any
) -> list[HeadPolicy]:
    """Policies to count for: of the pattern if there is one, else with heads spread evenly over a plain shape."""
    from duohead.bench.jobs import spread
    from duohead.policy import HeadPolicy
    from duohead.shapes import layer_shapes

    if pattern is not None:
        chosen = _selected(pattern, args)
        if chosen is not None:
            return [chosen]
        return [_policy(pattern, args, {"retrieval_ratio": ratio}) for ratio in CAPACITY_RATIOS]
    if args.kv_budget is not None or args.threshold is not None:
        raise ValueError("--kv-budget and --threshold select heads of a pattern; give its FOLDER")
    shapes = layer_shapes(made)
    heads = max(shape.num_kv_heads for shape in shapes)
    ratios = CAPACITY_RATIOS if args.retrieval_ratio is None else (args.retrieval_ratio,)
    sink = 64 if args.sink is None else args.sink
    recent = 256 if args.recent is None else args.recent
    return [
        HeadPolicy.from_heads(
            retrieval=spread(ratio, len(shapes), heads),
            num_kv_heads=heads,
            sink=sink,
            recent=recent,
            **storage_fields(args),
        )
        for ratio in ratios
    ]


def heat_map(pattern: HeadPattern, policy: HeadPolicy | None, *, stream: TextIO) -> list[str]:
    """Lines of a map with a row per layer and a cell per KV head, in colour if `stream` is a terminal.

    With a policy, each row ends with its number of retrieval heads; without, with the number of alphas above 0.5.
    """
    colour = stream.isatty()
    shades = SHADES if _can_print(SHADES, stream) else ASCII_SHADES
    layers, heads = pattern.alpha.shape
    counted = "alpha > 0.5" if policy is None else "retrieval"
    lines = [f"layer  {_scale(colour, shades)}   {counted} of {heads}"]
    for layer in range(layers):
        row = pattern.alpha[layer]
        if not pattern.gated[layer].any():
            window = pattern.windows[layer] if pattern.windows else None
            note = "no gates" if window is None else f"native window of {window} tokens"
            lines.append(f"{layer:5}  {'  ' * heads}  not gated: {note}")
            continue
        cells = "".join(_cell(float(alpha), colour, shades) for alpha in row)
        kept = int((row > 0.5).sum()) if policy is None else len(policy.layers[layer].retrieval)
        lines.append(f"{layer:5}  {cells}  {kept:3}")
    return lines


def draw(pattern: HeadPattern, policy: HeadPolicy | None, path: str) -> None:
    """Write the heat map as a PNG; retrieval heads of `policy` are framed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    from duohead import files

    layers, heads = pattern.alpha.shape
    figure = Figure(figsize=(2.2 + 0.28 * heads, 1.6 + 0.2 * layers), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(
        pattern.alpha, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest"
    )
    axes.set(
        xlabel="KV head", ylabel="layer", title=(pattern.base_model or "alpha").rpartition("/")[2]
    )
    axes.set_facecolor("lightgrey")
    figure.colorbar(image, label="alpha")
    for layer, row in enumerate(policy.layers if policy else ()):
        for head in row.retrieval if pattern.gated[layer].any() else ():
            axes.add_patch(Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor="red"))
    with files.replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


def _check_png(path: str) -> None:
    if not path.lower().endswith(".png"):
        raise ValueError(f"--png must name a .png file, got {path}")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "--png needs matplotlib; install it with: pip install 'duohead[report]'"
        ) from error


def _selected(pattern: HeadPattern, args: argparse.Namespace) -> HeadPolicy | None:
    names = ("retrieval_ratio", "kv_budget", "threshold")
    selector = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return _policy(pattern, args, selector) if selector else None


def _policy(pattern: HeadPattern, args: argparse.Namespace, selector: dict[str, Any]) -> HeadPolicy:
    options = {"sink": args.sink, "recent": args.recent, **storage_fields(args)}
    return pattern.policy(**selector, **options, tokens=args.tokens, head_dim=args.head_dim)


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
) -> list[str]:
    window = f"sink {costs[0][1].sink}, recent {costs[0][1].recent}"
    dense = costs[0][1].dense_kv_bytes(args.tokens, head_dim=args.head_dim)
    lines = [
        f"KV cache of {args.tokens:,} tokens (head size {args.head_dim}, 16 bit, "
        f"{'every token kept' if args.keep_all else window}): {_bytes(dense)} dense; {_storage(args)}",
        f"{'ratio':>8}  {'heads':>6}  {'cache':>11}  {'of dense':>8}  {'alpha down to':>13}  {'smaller from':>12}",
    ]
    rows = [(f"{ratio:g}", chosen) for ratio, chosen in costs]
    if policy is not None:
        rows.append(("selected", policy))
    for name, chosen in rows:
        size = chosen.kv_bytes(args.tokens, head_dim=args.head_dim)
        kept = [
            float(pattern.alpha[layer, head])
            for layer, row in enumerate(chosen.layers)
            for head in row.retrieval
            if not math.isnan(pattern.alpha[layer, head])
        ]
        lowest = f"{min(kept):.4f}" if kept else "-"
        saves = chosen.saves_from(head_dim=args.head_dim)
        lines.append(
            f"{name:>8}  {len(kept):6}  {_bytes(size):>11}  {size / dense:8.1%}  {lowest:>13}  "
            f"{'never' if saves is None else f'{saves:,}':>12}"
        )
    lines.append(
        "smaller from: length in tokens from which on the cache is smaller than the model's own"
    )
    return lines


def _storage(args: argparse.Namespace) -> str:
    """How heads are stored, in words."""
    every = ", every token of them" if args.keep_all else ""
    return (
        f"retrieval heads stored as {args.retrieval_dtype}, streaming heads as {args.streaming_dtype}{every}, "
        f"native windows as {args.window_dtype}"
    )


def _cell(alpha: float, colour: bool, shades: str) -> str:
    if not colour:
        return shades[min(int(alpha * len(shades)), len(shades) - 1)] * 2
    if math.isnan(alpha):
        return "  "
    return f"\x1b[48;5;{COLOURS[min(int(alpha * len(COLOURS)), len(COLOURS) - 1)]}m  \x1b[0m"


def _scale(colour: bool, shades: str) -> str:
    steps = COLOURS if colour else shades
    return (
        "0 "
        + "".join(_cell(index / len(steps), colour, shades) for index in range(len(steps)))
        + " 1"
    )


def _can_print(text: str, stream: TextIO) -> bool:
    try:
        text.encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _bytes(count: int) -> str:
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"

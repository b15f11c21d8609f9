"""`duohead bench kernels`: how fast streaming prefill is against dense causal attention, here and now.

The oracle is checked first, both are timed in this process on the same inputs, and every figure can be kept as a
record. Run `duohead bench kernels --lengths 4096 16384 --json results/prefill.jsonl`.
"""

from __future__ import annotations

import argparse

FLAGS = (
    "--lengths",
    "--heads",
    "--kv-heads",
    "--head-dim",
    "--batch",
    "--sink",
    "--recent",
    "--impl",
    "--dtype",
    "--device",
    "--seconds",
    "--json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this verb (listed in FLAGS)."""
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    text = "streaming prefill against dense causal attention"
    add = kinds.add_parser("kernels", help=text, description=text, allow_abbrev=False).add_argument
    add(
        "--lengths",
        type=int,
        nargs="+",
        default=[4096, 16384],
        metavar="N",
        help="tokens (4096 16384)",
    )
    for name, default, meaning in (
        ("--heads", 8, "query heads"),
        ("--kv-heads", 4, "KV heads"),
        ("--head-dim", 64, "head size"),
        ("--batch", 1, "rows"),
        ("--sink", 64, "first tokens seen"),
        ("--recent", 256, "last tokens seen"),
    ):
        add(name, type=int, default=default, metavar="N", help=f"{meaning} (%(default)s)")
    add("--impl", default="auto", metavar="NAME", help="attention implementation (%(default)s)")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="(%(default)s)",
    )
    add("--device", default="cpu", metavar="D", help="cpu, cuda (%(default)s)")
    add("--seconds", type=float, default=2.0, metavar="S", help="time for each (%(default)s)")
    add("--json", metavar="FILE", help="append records, one JSON line per length")


def run(args: argparse.Namespace) -> int:
    """Measure every length, print a card, append records."""
    _check(args)
    import torch
    from tqdm import tqdm

    from duohead.attention import choose
    from duohead.bench.kernels import PrefillShape, streaming_prefill
    from duohead.pocket.loading import device_of
    from duohead.record import write_record

    device, dtype = device_of(args.device), getattr(torch, args.dtype)
    lines = []
    for length in tqdm(args.lengths, desc="bench", unit="length"):
        shape = PrefillShape(
            length, args.heads, args.kv_heads, args.head_dim, args.batch, args.sink, args.recent
        )
        result = streaming_prefill(
            shape, device=device, dtype=dtype, impl=args.impl, seconds=args.seconds
        )
        lines.append(
            f"{length:>8,} tokens: streaming {result.streaming.median_ms:9.1f} ms, causal "
            f"{result.causal.median_ms:9.1f} ms, {result.speedup:5.1f} times faster, error {result.error:.1e}"
        )
        if args.json is not None:
            write_record(
                args.json,
                op="prefill.streaming",
                impl=choose(args.impl, device.type),
                shape=vars(shape),
                dtype=dtype,
                numbers=result.numbers(),
            )
    print(*lines, sep="\n")
    return 0


def _check(args: argparse.Namespace) -> None:
    from duohead.attention import check_impl

    check_impl(args.impl)
    sizes = {
        name: getattr(args, name) for name in ("heads", "kv_heads", "head_dim", "batch", "recent")
    }
    for name, value in [*sizes.items(), *(("lengths", length) for length in args.lengths)]:
        if value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if args.sink < 0:
        raise ValueError(f"--sink must be at least 0, got {args.sink}")
    if args.heads % args.kv_heads:
        raise ValueError(
            f"--heads must be a multiple of --kv-heads, got {args.heads} and {args.kv_heads}"
        )
    if args.json is not None:
        from duohead.files import check_writable

        check_writable(args.json)

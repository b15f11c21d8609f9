"""`duohead bench identify`: its flags, and its work as lines to print; apart from the measuring, which others use too.

The command line registers what is here under a name and prints. Use `add_flags(parser.add_argument)` and
`for line in run(args): print(line)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

FLAGS = (
    "--model",
    "--lengths",
    "--kernels",
    "--checkpointing",
    "--shard",
    "--runs",
    "--steps",
    "--sink",
    "--recent",
    "--dtype",
    "--device",
    "--json",
)


def add_flags(add: Any) -> None:
    """Flags of `bench identify` (FLAGS)."""
    add("--model", default="tiny", metavar="NAME", help="llama-3-8b, llama-2-7b, ... (%(default)s)")
    add(
        "--lengths",
        type=int,
        nargs="+",
        default=[4096, 16384, 32768],
        metavar="N",
        help="tokens of a sample (4096 16384 32768)",
    )
    add(
        "--kernels",
        nargs="+",
        choices=("deterministic", "fastest"),
        default=["deterministic"],
        help="of full attention (deterministic)",
    )
    add(
        "--checkpointing",
        choices=("yes", "no"),
        default="yes",
        help="recompute activations (%(default)s)",
    )
    add("--shard", choices=("yes", "no"), default="no", help="FSDP2, under torchrun (%(default)s)")
    add("--runs", type=int, default=3, metavar="N", help="steps that count (%(default)s)")
    add("--steps", type=int, default=2000, metavar="N", help="of the projected run (%(default)s)")
    add("--sink", type=int, default=128, metavar="N", help="first tokens (%(default)s)")
    add("--recent", type=int, default=256, metavar="N", help="last tokens (%(default)s)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="(on a GPU bfloat16)")
    add("--device", metavar="D", help="cpu, cuda (the GPU if there is one)")
    add("--json", metavar="FILE", help="append records, one JSON line for each")


def run(args: Any) -> Iterator[str]:
    """Measure, append records, and yield a line for each; under torchrun, the first process alone says and writes.

    Raises:
        ValueError: a number out of range, an unknown model, or results that are off.
    """
    from duohead.identify.parallel import joined

    for name in ("runs", "steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if min(args.lengths) < 2:
        raise ValueError(f"--lengths must be at least 2, got {min(args.lengths)}")
    with joined(args.device) as ranks:
        for kernels in args.kernels:
            lines = _measured(args, kernels, ranks)
            for line in lines:
                if ranks.first:
                    yield line


def _measured(args: Any, kernels: str, ranks: Any) -> Iterator[str]:
    import torch

    from duohead.bench.ceilings import ceilings
    from duohead.bench.identify import IdentifyBench, projected
    from duohead.bench.model import release
    from duohead.identify.options import IdentifyOptions
    from duohead.pocket.loading import device_of

    device = device_of(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    options = IdentifyOptions(
        steps=args.steps,
        sink=args.sink,
        recent=args.recent,
        context_min=max(2000, args.sink + args.recent + 1),
        deterministic=kernels == "deterministic",
        gradient_checkpointing=args.checkpointing == "yes",
        shard=args.shard == "yes",
    )
    limits = ceilings(device)
    bench = IdentifyBench(args.model, device=device, dtype=dtype, options=options, ranks=ranks)
    bench.verify(2 * (args.sink + args.recent))
    costs = []
    for length in args.lengths:
        cost = bench.measure(length, runs=args.runs)
        costs.append(cost)
        numbers = cost.numbers(limits.matmul_tflop_per_s, world=ranks.world)
        _write(args, kernels, ranks, dtype, {"length": length}, numbers | limits.numbers())
        yield _line(args.model, kernels, length, numbers)
    run = projected(costs, options)
    if run is not None:
        lengths = {"context_min": options.context_min, "context_max": options.longest(None)}
        _write(args, kernels, ranks, dtype, lengths, run)
        yield (
            f"{args.model} {kernels}: {run['steps']} steps of the paper's lengths take {run['run_hours']:.2f} h "
            f"on {ranks.world} device(s) (curve within {run['curve_error']:.1%})"
        )
    del bench
    release(device)


def _line(model: str, kernels: str, length: int, numbers: dict[str, Any]) -> str:
    start = f"{model} {kernels} {length:>6}"
    if "outcome" in numbers:
        return f"{start}  {numbers['outcome']}"
    phases = ", ".join(
        f"{name} {numbers[f'{name}_seconds']:.3f}" for name in ("teacher", "student", "backward")
    )
    return (
        f"{start}  {numbers['step_seconds']:.3f} s a step ({phases}), peak {numbers['peak_bytes'] / 2**30:.1f} GiB, "
        f"floor {numbers['floor_seconds']:.3f} s ({numbers['share_of_matmul_ceiling']:.0%} of the matmul ceiling)"
    )


def _write(
    args: Any, kernels: str, ranks: Any, dtype: Any, sizes: dict[str, int], numbers: dict[str, Any]
) -> None:
    from duohead.record import write_record

    if args.json is None or not ranks.first:
        return
    shape = {
        "model": args.model,
        "kernels": kernels,
        "checkpointing": args.checkpointing,
        "sink": args.sink,
        "recent": args.recent,
        "processes": ranks.world,
        "shard": args.shard,
        **sizes,
    }
    op = "identify.step" if "length" in sizes else "identify.run"
    write_record(
        args.json, op=op, impl="duo", shape=shape, dtype=dtype, policy=None, numbers=numbers
    )

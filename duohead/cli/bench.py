"""`duohead bench`: speed and memory, measured here, after the results were held against fp64 in the same process.

`kernels` times attention of one layer against the best full attention there is, `model` whole models of true shapes,
`capacity` the longest cache that fits, `identify` a step of gate training, `footprint` the bytes of caches; all append
records, of which `report` draws pictures. Run `duohead bench kernels --preset decode-table --json kernels.jsonl`.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from duohead.bench.identify_lines import add_flags as add_identify
from duohead.cli.bench_flags import (
    FLAGS,
    FOOTPRINT_CASES,
    KERNEL_CASES,
    KERNEL_SIZES,
    MODEL_JOBS,
    add_capacity,
    add_footprint,
    add_kernels,
    add_model,
    add_report,
)
from duohead.cli.given import Given, refuse, refuse_unless

if TYPE_CHECKING:
    import torch

    from duohead.bench.cases import Case
    from duohead.bench.footprint_cases import Asked
    from duohead.bench.jobs import Job

__all__ = ["FLAGS", "add_arguments", "run"]


# What no flag of seconds or GiB means.
MOST = 1_000_000
BESIDE_A_PRESET = "a --preset has its own; leave one of the two out"
USEFUL_OPERATIONS = {
    "--queries": ("decode", "append"),
    "--past": ("streaming", "prefill"),
    "--retrieval-ratio": ("prefill", "decode", "append"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this verb (listed in FLAGS)."""
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    for name, (text, add, _) in KINDS.items():
        child = kinds.add_parser(name, help=text, description=text, allow_abbrev=False)
        add(functools.partial(child.add_argument, action=Given))


def run(args: argparse.Namespace) -> int:
    """Measure, print a card, append records; 1 if something of a preset failed."""
    if getattr(args, "json", None) is not None:
        from duohead.files import check_writable

        check_writable(args.json)
    code: int = KINDS[args.kind][2](args)
    return code


def _place(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    import torch

    from duohead.pocket.loading import device_of

    device = device_of(args.device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {args.device}")
    for name in ("seconds", "memory"):
        value = getattr(args, name, None)
        if value is not None and not 0 <= value < MOST:
            raise ValueError(f"--{name} must lie between 0 and {MOST}, got {value}")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # events and streams belong to the current device
    name = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    return device, getattr(torch, name)


def _kernels(args: argparse.Namespace) -> int:
    cases = _cases(args)
    from tqdm import tqdm

    from duohead.bench.card import kernel_line, limits_lines
    from duohead.bench.ceilings import ceilings
    from duohead.bench.kernels import Place, baseline_key, run_baselines, run_case
    from duohead.record import write_record

    device, dtype = _place(args)
    gpu = device.type == "cuda"
    names = args.baselines
    if names is None:
        names = ["sdpa-flash", "sdpa-cudnn"] if gpu else ["sdpa"]
    limits = ceilings(device)
    seconds = args.seconds if args.seconds is not None else (0.2 if gpu else 2.0)
    place = Place(device, dtype, seconds, limits.cache_bytes)
    rivals: dict[Case, Any] = {}
    failures = 0
    work = list(itertools.product(cases, args.impl))
    for case, impl in tqdm(work, desc="bench kernels", unit="case", dynamic_ncols=True):
        key = baseline_key(case)
        if key not in rivals:
            rivals[key] = run_baselines(key, names, place)
        strict = args.preset is None
        result = run_case(case, place, impl=impl, rivals=rivals[key], strict=strict)
        failures += isinstance(result.outcome, str) and result.outcome.startswith("failed")
        tqdm.write(kernel_line(result, limits))
        if args.json is not None:
            write_record(
                args.json,
                op=f"{'prefill.' if case.op == 'streaming' else ''}{case.op}",
                impl=result.impl,
                shape={name: value for name, value in vars(case).items() if name != "op"},
                dtype=dtype,
                policy=case.policy(),
                numbers=result.numbers(limits),
            )
    print(*limits_lines(limits), sep="\n")
    return 1 if failures else 0


def _cases(args: argparse.Namespace) -> list[Case]:
    from duohead.attention import check_impl
    from duohead.bench.baselines import check_baselines
    from duohead.bench.cases import preset

    for impl in args.impl:
        check_impl(impl)
    check_baselines(args.baselines or [])
    if args.preset is not None:
        cases = [case for name in args.preset for case in preset(name)]
        refuse(args, KERNEL_CASES, BESIDE_A_PRESET)
        return cases
    for flag, suits in USEFUL_OPERATIONS.items():
        refuse_unless(args, flag, chosen=args.op, suits=suits, by="--op")
    return list(_asked_cases(args))


def _asked_cases(args: argparse.Namespace) -> Iterator[Case]:
    from duohead.bench.cases import Case

    sizes = {name: getattr(args, name) for name in (key.replace("-", "_") for key in KERNEL_SIZES)}
    for op, length in itertools.product(args.op, args.lengths):
        for ratio in args.retrieval_ratio if op != "streaming" else [0.0]:
            yield Case(
                op,
                length,
                **sizes,
                retrieval_ratio=ratio,
                retrieval_dtype=args.retrieval_dtype,
                streaming_dtype=args.streaming_dtype,
            )


def _model(args: argparse.Namespace) -> int:
    jobs = _jobs(args)
    from tqdm import tqdm

    from duohead.bench.card import limits_lines, model_line
    from duohead.bench.ceilings import ceilings
    from duohead.bench.model import ModelBench
    from duohead.record import write_record

    device, dtype = _place(args)
    limits = ceilings(device)
    bench = ModelBench(device, dtype, seconds=args.seconds)
    failures = 0
    for job in tqdm(jobs, desc="bench model", unit="job", dynamic_ncols=True):
        result = bench.run(job, strict=args.preset is None)
        failures += result.failed
        tqdm.write(model_line(result, limits))
        if args.json is not None:
            write_record(
                args.json,
                op=f"model.{job.measure}",
                impl=job.method,
                shape=job.shape() | {"attention": result.attention(device)},
                dtype=dtype,
                policy=result.policy,
                numbers=result.numbers(limits),
            )
    print(*limits_lines(limits), sep="\n")
    return 1 if failures else 0


def _jobs(args: argparse.Namespace) -> list[Job]:
    from dataclasses import replace

    from duohead.attention import check_impl
    from duohead.bench.jobs import preset

    check_impl(args.impl)
    if args.preset is not None:
        found = [job for name in args.preset for job in preset(name)]
        refuse(args, MODEL_JOBS, BESIDE_A_PRESET)
        return [replace(job, compile=_compile(args), impl=args.impl) for job in found]
    for flag in ("--chunks", "--seconds"):
        suits = ("prefill", "share")
        refuse_unless(args, flag, chosen=args.measure, suits=suits, by="--measure")
    refuse_unless(args, "--retrieval-ratio", chosen=args.methods, suits=("duo",), by="--methods")
    if "share" in args.measure and "duo" not in args.methods:
        raise ValueError(
            f"--measure share is about streaming heads, which --methods {' '.join(args.methods)} has none of; "
            f"add duo to --methods"
        )
    return list(dict.fromkeys(_asked_jobs(args)))


def _asked_jobs(args: argparse.Namespace) -> Iterator[Job]:
    for measure, method, length in itertools.product(args.measure, args.methods, args.lengths):
        if measure == "share" and method != "duo":
            continue  # the others have no streaming heads
        for chunk in args.chunks if measure != "decode" else args.chunks[:1]:
            for ratio in args.retrieval_ratio if method == "duo" else args.retrieval_ratio[:1]:
                yield _job(args, measure, method, length=length, chunk=chunk, retrieval_ratio=ratio)


def _job(args: argparse.Namespace, measure: str, method: str, **changes: Any) -> Job:
    from duohead.bench.jobs import Job

    names = (
        "model",
        "batch",
        "sink",
        "recent",
        "retrieval_dtype",
        "streaming_dtype",
        "weights",
        "impl",
    )
    shared = {name: getattr(args, name) for name in names}
    return Job(measure, method, **shared, compile=_compile(args), **changes)


def _compile(args: argparse.Namespace) -> bool | str:
    return "auto" if args.compile == "auto" else bool(args.compile == "yes")


def _identify(args: argparse.Namespace) -> int:
    from duohead.bench.identify_lines import run as lines

    for line in lines(args):
        print(line, flush=True)
    return 0


def _capacity(args: argparse.Namespace) -> int:
    from duohead.attention import check_impl, choose
    from duohead.bench.capacity import limit_memory, measure_capacity
    from duohead.bench.card import capacity_lines, limits_lines
    from duohead.bench.ceilings import ceilings
    from duohead.bench.fitting import device_memory
    from duohead.bench.model import ModelBench
    from duohead.record import write_record

    check_impl(args.impl)
    for name, least in (("tokens", 1), ("prefill", 0), ("memory", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    if not args.prefill:
        refuse(args, ("--chunk",), "counts for --prefill alone; give its tokens, too")
    job = _job(
        args, "decode", "duo", length=1, chunk=args.chunk, retrieval_ratio=args.retrieval_ratio
    )
    device, dtype = _place(args)
    name = choose(args.impl, device.type, index=device.index)
    shape = job.shape() | {"chunk": job.chunk, "attention": name}
    memory = device_memory(device) if args.memory is None else int(args.memory * 2**30)
    started = time.monotonic()

    def tell(what: str) -> None:
        print(f"{time.monotonic() - started:7.1f} s  {what}", file=sys.stderr, flush=True)

    tell("measuring what the device can do")
    limits = ceilings(device)
    limit_memory(device, memory)
    bench = ModelBench(device, dtype)
    result = None
    for result in measure_capacity(
        bench, job, memory_bytes=memory, tokens=args.tokens, prefill=args.prefill, tell=tell
    ):
        if args.json is not None:
            write_record(
                args.json,
                op="capacity",
                impl="duo",
                shape=shape | {"length": result.tokens},
                dtype=dtype,
                policy=result.policy,
                numbers=result.numbers(limits),
            )
            tell(f"recorded in {args.json}")
    assert result is not None, "there is a result of every stage"
    print(*capacity_lines(result, limits), *limits_lines(limits), sep="\n")
    return 0


def _footprint(args: argparse.Namespace) -> int:
    from duohead.bench.footprint import line, record_fields
    from duohead.bench.footprint import run as measured
    from duohead.record import write_record

    asked = _asked_footprint(args)
    for found in measured(asked):
        print(line(found), flush=True)
        if args.json is not None:
            write_record(args.json, **record_fields(found, asked))
    return 0


def _asked_footprint(args: argparse.Namespace) -> Asked:
    from dataclasses import replace

    from duohead.bench.footprint_cases import Asked, Kept, Range, Text, preset

    device, dtype = _place(args)
    if args.dtype is None:
        import torch

        dtype = torch.bfloat16  # what is counted is bytes, and nobody serves in float32
    if args.preset is not None:
        asked = preset(args.preset)
        refuse(args, FOOTPRINT_CASES, BESIDE_A_PRESET)
        if args.keep_all:
            raise ValueError(f"--keep-all: {BESIDE_A_PRESET}")
        return replace(asked, device=device, dtype=dtype)
    if args.keep_all:
        why = "of no use with --keep-all, by which streaming heads keep every token"
        refuse(args, ("--sink", "--recent"), f"{why}; leave one of the two out")
    texts = [Text(*both) for both in itertools.product(args.lengths, args.decode)]
    names = ("sink", "recent", "retrieval_dtype", "streaming_dtype", "window_dtype")
    shared = {name: getattr(args, name) for name in names}
    kept = [Kept(ratio, **shared, evict=not args.keep_all) for ratio in args.retrieval_ratio]
    tokens = sorted(text.tokens for text in texts)
    whole = Range(tokens[0], tokens[-1])
    return Asked(args.model, texts, kept, [whole], args.batch, dtype, device)


def _report(args: argparse.Namespace) -> int:
    from duohead.bench.plots import draw, write_page

    if args.out is None and args.png is None:
        raise ValueError("report needs --out FILE or --png FOLDER, or both")
    if args.out is not None:
        write_page(args.out, args.files)
        print(f"wrote {args.out}")
    if args.png is not None:
        for path in draw(args.png, args.files):
            print(f"wrote {path}")
    return 0


KINDS: dict[str, tuple[str, Any, Any]] = {
    "kernels": ("attention of one layer against the best full attention", add_kernels, _kernels),
    "model": ("whole models of true shapes with random weights", add_model, _model),
    "capacity": ("the longest cache that fits beside a model", add_capacity, _capacity),
    "identify": (
        "a step of gate training, and what a whole run would take",
        add_identify,
        _identify,
    ),
    "footprint": (
        "bytes of a cache as allocated, beside the model's own with its native windows",
        add_footprint,
        _footprint,
    ),
    "report": ("pictures of what the others measured", add_report, _report),
}

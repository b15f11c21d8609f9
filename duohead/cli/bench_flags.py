"""The flags of `duohead bench`: what can be asked for, apart from the doing of it in `duohead.cli.bench`.

Each kind of benchmark lists its flags in a tuple beside the function that adds them, since a new flag is a decision
(`tests/test_cli.py`). Nothing here imports torch.
"""

from __future__ import annotations

from typing import Any

from duohead.bench.identify_lines import FLAGS as IDENTIFY_FLAGS

KERNEL_SIZES = {
    "heads": (8, "query heads"),
    "kv-heads": (4, "KV heads"),
    "head-dim": (64, "head size"),
    "batch": (1, "rows"),
    "sink": (64, "first tokens seen by streaming heads"),
    "recent": (256, "last tokens seen by streaming heads"),
    "queries": (1, "new tokens of decode and append"),
    "past": (0, "tokens that prefill finds in the cache"),
}
MODEL_SIZES = {name: KERNEL_SIZES[name] for name in ("batch", "sink", "recent")}
STORAGE_FLAGS = ("--retrieval-dtype", "--streaming-dtype")
PLACE_FLAGS = ("--impl", "--dtype", "--device", "--json")
# What is measured, which a preset says by itself; the other flags say how.
KERNEL_CASES = (
    "--op",
    "--lengths",
    "--retrieval-ratio",
    *(f"--{name}" for name in KERNEL_SIZES),
    *STORAGE_FLAGS,
)
KERNEL_FLAGS = (*KERNEL_CASES, "--preset", "--baselines", "--seconds", *PLACE_FLAGS)
MODEL_JOBS = (
    "--measure",
    "--methods",
    "--model",
    "--lengths",
    "--chunks",
    "--retrieval-ratio",
    "--weights",
    *(f"--{name}" for name in MODEL_SIZES),
    *STORAGE_FLAGS,
)
MODEL_FLAGS = (*MODEL_JOBS, "--preset", "--compile", "--seconds", *PLACE_FLAGS)
CAPACITY_FLAGS = (
    "--model",
    "--tokens",
    "--prefill",
    "--chunk",
    "--memory",
    "--retrieval-ratio",
    "--weights",
    "--compile",
    *(f"--{name}" for name in MODEL_SIZES),
    *STORAGE_FLAGS,
    *PLACE_FLAGS,
)
FOOTPRINT_CASES = (
    "--model",
    "--lengths",
    "--decode",
    "--retrieval-ratio",
    "--keep-all",
    *(f"--{name}" for name in MODEL_SIZES),
    *STORAGE_FLAGS,
    "--window-dtype",
)
FOOTPRINT_FLAGS = (*FOOTPRINT_CASES, "--preset", "--dtype", "--device", "--json")
REPORT_FLAGS = ("--out", "--png")
FLAGS = (
    KERNEL_FLAGS + MODEL_FLAGS + CAPACITY_FLAGS + IDENTIFY_FLAGS + FOOTPRINT_FLAGS + REPORT_FLAGS
)


def _add_common(add: Any, sizes: dict[str, tuple[int, str]]) -> None:
    for name, (default, meaning) in sizes.items():
        add(f"--{name}", type=int, default=default, metavar="N", help=f"{meaning} (%(default)s)")
    for kind in ("retrieval", "streaming"):
        add(
            f"--{kind}-dtype",
            default="auto",
            metavar="D",
            help=f"storage of {kind} heads: bf16, fp8, int8, int4, int4-hadamard, or two of them as KEYS/VALUES "
            "(%(default)s)",
        )
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="(on a GPU bfloat16, else float32)",
    )
    add("--device", metavar="D", help="cpu, cuda (the GPU if there is one)")
    add("--json", metavar="FILE", help="append records, one JSON line for each")


def _add_numbers(add: Any, flag: str, kind: type, default: list[Any], meaning: str) -> None:
    shown = " ".join(map(str, default))
    add(flag, type=kind, nargs="+", default=default, metavar="N", help=f"{meaning} ({shown})")


def add_kernels(add: Any) -> None:
    """Flags of `bench kernels` (KERNEL_FLAGS)."""
    add(
        "--op",
        nargs="+",
        default=["streaming"],
        metavar="OP",
        help="streaming (prefill of streaming heads), prefill, decode, append (streaming)",
    )
    add(
        "--preset",
        nargs="+",
        metavar="NAME",
        help="decode-table, prefill-table, shapes, rotation: the cases of tables, instead of --op and sizes",
    )
    _add_numbers(add, "--lengths", int, [4096, 16384], "tokens")
    _add_numbers(add, "--retrieval-ratio", float, [1.0], "share of KV heads that keep everything")
    add("--impl", nargs="+", default=["auto"], metavar="NAME", help="implementations (auto)")
    add(
        "--baselines",
        nargs="*",
        metavar="NAME",
        help="sdpa, sdpa-flash, sdpa-cudnn, sdpa-efficient, flex, fa4 (on a GPU: sdpa-flash sdpa-cudnn, else sdpa)",
    )
    add("--seconds", type=float, metavar="S", help="time for each (on a GPU 0.2, else 2)")
    _add_common(add, KERNEL_SIZES)


def _add_whole(add: Any) -> None:
    """What `model` and `capacity` share."""
    add(
        "--model",
        default="tiny",
        metavar="NAME",
        help="llama-3-8b, llama-2-7b, qwen2.5-7b, mistral-7b, tiny (%(default)s)",
    )
    add("--weights", default="bf16", metavar="W", help="bf16 or int8 (%(default)s)")
    add(
        "--compile",
        choices=("auto", "yes", "no"),
        default="auto",
        help="torch.compile in the engine (%(default)s)",
    )
    add("--impl", default="auto", metavar="NAME", help="attention implementation (%(default)s)")
    _add_common(add, MODEL_SIZES)


def add_model(add: Any) -> None:
    """Flags of `bench model` (MODEL_FLAGS)."""
    add(
        "--measure",
        nargs="+",
        default=["prefill", "decode"],
        metavar="WHAT",
        help="prefill, decode, share (of streaming heads in the attention time of prefill) (prefill decode)",
    )
    add(
        "--methods",
        nargs="+",
        default=["full", "duo", "transformers"],
        metavar="NAME",
        help="full, duo (both in our engine), transformers (all three)",
    )
    add(
        "--preset",
        nargs="+",
        metavar="NAME",
        help="decode-table, prefill-table, long-prefill, paper-decode, paper-prefill, paper-ratio",
    )
    _add_numbers(add, "--lengths", int, [4096], "tokens of the prompt or of the past")
    _add_numbers(add, "--chunks", int, [32768], "tokens per forward of prefill")
    _add_numbers(add, "--retrieval-ratio", float, [0.5], "share of retrieval heads of duo")
    add(
        "--seconds",
        type=float,
        default=1.0,
        metavar="S",
        help="repeat a prefill for so long (%(default)s)",
    )
    _add_whole(add)


def add_capacity(add: Any) -> None:
    """Flags of `bench capacity` (CAPACITY_FLAGS)."""
    add("--tokens", type=int, metavar="N", help="length to measure at (the estimate)")
    add(
        "--prefill",
        type=int,
        default=0,
        metavar="N",
        help="also read a real prompt of so many tokens",
    )
    add(
        "--chunk",
        type=int,
        default=32768,
        metavar="N",
        help="tokens per forward of it (%(default)s)",
    )
    add("--memory", type=float, metavar="GIB", help="memory to fill in GiB (all of the device)")
    add(
        "--retrieval-ratio",
        type=float,
        default=0.5,
        metavar="R",
        help="share of retrieval heads (%(default)s)",
    )
    _add_whole(add)


def add_footprint(add: Any) -> None:
    """Flags of `bench footprint` (FOOTPRINT_FLAGS)."""
    add(
        "--preset",
        metavar="NAME",
        help="laguna-card: the rows of the Laguna adapter's card and longer ones, instead of the rest",
    )
    add(
        "--model",
        default="tiny",
        metavar="NAME",
        help="laguna-xs.2, llama-3-8b, llama-2-7b, qwen2.5-7b, mistral-7b, tiny, a folder or a hub id (%(default)s)",
    )
    _add_numbers(add, "--lengths", int, [4096], "tokens of the prompt")
    _add_numbers(add, "--decode", int, [64], "tokens decoded after it")
    _add_numbers(
        add, "--retrieval-ratio", float, [0.5], "share of retrieval heads of global layers"
    )
    add(
        "--keep-all",
        action="store_true",
        help="streaming heads keep every token too, as --streaming-dtype says",
    )
    add(
        "--window-dtype",
        default="auto",
        metavar="D",
        help="storage of heads with a native window, likewise (%(default)s)",
    )
    _add_common(add, MODEL_SIZES)


def add_report(add: Any) -> None:
    """Flags of `bench report` (REPORT_FLAGS)."""
    add("files", nargs="+", metavar="FILE", help="records that the other kinds wrote")
    add("--out", metavar="FILE", help="write one HTML page")
    add("--png", metavar="FOLDER", help="write each picture as a PNG there (needs matplotlib)")

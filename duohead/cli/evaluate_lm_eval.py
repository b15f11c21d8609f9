"""`duohead evaluate lm-eval`: any task of lm-evaluation-harness under a pattern's policies, beside full attention.

Flags that lm-eval has too are called as there, so that a published command can be copied; what is added are the pattern
and the methods to compare. Run `duohead evaluate lm-eval --model M --pattern P --tasks mmlu ruler`; docs/benchmarks.md
has the commands for the tables of the paper.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from duohead.cli.common import (
    MODELS,
    STORAGE_FLAGS,
    WINDOW_FLAGS,
    add_storage_flags,
    add_window_flags,
    load_pattern,
    storage_fields,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from duohead.evaluate.harness import HarnessOptions, HarnessRow
    from duohead.policy import HeadPolicy

KINDS = ("full", "duo", "random", "streaming")
FLAGS = (
    "--model",
    "--pattern",
    "--retrieval-ratio",
    *WINDOW_FLAGS,
    *STORAGE_FLAGS,
    "--methods",
    "--random-draws",
    "--tasks",
    "--num-fewshot",
    "--limit",
    "--batch-size",
    "--max-length",
    "--chunk",
    "--include-path",
    "--metadata",
    "--gen-kwargs",
    "--apply-chat-template",
    "--fewshot-as-multiturn",
    "--no-fewshot-as-multiturn",
    "--system-instruction",
    "--confirm-run-unsafe-code",
    "--dtype",
    "--device",
    "--revision",
    "--json",
    "--seed",
)


def add_arguments(kinds: Any) -> None:
    """Add the kind `lm-eval` and its flags (listed in FLAGS) to the subparsers of `duohead evaluate`."""
    text = "any task of lm-evaluation-harness, through the small cache"
    parser = kinds.add_parser("lm-eval", help=text, description=text, allow_abbrev=False)
    _add_methods(parser)
    _add_tasks(parser)
    add = parser.add_argument
    add("--dtype", default="auto", metavar="T", help="auto, float32, bfloat16, float16 (auto)")
    add("--device", metavar="D", help="torch device (the GPU if there is one)")
    add("--revision", metavar="REV", help="branch, tag or commit of a hub model")
    add("--json", metavar="FILE", help="write records, one JSON line per method and task")
    add("--seed", type=int, default=1234, metavar="N", help="of everything random (%(default)s)")


def _add_methods(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="MODEL", help=MODELS)
    add("--pattern", required=True, metavar="FOLDER", help="folder or hub id of its pattern")
    add(
        "--retrieval-ratio",
        type=float,
        nargs="+",
        default=[0.5],
        metavar="R",
        help="shares of heads that keep all (0.5)",
    )
    add_window_flags(parser)
    add_storage_flags(parser)
    add(
        "--methods",
        nargs="+",
        default=["full", "duo"],
        metavar="KIND",
        help="what to compare: full, duo (identified heads), random, streaming (full duo)",
    )
    add(
        "--random-draws",
        type=int,
        default=3,
        metavar="N",
        help="random choices per ratio (%(default)s)",
    )


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--tasks", nargs="+", required=True, metavar="TASK", help="lm-eval's names; commas do, too")
    add("--num-fewshot", type=int, metavar="N", help="examples in the prompt (the task's own)")
    add("--limit", type=int, metavar="N", help="documents per task, for trying things out (all)")
    add("--batch-size", type=int, default=1, metavar="N", help="prompts at a time (%(default)s)")
    add("--max-length", type=int, metavar="N", help="tokens of prompt and answer (the model's)")
    add("--chunk", type=int, metavar="N", help="run prompts in pieces of N tokens, to save memory")
    add("--include-path", metavar="DIR", help="folder with task files of your own")
    add("--metadata", metavar="JSON", help="for tasks: '{\"max_seq_lengths\": [4096]}' for RULER")
    add(
        "--gen-kwargs", metavar="JSON", help="generation settings, such as '{\"max_gen_toks\": 64}'"
    )
    add(
        "--apply-chat-template",
        nargs="?",
        const=True,
        default=False,
        metavar="NAME",
        help="use the tokenizer's chat template",
    )
    add(
        "--fewshot-as-multiturn",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="examples are turns of the conversation, with a chat template (yes)",
    )
    add("--system-instruction", metavar="TEXT", help="goes before every prompt")
    add(
        "--confirm-run-unsafe-code",
        action="store_true",
        help="allow tasks that run what the model wrote",
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate, print a table, write the records."""
    from duohead.evaluate.harness import evaluate_harness, harness_recorder, require_lm_eval
    from duohead.evaluate.recording import recording
    from duohead.files import check_writable
    from duohead.pocket.loading import load_model

    options = _options(args)
    if unknown := [kind for kind in args.methods if kind not in KINDS]:
        raise ValueError(f"--methods must be among {', '.join(KINDS)}, got {', '.join(unknown)}")
    if args.json is not None:
        check_writable(args.json)
    require_lm_eval()
    pattern = load_pattern(args.pattern)
    policies = _policies(args, pattern)
    model, tokenizer = load_model(
        args.model, dtype=args.dtype, device=args.device, revision=args.revision
    )
    pattern.validate(model)
    as_record = harness_recorder(model=args.model, dtype=model.dtype, options=options)
    with recording(args.json, as_record) as keep:
        rows = evaluate_harness(model, tokenizer, policies=policies, options=options, on_row=keep)
    print(_table(rows))
    if args.json is not None:
        print(f"\nwrote {args.json}")
    return 0


def _options(args: argparse.Namespace) -> HarnessOptions:
    from duohead.evaluate.harness import HarnessOptions

    tasks = [name for word in args.tasks for name in word.split(",") if name]
    return HarnessOptions(
        tasks=tuple(dict.fromkeys(tasks)),
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        batch_size=args.batch_size,
        max_length=args.max_length,
        chunk=args.chunk,
        include_path=args.include_path,
        metadata=_mapping("--metadata", args.metadata),
        apply_chat_template=args.apply_chat_template,
        fewshot_as_multiturn=args.fewshot_as_multiturn,
        system_instruction=args.system_instruction,
        gen_kwargs=_mapping("--gen-kwargs", args.gen_kwargs),
        confirm_run_unsafe_code=args.confirm_run_unsafe_code,
        seed=args.seed,
    )


def _mapping(flag: str, text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{flag} must be a JSON object, got {text!r} ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f'{flag} must be a JSON object such as {{"key": 1}}, got {text!r}')
    return value


def _policies(args: argparse.Namespace, pattern: Any) -> dict[str, HeadPolicy | None]:
    from duohead.evaluate.methods import comparison

    methods = comparison(
        pattern,
        ratios=args.retrieval_ratio,
        draws=args.random_draws,
        seed=args.seed,
        sink=args.sink,
        recent=args.recent,
        prefill_recent=args.prefill_recent,
        **storage_fields(args),
    )
    return {name: method.policy for name, method in methods.items() if method.kind in args.methods}


def _table(rows: Sequence[HarnessRow]) -> str:
    """One line per task, method and metric, with its standard error and the cache beside it."""
    from duohead.evaluate.tables import text_table

    lines = []
    order = list(dict.fromkeys(row.task for row in rows))
    for row in sorted(rows, key=lambda r: order.index(r.task)):
        for metric, value in row.scores.items():
            name, _, rule = metric.partition(",")
            if name.endswith("_stderr"):
                continue
            error = row.scores.get(f"{name}_stderr{',' + rule if rule else ''}")
            lines.append(
                [
                    row.task,
                    row.task_version,
                    row.method,
                    metric,
                    "no number" if value is None else f"{value:.4f}",
                    "" if error is None else f"{error:.4f}",
                    f"{row.samples:,}",
                    f"{row.kv_bytes:,}",
                ]
            )
    head = ("task", "version", "method", "metric", "score", "± error", "documents", "cache bytes")
    return text_table(head, lines)

"""`duohead generate MODEL --policy FOLDER --prompt-file FILE`: continue a long prompt with the smaller cache.

The prompt is prefilled in chunks under a progress bar, the answer streams to standard output, and the speed and the
cache's bytes against the dense cache go to standard error, so that the answer alone can be piped on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from duohead.cli.common import (
    MODELS,
    SELECTOR_FLAGS,
    STORAGE_FLAGS,
    WINDOW_FLAGS,
    add_model_flags,
    add_selector_flags,
    add_storage_flags,
    add_window_flags,
    load_pattern,
    selector,
    storage_fields,
)

FLAGS = (
    "--policy",
    "--pattern",
    *SELECTOR_FLAGS,
    *WINDOW_FLAGS,
    *STORAGE_FLAGS,
    "--prompt-file",
    "--max-new-tokens",
    "--chunk",
    "--engine",
    "--max-length",
    "--temperature",
    "--top-p",
    "--seed",
    "--dtype",
    "--device",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this verb (listed in FLAGS)."""
    add = parser.add_argument
    add("model", metavar="MODEL", help=MODELS)
    add(
        "--policy",
        "--pattern",  # as evaluate calls it
        required=True,
        metavar="FOLDER",
        help="pattern that `duohead identify` wrote, a hub id, or a bundled model",
    )
    add_selector_flags(parser, default="0.5", text="this text")
    add_window_flags(parser)
    add_storage_flags(parser)
    add(
        "--prompt-file",
        required=True,
        metavar="FILE",
        help="UTF-8 text to continue; - for standard input",
    )
    add(
        "--max-new-tokens",
        type=int,
        default=128,
        metavar="N",
        help="tokens to generate at most (%(default)s)",
    )
    add(
        "--chunk",
        type=int,
        default=8192,
        metavar="N",
        help="prompt tokens per forward; more take more memory and little less time (%(default)s)",
    )
    add(
        "--engine",
        choices=("auto", "graph", "compiled", "transformers"),
        default="auto",
        help="what decodes: CUDA graphs, the same of a compiled step (minutes to compile, for long answers), "
        "transformers' own loop, or graphs where they can (%(default)s)",
    )
    add(
        "--max-length",
        type=int,
        metavar="N",
        help="tokens to allocate the engine's cache for (those of this text)",
    )
    add(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 for greedy decoding (%(default)s)",
    )
    add("--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling (%(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the sampling (%(default)s)")
    add_model_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Generate, and say what it took."""
    prompt = _prompt(args.prompt_file)
    _check(args)
    import torch
    from tqdm import tqdm
    from transformers import TextStreamer

    from duohead.models import duo
    from duohead.models.generate import check_positions, generate
    from duohead.pocket.loading import load_model
    from duohead.shapes import layer_shapes

    pattern = load_pattern(args.policy)
    policy = pattern.policy(**_selection(args))
    model, tokenizer = load_model(args.model, dtype=args.dtype, device=args.device)
    pattern.validate(model)
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    tokens = ids.shape[1] + args.max_new_tokens
    check_positions(model, tokens)
    if args.kv_budget is not None:
        # Made before the model was there to find mistakes early; the budget counts at the length of this text.
        head_dim = next(shape.head_dim for shape in layer_shapes(model) if shape.num_kv_heads)
        policy = pattern.policy(**_selection(args), tokens=tokens, head_dim=head_dim)
    torch.manual_seed(args.seed)
    bar = tqdm(total=ids.shape[1], desc="prefill", unit="tok", file=sys.stderr, leave=False)
    with duo(model, policy), bar:
        result = generate(
            model,
            ids,
            max_new_tokens=args.max_new_tokens,
            chunk=args.chunk,
            progress=bar.update,
            engine=args.engine,
            max_length=args.max_length,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **_sampling(args),
        )
    print(_summary(result), file=sys.stderr)
    return 0


def _check(args: argparse.Namespace) -> None:
    for flag, value in (
        ("--max-new-tokens", args.max_new_tokens),
        ("--chunk", args.chunk),
        ("--max-length", args.max_length),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{flag} must be at least 1, got {value}")
    if args.temperature < 0:
        raise ValueError(f"--temperature must be at least 0, got {args.temperature}")
    if not 0 < args.top_p <= 1:
        raise ValueError(f"--top-p must lie in (0, 1], got {args.top_p}")
    if args.top_p < 1 and args.temperature == 0:
        raise ValueError(
            f"--top-p {args.top_p} says how to sample, but --temperature 0 does not sample; "
            f"give a --temperature above 0, or leave --top-p out"
        )


def _prompt(path: str) -> str:
    if path == "-":
        text = sys.stdin.read()
    else:
        from duohead.identify import haystack

        text = haystack.read_text([Path(path)])
    if not text.strip():
        raise ValueError(f"--prompt-file must hold some text, got none in {path}")
    return text


def _selection(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `HeadPattern.policy`."""
    return {
        **(selector(args) or {"retrieval_ratio": 0.5}),
        "sink": args.sink,
        "recent": args.recent,
        "prefill_recent": args.prefill_recent,
        **storage_fields(args),
    }


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    if args.temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p}


def _summary(result: Any) -> str:
    prefill = result.prefilled_tokens / max(result.prefill_seconds, 1e-9)
    # The first new token is the prefill's.
    decode = max(result.new_tokens - 1, 1) / max(result.decode_seconds, 1e-9)
    spent = f", {result.prepare_seconds:,.1f} s to prepare" if result.prepare_seconds else ""
    share = result.kv_bytes / result.dense_kv_bytes
    return (
        f"{result.prompt_tokens:,} prompt tokens at {prefill:,.0f} tok/s, {result.new_tokens:,} new at "
        f"{decode:,.1f} tok/s ({result.engine}{spent}); "
        f"cache {result.kv_bytes:,} bytes, {share:.1%} of the dense {result.dense_kv_bytes:,}"
    )

"""A tiny random model with a word tokenizer, and a report of made-up numbers, for the tests of evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from duohead.evaluate.methods import Method, comparison
from duohead.evaluate.report import Example, Report
from duohead.evaluate.results import NeedleResult, NeedleRow
from duohead.pattern import HeadPattern

LAYERS, HEADS, HEAD_DIM = 3, 2, 8
TEXT = "\n".join(
    f"line {i} of a long story about nothing much , told slowly ." for i in range(3000)
)


def tokenizer():
    """Characters and white space of TEXT and of the needles, one token each."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(c) for c in range(32, 127)] + ["\n"]
    vocab = {"<unk>": 0, **{letter: i + 1 for i, letter in enumerate(letters)}}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


def model(*, positions: int = 4096, seed: int = 0):
    """A random Llama: 3 layers, 4 query and 2 KV heads of size 8."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=2 * HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=positions,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def pattern(*, layers: int = LAYERS, heads: int = HEADS) -> HeadPattern:
    alpha = np.random.default_rng(0).random((layers, heads), dtype=np.float32)
    return HeadPattern.from_alpha(alpha, sink=4, recent=16)


def save(folder: Path, *, characters: int | None = None) -> Path:
    """Model, tokenizer, pattern and as much prose as asked for, as files that a command line can name."""
    model().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    pattern().save(folder / "pattern")
    (folder / "prose.txt").write_text(TEXT[:characters])
    return folder


def row(name: str, method: Method, **changes: object) -> NeedleRow:
    """A made-up row; bytes are those of heads of size 64 in float32."""
    fields: dict[str, object] = {
        "task": "passkeys",
        "task_version": 1,
        "method": name,
        "retrieval_ratio": method.share,
        "sink": None if method.policy is None else method.policy.sink,
        "recent": None if method.policy is None else method.policy.recent,
        "policy": None if method.policy is None else method.policy.digest(),
        "length": 2048,
        "depth": 0.5,
        "samples": 12,
        "answers": 120,
        "exact_match": 0.5,
        "first_token": 0.75,
        "token_accuracy": 0.875,
        **changes,
    }
    tokens = int(fields["length"])
    if method.policy is None:
        taken = 8 * 4 * tokens * 2 * 64 * 4
    else:
        taken = method.policy.kv_bytes(tokens, head_dim=64, dtype="float32")
    return NeedleRow(**{"kv_bytes": taken, **fields})


def report() -> Report:
    """A report whose numbers are made up but all different."""
    random = np.random.default_rng(0)
    heads = HeadPattern.from_alpha(random.beta(0.3, 0.6, size=(8, 4)), sink=64, recent=256)
    methods = comparison(
        heads, ratios=(0.5, 0.25, 0.125), random_ratios=(0.5, 0.25), draws=3, seed=0
    )
    scores = dict(
        zip(
            methods,
            (0.975, 0.9667, 0.17, 0.5733, 0.25, 0.9583, 0.11, 0.3, 0.03, 0.58, 0.0417),
            strict=True,
        )
    )
    accuracy = NeedleResult(tuple(row(n, m, exact_match=scores[n]) for n, m in methods.items()))
    grid = NeedleResult(
        tuple(
            row(
                n,
                methods[n],
                task="needle",
                length=length,
                depth=depth,
                exact_match=float(random.integers(5)) / 4,
            )
            for n in ("full", "duo_25")
            for length in (512, 1024, 2048, 4096)
            for depth in (0.0, 0.25, 0.5, 0.75, 1.0)
        )
    )
    sizes = {
        n: {length: row(n, methods[n], length=length).kv_bytes for length in grid.lengths}
        for n in ("full", "duo_50", "duo_25")
    }
    from duohead.evaluate.demo import DemoPlan, figures

    example = Example(
        "Where is it?\nIt is",
        " under <the> stairs",
        {"full": " under <the> stairs", "random_25_0": " & gone"},
    )
    return Report(
        model="pocket",
        alpha=heads.alpha.tolist(),
        methods=methods,
        accuracy=accuracy,
        grid=grid,
        sizes=sizes,
        example=example,
        chosen="duo_25",
        figures=figures(DemoPlan(), accuracy, 131.2),
        provenance={"time": "2026-11-21T01:20:00+00:00", "hardware": "2 cores"},
    )

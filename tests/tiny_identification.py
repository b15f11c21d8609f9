"""A short identification of a tiny random model, and the tokenizer and text that it needs."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from duohead.identify import IdentifyOptions, haystack, identify
from duohead.pattern import HeadPattern

OPTIONS = IdentifyOptions(
    steps=12,
    learning_rate=0.05,
    sink=4,
    recent=8,
    context_min=300,
    context_max=400,
    context_lengths=4,
    num_passkeys=2,
    passkey_words=3,
    save_every=5,
)
TEXT = haystack.default_text()[:20_000]


@functools.cache
def tokenizer() -> Any:
    """A byte-level BPE of 400 tokens, trained on the spot."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    inner.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def tiny(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 400,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        **changes,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def run(out: Path | None = None, **arguments: Any) -> HeadPattern:
    given = {"model": tiny(), "tokenizer": tokenizer(), "text": TEXT, "options": OPTIONS}
    given = {**given, "progress": False, **arguments}
    return identify(given.pop("model"), given.pop("tokenizer"), given.pop("text"), out=out, **given)

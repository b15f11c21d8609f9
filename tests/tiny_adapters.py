"""Adapters for tests: a tiny base model on disk, a pattern for it, and a Laguna folder and model of the true geometry.

The Laguna folder is written from the description of the published one, with gates drawn here; nothing of it is copied.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import tiny

from duohead.pattern import HeadPattern

LAYERS, GLOBAL_EVERY, HEADS, DIM, WINDOW = 40, 4, 8, 128, 512
LAYER_TYPES = [
    "sliding_attention" if layer % GLOBAL_EVERY else "full_attention" for layer in range(LAYERS)
]
GLOBAL = [layer for layer, kind in enumerate(LAYER_TYPES) if kind == "full_attention"]
TOP = "duo_attention"


def base_and_pattern(folder: Path, family: str = "llama", **fields: Any) -> tuple[Path, Path]:
    """A tiny random model with a tokenizer in one folder, and a pattern that names it in another."""
    from transformers import AutoTokenizer

    from duohead import pocket

    base, heads = folder / "base", folder / "heads"
    model = tiny(family, **fields)
    model.save_pretrained(base)
    # Its vocabulary is larger than the model's; the words of the tests have low numbers in it.
    AutoTokenizer.from_pretrained(pocket.folder("pocket")).save_pretrained(base)
    shape = (model.config.num_hidden_layers, model.config.num_key_value_heads)
    alpha = np.random.default_rng(0).random(shape, dtype=np.float32)
    windowed = getattr(model.config, "layer_types", None) or ["full_attention"] * shape[0]
    alpha[[kind == "sliding_attention" for kind in windowed]] = np.nan
    pattern = HeadPattern.from_alpha(
        alpha, model=model, sink=2, recent=4, training={"method": "drawn by lot", "steps": 3}
    )
    replace(pattern, base_model=str(base)).save(heads)
    return base, heads


def laguna_model(**fields: Any) -> Any:
    """A random Laguna with the KV geometry of the published one, and next to nothing beside it."""
    return tiny(
        "laguna",
        num_hidden_layers=LAYERS,
        num_attention_heads=48,
        num_key_value_heads=HEADS,
        head_dim=DIM,
        num_attention_heads_per_layer=[64 if layer % GLOBAL_EVERY else 48 for layer in range(LAYERS)],
        layer_types=LAYER_TYPES,
        mlp_layer_types=["dense", *["sparse"] * (LAYERS - 1)],
        sliding_window=WINDOW,
        max_position_embeddings=4096,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        **fields,
    )  # fmt: skip


def raw_gates() -> torch.Tensor:
    """Gates of every layer, some beyond [0, 1], as an optimiser leaves them."""
    gates = torch.rand(LAYERS, HEADS, generator=torch.Generator().manual_seed(3)) * 1.1 - 0.05
    gates[0, 0], gates[1, 1] = -0.02, 1.03
    return gates


def laguna_folder(folder: Path, config: Any, base: str | None, **settings: Any) -> Path:
    """An adapter's repository in the published layout: full model config, settings twice, gates twice."""
    gates = raw_gates()
    inner = folder / TOP
    inner.mkdir(parents=True)
    block = {
        "enabled": True,
        "architecture": "laguna",
        "base_model_name_or_path": base,
        "base_config_name_or_path": base,
        "full_attention_heads_file": f"{TOP}/full_attention_heads.pt",
        "full_attention_heads_tsv_file": f"{TOP}/full_attention_heads.tsv",
        "sink_size": 64,
        "recent_size": 256,
        "training_sink_size": 64,
        "training_recent_size": 256,
        "patch_mode": "eval",
        "format_version": 1,
        **settings,
    }
    whole = {
        **config.to_dict(),
        "architectures": ["DuoLagunaForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_duo_laguna.DuoLagunaForCausalLM"},
        TOP: block,
    }
    (folder / "config.json").write_text(json.dumps(whole))
    (inner / "config.json").write_text(json.dumps(block))
    torch.save(gates, inner / "full_attention_heads.pt")
    np.savetxt(inner / "full_attention_heads.tsv", gates.numpy(), delimiter="\t")
    (folder / "modeling_duo_laguna.py").write_text("raise SystemExit('remote code must not run')\n")
    return folder

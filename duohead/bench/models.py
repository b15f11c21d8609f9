"""Models of true shape with random weights, made where they run: speed depends on shapes, not on what was learnt.

Every preset is a transformers config with the published numbers of a model, its position limit raised; the weights are
drawn on the device in the dtype asked for, so that an 8B model takes seconds and no disk. Use `build("llama-3-8b")`.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from duohead.shapes import LayerShape, layer_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Positions cost nothing until they are used.
POSITIONS = 1 << 24
WEIGHTS = ("bf16", "int8")
_LLAMA_3 = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "theta": 5e5,
}  # fmt: skip
_LLAMA_2 = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "theta": 1e4,
}  # fmt: skip
_QWEN = {
    "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "theta": 1e6,
}  # fmt: skip
_MISTRAL = {
    "vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "theta": 1e6, "sliding_window": None,
}  # fmt: skip
_TINY = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "theta": 1e4,
}  # fmt: skip
# Laguna-XS.2: the first of every four layers is global, the others see 512 tokens with more query heads. The positions
# of the global layers are those of public ports (transformers' default is global throughout); bytes depend on how many.
_LAGUNA_TYPES = ["sliding_attention" if index % 4 else "full_attention" for index in range(40)]
_LAGUNA = {
    "vocab_size": 100352, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 40,
    "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128, "sliding_window": 512,
    "layer_types": _LAGUNA_TYPES,
    "num_attention_heads_per_layer": [48 if kind == "full_attention" else 64 for kind in _LAGUNA_TYPES],
}  # fmt: skip
# Models whose layers are alike, and models with native windows in some layers.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3-8b": ("LlamaConfig", _LLAMA_3),
    "llama-2-7b": ("LlamaConfig", _LLAMA_2),
    "qwen2.5-7b": ("Qwen2Config", _QWEN),
    "mistral-7b": ("MistralConfig", _MISTRAL),
    "tiny": ("LlamaConfig", _TINY),
}
HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {"laguna-xs.2": ("LagunaConfig", _LAGUNA)}
PRESETS = {**SHAPES, **HYBRIDS}


def config(name: str) -> Any:
    """The transformers config of a preset; ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"--model must be one of {', '.join(PRESETS)}, got {name!r}")
    import transformers

    family, shared = PRESETS[name]
    numbers = copy.deepcopy(shared)
    theta = numbers.pop("theta", None)
    # A family with a base for every kind of layer has them as its defaults.
    rope = None if theta is None else {"rope_type": "default", "rope_theta": theta}
    made = getattr(transformers, family)(
        **numbers,
        max_position_embeddings=POSITIONS,
        rope_parameters=rope,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    made._name_or_path = name
    return made


def any_config(name: str, *, offline: bool = False) -> Any:
    """The config of a preset, a bundled model, a folder or a hub id, of the last only what is here if ``offline``.

    Raises:
        ValueError: there is no such model.
    """
    if name in PRESETS:
        return config(name)
    from transformers import AutoConfig

    from duohead.pocket import NAMES, folder

    try:
        place = str(folder(name)) if name in NAMES else name
        # Nobody is there to be asked about remote code.
        trust = False if offline else None
        return AutoConfig.from_pretrained(place, local_files_only=offline, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"--model must be {', '.join(PRESETS)}, a folder or a hub id, got {name!r} ({reason})"
        ) from error


def build(
    name: str, *, device: torch.device, dtype: torch.dtype = torch.bfloat16, weights: str = "bf16"
) -> PreTrainedModel:
    """A model of that shape with random weights, in evaluation mode.

    Args:
        name: one of PRESETS.
        device: where its weights are drawn and stay.
        dtype: dtype that it computes in, and of the weights unless they are quantised.
        weights: "bf16" leaves them in ``dtype``; "int8" stores linear layers in 8 bits a weight (torchao).

    Raises:
        ValueError: unknown name or precision, or torchao is missing.
    """
    check_weights(weights)
    from transformers import AutoModelForCausalLM

    made = config(name)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(made, dtype=dtype)
    model = model.eval().requires_grad_(False)
    if weights == "int8":
        _quantize(model)
        gc.collect()
    return model


def check_weights(weights: str) -> None:
    """Raise ValueError unless this precision of weights is known and possible here."""
    if weights not in WEIGHTS:
        raise ValueError(f"--weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    if weights == "int8":
        _torchao()


def weight_bytes(model: PreTrainedModel) -> tuple[int, int]:
    """Bytes of all weights, and of those that every decode step reads: all but the embedding table."""
    table = model.get_input_embeddings().weight
    tied = model.get_output_embeddings() is not None and (
        model.get_output_embeddings().weight is table
    )
    whole = sum(_stored_bytes(parameter) for parameter in model.parameters())
    whole += sum(buffer.nbytes for buffer in model.buffers())
    return whole, whole - (0 if tied else _stored_bytes(table))


def estimated_weight_bytes(made: Any, weights: str = "bf16") -> int:
    """Bytes of the weights of a config's model, without making it; linear layers in 8 bits for "int8"."""
    from transformers import AutoModelForCausalLM

    check_known(weights)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)
    total = 0
    linear = {id(m.weight): m for m in model.modules() if isinstance(m, torch.nn.Linear)}
    for parameter in model.parameters():
        if weights != "bf16" and id(parameter) in linear:
            bits = {"int8": 8, "int4": 4}[weights]
            # A row has an fp32 scale and an 8-bit zero point; 128 weights of 4 bits have both in 16 bits.
            scales = 5 * parameter.shape[0] if bits == 8 else 4 * (parameter.numel() // 128)
            total += parameter.numel() * bits // 8 + scales
        else:
            total += parameter.nbytes
    return total + sum(buffer.nbytes for buffer in model.buffers())


def check_known(weights: str) -> None:
    """Raise ValueError unless the bytes of this precision can be estimated."""
    if weights not in ("bf16", "int8", "int4"):
        raise ValueError(f"--weights must be one of bf16, int8, int4, got {weights!r}")


def kv_geometry(made: Any) -> tuple[int, int]:
    """Layers and KV heads of a config whose layers are alike."""
    shapes = layer_shapes(made)
    return len(shapes), shapes[0].num_kv_heads


def even_heads(shapes: Sequence[LayerShape], ratio: float) -> list[list[int]]:
    """Retrieval heads of every layer, spread evenly over the gated ones: ``ratio`` of their heads, rounded half up.

    A layer with a native window keeps all of its heads, which hold no more than that window.

    Raises:
        ValueError: a ratio outside of [0, 1].
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"--retrieval-ratio must lie in [0, 1], got {ratio}")
    gated = sum(shape.num_kv_heads for shape in shapes if shape.gated)
    total = int(ratio * gated + 0.5)
    found, seen, given = [], 0, 0
    for shape in shapes:
        if not shape.gated:
            found.append(list(range(shape.num_kv_heads)))
            continue
        seen += shape.num_kv_heads
        count = total * seen // gated - given
        given += count
        found.append(list(range(count)))
    return found


def _torchao() -> Any:
    try:
        from torchao import quantization
    except ImportError as error:
        raise ValueError(
            "--weights int8 needs torchao; install it with: pip install 'duohead[ao]'"
        ) from error
    return quantization


def _quantize(model: PreTrainedModel) -> None:
    ao = _torchao()
    ao.quantize_(model, ao.Int8WeightOnlyConfig(version=2))


def _stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes that a tensor takes; those of its parts for a quantised one."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return tensor.nbytes
    names, _ = flatten()
    return sum(_stored_bytes(getattr(tensor, name)) for name in names)

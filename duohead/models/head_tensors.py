"""Which tensors of an attention layer hold something for each KV head, and along which axis.

Moving a head is right only if everything that it owns moves with it, so every parameter and buffer of an attention
module has to be known here by name and shape, and one that is not refuses the whole model. `head_tensors` only looks;
`duohead.models.reorder` moves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from duohead.shapes import LayerShape

INPUTS = ("q_proj", "k_proj", "v_proj")
OUTPUTS = ("o_proj", "out_proj", "dense")
GATES = ("g_proj", "gate_proj")
NORMS = {
    **dict.fromkeys(("q_norm", "q_layernorm", "q_layer_norm", "query_layernorm"), "q_proj"),
    **dict.fromkeys(("k_norm", "k_layernorm", "k_layer_norm", "key_layernorm"), "k_proj"),
}
PER_QUERY_HEAD = ("sinks", "gate_bias")
INSTEAD = "duo(model, policy) indexes heads and needs no reordering"


@dataclass(frozen=True)
class HeadTensor:
    """A tensor along whose ``axis`` the shares of a layer's KV heads lie one after the other."""

    tensor: Tensor
    axis: int


@dataclass(frozen=True)
class HeadLayer:
    """What has to move together in one decoder layer: the tensors of its attention module."""

    index: int
    attention: nn.Module
    tensors: tuple[HeadTensor, ...]


def head_tensors(model: nn.Module, shapes: tuple[LayerShape, ...]) -> tuple[HeadLayer, ...]:
    """Every layer with KV heads, looked at as a whole before anybody moves anything.

    Args:
        model: a transformers model.
        shapes: the geometry of its layers.

    Raises:
        ValueError: something of a layer cannot be moved, or is not known; the message names it.
    """
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int):
            owners.setdefault(index, []).append((name, module))
    uses = _uses(model)
    layers = []
    for index, shape in enumerate(shapes):
        if shape.num_kv_heads:
            name, attention = _attention(index, owners.get(index, []))
            tensors = tuple(_layer_tensors(name, attention, shape, uses))
            layers.append(HeadLayer(index, attention, tensors))
    return tuple(layers)


def _attention(index: int, owners: list[tuple[str, nn.Module]]) -> tuple[str, nn.Module]:
    """The one module of a layer that projects queries, keys and values apart."""
    found = [(name, module) for name, module in owners if "k_proj" in module._modules]
    if len(found) == 1:
        return found[0]
    if len(found) > 1:
        names = " and ".join(name for name, _ in found)
        raise _refusal(f"layer {index}", f"has more than one attention module ({names})")
    for name, module in owners:
        parts = [part for part, child in module.named_children() if _has_weights(child)]
        if parts:
            kind = type(module).__name__
            raise _refusal(
                name,
                f"({kind}) must have q_proj, k_proj and v_proj apart, got {', '.join(parts)} (fused, or laid out in "
                f"a way that is not known)",
            )
    raise _refusal(
        f"layer {index}", "has no attention module with q_proj, k_proj and v_proj and a layer_idx"
    )


def _layer_tensors(
    name: str, attention: nn.Module, shape: LayerShape, uses: Counter[object]
) -> Iterator[HeadTensor]:
    output = next((part for part in OUTPUTS if part in attention._modules), OUTPUTS[0])
    for part in (*INPUTS, *(gate for gate in GATES if gate in attention._modules)):
        _plain_linear(f"{name}.{part}", attention._modules.get(part))
    projection = _plain_linear(f"{name}.{output}", attention._modules.get(output))
    heads = projection.weight.shape[1] // shape.value_dim
    kv_heads = shape.num_kv_heads
    if heads == 0 or heads % kv_heads:
        raise _refusal(
            f"{name}.{output}",
            f"must take whole groups of {kv_heads} KV heads, got {heads} query heads",
        )
    lengths: dict[str, tuple[int, ...]] = {
        "q_proj": (heads * shape.head_dim,),
        "k_proj": (kv_heads * shape.head_dim,),
        "v_proj": (kv_heads * shape.value_dim,),
        output: (heads * shape.value_dim,),
        **dict.fromkeys(GATES, (heads, heads * shape.value_dim)),
        **dict.fromkeys(PER_QUERY_HEAD, (heads,)),
    }
    for local, tensor in _all_tensors(attention):
        part, _, leaf = local.partition(".")
        label = f"{name}.{local}"
        if part in NORMS and leaf in ("weight", "bias"):
            axis = _norm_axis(tensor, shape.head_dim, lengths[NORMS[part]][0], label)
        elif part in lengths and leaf in ("", "weight", "bias"):
            if part == output and leaf == "bias":  # one value per hidden channel, not per head
                continue
            axis = int(part == output)
            if tensor.shape[axis] not in lengths[part]:
                expected = " or ".join(str(length) for length in lengths[part])
                raise _refusal(
                    label,
                    f"must have {expected} entries along axis {axis} for {heads} query and {kv_heads} KV heads, got "
                    f"{tensor.shape[axis]}",
                )
        else:
            raise _refusal(label, f"{tuple(tensor.shape)} is not known, and may belong to heads")
        if axis is not None:
            _check_plain(label, tensor)
            if uses[_place(tensor)] > 1:
                raise _refusal(label, "is shared with another module")
            yield HeadTensor(tensor, axis)


def _norm_axis(tensor: Tensor, head_dim: int, width: int, label: str) -> int | None:
    """Axis of the heads in a norm of queries or keys: None where all heads share its weights."""
    if tensor.shape == (head_dim,):
        return None
    if tensor.shape in ((width,), (width // head_dim, head_dim)):
        return 0
    raise _refusal(
        label,
        f"must have {head_dim} or {width} entries (one head or all of them), got {tuple(tensor.shape)}",
    )


def _plain_linear(label: str, module: nn.Module | None) -> nn.Linear:
    if module is None:
        raise _refusal(label, "does not exist")
    kind = type(module).__name__
    if hasattr(module, "base_layer"):
        raise _refusal(
            label, f"is wrapped by an adapter ({kind})", "merge it first (merge_and_unload)"
        )
    if type(module) is not nn.Linear:
        raise _refusal(label, f"must be a plain torch.nn.Linear, got {kind}")
    if "weight" not in module._parameters:
        raise _refusal(f"{label}.weight", "is not a parameter of its own (computed, or sharded)")
    return module


def _check_plain(label: str, tensor: Tensor) -> None:
    if type(tensor) not in (nn.Parameter, Tensor):
        kind = type(tensor).__name__
        raise _refusal(
            label,
            f"is a {kind} (quantised or sharded)",
            "reorder first, then quantise or shard",
        )
    if tensor.is_meta:
        raise _refusal(
            label, "is on the meta device (not loaded, or offloaded)", "load the whole model"
        )
    if tensor.is_inference():
        raise _refusal(
            label,
            "was made in torch.inference_mode and cannot be changed",
            "load the model outside of it",
        )


def _all_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _uses(model: nn.Module) -> Counter[object]:
    """How many names each piece of memory has in the model."""
    return Counter(_place(tensor) for _, tensor in _all_tensors(model))


def _place(tensor: Tensor) -> object:
    """Where a tensor lies; one without memory of its own is known by itself."""
    if type(tensor) not in (nn.Parameter, Tensor) or tensor.is_meta or not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.data_ptr()


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _refusal(label: str, what: str, remedy: str | None = None) -> ValueError:
    first = f"{remedy}; or leave the heads where they are: " if remedy else ""
    return ValueError(f"cannot reorder heads: {label} {what}; {first}{INSTEAD}")

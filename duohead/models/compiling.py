"""What `torch.compile` does for the engine, and how chunks of a prompt run without it: in slices.

A decode step and a chunk of the prompt can be compiled as a whole, attention in them as one operation a layer; that
takes a minute or two and is for many texts. Otherwise the row-wise parts of a layer (norms, feed-forward) take a chunk
in slices, which bounds their temporaries, and keeps those of norms in the cache of a GPU; for a long prompt they are
compiled each on its own, in seconds, since all layers share their code. Inductor keeps kernels and graphs on disk
(`TORCHINDUCTOR_CACHE_DIR`, by default in the temporary folder), so that a second process compiles less.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from duohead import attention
from duohead.models.hooks import PLAN

# Every engine compiles the same few functions for its own cache and buffers, which dynamo counts as recompiling.
VARIANTS = 256
# Rows (tokens of all rows of a batch) of a slice of a feed-forward network: many enough for full speed, few enough for
# temporaries of 1 GiB.
SLICE_ROWS = 8192
# Bytes of a slice of a norm, whose passes over it, some of them in fp32, then read and write a GPU's L2 cache.
NORM_BYTES = 8 << 20
# Tokens (of all rows) of a prompt whose row-wise parts compile="auto" compiles on a GPU; None for never. On an H100 the
# seconds of compiling came back after 2.3 M tokens of Llama-3-8B, those of compiling whole chunks after 1.8 M.
LONG_PROMPT: int | None = 1 << 21


def compiled_step(function: Callable[..., Any], *, rows: int) -> Callable[..., Any]:
    """Compile a decode step: one graph, fixed shapes.

    With a single row, products with the weights are matrix times vector; inductor writes and tunes kernels for those
    that read the weights faster than the library's, and fuses norms, activations and residuals into them.
    """
    options: dict[str, Any] = {"coordinate_descent_tuning": True} if rows == 1 else {}
    compiled = torch.compile(function, fullgraph=True, dynamic=False, options=options)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=VARIANTS):
            return compiled(*args)

    return call


def compiled_chunks(model: Any) -> Callable[..., Any]:
    """Compile the forward of a chunk into a static cache: one graph for any length; single tokens run as they are."""
    compiled = torch.compile(model, fullgraph=True)

    def call(**inputs: Any) -> Any:
        if inputs["input_ids"].shape[1] == 1:
            return model(**inputs)
        for name in {"input_ids", "position_ids"} & inputs.keys():
            # A slice of a prompt has the prompt's length as a stride, even of a single row, where it counts as
            # contiguous; that would be another graph for every prompt.
            inputs[name] = inputs[name].clone(memory_format=torch.contiguous_format)
            torch._dynamo.maybe_mark_dynamic(inputs[name], 1)
        mask = inputs.get("attention_mask")
        if mask is not None:
            # Only the padding at the left is read, so one length serves every chunk.
            rest = inputs["past_key_values"].max_length - mask.shape[1]
            inputs["attention_mask"] = functional.pad(mask, (0, rest), value=1)
        with torch._dynamo.config.patch(recompile_limit=VARIANTS):
            return compiled(**inputs)

    return call


def is_one_graph(model: nn.Module, device: torch.device) -> bool:
    """Whether a chunk can be compiled as a whole: the model promises it, and attention is an operation, not a loop."""
    impls = {plan.impl for module in model.modules() if (plan := getattr(module, PLAN, None))}
    promised = bool(getattr(model, "_can_compile_fullgraph", False))
    return promised and all(
        attention.choose(impl, device.type, index=device.index) in attention.KERNELS
        for impl in impls
    )


def is_long(tokens: int, device: torch.device) -> bool:
    """Whether a prompt of ``tokens`` tokens (of all rows) is worth compiling its row-wise parts without being asked."""
    return device.type == "cuda" and LONG_PROMPT is not None and tokens >= LONG_PROMPT


@contextmanager
def in_slices(model: nn.Module, *, compiled: bool) -> Iterator[None]:
    """Inside the block, the row-wise modules of ``model`` take long chunks in slices; on leaving, it is as it was.

    ``compiled`` ones are compiled for any length, which fuses a norm into one pass without temporaries, so that it
    needs no slices.
    """
    modules = row_wise(model)
    before = [vars(module).get("forward") for module in modules]
    for module in modules:
        norm = not any(True for _ in module.children())
        forward = torch.compile(module.forward, dynamic=True) if compiled else module.forward
        if not norm:
            module.forward = _sliced(forward, _feed_forward_step)
        else:
            module.forward = forward if compiled else _sliced(forward, _norm_step)
    try:
        with torch._dynamo.config.patch(recompile_limit=VARIANTS):
            yield
    finally:
        for module, own in zip(modules, before, strict=True):
            del module.forward
            if own is not None:
                module.forward = own


def _feed_forward_step(x: Tensor) -> int:
    return max(1, SLICE_ROWS // x.shape[0])


def _norm_step(x: Tensor) -> int:
    return max(1, NORM_BYTES * x.shape[1] // x.nbytes)


def _sliced(forward: Callable[..., Any], step_of: Callable[[Tensor], int]) -> Callable[..., Any]:
    """``forward`` of x [B, T, ...] in pieces of about equal length, at most ``step_of(x)`` along T."""

    @functools.wraps(forward)
    def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        length = x.shape[1] if x.ndim > 2 and x.numel() else 0
        count = -(-length // step_of(x)) if length else 0
        if args or kwargs or count < 2:
            return forward(x, *args, **kwargs)
        out: Tensor | None = None
        # None is much shorter than the others: a piece of a single row would be compiled anew.
        bounds = [index * length // count for index in range(count + 1)]
        for start, stop in itertools.pairwise(bounds):
            part: Tensor = forward(x[:, start:stop])
            if out is None:
                out = part.new_empty(*part.shape[:1], length, *part.shape[2:])
            out[:, start:stop] = part
        return out

    return call


def row_wise(model: nn.Module) -> list[nn.Module]:
    """Modules that treat every token alone: norms and feed-forward networks, in layers that also hold attention.

    Told by their names, because only those promise it. Mixtures of experts are left out: which rows meet in a product
    depends on the data.
    """
    found: dict[nn.Module, None] = {}
    for layer in model.modules():
        mixers = [child for child in layer.children() if _mixes(child)]
        beside = list(layer.children()) if mixers else []
        within = [child for mixer in mixers for child in mixer.children()]
        found |= dict.fromkeys(child for child in beside + within if _is_row_wise(child))
    return list(found)


def _mixes(module: nn.Module) -> bool:
    """Whether a module mixes tokens: attention and its like know which layer of the cache is theirs."""
    return isinstance(getattr(module, "layer_idx", None), int)


def _is_row_wise(module: nn.Module) -> bool:
    if not type(module).__name__.endswith(("RMSNorm", "LayerNorm", "MLP", "Mlp", "FeedForward")):
        return False
    return not any("Expert" in type(part).__name__ for part in module.modules())

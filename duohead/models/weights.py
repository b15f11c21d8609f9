"""Where a model's weights are, which a captured CUDA graph takes for granted.

A graph reads addresses: after weights were replaced or moved, or adapters switched, it would go on with the old ones
without an error. An engine keeps the `fingerprint` of its model and compares before it runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def fingerprint(model: Any) -> tuple[Any, ...]:
    """Where the weights are and which adapters are on: what a captured graph takes for granted."""
    tensors = (*model.parameters(), *model.buffers())
    adapters = tuple(
        (
            str(getattr(module, "active_adapters", "")),
            bool(getattr(module, "disable_adapters", False)),
            bool(getattr(module, "merged", False)),
        )
        for module in model.modules()
        if hasattr(module, "active_adapters")
    )
    return tuple(_address(tensor) for tensor in tensors), adapters


def _address(tensor: Tensor) -> int:
    """Where a weight lies; quantised ones are made of several tensors, so what counts is which object they are."""
    made_of_several: bool = is_traceable_wrapper_subclass(tensor)
    return id(tensor) if made_of_several else tensor.data_ptr()


def single_device(model: Any) -> torch.device:
    """The device of all weights.

    Raises:
        ValueError: there are several.
    """
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if len(places) > 1:
        raise ValueError(
            f"the engine needs the model on one device, got {', '.join(sorted(places))}; use model.generate"
        )
    device: torch.device = model.device
    return device

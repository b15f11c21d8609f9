"""Which implementation does a call: what was asked for, what the machine has, what a kernel can do.

"auto" takes the fastest that is there and says so once in the log, also when a kernel cannot do a call and the next one
has to; an explicit name is met or raises, with the reason and the remedy.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from duohead.cache.view import HeadView

logger = logging.getLogger(__name__)
IMPLEMENTATIONS = ("auto", "reference", "tiled", "triton", "hopper", "cute")


@dataclass(frozen=True)
class Kernels:
    """The modules of one implementation whose prefill kernels take a band, or every token; the best comes first."""

    band: tuple[str, ...]
    full: tuple[str, ...]


KERNELS = {
    "triton": Kernels(band=("triton_prefill",), full=("triton_prefill",)),
    "hopper": Kernels(band=("hopper_prefill",), full=("hopper_prefill",)),
    "cute": Kernels(band=("hopper_prefill", "triton_prefill"), full=("cute_prefill",)),
}
MAX_DECODE_TOKENS = 8
BEST_FIRST = ("cute", "hopper", "triton")
FLASH_ATTENTION = "flash_attn.cute"


class Kernel(Protocol):
    """A module with a prefill kernel."""

    def supports(
        self, query: Tensor, view: HeadView, *, softcap: float | None, sink_logits: Tensor | None
    ) -> str | None:
        """None if it can attend to this view, else why not."""

    def attend(
        self,
        query: Tensor,
        view: HeadView,
        out: Tensor,
        *,
        scale: float,
        softcap: float | None,
        sink_logits: Tensor | None,
        kv_heads: int,
    ) -> None:
        """Write the view's heads into ``out`` [B, Q, H, Dv] for ``query`` [B, H, Q, D] of ``kv_heads`` KV heads."""


def check_impl(impl: str) -> None:
    """Raise ValueError unless ``impl`` is a known name."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")


def choose(impl: str, device: str, *, index: int | None = None) -> str:
    """The implementation that ``impl`` means on a device; what "auto" chooses is logged once.

    Args:
        impl: one of `IMPLEMENTATIONS`.
        device: type of the device ("cpu", "cuda").
        index: which of that type; None for the current one.

    Raises:
        ValueError: unknown ``impl``, or one that this machine cannot run.
    """
    check_impl(impl)
    if impl == "auto":
        name = _best(device, index)
        if not torch.compiler.is_compiling():
            log_once(f"attention on {device}: impl={name}")
        return name
    reason = _missing(impl, device, index)
    if reason is not None:
        raise ValueError(f"impl={impl!r} cannot run here: {reason}")
    return impl


def kernel_for(
    query: Tensor,
    view: HeadView,
    *,
    name: str,
    impl: str,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Kernel | None:
    """The kernel for a view under the chosen implementation ``name``; None if "auto" has none for it.

    Raises:
        ValueError: an explicit ``impl`` whose kernels cannot do this; the message says why.
    """
    kernels = KERNELS[name]
    modules = kernels.full if view.reach is None else kernels.band
    if impl == "auto":
        modules = tuple(dict.fromkeys((*modules, *KERNELS["triton"].full)))
    reasons: list[str] = []
    for module in modules:
        kernel: Kernel = _module(module)
        reason = kernel.supports(query, view, softcap=softcap, sink_logits=sink_logits)
        if reason is None:
            if reasons:
                log_once(f"attention by {module}: {'; '.join(reasons)}")
            return kernel
        reasons.append(f"{module}: {reason}")
    accept("; ".join(reasons), name, impl)
    return None


def accept(reason: str | None, name: str, impl: str) -> bool:
    """Whether there is no ``reason`` against ``name``; one is logged once under "auto".

    Raises:
        ValueError: there is a reason and ``name`` was asked for.
    """
    if reason is None:
        return True
    if impl != "auto":
        raise ValueError(
            f"impl={impl!r} cannot do this call: {reason}; use impl='auto' to take what can"
        )
    log_once(f"attention without {name}: {reason}")
    return False


@torch.compiler.assume_constant_result
def _best(device: str, index: int | None) -> str:
    """The fastest implementation that this machine has."""
    # The interpreter is for tests, which ask for it by name.
    if device == "cpu":
        return "tiled"
    return next((name for name in BEST_FIRST if _missing(name, device, index) is None), "tiled")


@torch.compiler.assume_constant_result
def _missing(name: str, device: str, index: int | None) -> str | None:
    """What ``name`` needs and does not find, with the remedy; None if nothing."""
    if name not in KERNELS:
        return None
    if not _installed("triton"):
        return "Triton is not installed; use a CUDA or ROCm build of torch, or impl='tiled'"
    if device == "cpu":
        if name == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "the tensors are on the CPU; move the model to a GPU, or use impl='tiled'"
    if device != "cuda":
        return f"there are no kernels for {device!r}; use impl='tiled'"
    if name == "triton":
        return None
    major = 0 if torch.version.hip else torch.cuda.get_device_capability(index)[0]
    if name == "hopper":
        if major != 9:
            return "it needs a Hopper GPU; use impl='triton'"
        found: str | None = _module("hopper_launch").missing(
            torch.cuda.current_device() if index is None else index
        )
        if found is not None:
            log_once(f"attention without hopper: {found}")
        return found
    if major not in (9, 10):
        return "it needs a Hopper or Blackwell data-center GPU; use impl='triton'"
    if not _installed(FLASH_ATTENTION):
        return "flash-attn-4 is not installed; pip install 'duohead[cuda]', or use impl='triton'"
    return None


@functools.cache
def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # a parent of it is not there
        return False


@functools.cache
def _module(name: str) -> Any:
    return importlib.import_module(f"duohead.attention.{name}")


@functools.cache
def log_once(message: str) -> None:
    """Log a choice, the first time it is made."""
    logger.info(message)

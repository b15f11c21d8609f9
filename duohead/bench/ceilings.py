"""What this machine can do at most, measured: how fast memory is read, and how fast matrices are multiplied.

A share of a data sheet's number says little, since no program reaches it; a share of what the plainest kernel reaches
here and now says how much is left. `ceilings(device)` measures once per process; every record carries the result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from duohead.bench.timing import measure, measure_rotated

GPU_READ_BYTES = 2 * 2**30
CPU_READ_BYTES = 2**27
MATMUL_SIZE = {"cuda": 8192, "cpu": 512}


@dataclass(frozen=True)
class Ceilings:
    """Measured limits of one device.

    Attributes:
        read_gb_per_s: best rate at which memory was read, in 10**9 bytes per second.
        read_by: the operation that reached it.
        matmul_tflop_per_s: rate of one large matrix product in ``matmul_dtype``.
        matmul_dtype: its dtype.
        cache_bytes: size of the GPU's L2 cache; 0 on a CPU.
    """

    read_gb_per_s: float
    read_by: str
    matmul_tflop_per_s: float
    matmul_dtype: str
    cache_bytes: int

    def numbers(self) -> dict[str, float | str]:
        """For a record."""
        return {
            "read_ceiling_gb_per_s": self.read_gb_per_s,
            "read_ceiling_by": self.read_by,
            "matmul_ceiling_tflop_per_s": self.matmul_tflop_per_s,
            "matmul_ceiling_dtype": self.matmul_dtype,
        }


@functools.cache
def ceilings(device: torch.device) -> Ceilings:
    """The limits of ``device``, measured at the first call (about a second on a GPU)."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rates = _read_rates(device)
    best = max(rates, key=lambda name: rates[name])
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return Ceilings(
        read_gb_per_s=rates[best],
        read_by=best,
        matmul_tflop_per_s=_matmul_rate(device, dtype),
        matmul_dtype=str(dtype).removeprefix("torch."),
        cache_bytes=cache,
    )


def _read_rates(device: torch.device) -> dict[str, float]:
    """10**9 bytes per second of several plain ways to read much memory; the copy counts what it writes as well."""
    size = GPU_READ_BYTES if device.type == "cuda" else CPU_READ_BYTES
    x = torch.zeros(size // 4, dtype=torch.float32, device=device)
    half = x.numel() // 2
    ways: dict[str, Callable[[], object]] = {
        "sum": x.sum,
        "row sums": lambda: x.view(-1, 2**14).sum(1),
        "sums of long rows": lambda: x.view(-1, 2**16).sum(1),
        "row maxima": lambda: x.view(-1, 2**14).amax(1),
        "copy": lambda: x[:half].copy_(x[half:]),
        "dot product": lambda: torch.dot(x[:half], x[half:]),
    }
    # Several in a row, as attention is timed too, so that the start of one hides behind the end of another.
    return {
        name: x.nbytes / 1e6 / measure_rotated([call], device=device, seconds=0.05).median_ms
        for name, call in ways.items()
    }


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    size = MATMUL_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = 0.2 if device.type == "cuda" else 0.02
    return 2 * size**3 / 1e9 / measure(lambda: a @ b, device=device, seconds=seconds).median_ms

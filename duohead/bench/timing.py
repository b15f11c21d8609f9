"""The clock: warm-up apart, then the median with its spread, on a CPU or a GPU.

A median with p20 and p80 says what a mean hides, and the same function times every competitor in one process. Use
`measure(lambda: attend(...), device=query.device)`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds: median, 20th and 80th percentile of ``runs`` runs, and the first (warm-up) run."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    first_ms: float
    runs: int


def measure(
    call: Callable[[], object], *, device: torch.device, seconds: float = 2.0, least: int = 5
) -> Timing:
    """Time ``call`` for about ``seconds``, at least ``least`` runs, after one warm-up run.

    Raises:
        ValueError: fewer than one run asked for.
    """
    if least < 1:
        raise ValueError(f"least must be at least 1 run, got {least}")
    clock = _gpu_run if device.type == "cuda" else _cpu_run
    first = clock(call)
    times: list[float] = []
    while len(times) < least or sum(times) < 1000 * seconds:
        times.append(clock(call))
    times.sort()
    spread = (
        statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else [times[0]] * 4
    )
    return Timing(statistics.median(times), spread[0], spread[3], first, len(times))


def _cpu_run(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - started)


def _gpu_run(call: Callable[[], object]) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)

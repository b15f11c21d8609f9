"""The clock: warm-up and compilation apart, then the median with its spread, on a CPU or a GPU.

A median with p20 and p80 says what a mean hides, and the same functions time every competitor in one process. Use
`measure(call, device=...)` for work that lasts milliseconds and `measure_rotated(calls, device=...)` for short kernels,
which go many times into one CUDA graph, since launching one from Python costs more than it runs.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

Result = TypeVar("Result")

logger = logging.getLogger(__name__)
# A replay this long hides the cost of starting it; longer calls gain nothing from a graph.
REPLAY_MS = 2.0
MAX_GRAPH_CALLS = 256


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: median, 20th and 80th percentile of ``runs`` runs, and the first call, which may compile.

    ``graph_calls`` is the number of calls that a run is the mean of, captured in one CUDA graph; 0 without a graph.
    """

    median_ms: float
    p20_ms: float
    p80_ms: float
    first_ms: float
    runs: int
    graph_calls: int = 0


def measure(
    call: Callable[[], object], *, device: torch.device, seconds: float = 2.0, least: int = 5
) -> Timing:
    """Time ``call`` for about ``seconds``, at least ``least`` runs, after one warm-up run.

    Raises:
        ValueError: fewer than one run asked for.
    """
    clock = _clock(device)
    first = clock(call)
    return timing_of(_runs(call, clock, seconds, least), first_ms=first)


def measure_rotated(
    calls: Sequence[Callable[[], object]],
    *,
    device: torch.device,
    seconds: float = 0.3,
    least: int = 5,
    first_ms: float | None = None,
) -> Timing:
    """Time one of several equal calls on different inputs, taken in turn so that no input waits in a cache.

    On a GPU, calls shorter than REPLAY_MS are captured in a CUDA graph that goes through all of them at least once.
    What cannot be captured runs as often one after the other; ``graph_calls`` is 0 then, and the log says why.

    Args:
        calls: the same work on different memory; enough of them that what lies between two uses of the same input
            exceeds the L2 cache (`input_sets`).
        device: where the work runs.
        seconds: about how long to measure.
        least: runs to take at least.
        first_ms: how long the very first call took, if it has been made already (`first_run`).

    Raises:
        ValueError: no call, or fewer than one run asked for.
    """
    if not calls:
        raise ValueError("calls must hold at least one call, got none")
    clock = _clock(device)
    once = clock(calls[0])
    first = once if first_ms is None else first_ms
    warm = statistics.median([clock(calls[index % len(calls)]) for index in range(1, 4)])
    if device.type != "cuda" or warm > REPLAY_MS:
        turn = _in_turn(calls)
        return timing_of(_runs(turn, clock, seconds, least), first_ms=first)
    rounds = math.ceil(REPLAY_MS / max(warm, REPLAY_MS / MAX_GRAPH_CALLS) / len(calls))
    count = rounds * len(calls)
    replay, captured = _captured(calls, rounds)
    clock(replay)
    times = [run / count for run in _runs(replay, clock, seconds, least)]
    return timing_of(times, first_ms=first, graph_calls=count if captured else 0)


def first_run(call: Callable[[], Result], *, device: torch.device) -> tuple[Result, float]:
    """What the first call gives, and its milliseconds by the wall clock, in which a kernel may be compiled."""
    started = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, 1000 * (time.perf_counter() - started)


def timing_of(times: Sequence[float], *, first_ms: float, graph_calls: int = 0) -> Timing:
    """The summary of measured times in milliseconds."""
    times = sorted(times)
    spread = (
        statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else [times[0]] * 4
    )
    return Timing(statistics.median(times), spread[0], spread[3], first_ms, len(times), graph_calls)


def input_sets(bytes_read: int, cache_bytes: int, *, most: int = 16) -> int:
    """Input sets to take turns with, so that more than twice the cache is read before a set comes again."""
    return min(most, 1 + math.ceil(2 * cache_bytes / max(bytes_read, 1)))


def _captured(
    calls: Sequence[Callable[[], object]], rounds: int
) -> tuple[Callable[[], object], bool]:
    """Every call ``rounds`` times as one, and whether that is a graph; nothing compiles during the capture."""

    def everything() -> None:
        for _ in range(rounds):
            for call in calls:
                call()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            everything()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        logger.warning("timed without a CUDA graph: %s", " ".join(str(error).split())[:200])
        torch.cuda.synchronize()
        return everything, False
    return graph.replay, True


def _in_turn(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    place = -1

    def turn() -> object:
        nonlocal place
        place = (place + 1) % len(calls)
        return calls[place]()

    return turn


def _runs(
    call: Callable[[], object], clock: Callable[..., float], seconds: float, least: int
) -> list[float]:
    if least < 1:
        raise ValueError(f"least must be at least 1 run, got {least}")
    times: list[float] = []
    while len(times) < least or sum(times) < 1000 * seconds:
        times.append(clock(call))
    return times


def _clock(device: torch.device) -> Callable[[Callable[[], object]], float]:
    return _gpu_run if device.type == "cuda" else _cpu_run


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

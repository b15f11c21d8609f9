"""Made-up records and training logs, as lines of JSON, for the tests of the report."""

from __future__ import annotations

import json
from typing import Any

HARDWARE = {"cpu": "a processor", "cores": 2}


def line(op: str, impl: str = "", **parts: Any) -> str:
    """One record as JSON; `shape` and `numbers` are what matters."""
    entry = {
        "op": op,
        "impl": impl,
        "shape": {},
        "numbers": {},
        "dtype": "float32",
        "policy": None,
        "hardware": HARDWARE,
        "versions": {"duohead": "0.1.0"},
        "commit": "abc",
        "time": "2026-11-21T01:00:00+00:00",
    }
    return json.dumps({**entry, **parts}) + "\n"


def answer(method: str, ratio: float, score: float, taken: int, **shape: Any) -> str:
    shape = {"model": "m", "task": "find", "task_version": 1, "retrieval_ratio": ratio, **shape}
    numbers = {"exact_match": score, "answers": 10, "kv_bytes": taken, "token_seconds": 0.25}
    return line("evaluate.suite", method, shape=shape, numbers=numbers)


def log_of(steps: int, gates: int) -> str:
    """A log in which every other gate falls; gates stand in every second line."""
    lines = []
    for step in range(steps):
        fallen = 1 - step / steps
        numbers = {"loss": 2.0 * fallen, "distill": fallen, "mean_gate": 0.5, "lr": 0.1}
        values = [fallen if gate % 2 == 0 else 1.0 for gate in range(gates)]
        entry = {"step": step, **numbers, **({} if step % 2 else {"gates": values})}
        lines.append(json.dumps(entry) + "\n")
    return "".join(lines)

"""Put times that were taken alone on a GPU into needle records whose accuracy was measured beside other work.

Scores and bytes do not depend on who else uses the GPU, times do; so a long run goes with `--speed-tokens 0` and a
short one (`--depths 1 --samples 1 --tasks needle`, the same methods and lengths) has the machine for itself. Run
`python -m tools.needle_times SCORED TIMED` to write the times into SCORED.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from duohead.bench.figures import machine
from duohead.evaluate.results import OP
from duohead.record import read_records
from tools.finding_records import Records, rewrite

TIMES = ("ttft_ms", "tpot_ms", "engine")
# What a time depends on, and what says that both were made by the same code on the same kind of machine.
_SHAPE = ("model", "length", "chunk")
_MADE = ("impl", "dtype", "policy", "versions", "commit")


def with_times(scored: Records, timed: Records) -> list[dict[str, Any]]:
    """The records ``scored``, those of needles with the times of the same method, policy and length in ``timed``.

    Raises:
        ValueError: no time for a record: none of that method and length, or one of another machine or commit.
    """
    times = {_key(entry): entry["numbers"] for entry in timed if entry["op"] == OP}
    return [_timed(entry, times) if entry["op"] == OP else entry for entry in scored]


def _timed(entry: dict[str, Any], times: dict[str, dict[str, Any]]) -> dict[str, Any]:
    found = times.get(_key(entry))
    if found is None:
        shape = entry["shape"]
        raise ValueError(
            f"times must be of every method and length, got none of {entry['impl']} of {shape['model']} at "
            f"{shape['length']} tokens in {entry['dtype']} from commit {entry['commit']} on the same kind of machine; "
            "take them with the code and on the machine that the scores are from"
        )
    return {**entry, "numbers": {**entry["numbers"], **{name: found[name] for name in TIMES}}}


def _key(entry: dict[str, Any]) -> str:
    made = [machine(entry), *(entry[name] for name in _MADE)]
    return json.dumps([made, [entry["shape"].get(name) for name in _SHAPE]], sort_keys=True)


def join(scored: str | os.PathLike[str], timed: str | os.PathLike[str]) -> int:
    """Write the times of one file into the other; how many records it holds."""
    entries = with_times(read_records(scored), read_records(timed))
    rewrite(scored, entries)
    return len(entries)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tools.needle_times", description=__doc__)
    parser.add_argument("scored", metavar="SCORED", help="records to complete")
    parser.add_argument("timed", metavar="TIMED", help="records of the short run")
    args = parser.parse_args()
    print(f"{args.scored}: {join(args.scored, args.timed)} records")


if __name__ == "__main__":
    main()

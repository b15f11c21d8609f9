"""`duohead evaluate KIND`: what a choice of heads is worth; one kind, one module beside this one.

Needles and prose are our own measurements, `compare` sets ways to find heads against one another, `lm-eval` runs the
tasks of lm-evaluation-harness. Every kind takes a model and policies and writes records that `duohead report` draws.
"""

from __future__ import annotations

import argparse

from duohead.cli import evaluate_compare, evaluate_lm_eval, evaluate_needle, evaluate_prose

KINDS = {
    "needle": evaluate_needle,
    "prose": evaluate_prose,
    "compare": evaluate_compare,
    "lm-eval": evaluate_lm_eval,
}
FLAGS = tuple(flag for module in KINDS.values() for flag in module.FLAGS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of every kind (listed in FLAGS)."""
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    for module in KINDS.values():
        module.add_arguments(kinds)


def run(args: argparse.Namespace) -> int:
    """Run the kind that was asked for."""
    return KINDS[args.kind].run(args)

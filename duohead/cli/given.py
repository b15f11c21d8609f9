"""Which flags a person typed, so that one that would be ignored is refused instead.

A default and the same value given on purpose look alike after parsing; only the second can contradict another flag.
Make flags with ``action=Given`` and ask `given(args)`, or let `refuse` and `refuse_unless` ask.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterable
from typing import Any


class Given(argparse.Action):
    """Stores a value as argparse does by itself, and remembers the flag."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Called by argparse for every value that was typed."""
        setattr(namespace, self.dest, values)
        if option_string is not None:
            namespace.given = (*given(namespace), option_string)


def given(args: argparse.Namespace) -> tuple[str, ...]:
    """The flags made with `Given` that were typed, in their order."""
    return getattr(args, "given", ())


def refuse(args: argparse.Namespace, flags: Collection[str], why: str) -> None:
    """Raise ValueError if one of ``flags`` was typed; ``why`` says what it would be ignored for and what to do."""
    found = [flag for flag in dict.fromkeys(given(args)) if flag in flags]
    if found:
        raise ValueError(f"{', '.join(found)}: {why}")


def refuse_unless(
    args: argparse.Namespace, flag: str, *, chosen: Iterable[str], suits: Collection[str], by: str
) -> None:
    """Raise ValueError if ``flag`` was typed but none of ``chosen``, the values of ``by``, takes notice of it."""
    if not set(chosen) & set(suits):
        names = " or ".join(suits)
        refuse(
            args, (flag,), f"of no use here, only with {by} {names}; leave it out or change {by}"
        )

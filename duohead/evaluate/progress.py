"""A progress bar on standard error, one step per scored sample, with the method's name beside it.

Use `with bar("accuracy", total, shown=True) as advance:` and call `advance(method)`; `evaluate_needle` takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(title: str, total: int, *, shown: bool) -> Iterator[Callable[[str], None]]:
    """A bar of `total` steps that says `title`, or nothing if not `shown`."""
    from tqdm import tqdm

    with tqdm(
        total=total, desc=f"{title:<13}", unit="pass", disable=not shown, dynamic_ncols=True
    ) as lines:

        def advance(note: str) -> None:
            lines.set_postfix_str(note, refresh=False)
            lines.update()

        yield advance

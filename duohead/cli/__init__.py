"""The `duohead` command: one verb, one module beside this one, loaded when it is asked for.

A mistake of the caller ends in one line and exit code 2, Ctrl-C in one line and 130; anything else is a bug of ours and
keeps its traceback. Set DUOHEAD_DEBUG=1 to see the traceback of those as well.
"""

import argparse
import errno
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from duohead import __version__

VERBS = {
    "demo": "see it work: find the heads of the pocket model and write a report",
    "identify": "find the retrieval heads of a model and write its pattern",
    "inspect": "look at a pattern: heat map, counts, bytes",
    "generate": "continue a prompt with the smaller cache",
    "evaluate": "measure what accuracy remains",
    "bench": "measure speed and memory",
    "export": "write an adapter that transformers loads: heads and settings, no weights",
    "report": "draw records, patterns and training logs on one page",
}
USER_ERROR, INTERRUPTED = 2, 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (by default the process's own) and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = next((word for word in arguments if not word.startswith("-")), None)
    try:
        parser = build_parser(verb)
        options = parser.parse_args(arguments)
        _hush()
        code = int(_module(options.verb).run(options))
        sys.stdout.flush()  # a reader that has left is met here, not at exit
        return code
    except (ValueError, OSError, KeyboardInterrupt) as error:
        if os.environ.get("DUOHEAD_DEBUG"):
            raise
        return _report(verb, error)


def build_parser(verb: str | None = None) -> argparse.ArgumentParser:
    """The parser of the whole command; only `verb` gets its arguments, so that the other modules stay unloaded."""
    parser = _Parser(
        prog="duohead", description="DuoAttention for any Hugging Face causal language model."
    )
    parser.add_argument("--version", action="version", version=f"duohead {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, text in VERBS.items():
        child = verbs.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False
        )
        if name == verb:
            _module(name).add_arguments(child)
    return parser


def _hush() -> None:
    """Keep what importing torchao says about parts it does not need off the screen; its errors stay."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _module(verb: str) -> Any:
    return importlib.import_module(f"duohead.cli.{verb}")


def _report(verb: str | None, error: BaseException) -> int:
    name = f"duohead {verb}" if verb in VERBS else "duohead"
    if isinstance(error, KeyboardInterrupt):
        # On a line of its own: a progress bar or the terminal's ^C may stand on this one.
        print(f"\n{name}: interrupted{f'; {error}' if str(error) else ''}", file=sys.stderr)
        return INTERRUPTED
    if isinstance(
        error, BrokenPipeError
    ):  # the reader of our output left, as in `duohead inspect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    print(f"{name}: error: {_one_line(error)}", file=sys.stderr)
    return USER_ERROR


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, OSError) or error.strerror is None or error.filename is None:
        return text
    remedy = "; free some space or write elsewhere" if error.errno == errno.ENOSPC else ""
    return f"{error.filename}: {error.strerror}{remedy}"

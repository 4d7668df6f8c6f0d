"""Lines for the person at the terminal. They go to standard error, and a failure to print one never stops the work.

A program that embeds the package can have the same lines from the logger `seriatim` of the standard library: lines at
level INFO, warnings at WARNING. The logger has only a NullHandler. Lines are taken off standard error as soon as the
program gives the logger a handler of its own; handlers of the root logger get copies, as far as levels allow.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings

from seriatim.core.errors import UsageError, caller_level
from seriatim.core.names import printable
from seriatim.core.processes import place

LOGGER = logging.getLogger("seriatim")
LOGGER.addHandler(logging.NullHandler())  # otherwise Python prints warnings that no handler takes


def say(text: str, *, everyone: bool = False) -> None:
    """Tell the user one line: on standard error and to the logger `seriatim`, or to its own handlers alone.

    The first of several processes speaks for all, except with `everyone`.
    """
    if everyone or speaks():
        LOGGER.info("%s", text)
        if not handled():
            show(text)


def warn(text: str) -> None:
    """Issue a Python warning that points to the caller's code, and tell the logger `seriatim` too."""
    LOGGER.warning("%s", text)
    warnings.warn(text, stacklevel=caller_level())


def handled() -> bool:
    """Whether the program gave the logger `seriatim` a handler of its own."""
    return any(not isinstance(handler, logging.NullHandler) for handler in LOGGER.handlers)


def show(text: str) -> None:
    """Write one line to standard error.

    Where standard error was closed, never existed (a daemon, pythonw) or went away with its terminal, the line is
    dropped silently. Characters that the stream cannot encode, or that would break the line, are escaped.
    """
    stream = sys.stderr
    if stream is None:
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    with contextlib.suppress(OSError, ValueError):  # a stream that Python itself has closed raises ValueError
        stream.write(printable(text).encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()


def speaks() -> bool:
    """Whether this process is the first, or the only one, of those that work together."""
    try:
        return place().rank == 0
    except UsageError:  # the environment contradicts itself, which is reported where the processes are needed
        return True


def is_terminal() -> bool:
    """True if standard error is a terminal, on which a progress bar can be redrawn."""
    with contextlib.suppress(OSError, ValueError):
        return sys.stderr is not None and sys.stderr.isatty()
    return False

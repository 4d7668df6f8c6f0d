"""Lines for the person at the terminal. They go to standard error, and a failure to print one never stops the work."""

from __future__ import annotations

import contextlib
import sys

from seriatim.core.errors import UsageError
from seriatim.core.names import printable
from seriatim.core.processes import place


def say(text: str, *, everyone: bool = False) -> None:
    """Write one line to standard error. The first of several processes speaks for all, except with `everyone`.

    Where standard error was closed, never existed (a daemon, pythonw) or went away with its terminal, the line is
    dropped silently. Characters that the stream cannot encode, or that would break the line, are escaped.
    """
    stream = sys.stderr
    if stream is None or not (everyone or speaks()):
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

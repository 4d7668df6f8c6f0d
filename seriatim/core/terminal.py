"""Lines for the person at the terminal: they go to standard error, and never stop the work that they are about."""

from __future__ import annotations

import contextlib
import sys

from seriatim.core.names import printable


def say(text: str) -> None:
    """Write one line to standard error.

    Where standard error was closed, never existed (a daemon, pythonw) or has gone away with its terminal, the line is
    lost and nothing else is; what the stream's encoding lacks, or would break the line, is escaped.
    """
    stream = sys.stderr
    if stream is None:
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    with contextlib.suppress(OSError, ValueError):  # ValueError: it was closed from within Python
        stream.write(printable(text).encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()


def is_terminal() -> bool:
    """Whether standard error is a terminal, on which a bar can move."""
    with contextlib.suppress(OSError, ValueError):
        return sys.stderr is not None and sys.stderr.isatty()
    return False

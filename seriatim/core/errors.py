"""The errors of Seriatim and the exit codes they become at the command line.

    SeriatimError            1
      UsageError             2   an argument is wrong (also a ValueError)
        ConfigError          2   a recipe or a config is wrong
      DataError              3   images or labels cannot be used
      CheckpointError        4   a model folder is missing, damaged or does not fit
      NumericsError          5   a loss or a weight is not finite
      ResourceError          6   disk, memory, permissions
      Stopped              143   stopped on request, state saved

Every message is one line: the argument, the value, what is allowed, what to do.
"""

from __future__ import annotations

import difflib
import reprlib
import sys
from collections.abc import Callable, Iterable
from typing import Any

from seriatim.core.names import printable

LONGEST = 2000  # characters of a message; a text that was read from a file may be much longer


class SeriatimError(Exception):
    """Base of all errors that a user is meant to read; `exit_code` is what the CLI returns."""

    exit_code = 1
    told = False  # True where another process of the same command prints the message


class UsageError(SeriatimError, ValueError):
    """An argument has a value that is not allowed."""

    exit_code = 2


class ConfigError(UsageError):
    """A recipe or a stored configuration has an unknown key or a value that is not allowed."""


class DataError(SeriatimError, ValueError):
    """Images or labels cannot be used."""

    exit_code = 3


class CheckpointError(SeriatimError, ValueError):
    """A model folder is missing, incomplete, damaged, or does not fit the model."""

    exit_code = 4


class NumericsError(SeriatimError, ArithmeticError):
    """A loss, a gradient or a weight is not finite."""

    exit_code = 5


class ResourceError(SeriatimError):
    """The machine cannot do this: the disk is full, a permission is missing, or memory has run out."""

    exit_code = 6


class Stopped(SeriatimError):
    """The work was stopped on request, after its state was saved."""

    exit_code = 143


def nearest(name: str, allowed: Iterable[str]) -> str:
    """The end of an error message: `"; did you mean 'x'?"` if an allowed name is close, else the allowed names."""
    names = [str(a) for a in allowed]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"; allowed: {shown}" if names else ""


def nearest_part(name: str, allowed: Iterable[str]) -> str:
    """`nearest` for the name of a part that may be of a plug-in."""
    return or_of_plugin(nearest(name, allowed))


def or_of_plugin(hint: str) -> str:
    """The end of an error message that also tells how a plug-in is loaded."""
    joint = " If" if hint.endswith("?") else "; if"
    return f"{hint}{joint} it is of a plug-in, load that first (--plugin FILE.py, seriatim.load_plugin)"


def caller_level() -> int:
    """The `stacklevel` with which a warning points to the first line of code outside this package."""
    # The frames of contextlib lie between a decorated function and its caller, so they are skipped as well.
    ours = (__name__.split(".")[0], "contextlib")
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ours:
        frame, level = frame.f_back, level + 1
    return level


def is_out_of_memory(error: BaseException) -> bool:
    """True if an exception of Python, torch or the operating system means that memory has run out."""
    out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    words = ("allocate memory", "can't start new thread", "os error 12")  # safetensors reports "os error 12"
    return out_of_memory or any(each in str(error) for each in words)


def one_line(error: BaseException) -> str:
    """The message of any exception on one line, at most LONGEST characters, safe to print on a terminal."""
    text = printable(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def shown(value: Any, most: int = 100) -> str:
    """`repr(value)` shortened to at most `most` characters; the full text, which may be huge, is never built."""
    if isinstance(value, int) and abs(value) >> 256:
        return f"a whole number of {value.bit_length():,} bits"
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = most
    brief.maxlevel = 3
    try:
        text = brief.repr(value)
    except ValueError:  # the value contains an integer that is too long for Python to print
        text = type(value).__name__
    return text if len(text) <= most else f"{text[: most - 3]}..."


def check_least(least: int, **values: int | None) -> None:
    """Raise UsageError that names the first of the values that is below `least`; None is allowed."""
    for name, value in values.items():
        if value is not None and value < least:
            raise UsageError(f"{name}: {value!r} is not allowed; it must be at least {least}")


def check_known(known: Iterable[str], hint: Callable[[str, Iterable[str]], str] = nearest, **values: object) -> None:
    """Raise UsageError that names the first of the values that is not one of the known names, with a `hint`."""
    names = list(known)
    for name, value in values.items():
        if not (isinstance(value, str) and value in names):
            raise UsageError(f"{name}: {value!r} is not known{hint(str(value), names)}")

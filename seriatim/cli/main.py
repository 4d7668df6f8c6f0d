"""The entry point of `seriatim`: it turns a command line into an exit code, and every error into one line.

Nothing heavy is imported before the process can handle signals and closed streams.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

from seriatim.core.errors import ResourceError, SeriatimError, Stopped, is_out_of_memory, one_line
from seriatim.core.plugins import fault_of_plugin
from seriatim.core.terminal import say, show, speaks

INTERRUPTED = 130
SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]  # Windows lacks some
PLAIN = {"\u2026": "...", "\u00b1": "+/-", "\u00d7": "x", "\u2013": "-", "\u2014": "-", "\u2019": "'"}


class Interrupted(BaseException):
    """A signal asked this process to stop. It is a BaseException so that no `except Exception` catches it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.name = signal.Signals(number).name
        self.exit_code = INTERRUPTED if number == signal.SIGINT else Stopped.exit_code


def run(arguments: Sequence[str]) -> int:
    """Run one command line; return its exit code. Prints no traceback unless SERIATIM_DEBUG is set."""
    with warnings.catch_warnings():
        warnings.showwarning = show_warning
        try:
            from seriatim.cli.app import app

            code = int(app(list(arguments), prog_name="seriatim", standalone_mode=False) or 0)
            if code == INTERRUPTED:  # typer turns Ctrl-C into this exit code
                say("stopped")
            return code
        except BaseException as error:
            if os.environ.get("SERIATIM_DEBUG"):
                traceback.print_exc()
            return explain(error)


def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Show a warning, of this package or another, as one line; `core.terminal.warn` has told the logger of ours."""
    if speaks():
        show(f"warning: {one_line(Warning(message))}")


def explain(error: BaseException) -> int:
    """Print what happened on one line; return the exit code."""
    if isinstance(error, Interrupted):
        say(f"{error.name}: stopped")
        return error.exit_code
    if isinstance(error, SystemExit):
        if isinstance(error.__context__, BrokenPipeError):  # typer makes this of a reader that went away
            return 0
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, SeriatimError):
        if not error.told:
            say(one_line(error) if isinstance(error, Stopped) else f"error: {one_line(error)}", everyone=True)
        return error.exit_code
    if hasattr(error, "format_message"):  # an error of the argument parser, whose classes are private to typer
        text = error.format_message()
        if text:
            say(f"error: {one_line(Exception(text)).rstrip('.')}; see `seriatim --help`")
        else:
            show: Any = getattr(error, "show", lambda: None)
            show()
        return int(getattr(error, "exit_code", 2))
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        say("stopped")
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        return 0
    if is_out_of_memory(error):
        say(f"error: out of memory ({one_line(error)[:120]}); use a smaller batch or model", everyone=True)
        return ResourceError.exit_code
    if isinstance(error, OSError):
        say(f"error: {one_line(error)}; check the path and the disk", everyone=True)
        return ResourceError.exit_code
    what = f"{type(error).__name__}: {one_line(error)[:300]}"
    plugin = fault_of_plugin(error)
    if plugin is not None:
        say(f"error: {plugin}: {what}; SERIATIM_DEBUG=1 shows the traceback", everyone=True)
        return 1
    say(f"error: {what} (a bug: please report it; SERIATIM_DEBUG=1 shows it)", everyone=True)
    return 1


# --- the process --------------------------------------------------------------------------------------------------


def stop(number: int, _: FrameType | None) -> None:
    """Raise Interrupted at the first signal, so that `finally` blocks clean up; a second signal stops at once."""
    for each in SIGNALS:
        if signal.getsignal(each) is stop:
            signal.signal(each, stop_at_once)
    raise Interrupted(number)


def stop_at_once(number: int, _: FrameType | None) -> None:
    os._exit(Interrupted(number).exit_code)


def heed_signals() -> None:
    """Stop with a one-line message on Ctrl-C, SIGTERM and SIGHUP; if SIGHUP is ignored (`nohup`), it stays ignored."""
    for number in SIGNALS:
        if number.name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)


def open_streams() -> None:
    """Replace closed standard streams by the null device, because otherwise a file could get their number."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it takes the lowest free number, which is this one
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")


def empty_streams() -> None:
    """Write what the standard streams still hold, or drop it where nobody reads any more.

    The interpreter does so at its end, and a failure would replace the exit code by 120.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """ASCII text for characters that the encoding of standard output lacks; a codec error handler."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lacking), error.end


def ask_for_large_pages() -> None:
    """Let torch ask the kernel for pages of two megabytes for large tensors, which a step allocates anew each time.

    Torch reads the variable when it first allocates, so this must come before it is imported. A value that the user has
    set is kept, and systems without such pages (all but Linux) ignore it.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def main() -> NoReturn:
    heed_signals()
    ask_for_large_pages()
    open_streams()
    codecs.register_error("seriatim.plain", plain)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="seriatim.plain")
    try:
        code = run(sys.argv[1:])
    except Interrupted as error:  # the signal came outside the `try` of `run`
        code = explain(error)
    for number in SIGNALS:  # nothing is left to clean up while the interpreter exits
        if signal.getsignal(number) in (stop, stop_at_once):
            signal.signal(number, signal.SIG_DFL)
    empty_streams()
    sys.exit(code)

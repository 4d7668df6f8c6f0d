"""Stopping on request: finish the step, save, leave. And one process to a folder, or to a part of its work."""

from __future__ import annotations

import contextlib
import fcntl  # not `filelock`: see `claimed`
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TextIO

from seriatim.core.errors import Stopped, UsageError
from seriatim.core.files import explained

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name))


class StopRequest:
    """`with StopRequest() as stop:` and, after each step, `if stop.requested:`.

    The first SIGTERM, SIGINT, SIGHUP or SIGUSR1 is noted; a second stops the process at once, which loses nothing that
    was saved, since files are renamed when they are whole. Where SIGHUP is ignored (`nohup`) it stays ignored.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # only there can handlers be set
            for number in SIGNALS:
                if number.name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.requested is not None:
            os._exit(Stopped.exit_code)
        self.requested = signal.Signals(number).name
        text = f"{self.requested}: finishing this step and saving; send it again to stop at once\n"
        if sys.stderr is not None:
            with contextlib.suppress(OSError, ValueError):  # no `say`: the handler may have interrupted a print
                os.write(sys.stderr.fileno(), text.encode())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def refuse_many_processes() -> None:
    """Training is one process on one device; one of several would train everything again, or wait for the others."""
    for name, most in (("WORLD_SIZE", 1), ("RANK", 0)):
        value = os.environ.get(name, "")
        if value.isdecimal() and int(value) > most:
            raise UsageError(
                f"train: {name}={value} is set, but training is one process on one device; start it without torchrun, "
                f"or unset {name}"
            )


@contextlib.contextmanager
def only_trainer(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; the system lets go when the process ends, however it ends."""
    with open(folder / ".lock", "a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            raise UsageError(
                f"out: {folder} is being trained into by {holder}; wait for it or choose another"
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


@contextlib.contextmanager
def claimed(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold the lock file `path`, made for this and deleted when let go; False where another process holds it.

    With `wait`, until it lets go. The system lets go for a process that dies; its file stays until the next holder.

    `filelock` can't do this. It leaves the file behind, or, where we delete it, lets two processes hold files of the
    same name (version 3.12 does not look whether the file that it has locked is still there), and that version empties
    a file that another process holds, and with it the name of the holder that `only_trainer` reports.
    """
    while True:
        with explained(path):
            lock = open(path, "a", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            lock.close()
            yield False
            return
        if is_at(lock, path):
            break
        lock.close()  # deleted by the last holder between our opening and locking it: another may hold a new one
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)  # while it is held, so that nobody else's goes
        fcntl.flock(lock, fcntl.LOCK_UN)  # said, not left to closing: a worker process may have the file open too
        lock.close()


def is_at(file: TextIO, path: Path) -> bool:
    """Whether the open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False

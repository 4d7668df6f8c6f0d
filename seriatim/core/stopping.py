"""Stops work on request after the current step, and lets only one process at a time work on a folder or part of it."""

from __future__ import annotations

import contextlib
import fcntl  # not `filelock`: see `claimed`
import os
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TextIO

from seriatim.core.errors import Stopped, UsageError
from seriatim.core.files import explained
from seriatim.core.processes import place

WAIT_SECONDS = 0.2  # between looks at work that other processes hold
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name))


class StopRequest:
    """`with StopRequest() as stop:` and, after each step, `if stop.requested:`.

    The first SIGTERM, SIGINT, SIGHUP or SIGUSR1 is noted in `requested`; a second one ends the process at once. That
    loses nothing that was saved, because files are renamed only when they are complete. If the process ignores SIGHUP
    (under `nohup`), it keeps ignoring it.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python lets only the main thread set handlers
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
            # `say` can't be used here, because this handler may have interrupted a print to the same stream.
            with contextlib.suppress(OSError, ValueError):
                os.write(sys.stderr.fileno(), text.encode())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def only_trainer(folder: Path) -> Iterator[None]:
    """Lock `folder` for this process; raises UsageError if another process trains into it.

    The operating system releases the lock when the process ends, even after a crash.
    """
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
    """Lock the file `path` and yield True; yield False where another process holds the lock.

    With `wait`, this waits until the other process releases the lock. The file is created for the lock and deleted when
    the lock is released. The operating system releases the lock of a process that dies; its file stays until the next
    process takes the lock. Raises UsageError if the file is not one that this function created: those are empty.

    `filelock` can't do this. It leaves the file behind, and if we delete the file, it lets two processes lock files of
    the same name (version 3.12 does not check that the file it has locked still exists). That version also empties a
    file that another process holds, and `only_trainer` reads the name of the holder from that file.
    """
    while True:
        with explained(path):
            refuse_other_file(path)
            lock = open(path, "a", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            lock.close()
            yield False
            return
        if is_at(lock, path):
            break
        lock.close()  # the last holder deleted the file after we opened it, so another process may hold a new file
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)  # deleted while the lock is held, so that no other process's file is deleted
        fcntl.flock(lock, fcntl.LOCK_UN)  # closing would not release it if a worker process has the file open too
        lock.close()


def claims(
    numbers: Iterable[int], lock_of: Callable[[int], Path], pause: Callable[[], object] = lambda: None
) -> Generator[int]:
    """Yield the numbers, each while its lock is held, so that several processes share the work.

    The process of rank r of n begins with r, r + n, ..., and goes on with those of the others. A number that another
    process holds comes again later, because that process may die; the caller must find out whether its work was done.
    `pause` is called before each attempt, and may raise to end the work.
    """
    where = place()
    todo = sorted(numbers, key=lambda number: ((number - where.rank) % where.size, number))
    while todo:
        busy = []
        for number in todo:
            pause()
            with claimed(lock_of(number)) as mine:
                if mine:
                    yield number
                else:
                    busy.append(number)
        if busy == todo:
            time.sleep(WAIT_SECONDS)
        todo = busy


def refuse_other_file(path: Path) -> None:
    """Raise UsageError if something lies at `path` that is no lock file, since it would be deleted with the lock."""
    try:
        there = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISREG(there.st_mode) or there.st_size:
        raise UsageError(f"{path} is not a file of Seriatim, which keeps a lock there while it works; move it away")


def is_at(file: TextIO, path: Path) -> bool:
    """True if the open file is still the file at `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False

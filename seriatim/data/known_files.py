"""What is known about the files of a data set, kept between starts, so that each is hashed and decoded only once.

    CACHE/known/NAME.json    NAME is the sha256 of the folder's path with links resolved
        line 1               {"format": 1, "sha256": the sha256 of line 2}
        line 2               {"source", "reader", "files": {path: [bytes, time of change, sha256, verdict]}}

CACHE is the folder that `core/cache_folder.py` finds. An entry counts only while the file has the same size and time of
change. A verdict is true if the file can be decoded, else the reason why not, or null if it was never decoded; it
counts only for the same `reader`, which describes the decoder and its settings. A damaged file of this kind is made
anew, and where none can be written, every start reads all files again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from seriatim.core.cache_folder import VARIABLE, cache_folder
from seriatim.core.errors import DataError, SeriatimError
from seriatim.core.files import atomic_write
from seriatim.core.images import BadImage, NoMemory
from seriatim.core.progress import Progress
from seriatim.core.reading import LISTING_BYTES
from seriatim.core.stopping import claimed
from seriatim.core.terminal import say

FORMAT = 1
AT_ONCE = 1024  # files that are handed to the threads together
SAVE_SECONDS = 60.0  # a start that is killed loses at most the work of this time

Stamp = tuple[int, int]  # bytes and time of change, by which a changed file is noticed
Verdict = bool | str | None


class Known(NamedTuple):
    """What is known about a file."""

    bytes: int
    changed: int  # the time of change, in nanoseconds
    sha256: str
    verdict: Verdict = None


@dataclass(frozen=True)
class Files:
    """The files of a data set, numbered from 0."""

    source: str  # what identifies the data set: a folder's path with links resolved
    names: Sequence[str]
    stamps: Sequence[Stamp]
    digest: Callable[[int], str]  # the sha256 of a file; raises OSError
    stamp: Callable[[int], Stamp]  # the present stamp of a file; raises OSError
    decode: Callable[[int], object] | None  # raises BadImage; None if the files need not be decoded
    reader: str  # describes the decoder and its settings

    def at(self) -> Path:
        return cache_folder() / "known" / f"{hashlib.sha256(os.fsencode(self.source)).hexdigest()[:32]}.json"


def examine(files: Files, *, again: bool = False) -> list[Known]:
    """What is known about each file. Files that are new or changed, and with `again` all files, are read.

    Several files are read at a time. Another process that examines the same files is waited for. Raises DataError for
    a file that can't be read, unless files are decoded; then the verdict says so.
    """
    known = {} if again else read_known(files)
    if missing(files, known):
        with alone(files.at()):
            known = {} if again else read_known(files)  # another process may have read the files meanwhile
            known = read_files(files, known)
    return [known[name] for name in files.names]


def missing(files: Files, known: dict[str, Known]) -> list[int]:
    """The numbers of the files about which something is unknown."""
    wanted = files.decode is not None
    return [
        i
        for i, (name, stamp) in enumerate(zip(files.names, files.stamps, strict=True))
        if (found := known.get(name)) is None or found[:2] != stamp or (wanted and found.verdict is None)
    ]


def read_files(files: Files, known: dict[str, Known]) -> dict[str, Known]:
    """`known` with all files of the data set, of which the missing ones are read; it is kept for the next start."""
    todo = missing(files, known)
    doubtful = {files.names[i] for i in todo}
    kept = {name: known[name] for name in files.names if name in known and name not in doubtful}
    found: dict[str, Known] = {}  # what must not be kept, because it may differ at the next start
    what = "hashing images" if files.decode is None else "checking images"
    saved = time.monotonic()

    def read(i: int) -> tuple[Known, bool]:
        return read_one(files, i, known.get(files.names[i]))

    try:
        with Progress(len(todo), what, "images") as bar, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for first in range(0, len(todo), AT_ONCE):  # Pillow and hashlib release the interpreter lock
                part = todo[first : first + AT_ONCE]
                for i, (entry, lasting) in zip(part, pool.map(read, part), strict=True):
                    (kept if lasting else found)[files.names[i]] = entry
                    bar.advance()
                if time.monotonic() - saved > SAVE_SECONDS:
                    write_known(files, kept)
                    saved = time.monotonic()
    finally:
        write_known(files, kept)
    return kept | found


def read_one(files: Files, i: int, before: Known | None) -> tuple[Known, bool]:
    """Hash and decode file i, and tell whether the result will hold as long as the file is the same.

    `before` is what is known already; its sha256 holds if the file has the same stamp.
    """
    digest, verdict, lasting = "", None, True
    try:
        digest = before.sha256 if before is not None and before[:2] == files.stamps[i] else files.digest(i)
        verdict, lasting = decoded(files, i)
        lasting = lasting and files.stamp(i) == files.stamps[i]
    except OSError as error:
        reason = f"can't be read ({error.strerror or type(error).__name__})"
        if files.decode is None:
            raise DataError(f"data: {files.names[i]} of {files.source} {reason}; repair it or remove it") from error
        verdict, lasting = reason, False
    return Known(*files.stamps[i], digest, verdict), lasting


def decoded(files: Files, i: int) -> tuple[Verdict, bool]:
    """The verdict on file i, and whether it depends on the file alone."""
    if files.decode is None:
        return None, True
    try:
        files.decode(i)
    except BadImage as error:
        return str(error), not isinstance(error, NoMemory)
    return True, True


# --- the file -----------------------------------------------------------------------------------------------------


def read_known(files: Files) -> dict[str, Known]:
    """What an earlier start kept about the files; empty if there is nothing, or if it is damaged."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError, RuntimeError):
        path = files.at()
        if path.stat().st_size > LISTING_BYTES:
            return {}
        head, _, body = path.read_bytes().partition(b"\n")
        if json.loads(head) != {"format": FORMAT, "sha256": hashlib.sha256(body).hexdigest()}:
            return {}
        stored = json.loads(body)
        if stored["source"] == files.source:
            known = {name: Known(*entry) for name, entry in stored["files"].items()}
            if stored["reader"] != files.reader:
                known = {name: entry._replace(verdict=None) for name, entry in known.items()}
            return known
    return {}


def write_known(files: Files, known: dict[str, Known]) -> None:
    """Keep what is known for the next start. If that fails, one line says so."""
    body = json.dumps({"source": files.source, "reader": files.reader, "files": known}).encode()
    head = json.dumps({"format": FORMAT, "sha256": hashlib.sha256(body).hexdigest()}).encode()
    try:
        atomic_write(files.at(), lambda file: file.write_bytes(head + b"\n" + body))
    except (SeriatimError, RuntimeError) as error:  # without a home folder, pathlib raises RuntimeError
        say(f"what was found out about the images is not kept ({error}); set {VARIABLE} to a folder for it")


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """A context in which no other process of this machine examines the same files, if the system can lock files."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(SeriatimError, OSError, RuntimeError):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not stack.enter_context(claimed(path.with_suffix(".lock"))):
                say("another process is checking these images; waiting for it")
                stack.enter_context(claimed(path.with_suffix(".lock"), wait=True))
        yield

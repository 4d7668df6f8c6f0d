"""Files that are whole or absent: written aside, synced, renamed; read against their sha256.

A power cut or a `kill -9` at any moment leaves either the old file or the new one. Folders are written the
same way: complete under a temporary name first, then renamed into place.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from seriatim.core.errors import CheckpointError, ResourceError, UsageError, one_line
from seriatim.core.names import BREAKS_A_LINE, SURROGATE
from seriatim.core.reading import Unreadable, parse_json, read_text

MANIFEST = "manifest.json"
PREVIOUS = "previous"


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut (a no-op where folders can't be opened)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def explained(path: Path, argument: str = "") -> Iterator[None]:
    """Turn an OSError about `path` into one line that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            remedy = "no space is left: free some or choose another disk"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            remedy = "choose a folder that you may write to"
        else:
            remedy = "check the path and the disk"
        reason = error.strerror or one_line(error)
        prefix = f"{argument}: " if argument else ""
        raise ResourceError(f"{prefix}cannot write {path}: {reason}; {remedy}") from error


def atomic_write(path: Path | str, write: Callable[[Path], object]) -> Path:
    """Call `write(temporary)`; then sync the temporary file and rename it to `path`.

    `write` fills a file beside `path` (same file system, same suffix). When it fails, `path` keeps what it had
    and nothing is left behind.
    """
    path = Path(path)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.stem}.~{secrets.token_hex(4)}{path.suffix}")
        try:
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # the system applies the umask
            write(temporary)
            sync_file(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    return path


def write_text(path: Path | str, text: str) -> Path:
    return atomic_write(path, lambda file: file.write_text(text, encoding="utf-8"))


def write_json(path: Path | str, value: Any) -> Path:
    return write_text(path, json_text(value) + "\n")


def json_text(value: Any) -> str:
    """JSON that can be encoded and shown: bytes of a name that are not UTF-8, and what would steer a terminal, become
    escapes, which are read back as they were.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return BREAKS_A_LINE.sub(lambda found: "\n" if found[0] == "\n" else f"\\u{ord(found[0]):04x}", text)


@contextlib.contextmanager
def utf8_path(path: Path | str) -> Iterator[str]:
    """A name of the file that is valid UTF-8, which some libraries need: its own, or that of a link to it."""
    if not SURROGATE.search(str(path)):
        yield str(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "link"
        link.symlink_to(Path(path).absolute())
        yield str(link)


@contextlib.contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield an empty folder beside `path`; on success sync it and rename it to `path`.

    A folder that was at `path` is replaced: it is moved aside first and deleted last, so that a crash in
    between leaves it on the disk, under the name `.<name>.previous`, where `put_back` finds it.
    """
    path = Path(path)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        previous = path.with_name(f".{path.name}.{PREVIOUS}")
        temporary = path.with_name(f".{path.name}.~{secrets.token_hex(4)}")
        temporary.mkdir()
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    sync_file(file)
            sync_folder(temporary)
            if path.exists():
                shutil.rmtree(previous, ignore_errors=True)
                os.replace(path, previous)
            os.replace(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            if previous.exists() and not path.exists():
                os.replace(previous, path)
            raise
        sync_folder(path.parent)
        shutil.rmtree(previous, ignore_errors=True)


# --- after a crash ------------------------------------------------------------------------------------------------


def asides(path: Path) -> dict[int, Path]:
    """The folders that were moved aside while `path` was being replaced, by number: the newest has the highest."""
    pattern = re.compile(re.escape(f".{path.name}.{PREVIOUS}") + r"(-([0-9]{1,6}))?")
    found = {entry: pattern.fullmatch(entry.name) for entry in (path.parent.iterdir() if path.parent.is_dir() else ())}
    return {int(match[2] or 1): entry for entry, match in found.items() if match is not None and entry.is_dir()}


def present_or_previous(path: Path) -> Path:
    """`path`, or where it is missing the folder that a crash between two renames left under another name."""
    found = {} if path.exists() else asides(path)
    return found[max(found)] if found else path


def put_back(path: Path) -> None:
    """Undo a replacement that a crash interrupted between its two renames; only who may write to `path` calls it."""
    found = present_or_previous(path)
    if found != path:
        with explained(path), contextlib.suppress(FileNotFoundError):  # another process was quicker
            os.replace(found, path)


def set_aside(path: Path) -> Path:
    """Rename the folder `path`, make an empty one in its place, and return the new name of what it held."""
    path = path.resolve()
    number = 1 + max(asides(path), default=0)
    aside = path.with_name(f".{path.name}.{PREVIOUS}" + (f"-{number}" if number > 1 else ""))
    with explained(path):
        os.replace(path, aside)
        path.mkdir()
        sync_folder(path.parent)
    return aside


def target_of(path: Path) -> str | None:
    """The name that a temporary file or folder of ours was to get; None where `path` is no such thing.

    Release 0.1 let `tempfile` choose the names: eight characters. A word of eight letters is somebody's, unless the
    file is private, as `tempfile` makes them.
    """
    if not path.name.startswith(".") or path.is_symlink():
        return None
    found = re.fullmatch(r"\.(.+)\.(~[0-9a-f]{8}|[a-z0-9_]{8})(\.[^.]+)?", path.name)
    if found is None or found[2] == PREVIOUS:
        return None
    if found[2].isalpha() and path.lstat().st_mode & 0o077:
        return None
    return found[1] + (found[3] or "")


def sweep(folder: Path, ours: Callable[[str], bool]) -> None:
    """Delete the temporary files of `folder` that a killed process left; `ours` says which names are written there.

    Nobody else may be writing to the folder meanwhile.
    """
    if folder.is_dir():
        for path in list(folder.iterdir()):
            target = target_of(path)
            if target is not None and ours(target):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


# --- folders and what they hold -----------------------------------------------------------------------------------


def writable_folder(path: Path | str, argument: str = "out") -> Path:
    """Create `path` if it isn't there and prove that it can be written to, before hours of work rely on it."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UsageError(f"{argument}: {path} is a file; name a folder")
    with explained(path, argument):
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe.~{secrets.token_hex(4)}"
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        os.unlink(probe)
    return path


@contextlib.contextmanager
def no_empty_folder(path: Path, new: bool) -> Iterator[None]:
    """Take a folder away again that is `new`, where what fails inside has left it empty."""
    try:
        yield
    except BaseException:
        if new:
            with contextlib.suppress(OSError):
                path.rmdir()  # which refuses one that holds anything
        raise


def sha256(path: Path | str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _render(files: dict[str, dict[str, Any]]) -> str:
    # The digest covers the listing, so that a damaged manifest is named as such and not as a damaged file.
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return json.dumps({"format": 1, "files": files, "sha256": digest}, indent=2, sort_keys=True) + "\n"


def write_manifest(folder: Path, names: Iterable[str], known: Mapping[str, str] | None = None) -> Path:
    """Write `manifest.json`: bytes and sha256 of each named file of `folder`; those in `known` are not read again."""
    hashes = {name: (known or {}).get(name) or sha256(folder / name) for name in names}
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": hashes[name]} for name in sorted(hashes)}
    return write_text(folder / MANIFEST, _render(files))


def read_manifest(folder: Path, remedy: str = "copy it again") -> dict[str, tuple[int, str]]:
    """Name -> (bytes, sha256) as the manifest of `folder` lists them; raises CheckpointError where it is damaged."""
    manifest = folder / MANIFEST
    try:
        text = read_text(manifest)
        files = parse_json(text, dict).get("files")
        if not isinstance(files, dict) or text != _render(files):
            raise Unreadable("has a digest that does not match")
        listing = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
        if any(type(size) is not int or size < 0 or type(digest) is not str for size, digest in listing.values()):
            raise Unreadable("lists a file without its bytes and sha256")
    except (Unreadable, KeyError, TypeError) as error:
        why = error if isinstance(error, Unreadable) else "lists a file without its bytes and sha256"
        raise CheckpointError(f"{manifest} is damaged: it {why}; {remedy}") from error
    for name in listing:
        if Path(name).name != name or name in ("", ".", "..") or "\0" in name:  # a listed name is never a path
            raise CheckpointError(f"{manifest} lists {name!r}, which is not a plain file name")
    return listing


def verify_file(path: Path, size: int, digest: str | None, remedy: str = "copy it again") -> None:
    """Raise CheckpointError unless `path` has this many bytes and this sha256; None looks at the bytes alone."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing though {MANIFEST} lists it; {remedy}")
    actual = path.stat().st_size
    if actual != size:
        raise CheckpointError(f"{path} has {actual} bytes, {size} expected: truncated or changed; {remedy}")
    if digest is not None and sha256(path) != digest:
        raise CheckpointError(f"{path} is damaged: its sha256 is not the one in {MANIFEST}; {remedy}")


def refuse_outside(folder: Path, name: str) -> None:
    """Refuse a file that is a link to somewhere outside of its folder; the hub's cache keeps all its files so."""
    target, folder = (folder / name).resolve(), folder.resolve()
    in_cache = folder.parent.name == "snapshots" and target.parent == folder.parent.parent / "blobs"
    if not (target.is_relative_to(folder) or in_cache):
        raise CheckpointError(f"{folder / name} is a link to {target}, outside of its folder; copy the file there")


def verify_manifest(folder: Path, needed: Iterable[str] = ()) -> dict[str, str]:
    """Check every file that the manifest of `folder` lists; return name -> sha256.

    Raises CheckpointError naming the first file that is missing, truncated or changed, and where `needed` names
    a file that the manifest does not list.
    """
    manifest = folder / MANIFEST
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if not manifest.is_file():
        raise CheckpointError(f"{manifest} is missing: the folder is not a complete model folder; copy it again")
    listing = read_manifest(folder, "copy the folder again")
    for name in needed:
        if name not in listing:
            raise CheckpointError(f"{manifest} does not list {name}: the folder is incomplete; copy it again")
    for name, (size, digest) in listing.items():
        refuse_outside(folder, name)
        verify_file(folder / name, size, digest)
    return {name: digest for name, (_, digest) in listing.items()}

"""Writes files and folders so that they are either complete or absent, and checks them against their sha256.

A file is written under a temporary name, synced and renamed, so that a power cut or a `kill -9` at any moment leaves
either the old file or the new one. Folders are written in the same way.
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
    """Make a rename inside `folder` survive a power cut (does nothing on systems that can't open folders)."""
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
    """Turn an OSError raised inside into a ResourceError about `path`, with one line that says what to do."""
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

    `write` fills a file beside `path` (on the same file system, with the same suffix). When it fails, `path` is
    unchanged and the temporary file is deleted.
    """
    path = Path(path)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.stem}.~{secrets.token_hex(4)}{path.suffix}")
        try:
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # the umask reduces this mode
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
    """The value as indented JSON that is valid UTF-8 and safe to print.

    Bytes of names that are not UTF-8, and characters that would control a terminal, become JSON escapes, so reading the
    JSON gives the original value.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return BREAKS_A_LINE.sub(lambda found: "\n" if found[0] == "\n" else f"\\u{ord(found[0]):04x}", text)


@contextlib.contextmanager
def utf8_path(path: Path | str) -> Iterator[str]:
    """Yield a path of the file that is valid UTF-8, which some libraries need: its own path, or a link to the file."""
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

    A folder that was at `path` is renamed first and deleted last, so that a crash in between leaves it on the disk
    under the name `.<name>.previous`, from which `put_back` restores it.
    """
    path = Path(path)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside: Path | None = None
        temporary = path.with_name(f".{path.name}.~{secrets.token_hex(4)}")
        temporary.mkdir()
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    sync_file(file)
            sync_folder(temporary)
            if path.exists():
                aside = free_aside(path)
                os.replace(path, aside)
            os.replace(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            if aside is not None and aside.exists() and not path.exists():
                os.replace(aside, path)
            raise
        sync_folder(path.parent)
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
        for stale in asides(path).values():  # of a process that was killed
            shutil.rmtree(stale, ignore_errors=True)


# --- after a crash ------------------------------------------------------------------------------------------------


def asides(path: Path) -> dict[int, Path]:
    """The folders that were renamed while `path` was being replaced: number -> folder; the newest has the highest.

    A folder of such a name that somebody else made is left out: these may be deleted, or put back.
    """
    return {number: entry for number, entry in named_aside(path).items() if is_written(entry)}


def named_aside(path: Path) -> dict[int, Path]:
    """All that has a name that `path` could be given while it is replaced, by number, whoever made it."""
    pattern = re.compile(re.escape(f".{path.name}.{PREVIOUS}") + r"(-([0-9]{1,6}))?")
    found = {entry: pattern.fullmatch(entry.name) for entry in (path.parent.iterdir() if path.parent.is_dir() else ())}
    return {int(match[2] or 1): entry for entry, match in found.items() if match is not None}


def free_aside(path: Path) -> Path:
    """A name beside `path` that nothing has, for `path` to be renamed to."""
    number = 1 + max(named_aside(path), default=0)
    return path.with_name(f".{path.name}.{PREVIOUS}" + (f"-{number}" if number > 1 else ""))


def is_written(folder: Path) -> bool:
    """Whether a folder is one that Seriatim writes and replaces as a whole, as its manifest or a run's files show."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    try:
        if (folder / MANIFEST).is_file():
            return {"files", "sha256"} <= parse_json(read_text(folder / MANIFEST), dict).keys()
        return (folder / "recipe.yaml").is_file() and "fingerprint" in parse_json(read_text(folder / "data.json"), dict)
    except (OSError, Unreadable):
        return False


def expanded(path: Path | str) -> Path:
    """The path with a leading `~` or `~user` replaced by that home folder, and as it is where there is none.

    `Path.expanduser` raises RuntimeError for a user who has no home, such as one of a container.
    """
    return Path(os.path.expanduser(path))


def present_or_previous(path: Path) -> Path:
    """`path` if it exists, else the folder that a crash between two renames left under another name, else `path`."""
    found = {} if os.path.exists(path) else asides(path)  # `Path.exists` raises OSError for a name that is too long
    return found[max(found)] if found else path


def put_back(path: Path) -> None:
    """Restore `path` after a crash between the two renames of `atomic_folder`; call it only with the right to write."""
    found = present_or_previous(path)
    if found != path:
        with explained(path), contextlib.suppress(FileNotFoundError):  # another process was quicker
            os.replace(found, path)


def set_aside(path: Path) -> Path:
    """Rename the folder `path`, create an empty folder in its place, and return the new path of the old folder."""
    path = path.resolve()
    aside = free_aside(path)
    with explained(path):
        os.replace(path, aside)
        path.mkdir()
        sync_folder(path.parent)
    return aside


def target_of(path: Path) -> str | None:
    """The final name that a temporary file or folder of Seriatim would have had; None for any other path.

    Release 0.1 used names from `tempfile`, which have eight random characters and are private files. A name that ends
    in eight letters may be a word that a user chose, so it counts as temporary only if the file is private.
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
    """Delete the temporary files in `folder` that a killed process left there.

    `ours` returns True for each final name that Seriatim writes in this folder. No other process may write to the
    folder meanwhile.
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
    """Create the folder `path` if needed, check that files can be written there, and return it.

    Called before long work, so that a folder that can't be written to is noticed at once. Raises UsageError for a file
    and ResourceError where writing fails.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UsageError(f"{argument}: {path} is a file; name a folder")
    with explained(path, argument):
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(prefix=".probe.", dir=path).close()  # on Linux it has no name that a kill could leave
    return path


@contextlib.contextmanager
def no_empty_folder(path: Path, new: bool) -> Iterator[None]:
    """Delete the folder `path` if it is `new` and the code inside fails and leaves it empty."""
    try:
        yield
    except BaseException:
        if new:
            with contextlib.suppress(OSError):
                path.rmdir()  # raises OSError unless the folder is empty
        raise


def sha256(path: Path | str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _render(files: dict[str, dict[str, Any]]) -> str:
    # The digest covers the listing, so that a damaged manifest is reported as such and not as a damaged file.
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return json.dumps({"format": 1, "files": files, "sha256": digest}, indent=2, sort_keys=True) + "\n"


def write_manifest(folder: Path, names: Iterable[str], known: Mapping[str, str] | None = None) -> Path:
    """Write `manifest.json` with the size and sha256 of each named file of `folder`, and return its path.

    `known` maps names to sha256 digests that need not be computed again.
    """
    hashes = {name: (known or {}).get(name) or sha256(folder / name) for name in names}
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": hashes[name]} for name in sorted(hashes)}
    return write_text(folder / MANIFEST, _render(files))


def read_manifest(folder: Path, remedy: str = "copy it again") -> dict[str, tuple[int, str]]:
    """The listing in the manifest of `folder`: name -> (bytes, sha256); raises CheckpointError if it is damaged."""
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
        if Path(name).name != name or name in ("", ".", "..") or "\0" in name:  # a path could point outside the folder
            raise CheckpointError(f"{manifest} lists {name!r}, which is not a plain file name")
    return listing


def verify_file(
    path: Path, size: int, digest: str | None, remedy: str = "copy it again", *, listed_in: str = MANIFEST
) -> None:
    """Raise CheckpointError unless `path` has `size` bytes and the sha256 `digest`; None checks only the size."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing though {listed_in} lists it; {remedy}")
    actual = path.stat().st_size
    if actual != size:
        raise CheckpointError(f"{path} has {actual} bytes, {size} expected: truncated or changed; {remedy}")
    if digest is not None and sha256(path) != digest:
        raise CheckpointError(f"{path} is damaged: its sha256 is not the one in {listed_in}; {remedy}")


def refuse_outside(folder: Path, name: str) -> None:
    """Raise CheckpointError for a file that links outside of its folder.

    Links inside the hub's cache are allowed, because the cache stores all files as links to its `blobs` folder.
    """
    target, folder = (folder / name).resolve(), folder.resolve()
    in_cache = folder.parent.name == "snapshots" and target.parent == folder.parent.parent / "blobs"
    if not (target.is_relative_to(folder) or in_cache):
        raise CheckpointError(f"{folder / name} is a link to {target}, outside of its folder; copy the file there")


def verify_manifest(folder: Path, needed: Iterable[str] = ()) -> dict[str, str]:
    """Check every file that the manifest of `folder` lists, and return name -> sha256.

    Raises CheckpointError that names the first file that is missing, truncated or changed, or the first name of
    `needed` that the manifest does not list.
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

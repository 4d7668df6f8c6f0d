"""List which files of a folder are pictures of which class, and why other files are not used.

Links to files and folders are followed. Each folder is read only once for each class, so that circular links end.
"""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from seriatim.core.errors import DataError
from seriatim.core.images import UNREAD, suffixes
from seriatim.core.names import as_text, twins
from seriatim.core.terminal import say

HIDDEN = "hidden or of the system"
SYSTEM = {  # files and folders, in lower case, that operating systems and archivers leave behind
    "__macosx",
    "@eadir",
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "icon\r",
    "$recycle.bin",
    "#recycle",
    "@recycle",
    "system volume information",
    "lost+found",
}
SPLIT = re.compile(  # folder names that mean parts of one data set, not classes
    r"(train|training|val|valid|validation|dev|test|testing|eval)[-_ ]?(set|split|data|images?|photos)?[-_ ]?\d*"
)
NOWHERE, CIRCLE, AGAIN = "a link that leads nowhere", "a link back to where it is", "a folder that was read already"
LOOSE = "beside class folders"
UNREAD_PICTURES = {f"the suffix {suffix} is not read" for suffix in UNREAD}


@dataclass(frozen=True)
class Entry:
    """A picture: its path relative to the folder, and its class."""

    path: str
    label: int
    stamp: tuple[int, int]  # bytes and time of change, by which a changed file is noticed


@dataclass
class Listing:
    """The pictures and classes found in a folder."""

    entries: list[Entry] = field(default_factory=list)
    class_names: list[str] = field(default_factory=list)
    passed_over: dict[str, str] = field(default_factory=dict)  # file or folder -> why it is not used


def hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM


class Walk:
    """Reads folders below `root`. `passed_over` maps each file or folder that is not used to the reason."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.passed_over: dict[str, str] = {}

    def name(self, path: str) -> str:
        """The name of a path that was found below the root, relative to it."""
        return path.removeprefix(str(self.root)).lstrip(os.sep).replace(os.sep, "/") or "."  # os.path.relpath is slow

    def folders(self) -> list[str]:
        """The paths of the folders directly in the root."""
        root = str(self.root)
        found = [path for path, status in self.listed(root) if stat.S_ISDIR(status.st_mode)]
        circles = [path for path in found if leads_up(path, root)]
        self.passed_over |= {self.name(path): CIRCLE for path in circles}
        return [path for path in found if path not in circles]

    def listed(self, folder: str) -> Iterator[tuple[str, os.stat_result]]:
        """Yield the path and status of all that is in a folder, with links followed.

        Hidden files and broken links are passed over.
        """
        try:
            names = sorted(os.listdir(folder))
        except OSError as error:
            self.passed_over[self.name(folder)] = f"a folder that can't be read ({error.strerror})"
            return
        for name in names:
            path = os.path.join(folder, name)
            if hidden(name):
                self.passed_over[self.name(path)] = HIDDEN
                continue
            try:
                yield path, os.stat(path)
            except OSError as error:
                self.passed_over[self.name(path)] = NOWHERE if os.path.islink(path) else str(error.strerror)

    def pictures(self, folder: str, deep: bool = True) -> list[tuple[str, tuple[int, int]]]:
        """A sorted list of (name, stamp) of the pictures in a folder and, with `deep`, in all folders below it."""
        found: list[tuple[str, tuple[int, int]]] = []
        seen, todo = {identity(os.stat(folder))}, [folder]
        while todo:
            place = todo.pop()
            for path, status in self.listed(place):
                if stat.S_ISDIR(status.st_mode):
                    if not deep:
                        continue
                    circle = os.path.islink(path) and (leads_up(path, place) or leads_up(path, folder))
                    if circle or identity(status) in seen:
                        self.passed_over[self.name(path)] = CIRCLE if circle else AGAIN
                    else:
                        seen.add(identity(status))
                        todo.append(path)
                elif why := unused(path, status):
                    self.passed_over[self.name(path)] = why
                else:
                    found.append((self.name(path), stamp_of(status)))
        return sorted(found, key=lambda picture: picture[0].replace("/", "\0"))  # folder by folder


def stamp_of(status: os.stat_result) -> tuple[int, int]:
    """The size and the time of change of a file; while both are the same, the file counts as unchanged."""
    return status.st_size, status.st_mtime_ns


def identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def leads_up(path: str, place: str) -> bool:
    """Whether the folder `path` is `place` or one of its parents, by its path as given or with links resolved."""
    target = Path(os.path.realpath(path))
    named, real = Path(os.path.realpath(os.path.dirname(place))), Path(os.path.realpath(place))
    return target in (named, real, *named.parents, *real.parents)


def unused(path: str, status: os.stat_result) -> str | None:
    """The reason why a file is not read as a picture; None if it is read."""
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file"
    suffix = os.path.splitext(path)[1].lower()
    return None if suffix in suffixes() else f"the suffix {suffix} is not read" if suffix else "has no suffix"


def list_all(root: Path) -> Listing:
    """All pictures in `root` and in all folders below it, sorted, without classes."""
    walk = Walk(root)
    found = walk.pictures(str(root))
    return Listing([Entry(name, 0, stamp) for name, stamp in found], [], walk.passed_over)


def list_folder(root: Path, *, loose: str = "refuse", empty: str = "refuse") -> Listing:
    """All pictures, sorted: those in class folders if there are any, otherwise those in `root` itself.

    Raises DataError, which names a remedy, if the meaning of the folders is unclear: pictures beside class folders,
    class folders without pictures, or folders called train and val.
    """
    walk = Walk(root)
    folders = walk.folders()
    inside = {folder: walk.pictures(folder) for folder in folders}
    flat = walk.pictures(str(root), deep=False)
    full = [folder for folder in folders if inside[folder]]
    if full:
        refuse_splits(root, [os.path.basename(folder) for folder in full])
        if flat and loose == "refuse":
            raise DataError(
                f"data.path: {root} holds {len(flat)} pictures beside class folders ({flat[0][0]} beside "
                f"{walk.name(full[0])}/); move them into a folder of their class, or leave them out with "
                "data.loose=ignore"
            )
        walk.passed_over |= {name: LOOSE for name, _ in flat}
    without = [walk.name(folder) for folder in folders if not inside[folder]]
    unread = {name.split("/")[0] for name, why in walk.passed_over.items() if why in UNREAD_PICTURES}
    if empty == "refuse":
        refuse_empty(root, [name for name in without if full or name in unread], walk.passed_over)
    walk.passed_over |= {name: "a folder without pictures" for name in without}
    if not full:
        return Listing([Entry(name, 0, stamp) for name, stamp in flat], [], walk.passed_over)
    named = sorted((as_class(os.path.basename(folder)), folder) for folder in full)
    for first, second in twins([as_text(os.path.basename(folder)) for folder in full]):
        raise DataError(
            f"data.path: the class folders {first!a} and {second!a} of {root} differ only in how Unicode "
            "spells them; rename one of them, or move all pictures into one"
        )
    entries = [Entry(name, label, stamp) for label, (_, folder) in enumerate(named) for name, stamp in inside[folder]]
    return Listing(entries, [name for name, _ in named], walk.passed_over)


def as_class(folder: str) -> str:
    """The class name of a folder in composed Unicode (NFC), so that it is the same on every operating system."""
    return unicodedata.normalize("NFC", as_text(folder))


def refuse_splits(root: Path, names: list[str]) -> None:
    """Raise DataError for the parent folder of train/ and val/, which would become two classes."""
    splits = [name for name in names if SPLIT.fullmatch(name.lower())]
    if len(splits) > 1 or splits == names:
        first = next((name for name in splits if name.lower().startswith("train")), splits[0])
        listed = " and ".join(f"{name}/" for name in splits)
        raise DataError(
            f"data.path: {root} holds {listed}, which are parts of a data set and not classes; name one of them: "
            f"data.path={root / first}"
        )


def refuse_empty(root: Path, names: Sequence[str], why: Mapping[str, str]) -> None:
    """Raise DataError for class folders without pictures, because leaving them out would renumber the classes."""
    if names:
        inside = summary(reason for name, reason in why.items() if name.startswith(f"{names[0]}/"))
        shown = ", ".join(f"{name}/" for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise DataError(
            f"data.path: of {root}, {shown} would be a class without pictures{inside and f' ({inside})'}; add pictures "
            "that can be read, remove the folder, or leave such folders out with data.empty=ignore"
        )


def summary(reasons: Iterable[str]) -> str:
    """The most common reasons as text: `3 x hidden or of the system, 1 x the suffix .txt is not read`."""
    common = Counter(reasons).most_common()
    more = f", {sum(count for _, count in common[4:])} for other reasons" if len(common) > 4 else ""
    return ", ".join(f"{count} x {why}" for why, count in common[:4]) + more


def say_unused(where: str, bad: Mapping[str, str], passed_over: Mapping[str, str]) -> None:
    """Report on one line which files are not used, if there are any."""
    parts = [
        f"{len(why)} {what} ({summary(why.values())}; such as {next(iter(why))})"
        for why, what in ((bad, "left out"), (passed_over, "passed over"))
        if why
    ]
    if parts:
        say(f"not used of {where}: {', '.join(parts)}")

"""Which files of a folder are pictures of which class, and why each other file is not used.

Links to files and folders are followed; each folder is read once for each class, so that links in a circle end.
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
SYSTEM = {  # files and folders that systems and archivers leave behind, in lower case; so are all that begin with a dot
    "__macosx", "@eadir", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "$recycle.bin", "#recycle", "@recycle",
    "system volume information", "lost+found",
}  # fmt: skip
SPLIT = re.compile(  # names of parts of one data set
    r"(train|training|val|valid|validation|dev|test|testing|eval)[-_ ]?(set|split|data|images?|photos)?[-_ ]?\d*"
)
NOWHERE, CIRCLE, AGAIN = "a link that leads nowhere", "a link back to where it is", "a folder that was read already"
LOOSE = "beside class folders"
UNREAD_PICTURES = {f"the suffix {suffix} is not read" for suffix in UNREAD}


@dataclass(frozen=True)
class Entry:
    """A file of the index, relative to its folder."""

    path: str
    label: int
    stamp: tuple[int, int]  # bytes, time of change: another file is noticed


@dataclass
class Listing:
    """What was found in a folder."""

    entries: list[Entry] = field(default_factory=list)
    class_names: list[str] = field(default_factory=list)
    passed_over: dict[str, str] = field(default_factory=dict)  # file or folder -> why it is not used


def hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM


class Walk:
    """Reads a folder; `passed_over` says why what was met is not used, by its name relative to the root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.passed_over: dict[str, str] = {}

    def name(self, path: str) -> str:
        return os.path.relpath(path, self.root).replace(os.sep, "/")

    def folders(self) -> list[str]:
        """Paths of the folders in the root."""
        root = str(self.root)
        found = [path for path, status in self.listed(root) if stat.S_ISDIR(status.st_mode)]
        circles = [path for path in found if leads_up(path, root)]
        self.passed_over |= {self.name(path): CIRCLE for path in circles}
        return [path for path in found if path not in circles]

    def listed(self, folder: str) -> Iterator[tuple[str, os.stat_result]]:
        """What is in a folder, links followed; what leads nowhere or is hidden is passed over."""
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
        """(name, stamp) of the pictures in a folder, and in the folders below it, sorted folder by folder."""
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
                    found.append((self.name(path), (status.st_size, status.st_mtime_ns)))
        return sorted(found, key=lambda picture: picture[0].split("/"))


def identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def leads_up(path: str, place: str) -> bool:
    """Whether the folder `path` is the folder `place` or above it, where that is named or where it really lies."""
    target = Path(os.path.realpath(path))
    named, real = Path(os.path.realpath(os.path.dirname(place))), Path(os.path.realpath(place))
    return target in (named, real, *named.parents, *real.parents)


def unused(path: str, status: os.stat_result) -> str | None:
    """Why a file is no picture that is read; None where it is one."""
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file"
    suffix = os.path.splitext(path)[1].lower()
    return None if suffix in suffixes() else f"the suffix {suffix} is not read" if suffix else "has no suffix"


def list_folder(root: Path, *, loose: str = "refuse", empty: str = "refuse") -> Listing:
    """All pictures, sorted: in class folders where there are any, else in `root` itself.

    Raises DataError, naming the way out, where it isn't clear what the folders mean: pictures beside class folders,
    class folders without pictures, folders called train and val.
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
            "spells them; rename one of them, or put their pictures together"
        )
    entries = [Entry(name, label, stamp) for label, (_, folder) in enumerate(named) for name, stamp in inside[folder]]
    return Listing(entries, [name for name, _ in named], walk.passed_over)


def as_class(folder: str) -> str:
    """The class that a folder's name stands for: composed (NFC), so that it is the same from every system."""
    return unicodedata.normalize("NFC", as_text(folder))


def refuse_splits(root: Path, names: list[str]) -> None:
    """Refuse the parent of train/ and val/, which would make two classes of them."""
    splits = [name for name in names if SPLIT.fullmatch(name.lower())]
    if len(splits) > 1 or splits == names:
        first = next((name for name in splits if name.lower().startswith("train")), splits[0])
        listed = " and ".join(f"{name}/" for name in splits)
        raise DataError(
            f"data.path: {root} holds {listed}, which are parts of a data set and no classes; name one of them: "
            f"data.path={root / first}"
        )


def refuse_empty(root: Path, names: Sequence[str], why: Mapping[str, str]) -> None:
    """Refuse class folders without pictures, since the classes that are left mean something else."""
    if names:
        inside = summary(reason for name, reason in why.items() if name.startswith(f"{names[0]}/"))
        shown = ", ".join(f"{name}/" for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise DataError(
            f"data.path: of {root}, {shown} would be a class without pictures{inside and f' ({inside})'}; add pictures "
            "that can be read, remove the folder, or leave such folders out with data.empty=ignore"
        )


def summary(reasons: Iterable[str]) -> str:
    """`3 x hidden or of the system, 1 x the suffix .txt is not read`: the commonest reasons."""
    common = Counter(reasons).most_common()
    more = f", {sum(count for _, count in common[4:])} for other reasons" if len(common) > 4 else ""
    return ", ".join(f"{count} x {why}" for why, count in common[:4]) + more


def say_unused(where: str, bad: Mapping[str, str], passed_over: Mapping[str, str]) -> None:
    """Say on one line what is not used, where there is anything."""
    parts = [
        f"{len(why)} {what} ({summary(why.values())}; such as {next(iter(why))})"
        for why, what in ((bad, "left out"), (passed_over, "passed over"))
        if why
    ]
    if parts:
        say(f"not used of {where}: {', '.join(parts)}")

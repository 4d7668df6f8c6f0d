"""A folder of images: one folder for each class, or all in one (unconditional).

B images, c channels, H x W pixels.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from seriatim.core.errors import DataError, UsageError
from seriatim.core.progress import track
from seriatim.training.data import ImageData
from seriatim.training.images import SUFFIXES, BadImage, load_pixels

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """A file of the index, relative to its folder."""

    path: str
    label: int
    stamp: tuple[int, int]  # bytes, time of change: another file is noticed


class Folder(ImageData):
    """Images of `path`, sorted by class and name; every file is decoded once before training begins.

    What can't be used is dropped then and there, so that counts and order don't depend on luck: `bad` lists it with
    reasons, and more than `max_bad` of all files is an error.
    """

    def __init__(
        self,
        path: str,
        size: int | Sequence[int] = 256,
        channels: int = 3,
        *,
        flip: bool = True,  # mirror half of the images at random, left to right
        max_bad: float = 0.01,  # share of files that may be unusable
        check: bool = True,  # decode every file at the start; False finds damage only when it is met
    ) -> None:
        self.root = Path(path).expanduser()
        self.size, self.channels, self.flips = square(size, channels), channels, flip
        if not self.root.is_dir():
            raise DataError(f"data.path: {self.root} is not a folder; name one that holds images, or a folder a class")
        found, self.class_names = scan(self.root)
        self.bad: dict[str, str] = {}
        self.entries = found
        if check:
            reasons = check_all(found, lambda entry: load_pixels(self.root / entry.path, self.size, self.channels))
            self.bad = {entry.path: why for entry, why in zip(found, reasons, strict=True) if why}
            self.entries = [entry for entry, why in zip(found, reasons, strict=True) if not why]
        refuse_bad(str(self.root), self.bad, len(found), max_bad, len(self.entries))
        self.count = len(self.entries)
        self._labels = torch.tensor([entry.label for entry in self.entries])

    def fingerprint(self) -> str:
        """sha256 of which files there are, in which order, of which size and age."""
        listing = [[e.path, e.label, *e.stamp] for e in self.entries]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()

    def images(self, index: Tensor) -> Tensor:
        """index (B,) -> (B, c, H, W) uint8."""
        return torch.from_numpy(np.stack([self._load(int(i)) for i in index]))

    def _load(self, i: int) -> Any:
        path = self.root / self.entries[i].path
        try:
            return load_pixels(path, self.size, self.channels)
        except BadImage as error:
            raise DataError(f"{path}: {error}; it was whole when training began, or data.check is off") from error

    def labels(self, index: Tensor) -> Tensor | None:
        return self._labels[index] if self.class_names else None

    def name(self, i: int) -> str:
        return self.entries[i].path


def square(size: int | Sequence[int], channels: int) -> tuple[int, int]:
    """(H, W) from one number or two; both arguments checked."""
    pair = (size, size) if isinstance(size, int) else tuple(int(side) for side in size)
    if len(pair) != 2 or min(pair) < 1:
        raise UsageError(f"size: {size!r} is not allowed; it must be a side in pixels, or [height, width]")
    if channels not in (1, 3):
        raise UsageError(f"channels: {channels!r} is not allowed; it must be 1 or 3")
    return pair[0], pair[1]


def check_all(items: Sequence[T], load: Callable[[T], object]) -> list[str | None]:
    """Load every item once, several at a time; why each can't be used, or None."""

    def reason(item: T) -> str | None:
        try:
            load(item)
        except BadImage as error:
            return str(error)
        return None

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # Pillow decodes without holding the interpreter
        return list(track(pool.map(reason, items), len(items), "checking images", "images"))


def refuse_bad(path: str, bad: Mapping[str, str], total: int, max_bad: float, left: int) -> None:
    """Raise DataError where nothing is left, or where more than the share `max_bad` can't be used."""
    if not 0 <= max_bad <= 1:
        raise UsageError(f"max_bad: {max_bad!r} is not allowed; it must be a share from 0 to 1")
    common = Counter(bad.values()).most_common(3)
    summary = ", ".join(f"{count} x {why}" for why, count in common)
    if not left:
        why = f"{total} files, none usable: {summary}" if bad else f"none of {', '.join(sorted(SUFFIXES))}"
        raise DataError(f"data.path: {path} holds no images ({why})")
    if len(bad) > max_bad * total:
        raise DataError(
            f"data.path: {len(bad)} of {total} files can't be used ({summary}); more than data.max_bad={max_bad:g}; "
            f"first: {next(iter(bad))}; mend or remove them, or raise it"
        )


def scan(root: Path) -> tuple[list[Entry], list[str]]:
    """All files with an image's suffix, sorted: in class folders where there are any, else in `root` itself."""

    def files(folder: Path, label: int) -> list[Entry]:
        entries = []
        for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()):
            status = path.stat()
            entries.append(Entry(path.relative_to(root).as_posix(), label, (status.st_size, status.st_mtime_ns)))
        return entries

    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    classes = [(folder.name, entries) for folder in folders if (entries := files(folder, 0))]
    flat = [e for e in (files(root, 0) if not classes else []) if "/" not in e.path]
    if not classes:
        return flat, []
    found = [Entry(e.path, label, e.stamp) for label, (_, entries) in enumerate(classes) for e in entries]
    return found, [name for name, _ in classes]

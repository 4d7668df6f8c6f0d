"""The data source for a folder of images, with a folder for each class, or all in one (unconditional).

Shapes: B images, c channels, H x W pixels.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL
import torch
from torch import Tensor

from seriatim import __version__
from seriatim.core.errors import DataError, UsageError
from seriatim.core.files import expanded, sha256
from seriatim.core.flatten import WHITE, as_colour
from seriatim.core.images import MAX_PIXELS, BadImage, check_max_pixels, formats, load_pixels, suffixes
from seriatim.core.progress import Progress
from seriatim.data.base import ImageData
from seriatim.data.known_files import Files, Known, examine
from seriatim.data.listing import Entry, Listing, list_all, list_folder, refuse_empty, say_unused, stamp_of, summary
from seriatim.data.metadata_listing import list_metadata

MOST_BYTES = 4 << 30  # the limit for decoded images in memory
AT_ONCE = 256  # images that are decoded before the progress is shown
VERSION = "2:"  # begins the fingerprint; fingerprints without it contain times of change, which copies lose


class Folder(ImageData):
    """The images in `path`, sorted by class and name. Every file is hashed and decoded once before training begins.

    Pictures that can't be read are left out at that time, so that count and order are fixed in training. `bad` lists
    them with reasons; if their share exceeds `max_bad`, DataError is raised. `passed_over` lists other files that are
    not used. One line on stderr reports the number of both. What was found out about a file is kept in the user's
    cache folder and holds until the size of the file or its time of change differs (`known_files.py`).
    """

    named = True

    def __init__(
        self,
        path: str,
        size: int | Sequence[int] = 256,
        channels: int = 3,
        *,
        flip: bool = True,  # mirror half of the images at random, left to right
        max_bad: float = 0.01,  # the share of files that may be unusable
        # Whether files are decoded at the start. False finds damaged ones only during training; "full" reads all files
        # again, even those that were read by an earlier start and have the same size and time of change.
        check: bool | Literal["full"] = True,
        background: str | Sequence[int] = "white",  # the colour of transparent parts: a name, "#rrggbb" or [r, g, b]
        max_pixels: int = MAX_PIXELS,  # larger pictures are refused by their header, without decoding
        loose: Literal["refuse", "ignore"] = "refuse",  # what to do with pictures beside class folders
        empty: Literal["refuse", "ignore"] = "refuse",  # what to do with class folders without pictures
        # True takes folders as classes. False takes the pictures of all folders, without classes. A text names the
        # column of metadata.jsonl in `path` that has the class of each picture.
        classes: bool | str = True,
        memory: bool = False,  # whether decoded pictures stay in memory, so that each file is decoded once
    ) -> None:
        self.root = expanded(path)
        self.background, self.max_pixels = as_colour(background), check_max_pixels(max_pixels)
        self.size, self.channels, self.flips = square(size, channels), channels, flip
        if not self.root.is_dir():
            raise DataError(f"data.path: {self.root} is not a folder; name one that holds images or class folders")
        found = listing_of(self.root, classes, loose, empty)
        self.passed_over = found.passed_over
        if memory:
            check_room(len(found.entries), self.channels * self.size[0] * self.size[1])
        self._decoded: dict[str, Any] | None = {} if memory else None
        self.bad: dict[str, str] = {}
        self.entries, self.class_names = found.entries, found.class_names
        self._hashes: bytes | None = None
        if check:
            known = examine(self._files(found.entries, decode=True), again=check == "full")
            both = list(zip(found.entries, known, strict=True))
            self.bad = {entry.path: about.verdict for entry, about in both if isinstance(about.verdict, str)}
            self.entries = [entry for entry, about in both if about.verdict is True]
            self._hashes = joined(about for about in known if about.verdict is True)
        refuse_bad(str(self.root), self.bad, len(found.entries), max_bad, len(self.entries), self.passed_over)
        self._leave_out_empty(empty)
        say_unused(str(self.root), self.bad, self.passed_over)
        self.count = len(self.entries)
        self._labels = torch.tensor([entry.label for entry in self.entries])
        self._pixels = None if self._decoded is None else self._in_memory()
        self._decoded = None

    def _leave_out_empty(self, empty: str) -> None:
        """Leave out classes without readable pictures, or raise DataError if `empty` is "refuse"."""
        left = sorted({entry.label for entry in self.entries})
        lost = [name for label, name in enumerate(self.class_names) if label not in set(left)]
        if lost and empty == "refuse":
            refuse_empty(self.root, lost, self.bad)
        if lost:
            number = {label: i for i, label in enumerate(left)}
            self.class_names = [self.class_names[label] for label in left]
            self.entries = [replace(entry, label=number[entry.label]) for entry in self.entries]

    def fingerprint(self) -> str:
        """The sha256 of the list of pictures with their order, sizes and contents; copies have the same."""
        return VERSION + self._digest([[e.path, e.label, e.stamp[0]] for e in self.entries], self._sha256s())

    def fingerprints(self) -> tuple[str, ...]:
        return self.fingerprint(), self._digest([[e.path, e.label, *e.stamp] for e in self.entries])

    def _digest(self, listing: list[Any], contents: bytes = b"") -> str:
        """The sha256 of a listing, of the background and of the contents of files."""
        if self.background != WHITE:
            listing.append(["background", *self.background])
        return hashlib.sha256(json.dumps(listing).encode() + contents).hexdigest()

    def traits(self) -> dict[str, str]:
        return {
            "names": short(json.dumps([[entry.path, entry.label] for entry in self.entries]).encode()),
            "sizes": short(json.dumps([entry.stamp[0] for entry in self.entries]).encode()),
            "contents": short(self._sha256s()),
        }

    def contents(self) -> Iterator[bytes]:
        return apart(self._sha256s())

    def _sha256s(self) -> bytes:
        """The sha256 of each picture's file, one after another."""
        if self._hashes is None:
            self._hashes = joined(examine(self._files(self.entries, decode=False)))
        return self._hashes

    def _files(self, entries: Sequence[Entry], *, decode: bool) -> Files:
        root = str(self.root)
        return Files(
            os.path.realpath(self.root),
            [entry.path for entry in entries],
            [entry.stamp for entry in entries],
            digest=lambda i: sha256(os.path.join(root, entries[i].path)),
            stamp=lambda i: stamp_of(os.stat(os.path.join(root, entries[i].path))),
            decode=(lambda i: self._decode(entries[i])) if decode else None,
            reader=reader_of(self.channels, self.max_pixels),
        )

    def _in_memory(self) -> Tensor:
        """All images (count, c, H, W); those that were not decoded for the check are decoded now, several at a time."""
        kept = self._decoded or {}
        pixels = torch.empty(self.count, self.channels, *self.size, dtype=torch.uint8)
        missing = []
        for i, entry in enumerate(self.entries):
            if entry.path in kept:
                pixels[i] = torch.from_numpy(kept.pop(entry.path))
            else:
                missing.append(i)
        with (
            ThreadPoolExecutor(os.cpu_count() or 1) as pool,  # Pillow releases the interpreter lock while it decodes
            Progress(len(missing), "reading images", "images") as bar,
        ):
            for first in range(0, len(missing), AT_ONCE):
                part = missing[first : first + AT_ONCE]
                for i, image in zip(part, pool.map(self._load, part), strict=True):
                    pixels[i] = torch.from_numpy(image)
                    bar.advance()
        return pixels

    def images(self, index: Tensor) -> Tensor:
        """The images (B, c, H, W) uint8 with the numbers `index` (B,)."""
        if self._pixels is not None:
            return self._pixels[index]
        return torch.from_numpy(np.stack([self._load(int(i)) for i in index]))

    def _decode(self, entry: Entry) -> Any:
        pixels = load_pixels(self.root / entry.path, self.size, self.channels, self.background, self.max_pixels)
        if self._decoded is not None:
            self._decoded[entry.path] = pixels
        return pixels

    def _load(self, i: int) -> Any:
        try:
            return self._decode(self.entries[i])
        except BadImage as error:
            path = self.root / self.entries[i].path
            raise DataError(f"{path}: {error}; it was damaged after training began, or data.check is off") from error

    def labels(self, index: Tensor) -> Tensor | None:
        return self._labels[index] if self.class_names else None

    def name(self, i: int) -> str:
        return self.entries[i].path


def listing_of(root: Path, classes: bool | str, loose: str, empty: str) -> Listing:
    """The pictures of a folder with their classes, as `data.classes` says."""
    if isinstance(classes, str):
        return list_metadata(root, classes)
    return list_folder(root, loose=loose, empty=empty) if classes else list_all(root)


def check_room(count: int, size: int) -> None:
    """Raise DataError if `count` images of `size` bytes are more than may be held in memory."""
    if count * size > MOST_BYTES:
        raise DataError(
            f"data.memory: {count} decoded images take {count * size / 2**30:.1f} GiB, more than "
            f"{MOST_BYTES / 2**30:.0f}; leave it out, or lower data.size"
        )


def square(size: int | Sequence[int], channels: int) -> tuple[int, int]:
    """(H, W) from one number or two. Raises UsageError if `size` or `channels` is not allowed."""
    pair = (size, size) if isinstance(size, int) else tuple(int(side) for side in size)
    if len(pair) != 2 or min(pair) < 1:
        raise UsageError(f"size: {size!r} is not allowed; it must be a side in pixels, or [height, width]")
    if channels not in (1, 3):
        raise UsageError(f"channels: {channels!r} is not allowed; it must be 1 or 3")
    return pair[0], pair[1]


def reader_of(channels: int, max_pixels: int) -> str:
    """A text that describes the decoder and the settings on which it depends whether a picture can be read."""
    return json.dumps([__version__, PIL.__version__, formats(), channels, max_pixels])


def joined(known: Iterable[Known]) -> bytes:
    """The sha256 of files, one after another."""
    return bytes.fromhex("".join(about.sha256 for about in known))


def apart(hashes: bytes) -> Iterator[bytes]:
    """The single hashes of which `joined` made one text."""
    size = hashlib.sha256().digest_size
    return (hashes[i : i + size] for i in range(0, len(hashes), size))


def short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def refuse_bad(
    path: str,
    bad: Mapping[str, str],
    total: int,
    max_bad: float,
    left: int,
    passed_over: Mapping[str, str] | None = None,
) -> None:
    """Raise DataError if no image is left, or if more than the share `max_bad` of all files can't be used."""
    if not 0 <= max_bad <= 1:
        raise UsageError(f"max_bad: {max_bad!r} is not allowed; it must be a share from 0 to 1")
    if not left:
        kinds = ", ".join(sorted(suffixes()))
        why = f"{total} files, none usable: {summary(bad.values())}" if bad else f"no file ends in {kinds}"
        others = f"; not used: {summary(passed_over.values())}" if passed_over else ""
        raise DataError(f"data.path: {path} holds no images that can be read ({why}{others}); name a folder that does")
    if len(bad) > max_bad * total:
        raise DataError(
            f"data.path: {len(bad)} of {total} files can't be used ({summary(bad.values())}); more than "
            f"data.max_bad={max_bad:g}; first: {next(iter(bad))}; repair or remove them, or raise data.max_bad"
        )

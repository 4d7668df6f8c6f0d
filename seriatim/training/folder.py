"""A folder of images: one folder for each class, or all in one (unconditional).

B images, c channels, H x W pixels.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from seriatim.core.errors import DataError, UsageError
from seriatim.core.flatten import WHITE, as_colour
from seriatim.core.images import MAX_PIXELS, BadImage, check_max_pixels, load_pixels, suffixes
from seriatim.core.progress import track
from seriatim.training.data import TIMES, ImageData
from seriatim.training.listing import Entry, list_folder, refuse_empty, say_unused, summary

T = TypeVar("T")


class Folder(ImageData):
    """Images of `path`, sorted by class and name; every file is decoded once before training begins.

    Pictures that can't be read are dropped then and there, so that counts and order don't depend on luck: `bad` lists
    them with reasons, and more than `max_bad` of all is an error. `passed_over` lists what else is not used. One line
    on stderr says how much there is of either.
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
        background: str | Sequence[int] = "white",  # what transparent parts show: a name, "#rrggbb" or [r, g, b]
        max_pixels: int = MAX_PIXELS,  # a picture of more is refused from its header
        loose: Literal["refuse", "ignore"] = "refuse",  # pictures beside class folders
        empty: Literal["refuse", "ignore"] = "refuse",  # class folders without pictures
    ) -> None:
        self.root = Path(path).expanduser()
        self.background, self.max_pixels = as_colour(background), check_max_pixels(max_pixels)
        self.size, self.channels, self.flips = square(size, channels), channels, flip
        if not self.root.is_dir():
            raise DataError(f"data.path: {self.root} is not a folder; name one that holds images, or a folder a class")
        found = list_folder(self.root, loose=loose, empty=empty)
        self.passed_over = found.passed_over
        self.bad: dict[str, str] = {}
        self.entries, self.class_names = found.entries, found.class_names
        if check:
            reasons = check_all(found.entries, lambda entry: self._decode(entry))
            self.bad = {entry.path: why for entry, why in zip(found.entries, reasons, strict=True) if why}
            self.entries = [entry for entry, why in zip(found.entries, reasons, strict=True) if not why]
        refuse_bad(str(self.root), self.bad, len(found.entries), max_bad, len(self.entries), self.passed_over)
        self._leave_out_empty(empty)
        say_unused(str(self.root), self.bad, self.passed_over)
        self.count = len(self.entries)
        self._labels = torch.tensor([entry.label for entry in self.entries])

    def _leave_out_empty(self, empty: str) -> None:
        """Leave out classes of which no picture can be read, or refuse them."""
        left = sorted({entry.label for entry in self.entries})
        lost = [name for label, name in enumerate(self.class_names) if label not in set(left)]
        if lost and empty == "refuse":
            refuse_empty(self.root, lost, self.bad)
        if lost:
            number = {label: i for i, label in enumerate(left)}
            self.class_names = [self.class_names[label] for label in left]
            self.entries = [replace(entry, label=number[entry.label]) for entry in self.entries]

    def fingerprint(self) -> str:
        """sha256 of which files there are, in which order, of which size and age."""
        listing: list[Any] = [[e.path, e.label, *e.stamp] for e in self.entries]
        if self.background != WHITE:
            listing.append(["background", *self.background])
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()

    def traits(self) -> dict[str, str]:
        def digest(of: Callable[[Entry], Any]) -> str:
            return hashlib.sha256(json.dumps([of(entry) for entry in self.entries]).encode()).hexdigest()[:16]

        return {
            "names": digest(lambda entry: [entry.path, entry.label]),
            "sizes": digest(lambda entry: entry.stamp[0]),
            TIMES: digest(lambda entry: entry.stamp[1]),
        }

    def images(self, index: Tensor) -> Tensor:
        """index (B,) -> (B, c, H, W) uint8."""
        return torch.from_numpy(np.stack([self._load(int(i)) for i in index]))

    def _decode(self, entry: Entry) -> Any:
        return load_pixels(self.root / entry.path, self.size, self.channels, self.background, self.max_pixels)

    def _load(self, i: int) -> Any:
        try:
            return self._decode(self.entries[i])
        except BadImage as error:
            path = self.root / self.entries[i].path
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


def refuse_bad(
    path: str,
    bad: Mapping[str, str],
    total: int,
    max_bad: float,
    left: int,
    passed_over: Mapping[str, str] | None = None,
) -> None:
    """Raise DataError where nothing is left, or where more than the share `max_bad` can't be used."""
    if not 0 <= max_bad <= 1:
        raise UsageError(f"max_bad: {max_bad!r} is not allowed; it must be a share from 0 to 1")
    if not left:
        kinds = ", ".join(sorted(suffixes()))
        why = f"{total} files, none usable: {summary(bad.values())}" if bad else f"no file of {kinds}"
        others = f"; not used: {summary(passed_over.values())}" if passed_over else ""
        raise DataError(f"data.path: {path} holds no images that can be read ({why}{others}); name a folder that does")
    if len(bad) > max_bad * total:
        raise DataError(
            f"data.path: {len(bad)} of {total} files can't be used ({summary(bad.values())}); more than "
            f"data.max_bad={max_bad:g}; first: {next(iter(bad))}; mend or remove them, or raise it"
        )

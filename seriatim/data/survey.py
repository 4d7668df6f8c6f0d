"""Look over a folder of pictures: how many there are, and of some of them the sizes, colours and transparency.

All names are listed. Of large folders a sample is read, for a bounded time.

Shapes: n images of the sample, H x W pixels.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from seriatim.core.errors import DataError
from seriatim.core.flatten import BLACK, WHITE
from seriatim.core.images import MAX_PIXELS, BadImage, centre_crop, read_header, read_image, suffixes
from seriatim.core.progress import Progress
from seriatim.data.listing import Listing, list_all, list_folder, summary
from seriatim.data.metadata_listing import class_column, has_metadata, list_metadata, read_metadata

SIDE = 32  # pixels of the sample
MOST, FEWEST = 2000, 16  # pictures of the sample; the fewest are read however long it takes
AT_ONCE = 32  # pictures between two looks at the clock
GREY = 3.0  # levels by which the colours of a grey picture differ at most, on average
CLEAR = 0.005  # the share of a picture that is transparent from which it counts
PALE = 0.85  # the brightness from which what is not transparent would hardly be seen on white


class Looked(NamedTuple):
    """What is known about a picture of the sample."""

    width: int
    height: int
    pixels: npt.NDArray[np.uint8]  # (SIDE, SIDE, 3), over white
    clear: float  # the share that is transparent
    brightness: float  # of what is not, from 0 to 1
    grey: bool
    seconds: float  # that it took to read it once


@dataclass(frozen=True)
class Survey:
    """What was found in a folder."""

    path: Path
    listing: Listing
    classes: bool | str  # the setting `data.classes` that gives this listing
    sample: list[Looked]
    index: list[int]  # the number of each picture of the sample among the entries
    bad: dict[str, str] = field(default_factory=dict)  # pictures of the sample that can't be read, with reasons

    @property
    def count(self) -> int:
        return len(self.listing.entries)

    @property
    def names(self) -> list[str]:
        return self.listing.class_names

    @property
    def looked_at(self) -> int:
        return len(self.sample) + len(self.bad)

    @property
    def each(self) -> list[int]:
        """The number of pictures of each class, smallest first; of all pictures if there are no classes."""
        return sorted(Counter(entry.label for entry in self.listing.entries).values())

    @property
    def labels(self) -> list[int]:
        """The class of each picture of the sample."""
        return [self.listing.entries[i].label for i in self.index]

    @property
    def pixels(self) -> Tensor:
        """The pictures of the sample: (n, 3, SIDE, SIDE) uint8."""
        return torch.from_numpy(np.stack([each.pixels for each in self.sample])).permute(0, 3, 1, 2)

    @property
    def grey(self) -> bool:
        return all(each.grey for each in self.sample)

    @property
    def clear(self) -> float:
        """The share of the pictures of which parts are transparent."""
        return sum(each.clear > CLEAR for each in self.sample) / len(self.sample)

    @property
    def pale(self) -> bool:
        """Whether most transparent pictures would hardly be seen on white."""
        bright = [each.brightness for each in self.sample if each.clear > CLEAR]
        return bool(bright) and statistics.median(bright) > PALE

    @property
    def short_side(self) -> int:
        """The median of the shorter sides."""
        return int(statistics.median_low([min(each.width, each.height) for each in self.sample]))

    @property
    def cropped(self) -> float:
        """The median share of a picture that a square crop cuts off."""
        sides = [(each.width, each.height) for each in self.sample]
        return statistics.median(1 - min(pair) / max(pair) for pair in sides)

    @property
    def seconds(self) -> float:
        """The mean seconds that one thread takes to read a picture."""
        return statistics.fmean(each.seconds for each in self.sample)

    @property
    def files(self) -> list[str]:
        return [self.listing.entries[i].path for i in self.index]


def survey(
    path: Path, seconds: float, *, classes: bool | str | None = None, loose: str = "refuse", quiet: bool = False
) -> Survey:
    """Look over the pictures in a folder, for about so many seconds.

    `classes` is the setting `data.classes`; None takes the column of metadata.jsonl that sorts pictures best, or else
    the folders. `loose` is the setting `data.loose`; folders without pictures are left out. Raises DataError if no
    picture can be read.
    """
    classes = found_classes(path) if classes is None else classes
    if isinstance(classes, str):
        listing = list_metadata(path, classes)
    else:
        listing = list_folder(path, loose=loose, empty="ignore") if classes else list_all(path)
    if not listing.entries:
        others = f"; not used: {summary(listing.passed_over.values())}" if listing.passed_over else ""
        raise DataError(
            f"data.path: {path} holds no pictures (no file ends in {', '.join(sorted(suffixes()))}{others}); name a "
            "folder of pictures, or of a folder for each class"
        )
    sample, index, bad = read_some(path, listing, seconds, quiet=quiet)
    if not sample:
        raise DataError(
            f"data.path: none of {len(bad)} pictures in {path} can be read ({summary(bad.values())}); name a folder of "
            "pictures"
        )
    return Survey(path, listing, classes, sample, index, bad)


def found_classes(path: Path) -> bool | str:
    """The column of metadata.jsonl that sorts the pictures into classes; False if it has none; True without it."""
    return (class_column(read_metadata(path)) or False) if has_metadata(path) else True


def read_some(
    path: Path, listing: Listing, seconds: float, *, quiet: bool
) -> tuple[list[Looked], list[int], dict[str, str]]:
    """Read pictures in a random order that is always the same, until there are MOST or the time is over."""
    order = np.random.default_rng(0).permutation(len(listing.entries))[:MOST].tolist()
    sample: list[Looked] = []
    index: list[int] = []
    bad: dict[str, str] = {}
    begin = time.monotonic()
    with (
        ThreadPoolExecutor(os.cpu_count() or 1) as pool,
        Progress(len(order), "looking at pictures", "pictures", quiet=quiet) as bar,
    ):
        done = 0
        while done < len(order) and (len(sample) < FEWEST or time.monotonic() - begin < seconds):
            size = AT_ONCE if len(sample) >= FEWEST else FEWEST
            part = order[done : done + size]
            files = [path / listing.entries[i].path for i in part]
            for i, found in zip(part, pool.map(looked_at, files), strict=True):
                if isinstance(found, str):
                    bad[listing.entries[i].path] = found
                else:
                    sample.append(found)
                    index.append(i)
            done += len(part)
            bar.advance(len(part))
        bar.total = done  # the rest is not read
    return sample, index, bad


def looked_at(path: Path) -> Looked | str:
    """What is known about a picture, or the reason why it can't be read."""
    try:
        header = read_header(path, MAX_PIXELS)
        begin = time.perf_counter()
        over_white = read_image(path, 3, WHITE)
        seconds = time.perf_counter() - begin
        pixels = small(over_white)
        clear, brightness = 0.0, float(pixels.mean()) / 255
        if header.clear:
            black = small(read_image(path, 3, BLACK)).astype(np.float32)
            opaque = 1 - (pixels - black).clip(0, 255).mean(axis=2) / 255  # (SIDE, SIDE), from 0 to 1
            clear = 1 - float(opaque.mean())
            brightness = float(black.mean(axis=2).sum() / 255 / max(1e-6, opaque.sum()))
        levels = pixels.astype(np.int16)
        grey = float((levels.max(axis=2) - levels.min(axis=2)).mean()) <= GREY
        return Looked(header.width, header.height, pixels, clear, brightness, grey, seconds)
    except BadImage as error:
        return str(error)
    except OSError as error:
        return f"can't be read ({error.strerror or type(error).__name__})"


def small(image: object) -> npt.NDArray[np.uint8]:
    """The middle of a picture at SIDE x SIDE pixels: (SIDE, SIDE, 3)."""
    return np.asarray(centre_crop(image, (SIDE, SIDE)))  # type: ignore[arg-type]

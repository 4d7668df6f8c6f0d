"""Images with labels in memory, to train and test a classifier, and the augmentation of the training images.

Shapes: B images, c channels, H x W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from seriatim.core.errors import ConfigError, DataError
from seriatim.core.names import match_names
from seriatim.core.progress import Progress
from seriatim.core.random import derive_seed, generator
from seriatim.data.base import ImageData, StreamData
from seriatim.data.loader import to_float
from seriatim.data.sources import build_data

MOST_BYTES = 4 << 30  # the limit for all images in memory
AT_ONCE = 256  # images that a thread reads at once


class InMemory(ImageData):
    """Images of another source, read once, because decoding all files in every pass would take longer than training."""

    def __init__(self, source: ImageData, index: Tensor | None = None, *, quiet: bool = False) -> None:
        self.source, self.index = source, torch.arange(source.count) if index is None else index
        self.count, self.size, self.channels = len(self.index), source.size, source.channels
        self.class_names, self.flips, self.bad = source.class_names, source.flips, source.bad
        self.passed_over, self.background = source.passed_over, source.background
        first = source.images(self.index[:1])
        check_room(self.count, first)
        self._images = first.new_empty(self.count, *first.shape[1:])
        places = torch.arange(self.count).split(AT_ONCE)
        with (
            ThreadPoolExecutor(os.cpu_count() or 1) as pool,  # Pillow releases the interpreter lock while it decodes
            Progress(self.count, "reading images", "images", quiet=quiet) as bar,
        ):
            for place, images in zip(places, pool.map(lambda p: source.images(self.index[p]), places), strict=True):
                self._images[place] = images
                bar.advance(len(place))
        labels = source.labels(self.index)
        assert labels is not None, "build_labelled has refused data without classes"
        self._labels = labels

    def images(self, index: Tensor) -> Tensor:
        return self._images[index]

    def labels(self, index: Tensor) -> Tensor:
        return self._labels[index]

    def name(self, i: int) -> str:
        return self.source.name(int(self.index[i]))

    def fingerprint(self) -> str:
        return self.fingerprints()[0]

    def fingerprints(self) -> tuple[str, ...]:
        held_out = self.source.count - self.count
        return tuple(text + (f" without {held_out}" if held_out else "") for text in self.source.fingerprints())

    def traits(self) -> dict[str, str]:
        return self.source.traits()


def check_room(count: int, images: Tensor) -> None:
    """Raise ConfigError if `count` images like the first would take too much memory."""
    size = count * images[0].numel() * images.element_size()
    if size > MOST_BYTES:
        shape = " x ".join(str(side) for side in images.shape[1:])
        raise ConfigError(
            f"data: {count} images of {shape} take {size / 2**30:.1f} GiB of memory, more than "
            f"{MOST_BYTES / 2**30:.0f}; a classifier holds them all: lower data.size, or name a smaller set"
        )


def build_labelled(config: Mapping[str, Any], seed: int, *, quiet: bool = False) -> tuple[InMemory, InMemory]:
    """The images to train on and the images to test on.

    The test images are in `test_path`, which has the same kind and classes as `path`. If it is not given, the share
    `test_share` of each class is held out. Raises ConfigError or DataError.
    """
    rest = dict(config)
    test_path, share = rest.pop("test_path", None), rest.pop("test_share", 0.1)
    if isinstance(share, bool) or not isinstance(share, float) or not 0 < share < 1:
        raise ConfigError(f"data.test_share: {share!r} is not allowed; it must be a share between 0 and 1, such as 0.1")
    if test_path is not None and not isinstance(test_path, str):
        raise ConfigError(f"data.test_path: {test_path!r} is not allowed; it must be a path, as data.path is")
    source = build_data(rest)
    check_classes(source)
    if test_path is None:
        kept, held_out = held_out_share(source, share, seed)
        return InMemory(source, kept, quiet=quiet), InMemory(source, held_out, quiet=quiet)
    if "path" not in rest:
        raise ConfigError(f"data.test_path: data of kind {rest['kind']!r} has no path; leave it out")
    try:
        other = build_data({**rest, "path": test_path})
    except DataError as error:
        raise DataError(str(error).replace("data.path", "data.test_path")) from error
    if match_names(other.class_names, source.class_names) != list(range(len(source.class_names))):
        odd = sorted(set(other.class_names) ^ set(source.class_names))
        where = "data.test_path" if odd and odd[0] in other.class_names else "data.path"
        which = f"{odd[0]!r} is only in {where}" if odd else "their order differs"
        raise DataError(f"data.test_path: its classes are not those of data.path ({which}); name images of the same")
    return InMemory(source, quiet=quiet), InMemory(other, quiet=quiet)


def check_classes(data: ImageData) -> None:
    """Raise ConfigError or DataError if a classifier can't be trained on the data."""
    if isinstance(data, StreamData) or data.cached:
        raise ConfigError("data.kind: a classifier holds its images in memory; use a folder or hf")
    if len(data.class_names) < 2:
        found = f"the one class {data.class_names[0]!r}" if data.class_names else "no classes"
        raise DataError(f"data.path: has {found}; a classifier needs two or more, each with a folder of images")


def held_out_share(data: ImageData, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """The indices to train on and to test on. Each class is split by `share`, with at least one image on each side."""
    labels = data.labels(torch.arange(data.count))
    assert labels is not None, "check_classes has refused data without classes"
    kept, held_out = [], []
    for label, name in enumerate(data.class_names):
        members = (labels == label).nonzero()[:, 0]
        if len(members) < 2:
            raise DataError(
                f"data.path: class {name!r} has {len(members)} usable images, so none can be held out for testing; "
                "add more, or name test images with data.test_path"
            )
        members = members[torch.randperm(len(members), generator=generator(derive_seed(seed, "held out", label)))]
        count = min(len(members) - 1, max(1, round(share * len(members))))
        held_out.append(members[:count])
        kept.append(members[count:])
    return torch.cat(kept).sort().values, torch.cat(held_out).sort().values


# --- augmentation ---------------------------------------------------------------------------------------------------


def augmented(images: Tensor, draws: Tensor, crop: int, cutout: int) -> Tensor:
    """The images (B, c, H, W) shifted at random by up to `crop` pixels each way, with a grey square; in [-1, 1].

    Shifting mirrors the border (pixel -1 is pixel 1), which looks more like an image than black. The square has the
    side `cutout` and its centre anywhere (Cutout, DeVries & Taylor 2017). `draws` (B,) has one random number for each
    image, which decides everything.
    """
    B, _, H, W = images.shape
    n = 2 * crop + 1
    down, right = draws % n - crop, draws // n % n - crop  # (B,)
    y, x = torch.arange(H), torch.arange(W)
    rows, columns = mirrored_index(y + down[:, None], H), mirrored_index(x + right[:, None], W)  # (B, H), (B, W)
    moved = images[torch.arange(B)[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (B, H, W, c)
    moved = to_float(moved)
    if cutout:
        draws = draws // n**2
        top, left = draws % H - cutout // 2, draws // H % W - cutout // 2  # (B,)
        inside_y = (y >= top[:, None]) & (y < top[:, None] + cutout)  # (B, H)
        inside_x = (x >= left[:, None]) & (x < left[:, None] + cutout)  # (B, W)
        moved = moved.masked_fill((inside_y[:, :, None] & inside_x[:, None, :])[..., None], 0.0)
    return moved.permute(0, 3, 1, 2)  # (B, c, H, W), channels last in memory


def mirrored_index(index: Tensor, size: int) -> Tensor:
    """The positions with those outside 0, ..., size - 1 mirrored at the border: -1 -> 1, size -> size - 2."""
    return (size - 1) - ((size - 1) - index.abs()).abs()


def draws_of(seed: int, first: int, count: int) -> Tensor:
    """63 random bits (count,) for the images first, ..., first + count - 1 of a run, which depend on these numbers."""
    return torch.tensor([derive_seed(seed, "augment", g) for g in range(first, first + count)])

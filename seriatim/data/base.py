"""The contract of data sources, and the order in which training reads images.

Shapes: B images, c channels, H x W pixels in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from seriatim.core.errors import UsageError
from seriatim.core.flatten import WHITE, Colour
from seriatim.core.random import derive_seed, generator
from seriatim.tokenizers.base import Tokenizer


class ImageData:
    """The base class of data sources. Images with labels are read by index, or in order from a `StreamData`.

    The constructor of a subclass sets
      count         the number of images
      size          (H, W)
      channels      c
      class_names   the name of each class; empty if there are no classes
    and may set
      flips         whether half of the images are mirrored at random
      bad           pictures that are left out because they can't be read, with reasons
      passed_over   other files and folders that are not used, with reasons
      background    the colour that transparent parts of pictures show
      cached        whether the "images" are a tokenizer's moments (B, m, h, w), float32 or int64 codes
      pictures      False if the data are other sequences, of size (1, L) with D features
      named         whether `name` identifies an image whatever the order of the listing, as the name of a file does
      held_out      images beside these on which a run measures its validation loss
    """

    count: int
    size: tuple[int, int]
    channels: int
    class_names: list[str]
    flips = False
    bad: Mapping[str, str] = {}
    passed_over: Mapping[str, str] = {}
    background: Colour = WHITE
    cached = False
    pictures = True
    named = False
    held_out: ImageData | None = None

    def images(self, index: Tensor) -> Tensor:
        """The images `index` (B,): (B, c, H, W) uint8, or float in [-1, 1]."""
        raise NotImplementedError(f"{type(self).__name__} lacks images()")

    def mirrored(self, index: Tensor, chosen: Tensor) -> Tensor:
        """The images `index` (B,), of which those in the mask `chosen` (B,) are mirrored left to right."""
        return mirror(self.images(index), chosen)

    def labels(self, index: Tensor) -> Tensor | None:
        """The labels (B,) of the images `index` (B,); None if there are no classes."""
        raise NotImplementedError(f"{type(self).__name__} lacks labels()")

    def some(self, most: int, size: int) -> Iterator[Tensor]:
        """Batches of `size` images, about `most` in all, from all over the data; statistics are measured on them."""
        index = torch.arange(self.count)[:: max(1, self.count // most)]
        return (self.images(part) for part in index.split(size))

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise ConfigError or DataError if this data can't be used with the tokenizer; sizes are checked elsewhere."""

    def name(self, i: int) -> str:
        """The name of image i in messages."""
        return str(i)

    def fingerprint(self) -> str:
        """A text that changes if the images or their order change; a run only resumes with the same one."""
        return f"{type(self).__name__} {self.count}"

    def fingerprints(self) -> tuple[str, ...]:
        """The fingerprint, followed by those by which earlier versions knew the same images."""
        return (self.fingerprint(),)

    def contents(self) -> Iterator[bytes] | None:
        """What each image is known by whatever its name and place, such as the sha256 of its file; None if nothing is.

        Equal contents mean that the images are the same. That is not so the other way round.
        """
        return None

    def traits(self) -> dict[str, str]:
        """The parts of the fingerprint by name, so that a message can say which of them changed."""
        return {}

    def images_fingerprint(self) -> str:
        """The fingerprint of the original images, which differs from `fingerprint` if this is a cache of them."""
        return self.fingerprint()


def mirror(images: Tensor, chosen: Tensor) -> Tensor:
    """The images (B, c, H, W), of which those in the mask `chosen` (B,) are mirrored left to right."""
    return torch.where(chosen.view(-1, 1, 1, 1), images.flip(-1), images)


class Position(NamedTuple):
    """A place in a stream: the number of complete passes, and the number of rows read in the current pass."""

    epoch: int = 0
    row: int = 0


BEGINNING = Position()


class Row(NamedTuple):
    """One row of a stream."""

    pixels: Any  # (c, H, W) uint8; None if the row can't be used
    label: int
    name: str
    why: str | None  # the reason if the row can't be used
    after: Position  # the position of the next row


class StreamData(ImageData):
    """A source that can only be read from the beginning, such as a data set of the hub that is too large for the disk.

    `count` is 0 if it is unknown. The order of the rows depends on (seed, position) alone.
    """

    max_bad: float  # the share of rows that may be unusable
    bad: dict[str, str]  # the unusable rows met so far, with reasons

    def rows(self, seed: int, begin: Position) -> Iterator[Row]:
        """Yield the rows from a position on, pass after pass without end."""
        raise NotImplementedError(f"{type(self).__name__} lacks rows()")

    def some(self, most: int, size: int) -> Iterator[Tensor]:
        images: list[Any] = []
        for row in self.rows(0, BEGINNING):
            if row.after.epoch or len(images) >= most:
                break
            images += [row.pixels] if row.why is None else []
        return (torch.from_numpy(np.stack(images[i : i + size])) for i in range(0, len(images), size))


class Digits(ImageData):
    """The handwritten digits that come with scikit-learn: 1797 images of 8x8, 17 grey levels, 10 classes.

    A fifth of each class is held out; `held_out=True` selects that part.
    """

    def __init__(self, held_out: bool = False) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        pixels, labels = load_digits(return_X_y=True)
        split = train_test_split(pixels, labels, test_size=0.2, random_state=0, stratify=labels)
        pixels, labels = (split[1], split[3]) if held_out else (split[0], split[2])
        self._images = torch.from_numpy((pixels / 8.0 - 1.0).astype(np.float32)).view(-1, 1, 8, 8)
        self._labels = torch.from_numpy(labels.astype(np.int64))
        self.count, self.size, self.channels = len(labels), (8, 8), 1
        self.class_names = [str(digit) for digit in range(10)]

    def images(self, index: Tensor) -> Tensor:
        return self._images[index]

    def labels(self, index: Tensor) -> Tensor:
        return self._labels[index]


class Order:
    """The order of a run's images: a new permutation in every epoch.

    The g-th image depends on (seed, g) alone, so that a run that resumes at image g continues as if it had never
    stopped, whatever its batch size.
    """

    def __init__(self, count: int, seed: int) -> None:
        if count < 1:
            raise UsageError(f"count: {count!r} is not allowed; training needs at least one image")
        self.count, self.seed = count, seed
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.long)

    def __call__(self, first: int, length: int) -> Tensor:
        """The indices (length,) of the images first, ..., first + length - 1 of the run."""
        parts = []
        while length:
            epoch, offset = divmod(first, self.count)
            if epoch != self._epoch:
                seeded = generator(derive_seed(self.seed, "order", epoch))
                self._epoch, self._permutation = epoch, torch.randperm(self.count, generator=seeded)
            part = self._permutation[offset : offset + length]
            parts.append(part)
            first, length = first + len(part), length - len(part)
        return torch.cat(parts)

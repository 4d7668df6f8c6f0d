"""Where training images come from, and in which order.

B images, c channels, H x W pixels in [-1, 1].
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

TIMES = "times of change"  # of files: a copy has others, unless it was told to keep them


class ImageData:
    """What every source is: a number of images with labels, read by index; or a `StreamData`, read from its front.

    A subclass sets, in its constructor,
      count         how many images
      size          (H, W)
      channels      c
      class_names   the name of each class; empty where there are none
    and, where they apply,
      flips         mirror half of the images at random
      bad           pictures left out because they can't be read, with reasons
      passed_over   other files and folders that are not used, with reasons
      background    what the transparent parts of pictures show
      cached        its "images" are a tokenizer's moments (B, m, h, w), float32 or int64 codes, ready for `tokens`
      pictures      False where they are sequences of another kind: (1, L) of D features
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

    def images(self, index: Tensor) -> Tensor:
        """index (B,) -> (B, c, H, W): uint8, or float in [-1, 1]."""
        raise NotImplementedError(f"{type(self).__name__} lacks images()")

    def mirrored(self, index: Tensor, chosen: Tensor) -> Tensor:
        """images(index), the chosen (B,) of them mirrored left to right."""
        return mirror(self.images(index), chosen)

    def labels(self, index: Tensor) -> Tensor | None:
        """index (B,) -> (B,), None where there are no classes."""
        raise NotImplementedError(f"{type(self).__name__} lacks labels()")

    def some(self, most: int, size: int) -> Iterator[Tensor]:
        """At most about `most` images from all over the data, `size` at a time: for measuring statistics."""
        index = torch.arange(self.count)[:: max(1, self.count // most)]
        return (self.images(part) for part in index.split(size))

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Refuse a tokenizer whose moments these are not; of images, `setup.build` checks the shape."""

    def name(self, i: int) -> str:
        """What a person calls image i."""
        return str(i)

    def fingerprint(self) -> str:
        """Changes when the images or their order do: a run resumes on what it began with."""
        return f"{type(self).__name__} {self.count}"

    def traits(self) -> dict[str, str]:
        """What the fingerprint is made of, each by itself: where it changes, a person is told what did."""
        return {}

    def images_fingerprint(self) -> str:
        """That of the images themselves, where these are made from them."""
        return self.fingerprint()


def mirror(images: Tensor, chosen: Tensor) -> Tensor:
    """Images (B, c, H, W), the chosen (B,) of them mirrored left to right."""
    return torch.where(chosen.view(-1, 1, 1, 1), images.flip(-1), images)


class Position(NamedTuple):
    """A place in a stream: how many times it was read to its end, and how many of its rows since."""

    epoch: int = 0
    row: int = 0


BEGINNING = Position()


class Row(NamedTuple):
    """One row of a stream."""

    pixels: Any  # (c, H, W) uint8; None where it can't be used
    label: int
    name: str
    why: str | None  # why it can't be used
    after: Position  # where the next row is


class StreamData(ImageData):
    """A source that can only be read from its front, such as a data set of the hub that no disk holds.

    `count` is 0 where nobody knows it. Rows come in an order that depends on (seed, position) alone.
    """

    max_bad: float  # share of rows that may be unusable
    bad: dict[str, str]  # rows met that were

    def rows(self, seed: int, begin: Position) -> Iterator[Row]:
        """Rows from a position on, again and again without end."""
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

    A fifth, in the proportion of the classes, is held out; `held_out=True` is that part.
    """

    LEVELS = 17

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
    """Which image is the g-th of a run: a new permutation every epoch, a function of (seed, g) alone.

    A run that resumes at image g goes on as if it had never stopped, whatever its batch size.
    """

    def __init__(self, count: int, seed: int) -> None:
        if count < 1:
            raise UsageError(f"count: {count!r} images; training needs at least one")
        self.count, self.seed = count, seed
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.long)

    def __call__(self, first: int, length: int) -> Tensor:
        """Indices of the images first, ..., first + length - 1 of the run: (length,)."""
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

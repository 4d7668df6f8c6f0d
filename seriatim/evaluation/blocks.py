"""What is computed of many images, block by block on the disk: another process, or another day, goes on with it.

A block is a shard, whose sha256 is checked whenever it is read: a damaged one is computed again. Image i is in block
i // SIZE whoever computes it.

B images of a block, F features.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from seriatim.core.errors import NumericsError, UsageError
from seriatim.core.files import writable_folder
from seriatim.core.progress import Progress
from seriatim.core.stopping import claims
from seriatim.data.store import Shards
from seriatim.evaluation.base import FeatureExtractor, Features
from seriatim.evaluation.metrics import Array

SIZE = 256  # images of a block: a stop loses less than that
AT_ONCE = 64  # images that go through an extractor: 299 pixels a side take memory
NAMES = Features._fields
PIXELS = "pixels"  # sha256 of a block's images in 8 bits, as 32 numbers

ImagesOf = Callable[[range], Iterator[Tensor]]  # of a block: images (b, c, H, W) in [-1, 1] of 8 bits, a few at a time


class Share(NamedTuple):
    """The blocks that a process computes and no others: those whose number % processes == process."""

    process: int
    processes: int


@dataclass(frozen=True)
class Vectors:
    """Features of a set of images, in float64."""

    features: Array  # (n, F)
    logits: Array | None = None  # (n, K)
    spatial: Array | None = None  # (n, S)
    pixels: str = ""  # sha256 of the sha256 of each block's images: the same pictures, wherever their files are

    def __len__(self) -> int:
        return len(self.features)

    def first(self, count: int) -> Vectors:
        parts = (self.features, self.logits, self.spatial)
        return Vectors(*(None if x is None else x[:count] for x in parts))  # type: ignore[arg-type]


class Blocks:
    """What is known of `count` images, under `folder`, in shards of SIZE images."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        ranges = self.ranges()
        self.shards = Shards(folder, lambda n: f"{ranges[n].start:08d}", lambda n: len(ranges[n]), folder.name)

    def ranges(self) -> list[range]:
        return [range(first, min(first + SIZE, self.count)) for first in range(0, self.count, SIZE)]

    def missing(self) -> list[range]:
        return [block for n, block in enumerate(self.ranges()) if not self.shards.there(n)]

    def fill(
        self,
        tensors_of: Callable[[range, Progress], Mapping[str, Tensor]],  # of a block; it moves the bar on
        what: str,
        *,
        share: Share | None = None,
        quiet: bool = False,
    ) -> None:
        """Compute the blocks that are missing or damaged: those of `share`, or together with other processes all.

        Without a `share`, blocks of a process that died are taken over, and all blocks are there in the end.
        """
        mine = {
            n: block for n, block in enumerate(self.ranges()) if share is None or n % share.processes == share.process
        }
        todo = {n: block for n, block in mine.items() if self.shards.whole(n) is None}
        total, left = (sum(map(len, blocks.values())) for blocks in (mine, todo))
        if not todo:
            return
        writable_folder(self.folder)
        with (
            Progress(total, what, "images", done=total - left, quiet=quiet) as bar,
            contextlib.closing(claims(todo, self.shards.lock)) as numbers,
        ):
            for n in numbers:
                self.shards.sweep(n)
                if self.shards.there(n) and self.shards.whole(n) is not None:
                    bar.skip(len(todo[n]))  # another process has computed it meanwhile
                else:
                    self.shards.write(n, tensors_of(todo[n], bar))

    def arrays(self) -> dict[str, Array]:
        """The tensors of all blocks by name, in float64, one block's rows after another's."""
        found: dict[str, list[Array]] = {}
        for n in range(len(self.ranges())):
            for name, value in self.shards.read(n).items():
                found.setdefault(name, []).append(value.numpy().astype(np.float64))
        return {name: np.concatenate(parts) for name, parts in found.items()}

    def read(self) -> Vectors:
        """Of blocks that `features_of` computed: all together."""
        arrays = self.arrays()
        digests = arrays.get(PIXELS, np.empty(0)).astype(np.uint8)
        whole = len(digests) == 32 * len(self.ranges())  # an earlier version wrote none
        pixels = hashlib.sha256(digests.tobytes()).hexdigest() if whole else ""
        return Vectors(arrays["features"], arrays.get("logits"), arrays.get("spatial"), pixels)


def features_of(
    images_of: ImagesOf, extractor: FeatureExtractor, what: str, device: torch.device | str = "cpu"
) -> Callable[[range, Progress], dict[str, Tensor]]:
    """Of a block: its images' features, for `Blocks.fill`."""

    def tensors_of(block: range, bar: Progress) -> dict[str, Tensor]:
        parts: list[Features] = []
        seen = hashlib.sha256()
        for images in images_of(block):
            seen.update(levels(images).to(torch.uint8).cpu().numpy().tobytes())
            parts += [extract(extractor, some, device) for some in images.split(AT_ONCE)]
            bar.advance(len(images))
        tensors = {}
        for name in NAMES:
            given = [getattr(part, name) for part in parts]
            if given[0] is None:
                continue
            value = torch.cat(given)
            bad = (~torch.isfinite(value)).flatten(1).any(dim=1).nonzero()
            if len(bad):
                image = block.start + int(bad[0])
                raise NumericsError(
                    f"features: {extractor.name} gives {name} that are not finite for image {image} ({what}); "
                    "try dtype float32, other features or other weights"
                )
            tensors[name] = value
        return tensors | {PIXELS: torch.tensor(list(seen.digest()), dtype=torch.uint8)}

    return tensors_of


@torch.no_grad()
def extract(extractor: FeatureExtractor, images: Tensor, device: torch.device | str = "cpu") -> Features:
    """Features on the CPU in float32 of images (B, c, H, W) in [-1, 1]."""
    given: Features = extractor(images.to(device))
    shape = tuple(given.features.shape) if isinstance(given, Features) else type(given).__name__
    if shape != (len(images), extractor.dim):
        raise UsageError(
            f"features: {extractor.name} gives {shape} for {len(images)} images, not Features(features=...) of shape "
            f"{(len(images), extractor.dim)}; its forward and its dim must agree"
        )
    return Features(*(None if x is None else x.float().cpu() for x in given))  # type: ignore[arg-type]


def eight_bits(images: Tensor) -> Tensor:
    """uint8, or float in [-1, 1] -> float in [-1, 1] with the 256 values that a picture's file can hold."""
    return levels(images) / 127.5 - 1


def levels(images: Tensor) -> Tensor:
    """uint8, or float in [-1, 1] -> the 256 values as float."""
    return images.float() if images.dtype == torch.uint8 else ((images.float() + 1) * 127.5).round().clamp(0, 255)

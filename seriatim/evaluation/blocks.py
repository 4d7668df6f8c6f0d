"""Features of many images, block by block on the disk: another process, or another day, goes on where one stopped.

A block is a file; it is there as a whole or not at all. Image i is in block i // SIZE whoever computes it.

B images of a block, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from seriatim.core.errors import NumericsError
from seriatim.core.files import atomic_write
from seriatim.core.progress import Progress
from seriatim.evaluation.base import FeatureExtractor, Features
from seriatim.evaluation.metrics import Array

SIZE = 256  # images of a block: a stop loses less than that
AT_ONCE = 64  # images that go through an extractor: 299 pixels a side take memory
NAMES = Features._fields


@dataclass(frozen=True)
class Share:
    """Which blocks are this process's: those with block number % processes == process."""

    process: int = 0
    processes: int = 1


ALL = Share()


@dataclass(frozen=True)
class Vectors:
    """Features of a set of images, in float64."""

    features: Array  # (n, F)
    logits: Array | None = None  # (n, K)
    spatial: Array | None = None  # (n, S)

    def __len__(self) -> int:
        return len(self.features)

    def first(self, count: int) -> Vectors:
        parts = (self.features, self.logits, self.spatial)
        return Vectors(*(None if x is None else x[:count] for x in parts))  # type: ignore[arg-type]


class Blocks:
    """The features of `count` images under `folder`."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count

    def ranges(self) -> list[range]:
        return [range(first, min(first + SIZE, self.count)) for first in range(0, self.count, SIZE)]

    def path(self, block: range) -> Path:
        return self.folder / f"{block.start:08d}.safetensors"

    def missing(self) -> list[range]:
        return [block for block in self.ranges() if not self.path(block).exists()]

    def fill(
        self,
        images_of: Callable[[range], Iterator[Tensor]],  # images (b, c, H, W) in [-1, 1], a few at a time
        extractor: FeatureExtractor,
        what: str,
        *,
        share: Share = ALL,
        device: torch.device | str = "cpu",
        quiet: bool = False,
    ) -> None:
        """Compute this process's blocks that are not there."""
        mine = [block for n, block in enumerate(self.ranges()) if n % share.processes == share.process]
        todo = [block for block in mine if not self.path(block).exists()]
        total, left = (sum(len(block) for block in blocks) for blocks in (mine, todo))
        with Progress(total, what, "images", done=total - left, quiet=quiet) as bar:
            for block in todo:
                parts: list[Features] = []
                for images in images_of(block):
                    parts += [extract(extractor, some, device) for some in images.split(AT_ONCE)]
                    bar.advance(len(images))
                self.write(block, parts, extractor, what)

    def write(self, block: range, parts: list[Features], extractor: FeatureExtractor, what: str) -> None:
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
            tensors[name] = value.contiguous()
        atomic_write(self.path(block), lambda file: save_file(tensors, file))

    def read(self) -> Vectors:
        """All blocks together. One that can't be read is removed, so that the next call computes it again."""
        found: dict[str, list[Array]] = {name: [] for name in NAMES}
        for block in self.ranges():
            try:
                tensors = load_file(self.path(block))
            except (SafetensorError, OSError) as error:
                self.path(block).unlink(missing_ok=True)
                raise NumericsError(
                    f"{self.path(block)} was damaged and is removed; the same command computes it"
                ) from error
            for name, value in tensors.items():
                found[name].append(value.numpy().astype(np.float64))
        return Vectors(*(np.concatenate(found[name]) if found[name] else None for name in NAMES))  # type: ignore[arg-type]


@torch.no_grad()
def extract(extractor: FeatureExtractor, images: Tensor, device: torch.device | str = "cpu") -> Features:
    """Features on the CPU in float32 of images (B, c, H, W) in [-1, 1]."""
    given: Features = extractor(images.to(device))
    return Features(*(None if x is None else x.float().cpu() for x in given))  # type: ignore[arg-type]


def eight_bits(images: Tensor) -> Tensor:
    """uint8, or float in [-1, 1] -> float in [-1, 1] with the 256 values that a picture's file can hold."""
    levels = images.float() if images.dtype == torch.uint8 else ((images.float() + 1) * 127.5).round().clamp(0, 255)
    return levels / 127.5 - 1

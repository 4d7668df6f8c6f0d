"""Real images: those that samples are measured against, and equally many others that show what a figure can be.

n images, c channels, H x W pixels, F features, K classes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from seriatim.core.array_reading import Declared, read_npz
from seriatim.core.errors import DataError, UsageError
from seriatim.core.files import expanded, sha256
from seriatim.core.names import match_names
from seriatim.core.random import derive_seed, generator
from seriatim.core.reading import Unreadable, read_or_raise
from seriatim.data.base import ImageData
from seriatim.evaluation.metrics import Array

Labels = npt.NDArray[np.int64]


class Images(Protocol):
    """What evaluation needs of a source of images; every source that training reads by index is one."""

    count: int
    size: tuple[int, int]
    channels: int
    class_names: list[str]

    def images(self, index: Tensor) -> Tensor:
        """index (B,) -> (B, c, H, W): uint8, or float in [-1, 1]."""

    def labels(self, index: Tensor) -> Tensor | None:
        """index (B,) -> (B,), None where there are no classes."""

    def fingerprint(self) -> str:
        """Changes when the images or their order do."""


@dataclass(frozen=True)
class Part:
    """Some images of a source."""

    data: Images
    index: Tensor  # (n,)
    labels: Labels | None  # (n,), in the model's numbering; None where there are no classes

    def __len__(self) -> int:
        return len(self.index)

    def fingerprint(self) -> str:
        """The sha256 of which images these are, and of their size."""
        return self.fingerprints()[0]

    def fingerprints(self) -> tuple[str, ...]:
        """The fingerprint, followed by those by which earlier versions knew the same images."""
        size, index = [list(self.data.size), self.data.channels], self.index.numpy().tobytes()
        says = [json.dumps([text, *size]).encode() for text in fingerprints_of(self.data)]
        return tuple(hashlib.sha256(text + index).hexdigest() for text in says)


class ArrayImages:
    """Images in memory: (n, H, W, c) uint8, without classes."""

    def __init__(self, arrays: npt.NDArray[np.uint8], fingerprint: str) -> None:
        self._arrays, self._fingerprint = arrays, fingerprint
        self.count, self.size = len(arrays), (int(arrays.shape[1]), int(arrays.shape[2]))
        self.channels, self.class_names = int(arrays.shape[3]), list[str]()

    def images(self, index: Tensor) -> Tensor:
        return torch.from_numpy(self._arrays[index.numpy()]).permute(0, 3, 1, 2)

    def labels(self, _index: Tensor) -> Tensor | None:
        return None

    def fingerprint(self) -> str:
        return self._fingerprint


def fingerprints_of(data: Images) -> tuple[str, ...]:
    """The fingerprint of images, followed by those by which earlier versions knew the same images."""
    return data.fingerprints() if isinstance(data, ImageData) else (data.fingerprint(),)


# --- which images -------------------------------------------------------------------------------------------------


def balanced(count: int, classes: int) -> Labels | None:
    """The class of image 0, 1, ..., count - 1: each in turn, so that any first few are as balanced as can be."""
    return np.arange(count) % classes if classes else None


def class_numbers(data: Images, classes: int, names: Sequence[str]) -> Labels | None:
    """The model's number of each class of the data (K,), matched by name, or by number where the model has none."""
    theirs = data.class_names
    if not classes or not theirs:
        return None
    places = match_names(theirs, names) if names else list(range(classes))
    if places is None:
        ours, other = (sorted(set(a) - set(b)) for a, b in ((names, theirs), (theirs, names)))
        lacks = f"the data lacks {ours[0]!r}" if ours else f"the model lacks {other[0]!r}"
        raise DataError(
            f"classes: the model has {len(names)}, the data {len(theirs)}; {lacks}; name data with the model's classes"
        )
    if len(theirs) != classes:
        raise DataError(f"classes: the model has {classes}, the data {len(theirs)}; name data with the model's classes")
    return np.array(places)


def whole(data: Images, classes: int, names: Sequence[str]) -> Part:
    """All images of a source."""
    index = torch.arange(data.count)
    numbers, given = class_numbers(data, classes, names), data.labels(index)
    return Part(data, index, None if numbers is None or given is None else numbers[given.numpy()])


def halves(part: Part) -> tuple[Part, Part]:
    """Two halves of the images of each class, at random and always the same; the first has the odd one."""
    chosen: tuple[list[Tensor], list[Tensor]] = ([], [])
    labels = part.labels if part.labels is not None else np.zeros(len(part), dtype=np.int64)
    for c in np.unique(labels):
        members = torch.from_numpy(np.flatnonzero(labels == c))
        order = torch.randperm(len(members), generator=generator(derive_seed("evaluation halves", int(c))))
        cut = -(-len(members) // 2)
        chosen[0].append(members[order[:cut]])
        chosen[1].append(members[order[cut:]])
    first, second = (subset(part, torch.cat(positions).sort().values) for positions in chosen)
    return first, second


def as_many(part: Part, count: int, classes: int) -> Part:
    """`count` images with the classes of `balanced`, or fewer, as many as every class allows; chosen at random."""
    labels = part.labels
    order = torch.randperm(len(part), generator=generator(derive_seed("evaluation as many")))
    if labels is None:
        return subset(part, order[:count])
    members = [order[torch.from_numpy(labels[order.numpy()] == c)] for c in range(classes)]
    count = min(count, classes * min(len(m) for m in members))
    return subset(part, torch.tensor([int(members[i % classes][i // classes]) for i in range(count)], dtype=torch.long))


def subset(part: Part, positions: Tensor) -> Part:
    return Part(part.data, part.index[positions], None if part.labels is None else part.labels[positions.numpy()])


# --- statistics that others have computed -------------------------------------------------------------------------


DIMENSIONS = {"mu": 1, "sigma": 2, "mu_s": 1, "sigma_s": 2, "arr_0": 4}  # of each array that is read
MOST_FEATURES = 4096  # Inception has 2048; a covariance of these takes 128 MB
MOST_PACKED = 64 << 20  # bytes: images that take more are looked at for how well they are packed
MOST_PACKING = 50  # photographs are packed to half, drawings to a tenth


@dataclass(frozen=True)
class Statistics:
    """A reference file of ADM's kind: Gaussians of Inception features, and maybe images."""

    path: Path
    sha256: str
    pool: tuple[Array, Array] | None  # mean (F,) and covariance (F, F): keys mu, sigma
    spatial: tuple[Array, Array] | None  # the same of spatial features: keys mu_s, sigma_s
    images: ArrayImages | None  # key arr_0: (n, H, W, 3) uint8


def read_statistics(path: Path | str) -> Statistics:
    """Read an `.npz` with mu and sigma, mu_s and sigma_s, arr_0. What it pickles is refused and never run."""
    path = expanded(path)
    if not path.is_file():
        raise UsageError(f"data: {path} is no file; name a reference batch such as VIRTUAL_imagenet256_labeled.npz")
    found = read_or_raise(
        lambda: read_npz(path, DIMENSIONS, check_declared), path, DataError, "name a reference batch of plain arrays"
    )
    digest = sha256(path)
    images = found.get("arr_0")
    if images is not None and not (images.ndim == 4 and images.dtype == np.uint8 and images.shape[3] in (1, 3)):
        raise DataError(f"{path}: arr_0 is {images.dtype} of shape {images.shape}, not uint8 (n, H, W, 3)")
    statistics = Statistics(
        path,
        digest,
        gaussian(path, found, "mu", "sigma"),
        gaussian(path, found, "mu_s", "sigma_s"),
        None if images is None else ArrayImages(images, digest),
    )
    if statistics.pool is None and statistics.images is None:
        raise DataError(f"{path}: holds neither mu and sigma nor arr_0; it is no reference batch")
    return statistics


def check_declared(says: Declared) -> None:
    """Raise Unreadable for an array that no reference batch has: it may be a thousand times as large as the file."""
    few = DIMENSIONS[says.name] < 3
    if few and max(says.shape, default=1) > MOST_FEATURES:
        raise Unreadable(f"has {says.name} of shape {says.shape}, but at most {MOST_FEATURES:,} features are read")
    if not few and says.bytes > MOST_PACKED and says.packing > MOST_PACKING:
        raise Unreadable(
            f"has {says.name}, which takes {says.bytes:,} bytes once unpacked, {says.packing:,.0f} times its size in "
            "the file, which no photographs do"
        )


def gaussian(path: Path, found: dict[str, Any], mean: str, covariance: str) -> tuple[Array, Array] | None:
    """Two keys as (F,) and (F, F) in float64; None where the file has neither."""
    if mean not in found and covariance not in found:
        return None
    if mean not in found or covariance not in found:
        raise DataError(f"{path}: has only one of {mean} and {covariance}; a Gaussian needs both")
    mu, sigma = found[mean], found[covariance]
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or mu.dtype.kind != "f" or sigma.dtype.kind != "f":
        raise DataError(f"{path}: {mean} {mu.dtype}{mu.shape} and {covariance} {sigma.dtype}{sigma.shape} don't fit")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise DataError(f"{path}: {mean} or {covariance} has values that are not finite")
    return mu.astype(np.float64, copy=False), sigma.astype(np.float64, copy=False)


def described(source: Images | Statistics, part: Part | None) -> dict[str, Any]:
    """What results.json says of real images."""
    says: dict[str, Any] = {"images": 0 if part is None else len(part)}
    if part is not None:
        says["sha256"] = part.fingerprint()
    if isinstance(source, Statistics):
        says |= {"file": source.path.name, "file_sha256": source.sha256}
    root = getattr(source, "root", None)
    return says | ({"path": os.fspath(root)} if root is not None else {})

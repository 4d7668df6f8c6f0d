"""Decide whether pictures may be mirrored in training: letters, digits and flags may not, most photographs may.

Two things decide. Names of folders and files tell of letters, digits, flags and the like. And a classifier is asked to
tell pictures from their mirror images: of photographs it can't, because the world has no preferred side, but of
letters it can (Lin et al. 2020, "Visual chirality"). It sees pictures at 16x16 pixels, because finer grain tells them
apart by the traces of cameras and of JPEG, which nobody sees. Its features are odd: those of a mirror image are the
negative ones. So is its answer, which is a linear function of them without a constant.

The limits: words that are small within photographs are not seen. Pictures that all face one way, such as cars that
are all photographed from one side, are told from their mirror images, and are then not mirrored, although a mirrored
car is still a car; that costs variety, while mirrored letters would be wrong.

Shapes: n images, c channels, H x W pixels, K filters, F features.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 16  # pixels at which pictures are compared
FILTER, FILTERS, DIRECTIONS = 5, 16, 12  # the side of a filter, their number, and principal components that they mix
FEWEST, MOST = 40, 1000  # images that are needed, and that are looked at
FOLDS = 5
TOLD_APART, CLASS_TOLD_APART = 0.6, 0.75  # shares of pictures told from their mirror images, of all and of one class
CLASS_FEWEST = 30  # images of a class that may decide
SURE = 4.0  # standard errors by which a share must be above one half
WORDS = re.compile(  # in the names of folders and files
    r"(?<![a-z])(letters?|digits?|numbers?|numerals?|alphabets?|glyphs?|fonts?|characters?|handwriting|handwritten|"
    r"texts?|words?|captions?|flags?|signs?|signage|logos?|licen[cs]e[ _-]?plates?|number[ _-]?plates?|keycaps?|"
    r"mnist|emnist|kmnist|svhn|left|right|clocks?|sheet[ _-]?music|maps?|screenshots?|receipts?|documents?)(?![a-z])"
)


@dataclass(frozen=True)
class Mirroring:
    """Whether pictures may be mirrored, and why."""

    allowed: bool
    why: str
    accuracy: float | None = None  # the share of pictures that is told from mirror images; None if it wasn't measured
    images: int = 0


def may_mirror(pixels: Tensor, labels: Sequence[int], names: Sequence[str], files: Iterable[str] = ()) -> Mirroring:
    """Decide from some pictures (n, 3, H, W) uint8, their classes, the names of all classes and names of files."""
    telling = telling_names(names, files)
    if telling:
        return Mirroring(False, f"names tell of letters, flags or the like ({telling})")
    some = np.linspace(0, len(pixels) - 1, min(len(pixels), MOST)).round().astype(int)
    if len(some) < FEWEST:
        count = f"{len(some)} picture{'s are' if len(some) > 1 else ' is'}"
        return Mirroring(False, f"{count} too few to tell whether a mirrored one looks right")
    right = told_apart(pixels[torch.from_numpy(some)])
    share, among = float(right.mean()), f"{len(some):,} pictures"
    if is_sure(share, len(some), TOLD_APART):
        why = f"a classifier tells {share:.0%} of {among} from their mirror images"
        return Mirroring(False, why, share, len(some))
    classes = np.asarray(labels)[some]
    for number, name in enumerate(names):
        own = right[classes == number]
        if len(own) >= CLASS_FEWEST and is_sure(float(own.mean()), len(own), CLASS_TOLD_APART):
            why = f"a classifier tells {own.mean():.0%} of {name!r} from their mirror images"
            return Mirroring(False, why, share, len(some))
    why = f"a classifier tells {share:.0%} of {among} from their mirror images, which is about as many as by guessing"
    return Mirroring(True, why, share, len(some))


def is_sure(share: float, count: int, least: float) -> bool:
    """Whether a share of `count` is at least so large, and more than guessing would give."""
    return share >= least and share >= 0.5 + SURE * (0.25 / count) ** 0.5


def telling_names(names: Sequence[str], files: Iterable[str]) -> str:
    """A name that tells of letters, flags or the like, or "" if there is none.

    A name of a class tells, as do single letters or digits as the names of at least three classes, and words in the
    names of most files.
    """
    for name in names:
        if WORDS.search(name.lower()):
            return f"class {name!r}"
    single = [name for name in names if len(name.strip()) == 1]
    if len(single) >= 3 and 2 * len(single) >= len(names):
        return f"classes {', '.join(single[:3])}"
    found = [(bool(WORDS.search(file.rsplit("/", 1)[-1].lower())), file) for file in files]
    if found and 2 * sum(told for told, _ in found) > len(found):
        return f"files such as {next(file for told, file in found if told)}"
    return ""


# --- the classifier -------------------------------------------------------------------------------------------------


def told_apart(pixels: Tensor) -> np.ndarray:
    """Whether each picture (n, 3, H, W) uint8 is told from its mirror image by a classifier fitted to others: (n,)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold

    features = odd_features(pixels)
    sides = np.where(np.random.default_rng(0).random(len(features)) < 0.5, 1, -1)  # so that there are two answers
    shown = features * sides[:, None]
    right = np.zeros(len(features), dtype=bool)
    for train, test in StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(shown, sides):
        fitted = LogisticRegression(fit_intercept=False, max_iter=300).fit(shown[train], sides[train])
        right[test] = fitted.predict(shown[test]) == sides[test]
    return right


def odd_features(pixels: Tensor) -> np.ndarray:
    """Features (n, F) of pictures that change their sign when the picture is mirrored.

    They are differences between a picture and its mirror image: of how strongly random smooth filters answer, over the
    whole picture and over its thirds, and of the grey levels themselves.
    """
    images = F.interpolate(pixels.float() / 127.5 - 1, (SIDE, SIDE), mode="area")
    images = images - images.mean(dim=(2, 3), keepdim=True)
    both = torch.cat([images, images.flip(-1)])  # (2 n, 3, H, W)
    filters = smooth_filters(both)
    answers = torch.cat([F.conv2d(part, filters) for part in both.split(512)])
    answers = torch.cat([F.relu(answers - 0.5), F.relu(-answers - 0.5)], dim=1)  # (2 n, 2 K, h, w)
    pooled = torch.cat([F.adaptive_avg_pool2d(answers, size).flatten(1) for size in (1, 3)], dim=1)
    grey = F.adaptive_avg_pool2d(both.mean(dim=1, keepdim=True), SIDE // 2).flatten(1)
    found = []
    for features in (pooled, grey):
        odd = features[: len(images)] - features[len(images) :]
        found.append(odd / (odd.std(dim=0, correction=0) + 1e-6) / odd.shape[1] ** 0.5)
    return torch.cat(found, dim=1).numpy()


def smooth_filters(images: Tensor) -> Tensor:
    """Random mixtures (K, c, FILTER, FILTER) of the first principal components of the patches of images."""
    some = images[:: max(1, len(images) // 1000)]
    patches = F.unfold(some, FILTER, stride=2).transpose(1, 2).flatten(0, 1)  # (N, c FILTER^2)
    patches = patches - patches.mean(dim=1, keepdim=True)
    variance, directions = torch.linalg.eigh(patches.T @ patches / len(patches))
    scale = variance[-DIRECTIONS:].clamp(min=1e-6).rsqrt()
    mix = torch.from_numpy(np.random.default_rng(0).normal(size=(FILTERS, DIRECTIONS))).float()
    mix = mix / mix.norm(dim=1, keepdim=True)
    return ((mix * scale) @ directions[:, -DIRECTIONS:].T).view(FILTERS, images.shape[1], FILTER, FILTER)

"""The table of feature extractors: name -> class. Register one of your own with `FEATURES["mine"] = Mine`.

B images, c channels, H x W pixels.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from seriatim.checkpoints.packaged import packaged, packaged_names
from seriatim.core.errors import UsageError, nearest_part
from seriatim.core.files import expanded
from seriatim.evaluation.base import FeatureExtractor, Features
from seriatim.evaluation.inception import Inception, InceptionPytorchFid
from seriatim.evaluation.lpips import LPIPS
from seriatim.evaluation.residual_net import Classifier

CLASSIFIER = "classifier"  # opens a folder given without a name
WEIGHTS = "inception"  # opens a file given without a name


class PixelFeatures(FeatureExtractor):
    """The pixels themselves, in [0, 1]: no network, for small images."""

    def __init__(self, size: tuple[int, int], channels: int) -> None:
        super().__init__()
        self.name, self.dim = "pixels", channels * size[0] * size[1]
        self.config = {"size": list(size), "channels": channels}

    @classmethod
    def open(cls, path: Path | None, *, size: tuple[int, int], channels: int) -> PixelFeatures:
        if path is not None:
            raise UsageError(f"features: pixels take no path, {str(path)!r} given; leave it out")
        return cls(size, channels)

    def forward(self, images: Tensor) -> Features:
        return Features((images.flatten(1).float() + 1) / 2)


FEATURES: dict[str, type[FeatureExtractor]] = {
    CLASSIFIER: Classifier,
    "inception": Inception,
    "inception-pytorch-fid": InceptionPytorchFid,
    "lpips": LPIPS,
    "pixels": PixelFeatures,
}


def open_features(which: str, *, size: tuple[int, int], channels: int) -> FeatureExtractor:
    """`NAME`, `NAME:PATH`, or a path alone (a folder is a classifier's, a file holds Inception's weights).

    A path may also be the name of a packaged classifier.
    """
    name, _, rest = which.partition(":")
    path = expanded(rest) if rest else None
    if which not in FEATURES and packaged(which) is not None:
        name, path = CLASSIFIER, Path(which)
    elif which not in FEATURES and expanded(which).exists():
        path = expanded(which)
        name = CLASSIFIER if path.is_dir() else WEIGHTS
    if name not in FEATURES:
        hint = nearest_part(name, [*FEATURES, *packaged_names("classifier"), "a folder of a trained classifier"])
        raise UsageError(f"features: {which!r} is neither an extractor nor a path that exists{hint}")
    return FEATURES[name].open(path, size=size, channels=channels).eval()

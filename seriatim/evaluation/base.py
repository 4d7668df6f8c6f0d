"""The contract of a feature extractor: what images are turned into before two sets of them are compared.

B images, c channels, H x W pixels in [-1, 1], F features, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from seriatim.core.errors import UsageError
from seriatim.tokenizers.base import Tokenizer, digest_of


class Features(NamedTuple):
    """What an extractor says of B images."""

    features: Tensor  # (B, F) float32
    logits: Tensor | None = None  # (B, K) float32, of an extractor that knows classes
    spatial: Tensor | None = None  # (B, S) float32, where things are: of sFID


class FeatureExtractor(nn.Module):
    """What every extractor is: a module in eval mode that `evaluate` calls without gradients.

    A subclass sets, in its constructor,
      name         what its figures are called by: FD[name]
      dim          F
      config       the constructor's arguments and all that shapes its features (resizing, layer), as plain data
    and, where they apply,
      classes      K of its logits; 0 where it has none
      class_names  their names; a model's classes are matched by name, else by number where there are equally many
      layers         names of the modules whose outputs a perceptual loss compares; none: the features
      layer_weights  a weight (C,) for each channel of some of these, by name
      standard     its figures may be called "FID", "IS", "KID", "sFID": the known Inception weights alone
    Register it: FEATURES["mine"] = Mine; then `--features mine`, or `--features mine:PATH`.
    """

    name: str
    dim: int
    config: dict[str, Any]
    classes: int = 0
    class_names: Sequence[str] = ()
    standard: bool = False
    layers: Sequence[str] = ()
    layer_weights: Mapping[str, Tensor] = {}

    @classmethod
    def open(cls, path: Path | None, *, size: tuple[int, int], channels: int) -> FeatureExtractor:  # noqa: ARG003
        """One for images (c, H, W); `path` is what stood behind the name, its weights or folder.

        Raises UsageError for a path it has no use for, CheckpointError where the weights are missing or others.
        """
        if path is not None:
            raise UsageError(f"features: {cls.__name__.lower()} takes no path, {str(path)!r} given; leave it out")
        return cls()

    def forward(self, images: Tensor) -> Features:
        """Images (B, c, H, W) in [-1, 1], of 8 bits a value -> features; it resizes as it needs to."""
        raise NotImplementedError(f"{type(self).__name__} lacks forward()")

    def fingerprint(self) -> str:
        """sha256 of settings and weights."""
        return digest_of(type(self).__name__, self.config, self.state_dict())


def check_pictures(tokenizer: Tokenizer) -> None:
    """Refuse tokens that are no pictures, before anything is read."""
    if not tokenizer.pictures:
        raise UsageError("model: its tokens are no pictures, and every figure here is of pictures; look at samples.npy")

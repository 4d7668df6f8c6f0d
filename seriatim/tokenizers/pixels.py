"""Tokens that are patches of p x p pixels, without a network.

Shapes: B images, c channels, H x W pixels, p patch side, h x w = L tokens, D = c p p features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from seriatim.core.device import full_float32
from seriatim.core.errors import DataError, UsageError
from seriatim.core.keys import Keys
from seriatim.nn.patch import patchify, unpatchify
from seriatim.tokenizers.base import Tokenizer, digest_of, sides

STD_FLOOR = 0.02  # least standard deviation, so that a nearly constant feature (a black border) is not amplified


class Patched(Tokenizer):
    """A tokenizer of patches, whose moments are the pixels themselves.

    An image side that p does not divide is padded by repeating the last row or column, which decoding crops again.
    """

    def __init__(self, size: int | Sequence[int], patch: int, channels: int, levels: int) -> None:
        super().__init__()
        H, W = sides(size)
        if channels not in (1, 3):
            raise UsageError(f"channels: {channels!r} is not allowed; it must be 1 or 3")
        if not 1 <= patch <= min(H, W):
            raise UsageError(f"patch: {patch!r} is not allowed for {H}x{W} pixels; it must be from 1 to {min(H, W)}")
        if levels < 2:
            raise UsageError(f"levels: {levels!r} is not allowed; a pixel has at least 2 values")
        self.size, self.patch, self.channels, self.levels = (H, W), patch, channels, levels
        self.grid = (-(-H // patch), -(-W // patch))
        self.config = {"size": [H, W], "patch": patch, "channels": channels, "levels": levels}

    @property
    def cell(self) -> tuple[int, int]:
        return self.patch, self.patch

    def moments(self, images: Tensor) -> Tensor:
        """The pixels of images (B, c, H, W), padded to (B, c, h p, w p). Their posterior is a point."""
        H, W = self.size
        bottom, right = self.grid[0] * self.patch - H, self.grid[1] * self.patch - W
        return F.pad(self.check_images(images), (0, right, 0, bottom), mode="replicate")

    def images_of(self, patches: Tensor) -> Tensor:
        """The images (B, c, H, W) of patches (B, L, c p p)."""
        images = unpatchify(patches, self.patch, *self.grid)  # (B, c, h p, w p)
        return images[..., : self.size[0], : self.size[1]].clamp(-1, 1)

    def moments_config(self) -> dict[str, Any]:
        h, w = self.grid
        padded = f"padded to {h * self.patch} x {w * self.patch}"  # moments depend on the patch only by the padding
        return {"size": list(self.size), "channels": self.channels, "patch": padded}

    def moments_fingerprint(self) -> str:
        return digest_of(type(self).__name__, self.moments_config(), {})


class Pixels(Patched):
    """Patches of pixels whose features are normalised to zero mean and unit variance over the training images.

    Neighbouring pixels are so alike that nearly all of a patch's variance lies in a few directions, its mean colour
    first. The other directions are fine grain, which a model must also learn to generate. `components` keeps only the
    first principal components (decoding is then no longer exact). `whiten` divides each component by its standard
    deviation to that power: 0 leaves the variances as they are, 1 makes them equal. Features have mean variance 1.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        patch: int = 1,
        channels: int = 3,
        *,
        levels: int = 256,
        components: int | None = None,  # the number of features of a token; None keeps all of the patch
        whiten: float = 0.0,
    ) -> None:
        super().__init__(size, patch, channels, levels)
        if not 0 <= whiten <= 1:
            raise UsageError(f"whiten: {whiten!r} is not allowed; it must be from 0 (not at all) to 1 (fully)")
        features = channels * patch * patch
        if components is not None and not 1 <= components <= features:
            raise UsageError(f"components: {components!r} is not allowed; a patch has 1 to {features}")
        self.whiten, self.dim = whiten, components or features
        self.rotated = bool(components or whiten)
        if self.rotated:  # otherwise the keys stay out, so that older folders have the same fingerprint
            self.config |= {"components": components, "whiten": whiten}
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(self.dim))
        self.basis: Tensor
        if self.rotated:
            self.register_buffer("basis", torch.eye(features)[:, : self.dim])  # one principal component per column

    @override
    def tokens(self, moments: Tensor, keys: Keys | None = None) -> Tensor:
        features = patchify(moments.to(self.mean), self.patch) - self.mean  # (B, L, D)
        with full_float32(features.device):
            return (features @ self.basis if self.rotated else features) / self.std

    def decode(self, tokens: Tensor) -> Tensor:
        features = tokens.to(self.mean) * self.std
        with full_float32(features.device):
            features = (features @ self.basis.T if self.rotated else features) + self.mean
        return self.images_of(features)

    def fit_moments(self, batches: Iterable[Tensor]) -> None:
        count = 0
        size = len(self.mean)
        shape = (size, size) if self.rotated else (size,)  # a large patch needs its covariance only to be rotated
        total, products = torch.zeros(size, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
        for moments in batches:
            features = patchify(moments.cpu(), self.patch).flatten(0, 1).double()  # (B L, D); float64 needs the CPU
            count += len(features)
            total += features.sum(dim=0)
            products += features.T @ features if self.rotated else features.square().sum(dim=0)
        if not count:
            raise DataError("no images to measure: the pixel tokenizer needs at least one")
        mean = total / count
        self.mean.copy_(mean)
        if not self.rotated:
            self.std.copy_((products / count - mean.square()).clamp(min=0).sqrt().clamp(min=STD_FLOOR))
            return
        covariance = products / count - mean.outer(mean)
        variance, basis = (t.flip(-1)[..., : self.dim] for t in torch.linalg.eigh(covariance))  # largest first
        deviation = variance.clamp(min=0).sqrt().clamp(min=STD_FLOOR)
        largest = basis.abs().argmax(dim=0, keepdim=True)
        self.basis.copy_(basis * basis.gather(0, largest).sign())  # the sign is arbitrary, so one is fixed
        std = deviation**self.whiten
        self.std.copy_(std * (deviation / std).square().mean().sqrt())  # the mean variance of a feature is 1

"""The perceptual term: the distance of reconstructions from images in the layers of a feature extractor.

Zhang et al. 2018 (LPIPS), arXiv 1801.03924, eq. 1.

Shapes: B images, c channels, H x W pixels in [-1, 1], C channels of a layer with h x w places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from seriatim.core.errors import ConfigError, UsageError, nearest, one_line
from seriatim.evaluation.base import FeatureExtractor
from seriatim.evaluation.features import open_features
from seriatim.nn.linear import at_least_float32

FLOOR = 1e-10  # added to the squared length of a feature vector, whose root divides; so it has a gradient at 0


class PerceptualDistance:
    """Compares images in the outputs of some modules of an extractor, whose weights stay as they are.

    It is no module, so that it is neither trained nor saved with the tokenizer.
    """

    def __init__(self, extractor: FeatureExtractor, layers: Sequence[str] = ()) -> None:
        """`layers` are names of modules; empty: those that the extractor proposes, or else its features alone."""
        self.extractor = extractor.eval().requires_grad_(False)
        modules = dict(extractor.named_modules())
        self.layers = list(layers or extractor.layers)
        for name in self.layers:
            if name not in modules or not name:
                raise ConfigError(
                    f"objective.perceptual_layers: {name!r} is no module of {extractor.name}"
                    f"{nearest(name, [each for each in modules if each])}"
                )
        self._modules = [modules[name] for name in self.layers]

    def __call__(self, decoded: Tensor, images: Tensor) -> Tensor:
        """The distances (B,) of reconstructions (B, c, H, W) from images; gradients reach the reconstructions."""
        with torch.no_grad():
            theirs = self.outputs(images)
        total = torch.zeros(len(images), device=images.device)
        for name, ours, there in zip(self.layers or [""], self.outputs(decoded), theirs, strict=True):
            total = total + layer_distance(ours, there, self.extractor.layer_weights.get(name))
        return total

    def outputs(self, images: Tensor) -> list[Tensor]:
        """What the chosen modules return for images (B, c, H, W)."""
        found: list[Tensor] = []

        def keep(_: nn.Module, __: Any, output: Tensor) -> None:
            found.append(output)

        handles = [module.register_forward_hook(keep) for module in self._modules]
        try:
            features = self.extractor(images).features
        finally:
            for handle in handles:
                handle.remove()
        return found if self._modules else [features]


def layer_distance(ours: Tensor, theirs: Tensor, weights: Tensor | None = None) -> Tensor:
    """d = mean over places of sum_c w_c (y_c / |y| - y0_c / |y0|)^2, of outputs (B, C, ...) of a layer: (B,).

    Without `weights` (C,) all are 1, and d is twice one minus the cosine of the angle between y and y0.
    """
    a, b = (y / (y.square().sum(dim=1, keepdim=True) + FLOOR).sqrt() for y in map(at_least_float32, (ours, theirs)))
    square = (a - b).square().flatten(2) if a.ndim > 2 else (a - b).square()[..., None]  # (B, C, places)
    if weights is not None:
        square = square * weights.view(1, -1, 1)
    return square.sum(dim=1).mean(dim=1)


def open_perceptual(
    which: str, layers: Sequence[str], *, size: tuple[int, int], channels: int, device: torch.device
) -> PerceptualDistance:
    """The distance in the features `which` of `evaluation`, for images of `size`. Raises ConfigError."""
    try:
        extractor = open_features(which, size=size, channels=channels)
    except UsageError as error:
        raise ConfigError(f"objective.perceptual_{one_line(error)}") from error
    return PerceptualDistance(extractor.to(device), layers)

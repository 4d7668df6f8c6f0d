"""PatchGAN: a convolutional network that tells for each patch of an image whether it is a reconstruction.

Isola et al. 2017, arXiv 1611.07004, with group norms in the place of batch norms, so that the judgement of an image
does not depend on the other images of its batch, on micro-batches or on the number of processes.

Shapes: B images, c channels, H x W pixels in [-1, 1], m x n patches.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from seriatim.core.errors import ConfigError

SLOPE = 0.2  # of the leaky ReLU below zero
CHANNELS = 16  # channels of a group of the norms


class PatchDiscriminator(nn.Module):
    """Halves the sides `layers` times, with `width` channels at first and at most eight times as many.

    Grey images are seen as colour images.
    """

    def __init__(self, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        widths = [width * min(2**i, 8) for i in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(SLOPE)]
        for i in range(layers):
            stride = 2 if i < layers - 1 else 1
            parts += [
                nn.Conv2d(widths[i], widths[i + 1], 4, stride, 1, bias=False),
                nn.GroupNorm(math.gcd(widths[i + 1], max(1, widths[i + 1] // CHANNELS)), widths[i + 1]),
                nn.LeakyReLU(SLOPE),
            ]
        self.layers = nn.Sequential(*parts, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """The logits (B, 1, m, n) of images (B, c, H, W); positive for originals."""
        logits: Tensor = self.layers(images.expand(-1, 3, -1, -1))
        return logits


def check_discriminator(size: tuple[int, int], layers: int) -> None:
    """Raise ConfigError if images are too small for the discriminator: two convolutions of 4 follow the halvings."""
    side, most = min(size), 0
    while side >> (most + 1) >= 3:
        most += 1
    if layers > most:
        hint = f"set it to at most {most}" if most else "leave out objective.gan for images this small"
        raise ConfigError(
            f"objective.gan_layers: {layers} is not allowed, as it halves sides of {side} pixels too often; {hint}"
        )

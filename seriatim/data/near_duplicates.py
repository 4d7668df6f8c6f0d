"""Find pictures that are nearly the same as others of a sample.

Two pictures are near duplicates if they agree at 16x16 pixels: equal but for compression, size and small retouches.

Shapes: n images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 16  # pixels at which pictures are compared
ALIKE = 0.97  # the least correlation of two pictures
DIFFERENCE = 0.02  # the largest mean squared difference, of levels in [-1, 1]
FLAT = 1e-6  # added to variances, so that pictures of one colour are compared by their colour alone
AT_ONCE = 512  # rows of the comparison


def near_duplicates(pixels: Tensor) -> Tensor:
    """Whether each picture (n, c, H, W) uint8 is a near duplicate of another one: (n,) bool."""
    levels = F.interpolate(pixels.float() / 127.5 - 1, (SIDE, SIDE), mode="area").flatten(1)  # (n, values)
    shapes = levels - levels.mean(dim=1, keepdim=True)
    variance = shapes.square().mean(dim=1) + FLAT
    squares = levels.square().mean(dim=1)
    found = torch.zeros(len(levels), dtype=torch.bool)
    for rows in torch.arange(len(levels)).split(AT_ONCE):
        products = shapes[rows] @ shapes.T / shapes.shape[1] + FLAT
        alike = products / (variance[rows, None] * variance).sqrt() >= ALIKE
        difference = squares[rows, None] + squares - 2 * (levels[rows] @ levels.T) / levels.shape[1]
        alike &= difference <= DIFFERENCE
        alike[torch.arange(len(rows)), rows] = False
        found[rows] = alike.any(dim=1)
    return found

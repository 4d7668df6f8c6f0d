"""What the tokenizers share whose tokens are p x p patches of pixels, without a network.

Shapes: B images, c channels, H x W pixels, p patch side, h x w = L tokens, D = c p p features of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from seriatim.core.errors import UsageError
from seriatim.nn.patch import unpatchify
from seriatim.tokenizers.base import Tokenizer, digest_of, sides


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

"""Converts images to tokens and back.

B images, c channels, H x W pixels, p patch side, h = H/p rows and w = W/p columns of tokens.
"""

from __future__ import annotations

from torch import Tensor


def patchify(images: Tensor, p: int) -> Tensor:
    """Images (B, c, H, W) -> tokens (B, h*w, c*p*p) in raster order; features are ordered (c, row, column)."""
    B, c, H, W = images.shape
    h, w = H // p, W // p
    x = images.reshape(B, c, h, p, w, p)
    x = x.permute(0, 2, 4, 1, 3, 5)  # (B, h, w, c, p, p)
    return x.reshape(B, h * w, c * p * p)


def unpatchify(tokens: Tensor, p: int, h: int, w: int) -> Tensor:
    """Tokens (B, h*w, c*p*p) -> images (B, c, h*p, w*p); the exact inverse of `patchify`."""
    B, _, D = tokens.shape
    c = D // (p * p)
    x = tokens.reshape(B, h, w, c, p, p)
    x = x.permute(0, 3, 1, 4, 2, 5)  # (B, c, h, p, w, p)
    return x.reshape(B, c, h * p, w * p)

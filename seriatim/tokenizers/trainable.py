"""What a tokenizer that can be trained here offers besides the contract of all tokenizers.

Shapes: B images, c channels, H x W pixels in [-1, 1], z channels of a latent, h' x w' latents of an image, L = h' w'.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from seriatim.core.keys import Keys


@dataclass(frozen=True)
class Coded:
    """What an encoder hands to its decoder in training."""

    latents: Tensor  # (B, z, h', w') posterior samples, or codewords; the gradient reaches the encoder
    losses: dict[str, Tensor] = field(default_factory=dict)  # terms of the loss without weights, means over images: ()
    codes: Tensor | None = None  # (B, L) int64, of a tokenizer with a vocabulary
    vectors: Tensor | None = None  # (B, L, C) what was quantised, without gradient; `code_watch.py` takes it


@runtime_checkable
class Trainable(Protocol):
    """A tokenizer whose encoder and decoder can be called with gradients, in the precision of the caller.

    The names of `losses` are keys of a recipe's `objective`, which has their weights: "kl" of continuous latents;
    "codebook", "commitment" and "entropy" of codes.
    """

    stride: int  # H / h' = W / w'
    masks: bool  # whether the encoder can be shown a part of an image, as `kept` below says

    @property
    def last_layer(self) -> Tensor:
        """The weights of the last layer of the decoder."""
        ...

    def coded(self, images: Tensor, keys: Keys, kept: Tensor | None = None) -> Coded:
        """The latents of images (B, c, H, W), sampled with one key for each image, and their terms of the loss.

        `kept` (B, L) is a mask of the latents that the encoder computes; the others are zero.
        """
        ...

    def draw(self, latents: Tensor, kept: Tensor | None = None) -> Tensor:
        """The images, not clamped, of latents (B, z, h', w'); a mask token stands for each that is not `kept` (B, L).

        A convolutional decoder takes latents of other heights and widths, too.
        """
        ...

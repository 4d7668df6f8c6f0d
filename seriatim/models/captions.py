"""Text as a causal model takes it: features of a text encoder in front of the image.

B images, T caption positions, F features of each, C width of the backbone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seriatim.core.errors import UsageError
from seriatim.core.random import Noise
from seriatim.nn.causal import TanhMLP


@dataclass(frozen=True)
class Captions:
    """What stands in the place of labels: one caption for each image, padded on the left."""

    features: Tensor  # (B, T, F)
    valid: Tensor  # (B, T) bool; False at padding

    def __len__(self) -> int:
        return len(self.features)


class CaptionEmbedder(nn.Module):
    """Linear, tanh-GELU, Linear, without biases; and what stands for no caption, which is never trained (LlamaGen)."""

    null: Tensor  # (T, F)

    def __init__(self, dim: int, tokens: int, width: int) -> None:
        super().__init__()
        self.tokens, self.dim = tokens, dim
        self.mlp = TanhMLP(dim, width, width, bias=False)
        for layer in (self.mlp.fc1, self.mlp.down):
            nn.init.normal_(layer.get_parameter("weight"), std=0.02)
        self.register_buffer("null", torch.randn(tokens, dim) / dim**0.5)

    def forward(self, captions: Captions) -> Tensor:
        """(B, T, C)."""
        return self.mlp(captions.features.to(self.null.dtype))

    def none(self, images: int, like: Captions | None = None) -> Captions:
        """No caption for each image; with the padding of `like`, as LlamaGen is guided."""
        valid = torch.ones(images, self.tokens, dtype=torch.bool, device=self.null.device)
        return Captions(self.null.expand(images, -1, -1), valid if like is None else like.valid)

    def drop(self, captions: Captions, share: float, noise: Noise) -> Captions:
        """A share of the captions replaced by none."""
        dropped = (noise.uniform() < share)[:, None, None].to(captions.features.device)
        return Captions(torch.where(dropped, self.null, captions.features), captions.valid)

    def check(self, captions: Captions, images: int) -> None:
        T, F = self.tokens, self.dim
        if not isinstance(captions, Captions):
            raise UsageError(f"labels: {type(captions).__name__} is not allowed; this model takes Captions")
        if captions.features.shape != (images, T, F) or not captions.features.is_floating_point():
            shape = tuple(captions.features.shape)
            raise UsageError(f"features: {captions.features.dtype} of shape {shape} is not ({images}, {T}, {F}) floats")
        if captions.valid.shape != (images, T) or captions.valid.dtype != torch.bool:
            shape = tuple(captions.valid.shape)
            raise UsageError(f"valid: {captions.valid.dtype} of shape {shape} is not bool ({images}, {T})")
        if not bool(captions.valid[:, -1].all()):
            raise UsageError("valid: the last position of a caption is padding; pad on the left, so that it comes last")

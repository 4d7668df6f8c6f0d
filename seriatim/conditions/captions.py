"""Captions as conditions: the features of a text encoder, one vector for each position of the caption.

This follows LlamaGen (Sun et al. 2024), in which the features of "no caption" are a buffer that is never trained.

Shapes: B images, T caption positions (P of the condition), F features of each, A width of a vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seriatim.conditions.base import Condition, Conditioner
from seriatim.core.errors import UsageError
from seriatim.core.keys import Keys
from seriatim.nn.causal_block import TanhMLP


@dataclass(frozen=True)
class Captions:
    """The captions of a batch as features of a text encoder, padded on the left."""

    features: Tensor  # (B, T, F)
    valid: Tensor  # (B, T) bool, False at padding

    def __len__(self) -> int:
        return len(self.features)

    def select(self, rows: Tensor | slice) -> Captions:
        """The captions of the images `rows`."""
        return Captions(self.features[rows], self.valid[rows])


class CaptionEmbedder(Conditioner):
    """Maps Captions to a condition of T vectors by Linear, tanh-GELU, Linear, without biases."""

    no_caption: Tensor  # (T, F)

    def __init__(self, dim: int, tokens: int, width: int) -> None:
        super().__init__()
        self.dim, self.count, self.width = dim, tokens, width
        self.config = {"classes": 0, "caption_dim": dim, "caption_tokens": tokens}
        self.mlp = TanhMLP(dim, width, width, bias=False)
        for layer in (self.mlp.fc1, self.mlp.down):
            nn.init.normal_(layer.get_parameter("weight"), std=0.02)
        self.register_buffer("no_caption", torch.randn(tokens, dim) / dim**0.5)

    def forward(self, inputs: Captions | None, images: int) -> Condition:
        if inputs is None:
            return self.null(images)
        features = inputs.features.to(self.no_caption.device, self.no_caption.dtype)
        return Condition(self.mlp(features), inputs.valid.to(self.no_caption.device))

    def null(self, images: int, like: Condition | None = None) -> Condition:
        """The condition "no caption" for each image; with `like`, it has the padding of `like`, as in LlamaGen."""
        valid = torch.ones(images, self.count, dtype=torch.bool, device=self.no_caption.device)
        embedded = self.mlp(self.no_caption[None]).expand(images, -1, -1)
        return Condition(embedded, valid if like is None or like.valid is None else like.valid)

    def drop(self, inputs: Captions | None, share: float, keys: Keys) -> Captions | None:
        if inputs is None:
            return None
        device = inputs.features.device
        dropped = (keys.uniform() < share)[:, None, None].to(device)
        return Captions(torch.where(dropped, self.no_caption.to(device), inputs.features), inputs.valid)

    def check(self, inputs: Any, images: int) -> None:
        if inputs is None:
            return
        T, F = self.count, self.dim
        if not isinstance(inputs, Captions):
            raise UsageError(f"labels: {type(inputs).__name__} is not allowed; this model takes Captions")
        if inputs.features.shape != (images, T, F) or not inputs.features.is_floating_point():
            shape = tuple(inputs.features.shape)
            raise UsageError(f"features: {inputs.features.dtype} of shape {shape} is not ({images}, {T}, {F}) floats")
        if inputs.valid.shape != (images, T) or inputs.valid.dtype != torch.bool:
            shape = tuple(inputs.valid.shape)
            raise UsageError(f"valid: {inputs.valid.dtype} of shape {shape} is not bool ({images}, {T})")
        if not bool(inputs.valid[:, -1].all()):
            raise UsageError("valid: the last position of a caption is padding; pad on the left, so that it comes last")

"""Classes as conditions: one learned vector for each class, and one for "no class".

The vector of "no class" is a separate parameter, as in MAR (Li et al. 2024), and not a row of the class table.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from seriatim.conditions.base import Condition, Conditioner
from seriatim.core.errors import UsageError
from seriatim.core.keys import Keys


class Classes(Conditioner):
    """Maps labels (B,) int64, where -1 means no class, to a condition of one vector for each image."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        if classes < 0:
            raise UsageError(f"classes: {classes!r} is not allowed; it must be 0 (unconditional) or more")
        self.classes, self.width, self.config = classes, width, {"classes": classes}
        self.no_class = nn.Parameter(torch.randn(1, width) * 0.02)
        if classes:
            self.class_embedding = nn.Parameter(torch.randn(classes, width) * 0.02)

    def forward(self, inputs: Tensor | None, images: int) -> Condition:
        if inputs is None:
            return self.null(images)
        labels = inputs.to(self.no_class.device)
        table = self.no_class if not self.classes else torch.cat([self.class_embedding, self.no_class])
        # Label -1 selects the last row, "no class". Labels are read as names only on the host, where that is cheap.
        names = inputs.tolist() if inputs.device.type == "cpu" else None
        return Condition(F.embedding(labels % len(table), table)[:, None], names=names)

    @override
    def null(self, images: int, like: Condition | None = None) -> Condition:
        return Condition(self.no_class.expand(images, 1, -1), names=[-1] * images)

    def check(self, inputs: Tensor | None, images: int) -> None:
        if inputs is None:
            return
        if not isinstance(inputs, Tensor) or inputs.shape != (images,) or inputs.is_floating_point():
            shape = tuple(getattr(inputs, "shape", ()))
            raise UsageError(f"labels: shape {shape} is not ({images},), one integer for each image")
        if inputs.device.type != "cpu":
            return  # reading labels from an accelerator would block, and the embedding checks their range there
        wrong = inputs[(inputs >= self.classes) | (inputs < -1)].tolist()
        if wrong:
            if not self.classes:
                raise UsageError(f"labels: got {wrong[0]}, but this model is unconditional (only -1 is valid)")
            raise UsageError(
                f"labels: {wrong[0]} is not allowed; they must be from 0 to {self.classes - 1}, or -1 for no class"
            )

    def drop(self, inputs: Tensor | None, share: float, keys: Keys) -> Tensor | None:
        if inputs is None:
            return None
        return torch.where(keys.uniform().to(inputs.device) < share, -1, inputs)

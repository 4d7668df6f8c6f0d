"""Vectors as conditions: the z of the outer backbone, for a sequence model that generates the parts of a token.

Shapes: B rows, P vectors of each, A width of a vector, Z width of the given vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from seriatim.conditions.base import Condition, Conditioner
from seriatim.core.errors import UsageError
from seriatim.core.keys import Keys
from seriatim.nn.linear import Linear


class Vectors(Conditioner):
    """Maps vectors (B, Z) or (B, P, Z) to a condition of P vectors, projected to width A where A differs from Z.

    There is no null condition here, so the caller of the sampler must provide it.
    """

    def __init__(self, inputs: int, count: int = 1, width: int | None = None) -> None:
        super().__init__()
        self.inputs, self.count, self.width = inputs, count, width or inputs
        self.config = {}
        self.project = None if self.width == inputs else Linear(inputs, self.width)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.project is None else self.project.weight.device

    @override
    def forward(self, inputs: Tensor, images: int) -> Condition:
        vectors = inputs[:, None] if inputs.ndim == 2 else inputs  # (B, P, Z)
        return Condition(vectors if self.project is None else self.project(vectors))

    @override
    def null(self, images: int, like: Condition | None = None) -> Condition:
        raise UsageError("condition: vectors have no null condition; give one to sample()")

    def check(self, inputs: Tensor, images: int) -> None:
        shape = (images, self.count, self.inputs)
        if not isinstance(inputs, Tensor) or inputs.shape not in (shape, (images, self.inputs)):
            given = tuple(getattr(inputs, "shape", ()))
            raise UsageError(f"vectors: shape {given} is not {shape}, {self.count} of width {self.inputs} for each")

    @override
    def drop(self, inputs: Tensor, share: float, keys: Keys) -> Tensor:
        return inputs  # the outer model drops its own condition instead

"""The condition of a batch, one type for every backbone, and the contract of the modules that make it.

Shapes: B images, P vectors of each image, A width of a vector.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seriatim.core.keys import Keys


@dataclass(frozen=True)
class Condition:
    """What each image of a batch is generated for: P vectors, some of which may be padding."""

    vectors: Tensor  # (B, P, A)
    valid: Tensor | None = None  # (B, P) bool, False at padding; None: every vector counts
    # Images with equal names have equal vectors. Names live on the host, so that a sampler can compare them there.
    names: Sequence[Hashable] | None = None

    def __len__(self) -> int:
        return len(self.vectors)

    def select(self, rows: Tensor | slice) -> Condition:
        """The condition of these images; rows may repeat. A slice shares memory."""
        valid = None if self.valid is None else self.valid[rows]
        if self.names is None:
            return Condition(self.vectors[rows], valid)
        chosen = range(len(self))[rows] if isinstance(rows, slice) else rows.tolist()
        return Condition(self.vectors[rows], valid, [self.names[i] for i in chosen])

    def join(self, other: Condition) -> Condition:
        """The images of this condition, then those of the other one."""
        names = None if self.names is None or other.names is None else [*self.names, *other.names]
        valid = None
        if self.valid is not None or other.valid is not None:
            valid = torch.cat([c.valid if c.valid is not None else _all_valid(c.vectors) for c in (self, other)])
        return Condition(torch.cat([self.vectors, other.vectors.to(self.vectors.dtype)]), valid, names)


def _all_valid(vectors: Tensor) -> Tensor:
    return torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device)


class Conditioner(nn.Module):
    """Makes the condition of a batch from what the caller has: labels, captions, or vectors.

    A subclass sets, in its constructor,
      width      A, the width of a vector
      count      P, how many vectors an image has
      classes    how many classes there are; 0 where the inputs are not classes
    and defines `forward`, `null`, `check` and `drop`.
    """

    width: int
    count: int = 1
    classes: int = 0

    @property
    def config(self) -> dict[str, Any]:
        """The model's arguments that make this conditioner, as plain data."""
        return {}

    @property
    def device(self) -> torch.device:
        """The device on which conditions are made."""
        return next(iter([*self.parameters(), *self.buffers()])).device

    def forward(self, inputs: Any, images: int) -> Condition:
        """The condition of `images` images. `inputs` None means that no image has a condition."""
        raise NotImplementedError(f"{type(self).__name__} lacks forward()")

    def null(self, images: int, like: Condition | None = None) -> Condition:
        """The condition of images that have none. With `like`, the padding is that of a given condition."""
        raise NotImplementedError(f"{type(self).__name__} lacks null()")

    def check(self, inputs: Any, images: int) -> None:
        """Raise UsageError where `inputs` are not those of so many images."""
        raise NotImplementedError(f"{type(self).__name__} lacks check()")

    def drop(self, inputs: Any, share: float, keys: Keys) -> Any:
        """The same inputs, with a share of the images left without a condition; keys (B rows)."""
        raise NotImplementedError(f"{type(self).__name__} lacks drop()")

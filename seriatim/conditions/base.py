"""The condition of a batch, which is one type for all backbones, and the interface of the modules that compute it.

Shapes: B images, P vectors of each image, A width of a vector.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seriatim.core.errors import UsageError
from seriatim.core.keys import Keys


@dataclass(frozen=True)
class Condition:
    """The condition of each image of a batch: P vectors, some of which may be padding."""

    vectors: Tensor  # (B, P, A)
    valid: Tensor | None = None  # (B, P) bool, False at padding; None means that there is no padding
    # Images with equal names have equal vectors. Names are kept on the host, where a sampler can compare them cheaply.
    names: Sequence[Hashable] | None = None

    def __len__(self) -> int:
        return len(self.vectors)

    def check(self, images: int, width: int) -> None:
        """Raise UsageError unless there are vectors (images, P, width) and matching padding."""
        B, P, A = self.vectors.shape
        if (B, A) != (images, width):
            raise UsageError(f"condition: shape {(B, P, A)} is not ({images}, P, {width})")
        valid = self.valid
        if valid is not None and (valid.shape != (B, P) or valid.dtype != torch.bool):
            raise UsageError(f"condition.valid: {valid.dtype} of shape {tuple(valid.shape)} is not bool {(B, P)}")

    def select(self, rows: Tensor | slice) -> Condition:
        """The condition of the images `rows`: a slice, which shares memory, or indices on the host."""
        there = rows if isinstance(rows, slice) else rows.to(self.vectors.device, non_blocking=True)
        valid = None if self.valid is None else self.valid[there]
        if self.names is None:
            return Condition(self.vectors[there], valid)
        chosen = range(len(self))[rows] if isinstance(rows, slice) else rows.tolist()
        return Condition(self.vectors[there], valid, [self.names[i] for i in chosen])

    def join(self, other: Condition) -> Condition:
        """The condition of the images of this condition followed by those of `other`."""
        names = None if self.names is None or other.names is None else [*self.names, *other.names]
        valid = None
        if self.valid is not None or other.valid is not None:
            valid = torch.cat([c.valid if c.valid is not None else _all_valid(c.vectors) for c in (self, other)])
        return Condition(torch.cat([self.vectors, other.vectors.to(self.vectors.dtype)]), valid, names)


def _all_valid(vectors: Tensor) -> Tensor:
    return torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device)


class Conditioner(nn.Module):
    """Computes the condition of a batch from its inputs: labels, captions, or vectors.

    A subclass sets, in its constructor,
      width      A, the width of a vector
      count      P, the number of vectors of an image
      classes    the number of classes; 0 where the inputs are not classes
      config     its constructor's arguments without width and classes, as plain data (of those here: the arguments of a
                 model that stand for it)
    and defines `forward`, `null`, `check` and `drop`.
    """

    width: int
    count: int = 1
    classes: int = 0
    config: dict[str, Any]

    @property
    def device(self) -> torch.device:
        """The device on which conditions are computed."""
        return next(iter([*self.parameters(), *self.buffers()])).device

    def forward(self, inputs: Any, images: int) -> Condition:
        """The condition of `images` images; `inputs` is None if no image has a condition."""
        raise NotImplementedError(f"{type(self).__name__} lacks forward()")

    def null(self, images: int, like: Condition | None = None) -> Condition:
        """The null condition for `images` images, as guidance needs it; with `like`, it has the padding of `like`."""
        raise NotImplementedError(f"{type(self).__name__} lacks null()")

    def check(self, inputs: Any, images: int) -> None:
        """Raise UsageError unless `inputs` are valid inputs for `images` images."""
        raise NotImplementedError(f"{type(self).__name__} lacks check()")

    def drop(self, inputs: Any, share: float, keys: Keys) -> Any:
        """The inputs after dropping the condition of a random share (0 to 1) of the images; `keys` has B rows."""
        raise NotImplementedError(f"{type(self).__name__} lacks drop()")

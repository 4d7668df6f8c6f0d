"""Describes the tokens of an image: how many there are, whether they are features or codes, and their grid.

The tokenizer, the backbone, the head and the split of a nested head each carry a `TokenSpec`. The code that combines
two of them checks that their specs agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seriatim.core.errors import UsageError, check_least


@dataclass(frozen=True)
class TokenSpec:
    """The L tokens of an image; each token is D features, or one of V codes."""

    count: int  # L
    dim: int | None = None  # D, the features of a token; None where tokens are codes
    vocab: int | None = None  # V, the number of codes; None where tokens are features
    grid: tuple[int, int] | None = None  # (h, w); None where tokens have no places in a plane
    step: float | None = None  # the width of one 8-bit level in token units; None where tokens are not pixel values

    def __post_init__(self) -> None:
        if (self.dim is None) == (self.vocab is None):
            raise UsageError(
                f"dim: {self.dim!r} with vocab {self.vocab!r} is not allowed; give dim (features) or vocab (codes)"
            )
        check_least(1, count=self.count, dim=self.dim, vocab=self.vocab)

    @property
    def discrete(self) -> bool:
        return self.vocab is not None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an image's tokens: (L, D) for features, (L,) for codes."""
        return (self.count,) if self.dim is None else (self.count, self.dim)

    @property
    def what(self) -> str:
        """A description of a token for error messages, such as "16 features"."""
        return f"{self.dim} features" if self.vocab is None else f"codes of a vocabulary of {self.vocab}"

    def blank(self, images: int, device: torch.device | str = "cpu") -> Tensor:
        """Placeholder tokens, all zero: features (B, L, D) float32, or codes (B, L) int64."""
        dtype = torch.float32 if self.vocab is None else torch.long
        return torch.zeros(images, *self.shape, dtype=dtype, device=device)

    def check(self, tokens: Tensor, images: int | None = None) -> None:
        """Raise UsageError unless `tokens` are features (B, L, D), or codes (B, L) within the vocabulary."""
        fits = tokens.ndim and tuple(tokens.shape[1:]) == self.shape
        if not fits or (images is not None and len(tokens) != images):
            wanted = ", ".join(("B" if images is None else str(images), *map(str, self.shape)))
            comma = "," if self.shape == () else ""
            raise UsageError(
                f"tokens: shape {tuple(tokens.shape)} is not ({wanted}{comma}); it is the tokenizer's output"
            )
        if (self.vocab is None) != tokens.is_floating_point():
            wanted = "features in floating point" if self.vocab is None else "codes, int64"
            raise UsageError(f"tokens: {tokens.dtype} is not allowed; this model's tokens are {wanted}")
        if self.vocab is None or not tokens.numel() or tokens.device.type != "cpu":
            return  # reading codes from an accelerator would block, so their range is checked where they are made
        low, high = (int(value) for value in tokens.aminmax())
        if not 0 <= low <= high < self.vocab:
            raise UsageError(f"tokens: codes from {low} to {high} are not all in the vocabulary, 0 to {self.vocab - 1}")


def grid_of(grid: Sequence[int] | None, tokens: int) -> tuple[int, int]:
    """The (rows, columns) of the token grid: `grid` if given, else a square if `tokens` allows it, else one row."""
    if grid is None:
        side = math.isqrt(tokens)
        return (side, side) if side * side == tokens else (1, tokens)
    if len(grid) != 2 or grid[0] * grid[1] != tokens:
        raise UsageError(f"grid: {list(grid)} is not allowed for {tokens} tokens; give their rows and columns")
    return int(grid[0]), int(grid[1])

"""The two contracts of backbones: from what is known to a vector z for every token asked for.

`Parallel` gives z of any set of tokens from any known set, as MAR does. `Sequential` gives z of the next tokens of an
order from those before them, with a state that keeps what it has seen, as GPT does. A backbone of your own subclasses
one of the two, defines the methods below, and is proven with `seriatim.testing.check_backbone`.

B images, L tokens, D features of a token or V codes, N tokens asked for (flattened over images), C width of z,
P vectors of a condition, A width of each, m tokens of content, n tokens asked for of each image.
"""

from __future__ import annotations

from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from seriatim.conditions.base import Condition
from seriatim.core.errors import UsageError
from seriatim.core.spec import TokenSpec
from seriatim.nn.linear import Linear


class Backbone(nn.Module):
    """What backbones of both kinds have.

    A subclass sets, in its constructor,
      spec         the tokens of an image
      width        A, the width of a condition's vectors
      z_dim        C, the width of z
      config       the constructor's arguments, as plain data
    """

    spec: TokenSpec
    width: int
    z_dim: int
    config: dict[str, Any]

    @property
    def tokens(self) -> int:
        """L, the number of tokens of an image."""
        return self.spec.count

    @property
    def dim(self) -> int | None:
        """D, the features of a token; None where tokens are codes."""
        return self.spec.dim

    @property
    def vocab(self) -> int | None:
        """V, the number of codes; None where tokens are features."""
        return self.spec.vocab

    @staticmethod
    def resized(state: dict[str, Tensor], grid: tuple[int, int], other: tuple[int, int]) -> dict[str, Tensor]:  # noqa: ARG004
        """Weights learned on a grid (h, w) of tokens, for another grid; by default they don't depend on it."""
        return state


class Parallel(Backbone):
    """z of any set of tokens from any known set."""

    def z(self, condition: Condition, tokens: Tensor, known: Tensor, ask: Tensor, neighbours: bool = False) -> Tensor:
        """z of every token asked for: (N, C), image by image, in raster order inside an image.

        tokens (B, L, D), or codes (B, L), on the backbone's device; those that are not known are ignored. known, ask
        (B, L) bool, on the same device or on the host, where samplers keep them. Images of a batch may have different
        numbers of known and of asked tokens. With `neighbours` the result is (N, 5, C): z of the token and of those
        above, below, left and right of it on the grid, zeros outside.
        """
        raise NotImplementedError(f"{type(self).__name__} lacks z()")


class SequentialState(Protocol):
    """What a sequential backbone keeps of a batch between steps. Rows are images."""

    def __len__(self) -> int:
        """How many rows there are."""

    def select(self, rows: Tensor | slice) -> Self:
        """The state of these rows; `rows` is a slice (leading rows share memory) or an index tensor on the host."""

    def join(self, other: Self) -> Self:
        """The rows of this state, then those of the other one, which may have seen another number of tokens."""


class Sequential(Backbone):
    """z of the next tokens of an order, each from the condition and the tokens before it.

    A subclass also sets
      any_order    whether it takes an order for each image; if not, tokens come in raster order
    """

    any_order: bool = False

    def sequence(self, condition: Condition, tokens: Tensor, order: Tensor | None = None) -> Tensor:
        """z of every token in one pass, each from the condition and the tokens before it: (B, L, C).

        tokens (B, L, D), or codes (B, L), by position. order (B, L) lists the positions of each image, the first to be
        generated first, and the i-th z belongs to the token at order[:, i]; None stands for raster order.
        """
        raise NotImplementedError(f"{type(self).__name__} lacks sequence()")

    def start(self, condition: Condition, order: Tensor | None = None) -> Any:
        """The state of images that have no token yet; arguments as in `sequence`."""
        raise NotImplementedError(f"{type(self).__name__} lacks start()")

    def step(
        self,
        state: Any,
        content: Tensor | None = None,
        content_valid: Tensor | None = None,
        ask: Tensor | None = None,
        ask_valid: Tensor | None = None,
    ) -> Tensor:
        """z of the next n tokens of each image, after m more tokens became known: (B, n, C).

        content (B, m, D), or codes (B, m): the tokens that follow, in each image's order, those that the state has
        seen; None where there are none. content_valid (B, m) bool, on the host: False at the end of rows that have
        fewer; None where all rows have m. ask (B, n): the positions whose z is wanted, the next ones of the order;
        None stands for the next one. ask_valid (B, n) bool, on the host, likewise; z at False entries is arbitrary.
        """
        raise NotImplementedError(f"{type(self).__name__} lacks step()")


def token_embedding(spec: TokenSpec, width: int) -> nn.Module:
    """From tokens to vectors (..., width): features (..., D) through a Linear, codes (...) through a table."""
    return Linear(spec.dim, width) if spec.dim is not None else nn.Embedding(spec.vocab or 0, width)


def check_condition(condition: Condition, images: int, width: int) -> None:
    """Raise UsageError where a condition is not that of so many images, or not of this width."""
    B, P, A = condition.vectors.shape
    if (B, A) != (images, width):
        raise UsageError(f"condition: shape {(B, P, A)} is not ({images}, P, {width})")
    valid = condition.valid
    if valid is not None and (valid.shape != (B, P) or valid.dtype != torch.bool):
        raise UsageError(f"condition.valid: {valid.dtype} of shape {tuple(valid.shape)} is not bool {(B, P)}")

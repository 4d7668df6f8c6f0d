"""The two interfaces of backbones, which compute a vector z for each requested token.

A `Parallel` backbone computes z of any set of tokens from any set of known tokens, as MAR does. A `Sequential` backbone
computes z of the next tokens of an order from the tokens before them, and keeps a state, as GPT does. Your own backbone
is a subclass of one of the two that defines the methods below; `seriatim.testing.check_backbone` tests it.

B images, L tokens, D features of a token or V codes, N requested tokens (flattened over images), C width of z,
P vectors of a condition, A width of each, m tokens of content, n requested tokens of each image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, Self

from torch import Tensor, nn

from seriatim.conditions.base import Condition
from seriatim.core.spec import TokenSpec
from seriatim.nn.linear import Linear


class Backbone(nn.Module):
    """The base class of both kinds of backbones.

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
        """D, the number of features of a token; None where tokens are codes."""
        return self.spec.dim

    @property
    def vocab(self) -> int | None:
        """V, the number of codes; None where tokens are features."""
        return self.spec.vocab

    @staticmethod
    def resized(state: dict[str, Tensor], grid: tuple[int, int], other: tuple[int, int]) -> dict[str, Tensor]:  # noqa: ARG004
        """The weights `state`, learned on the token grid `grid` (h, w), converted to the grid `other`.

        By default weights do not depend on the grid and are returned unchanged.
        """
        return state


class Parallel(Backbone):
    """A backbone that computes z of any set of tokens from any set of known tokens."""

    def z(self, condition: Condition, tokens: Tensor, known: Tensor, ask: Tensor, neighbours: bool = False) -> Tensor:
        """z of every requested token: (N, C), image by image, and in raster order inside an image.

        tokens (B, L, D), or codes (B, L), are on the backbone's device; tokens that are not known are ignored. known
        and ask, (B, L) bool, are on the same device or on the host, where samplers keep them. Images of a batch may
        have different numbers of known and of requested tokens, and a known token may be requested too. With
        `neighbours` the result is (N, 5, C): z of the token and of its neighbours above, below, left and right on the
        grid, with zeros outside the grid.
        """
        raise NotImplementedError(f"{type(self).__name__} lacks z()")


class SequentialState(Protocol):
    """The state that a sequential backbone keeps of a batch between steps; a row is an image."""

    def __len__(self) -> int:
        """The number of rows."""

    def select(self, rows: Tensor | slice) -> Self:
        """The state of the given rows: a slice (leading rows share memory) or an index tensor on the host."""

    def join(self, other: Self) -> Self:
        """The state of these rows followed by the rows of `other`, which may have seen another number of tokens."""


class Sequential(Backbone):
    """A backbone that computes z of the next tokens of an order from the condition and the tokens before them.

    A subclass also sets
      any_order    True if it accepts an order for each image; otherwise tokens come in raster order
      groups       True if several tokens may come together: z of all of them is requested in one step, and they may
                   look at one another once they are known; otherwise a step gives z of one token, and it does not
                   matter how many tokens of content enter with it
    """

    any_order: bool = False
    groups: bool = False

    def sequence(self, condition: Condition, tokens: Tensor, order: Tensor | None = None) -> Tensor:
        """z of every token in one pass, each from the condition and the tokens before it: (B, L, C).

        tokens (B, L, D), or codes (B, L), are indexed by position. order (B, L) lists the positions of each image in
        the order in which they are generated, and the i-th z belongs to the token at order[:, i]; None means raster
        order.
        """
        raise NotImplementedError(f"{type(self).__name__} lacks sequence()")

    def sequence_of_groups(
        self, condition: Condition, tokens: Tensor, order: Tensor | None, sizes: Sequence[int]
    ) -> Tensor:
        """The same if tokens come together in groups of these sizes, which add up to L; only with `groups`.

        z of a token depends on the condition and the tokens of the groups before its own.
        """
        raise NotImplementedError(f"{type(self).__name__} lacks sequence_of_groups()")

    def start(self, condition: Condition, order: Tensor | None = None) -> Any:
        """The state of images that have no token yet; the arguments are those of `sequence`."""
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

        content (B, m, D), or codes (B, m), holds the tokens that come next in each image's order after the tokens that
        the state has seen; None means that there are none. With `groups`, the content of one step is one group.
        content_valid (B, m) bool, on the host, is False at the end of rows with fewer than m tokens; None means that
        all rows have m. ask (B, n) holds the requested positions, which are the next ones of the order; None means the
        next one. ask_valid (B, n) bool, on the host, is False at the end of rows with fewer than n requests; z at these
        entries is arbitrary. A request does not change the state. Without `groups`, a request for more than one token
        raises UsageError.
        """
        raise NotImplementedError(f"{type(self).__name__} lacks step()")


def token_embedding(spec: TokenSpec, width: int) -> nn.Module:
    """A layer that maps tokens to vectors (..., width): a Linear for features (..., D), a table for codes (...)."""
    return Linear(spec.dim, width) if spec.dim is not None else nn.Embedding(spec.vocab or 0, width)

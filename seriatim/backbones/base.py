"""The contract of a backbone.

B images, L tokens, D features of a token or V codes, N tokens asked for (flattened over images), C width of z.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from seriatim.core.errors import UsageError
from seriatim.nn.linear import Linear


class Backbone(nn.Module):
    """What every backbone is: state for a batch, and z for the tokens asked for.

    A subclass sets, in its constructor,
      tokens         L, the tokens of an image
      dim            D, the features of a token; None where tokens are codes
      vocab          V, how many codes there are; None where tokens are features
      width          the width of a condition vector, as given to `start`
      z_dim          C, the width of z
      config         the constructor's arguments, as plain data
    """

    tokens: int
    dim: int | None = None
    vocab: int | None = None
    width: int
    z_dim: int
    config: dict[str, Any]
    causal = False  # sees only what comes before a token: has `sequence` and `step` (backbones/causal.py)

    @property
    def token_shape(self) -> tuple[int, ...]:
        """Of an image's tokens: (L, D) features, or (L,) codes."""
        return (self.tokens,) if self.dim is None else (self.tokens, self.dim)

    def blank(self, images: int, device: torch.device | str = "cpu") -> Tensor:
        """What stands for tokens that nobody knows: zeros (B, L, D), or codes (B, L) int64."""
        dtype = torch.float32 if self.vocab is None else torch.long
        return torch.zeros(images, *self.token_shape, dtype=dtype, device=device)

    @staticmethod
    def resized(state: dict[str, Tensor], grid: tuple[int, int], other: tuple[int, int]) -> dict[str, Tensor]:  # noqa: ARG004
        """Weights learned on a grid (h, w) of tokens, for another grid; by default they don't depend on it."""
        return state

    def start(self, condition: Tensor, B: int) -> Any:
        """The state for sampling or scoring B images; condition (B, width). Caches live in the state."""
        raise NotImplementedError(f"{type(self).__name__} lacks start()")

    def z(self, state: Any, tokens: Tensor, known: Tensor, ask: Tensor) -> Tensor:
        """z of every token asked for: (N, C), image by image, in raster order inside an image.

        tokens (B, L, D), or codes (B, L), of which those not known are ignored; known, ask (B, L) bool, with the tokens
        or on the CPU, where samplers keep them. Images of a batch may have different numbers of known and of asked
        tokens.
        """
        raise NotImplementedError(f"{type(self).__name__} lacks z()")


def token_embedding(dim: int | None, vocab: int | None, width: int) -> nn.Module:
    """From tokens to vectors: features (..., D) through a Linear, codes (...) through a table -> (..., width)."""
    if (dim is None) == (vocab is None):
        raise UsageError(f"dim: {dim!r} with vocab {vocab!r} is not allowed; give dim (features) or vocab (codes)")
    for name, value in (("dim", dim), ("vocab", vocab)):
        if value is not None and value < 1:
            raise UsageError(f"{name}: {value!r} is not allowed; it must be at least 1")
    return Linear(dim, width) if dim is not None else nn.Embedding(vocab or 0, width)

"""The contract of a backbone.

B images, L tokens, D features of a token, N tokens asked for (flattened over images), C width of z.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Backbone(nn.Module):
    """What every backbone is: state for a batch, and z for the tokens asked for.

    A subclass sets, in its constructor,
      tokens         L, the tokens of an image
      dim            D, the features of a token
      width          the width of a condition vector, as given to `start`
      z_dim          C, the width of z
      config         the constructor's arguments, as plain data
    """

    tokens: int
    dim: int
    width: int
    z_dim: int
    config: dict[str, Any]

    @staticmethod
    def resized(state: dict[str, Tensor], grid: tuple[int, int], other: tuple[int, int]) -> dict[str, Tensor]:
        """Weights learned on a grid (h, w) of tokens, for another grid; by default they don't depend on it."""
        return state

    def start(self, condition: Tensor, B: int) -> Any:
        """The state for sampling or scoring B images; condition (B, width). Caches live in the state."""
        raise NotImplementedError(f"{type(self).__name__} lacks start()")

    def z(self, state: Any, tokens: Tensor, known: Tensor, ask: Tensor) -> Tensor:
        """z of every token asked for: (N, C), image by image, in raster order inside an image.

        tokens (B, L, D), of which those not known are ignored; known, ask (B, L) bool, with the tokens or on the CPU,
        where samplers keep them. Images of a batch may have different numbers of known and of asked tokens.
        """
        raise NotImplementedError(f"{type(self).__name__} lacks z()")

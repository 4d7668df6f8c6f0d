"""Keys and values of the positions seen so far, so that one more position costs one position.

B sequences, h heads, S positions at most, n of them new, d features of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Of one attention layer: memory for S positions, taken when the first keys come, in their dtype."""

    def __init__(self, positions: int) -> None:
        self.positions = positions  # S
        self.keys: Tensor | None = None  # (B, h, S, d)
        self.values: Tensor | None = None

    def put(self, k: Tensor, v: Tensor, at: Tensor, live: int) -> tuple[Tensor, Tensor]:
        """New keys and values (B, h, n, d) at the places at (n,) -> all of the first `live` places."""
        if self.keys is None or self.values is None:
            B, h, _, d = k.shape
            # zeros, not what memory held: a masked value is multiplied by 0, which doesn't help where it is NaN
            self.keys, self.values = k.new_zeros(B, h, self.positions, d), v.new_zeros(B, h, self.positions, d)
        self.keys.index_copy_(2, at, k)
        self.values.index_copy_(2, at, v)
        return self.keys[:, :, :live], self.values[:, :, :live]

    def first(self, rows: int) -> KVCache:
        """That of the first `rows` sequences, in the same memory."""
        result = KVCache(self.positions)
        if self.keys is not None and self.values is not None:
            result.keys, result.values = self.keys[:rows], self.values[:rows]
        return result


def causal_mask(length: int, device: torch.device | str = "cpu") -> Tensor:
    """(S, S), True where a position (row) may look: at itself and before."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()

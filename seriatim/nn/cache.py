"""Keys and values of the positions seen so far, so that one more position costs one position.

B sequences, h heads, S positions at most, n of them new, d features of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNED = 16  # rows of memory begin at multiples of so many numbers: kernels copy what doesn't


class KVCache:
    """Of one attention layer: memory for S positions, taken when the first keys come, in their dtype.

    On a CPU keys lie feature by feature: the scores of one query are then a product along rows of memory.
    """

    def __init__(self, positions: int) -> None:
        self.positions = positions  # S
        self.keys: Tensor | None = None  # (B, h, S, d); in memory (B, h, d, S) on a CPU
        self.values: Tensor | None = None  # (B, h, S, d)

    def put(self, k: Tensor, v: Tensor, at: Tensor | None, live: int) -> tuple[Tensor, Tensor]:
        """New keys and values (B, h, n, d) at the places at (n,), None: the last of `live` -> those of all `live`."""
        n = k.shape[2]
        if self.keys is None or self.values is None:
            B, h, _, d = k.shape
            places = -(-self.positions // ALIGNED) * ALIGNED
            # zeros, not what memory held: a masked value is multiplied by 0, which doesn't help where it is NaN
            self.values = v.new_zeros(B, h, places, d)
            by_feature = k.device.type == "cpu"
            self.keys = k.new_zeros(B, h, d, places).transpose(2, 3) if by_feature else torch.zeros_like(self.values)
        if at is None:
            self.keys[:, :, live - n : live] = k
            self.values[:, :, live - n : live] = v
        else:
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

"""Keys and values of the positions seen so far, so that one more position costs one position.

B sequences, h heads, S places at most, n new positions, d features of a head, K places that are looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNED = 16  # rows of memory begin at multiples of so many numbers: kernels copy rows that don't


@dataclass(frozen=True)
class Window:
    """Where the n new positions of a pass are, and what they may look at."""

    rotation: Tensor | None = None  # rotary table of the new positions: (n, d/2, 2), or (B, 1, n, d/2, 2)
    mask: Tensor | None = None  # (B or 1, 1, n, K) bool, True where a key may be looked at; None: every key
    causal: bool = False  # without a cache: a position looks at itself and at those before it
    live: int = 0  # with a cache: how many of its places are looked at (K)
    index: Tensor | None = None  # with a cache: places of the new positions, (n,) or (B, n); None: the last n of K


class KVCache:
    """The cache of one attention layer: memory for S places, allocated in the dtype of the first keys.

    On a CPU keys are stored feature by feature, so that the scores of one query are a product along rows of memory.
    One more place than S is allocated: padded positions are written there, and nobody looks at it.
    """

    def __init__(self, places: int) -> None:
        self.places = places  # S
        self.keys: Tensor | None = None  # (B, h, S+, d); in memory (B, h, d, S+) on a CPU
        self.values: Tensor | None = None  # (B, h, S+, d)

    def put(self, k: Tensor, v: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        """Store new keys and values (B, h, n, d); return those of all K places that are looked at."""
        n, live, index = k.shape[2], window.live, window.index
        if self.keys is None or self.values is None:
            B, h, _, d = k.shape
            allocated = -(-(self.places + 1) // ALIGNED) * ALIGNED
            # Zeros, not what memory held: a masked value is multiplied by 0, which doesn't help where it is NaN.
            self.values = v.new_zeros(B, h, allocated, d)
            by_feature = k.device.type == "cpu"
            self.keys = k.new_zeros(B, h, d, allocated).transpose(2, 3) if by_feature else torch.zeros_like(self.values)
        if index is None:
            self.keys[:, :, live - n : live] = k
            self.values[:, :, live - n : live] = v
        elif index.ndim == 1:
            self.keys.index_copy_(2, index, k)
            self.values.index_copy_(2, index, v)
        else:
            at = index[:, None, :, None].expand_as(k)
            self.keys.scatter_(2, at, k)
            self.values.scatter_(2, at, v)
        return self.keys[:, :, :live], self.values[:, :, :live]

    def select(self, rows: Tensor | slice) -> KVCache:
        """The cache of these sequences; a slice is a view that shares memory."""
        result = KVCache(self.places)
        if self.keys is not None and self.values is not None:
            result.keys, result.values = self.keys[rows], self.values[rows]
        return result

    def join(self, other: KVCache) -> KVCache:
        """The sequences of this cache, then those of the other one; both have been put into."""
        result = KVCache(self.places)
        assert self.keys is not None and self.values is not None, "a cache without keys can't be joined"
        assert other.keys is not None and other.values is not None, "a cache without keys can't be joined"
        # Through the layout in memory, so that keys stay feature by feature on a CPU.
        result.keys = torch.cat([self.keys.transpose(2, 3), other.keys.transpose(2, 3)]).transpose(2, 3)
        result.values = torch.cat([self.values, other.values])
        return result


def causal_mask(length: int, device: torch.device | str = "cpu") -> Tensor:
    """(S, S), True where a position (row) may look: at itself and before."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()

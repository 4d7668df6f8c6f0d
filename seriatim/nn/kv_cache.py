"""A cache of the keys and values of earlier positions, so that a pass computes only the new positions.

B sequences, h heads, S places at most, n new positions, d features of a head, K places that are attended to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNED = 16  # rows start at multiples of this many numbers, because kernels copy rows that are not aligned


@dataclass(frozen=True)
class Window:
    """The places of the n new positions of a pass, and the keys that they may attend to."""

    rotation: Tensor | None = None  # rotary table of the new positions: (n, d/2, 2), or (B, 1, n, d/2, 2)
    mask: Tensor | None = None  # (B or 1, 1, n, K) bool, True where a key may be attended to; None allows every key
    causal: bool = False  # without a cache: a position attends only to itself and earlier positions
    live: int = 0  # with a cache: the number of its places that are attended to (K)
    index: Tensor | None = None  # with a cache: places of the new positions, (n,) or (B, n); None means the last n of K


class KVCache:
    """The cache of one attention layer, with memory for S places, allocated in the dtype of the first keys.

    On a CPU the keys are stored feature by feature, so that the scores of a query are computed along contiguous memory.
    One place more than S is allocated, because padded positions are written there; no query attends to it.
    """

    def __init__(self, places: int) -> None:
        self.places = places  # S
        self.keys: Tensor | None = None  # (B, h, S+, d); in memory (B, h, d, S+) on a CPU
        self.values: Tensor | None = None  # (B, h, S+, d)

    def put(self, k: Tensor, v: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        """Store new keys and values (B, h, n, d), and return the keys and values of all K places: (B, h, K, d)."""
        n, live, index = k.shape[2], window.live, window.index
        if self.keys is None or self.values is None:
            B, h, _, d = k.shape
            allocated = -(-(self.places + 1) // ALIGNED) * ALIGNED
            # The memory must be zeroed, because masked values are multiplied by 0, and 0 times NaN is NaN.
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
        """A cache of the sequences `rows` only; a slice gives a view that shares memory."""
        result = KVCache(self.places)
        if self.keys is not None and self.values is not None:
            result.keys, result.values = self.keys[rows], self.values[rows]
        return result

    def join(self, other: KVCache) -> KVCache:
        """A cache of the sequences of this cache followed by those of `other`; both must hold keys."""
        result = KVCache(self.places)
        assert self.keys is not None and self.values is not None, "a cache without keys can't be joined"
        assert other.keys is not None and other.values is not None, "a cache without keys can't be joined"
        # The transposes keep the layout in memory, in which a CPU stores the keys feature by feature.
        result.keys = torch.cat([self.keys.transpose(2, 3), other.keys.transpose(2, 3)]).transpose(2, 3)
        result.values = torch.cat([self.values, other.values])
        return result


def causal_mask(length: int, device: torch.device | str = "cpu") -> Tensor:
    """A mask (S, S) that is True where a position (row) may attend to a position (column): itself and earlier ones."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()

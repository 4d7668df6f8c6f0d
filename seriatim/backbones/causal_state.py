"""The state that the causal backbone keeps of a batch between steps.

Shapes: B images, L tokens, P prefix, S = P + L - 1 places, C width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from seriatim.nn.kv_cache import KVCache
from seriatim.nn.scalar_qkv import ScalarQKV


@dataclass
class CausalState:
    """The caches of a batch, and the progress of each of its images."""

    caches: list[KVCache]  # one cache for each block
    modulations: list[tuple[Tensor, ...]]  # one entry for each block and one for the last norm; empty without adaLN
    order: Tensor | None  # (B, L): the positions in the order of generation; None means raster order
    valid: Tensor | None  # (B, P) bool, False at padding of the prefix; None means that there is no padding
    places: Tensor = field(repr=False)  # 0 .. S-1, on the device
    z: Tensor  # (B, C), z of the next token of each image
    seen: list[int]  # the number of places of each image in the caches: its prefix and its known tokens
    scalar_qkv: ScalarQKV | None = None  # precomputed products of the first block, where tokens are scalars

    def __len__(self) -> int:
        return len(self.seen)

    def select(self, rows: Tensor | slice) -> CausalState:
        seen = self.seen[rows] if isinstance(rows, slice) else [self.seen[i] for i in rows.tolist()]
        rows = rows if isinstance(rows, slice) else rows.to(self.places.device)
        return CausalState(
            [cache.select(rows) for cache in self.caches],
            [tuple(t[rows] for t in made) for made in self.modulations],
            None if self.order is None else self.order[rows],
            None if self.valid is None else self.valid[rows],
            self.places,
            self.z[rows],
            seen,
            None if self.scalar_qkv is None else self.scalar_qkv.select(rows),
        )

    def join(self, other: CausalState) -> CausalState:
        assert (self.order is None) == (other.order is None), (
            "two states of the same backbone both have an order, or neither has one"
        )
        assert (self.valid is None) == (other.valid is None), "two states both have padding, or neither has it"
        scalar = None
        if self.scalar_qkv is not None and other.scalar_qkv is not None:
            scalar = self.scalar_qkv.join(other.scalar_qkv)
        return CausalState(
            [a.join(b) for a, b in zip(self.caches, other.caches, strict=True)],
            [
                tuple(torch.cat(pair) for pair in zip(a, b, strict=True))
                for a, b in zip(self.modulations, other.modulations, strict=True)
            ],
            None if self.order is None or other.order is None else torch.cat([self.order, other.order]),
            None if self.valid is None or other.valid is None else torch.cat([self.valid, other.valid]),
            self.places,
            torch.cat([self.z, other.z]),
            self.seen + other.seen,
            scalar,
        )

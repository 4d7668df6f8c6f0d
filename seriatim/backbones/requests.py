"""What parallel backbones share: a condition that fills the buffer, the positions of requested tokens, neighbours.

Shapes: B images, L tokens, P vectors of the condition, A buffer tokens, K the largest number of requested tokens of an
image, N requested tokens of the batch, C width of z.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seriatim.conditions.base import Condition
from seriatim.core.buckets import padded_length
from seriatim.core.errors import UsageError
from seriatim.nn.block import gather


def fill_buffer(condition: Condition, buffer: int) -> tuple[Tensor, Tensor | None]:
    """The vectors of the buffer, (B, A, E) or (B, 1, E) if all are equal, and the mask (B, A) of those that are valid.

    The P vectors of the condition are repeated to fill the buffer. The mask is None if all of them are valid.
    """
    A, P = buffer, condition.vectors.shape[1]
    if A % P:
        raise UsageError(f"buffer: {A} tokens can't hold a condition of {P} vectors; choose a multiple of {P}")
    vectors = condition.vectors if P in (1, A) else condition.vectors.repeat_interleave(A // P, dim=1)
    seen = condition.valid
    if seen is not None and P != A:
        seen = seen.repeat_interleave(A // P, dim=1)
    return vectors, seen


def positions_in(chosen: Tensor, buckets: int = 0) -> tuple[Tensor, Tensor | None]:
    """The chosen positions in raster order (B, K), and a mask (B, K) that is False at padding; chosen is (B, L) bool.

    The mask is None if K positions are chosen in every image, so that there is no padding. K is the largest number
    chosen, rounded up to one of so many `buckets`.
    """
    counts = chosen.sum(dim=1)  # (B,)
    least, most = (int(count) for count in counts.aminmax())
    most = padded_length(most, chosen.shape[1], buckets)
    index = chosen.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]  # (B, K)
    if most == least:
        return index, None
    return index, torch.arange(most, device=chosen.device) < counts[:, None]


def flat_requests(z: Tensor, valid: Tensor | None) -> Tensor:
    """z of the requested tokens, (N, C) or (N, 5, C), from z (B, K, C) or (B, K, 5, C) without its padding."""
    z = z.flatten(0, 1)
    if valid is None:
        return z
    # index_select is used because the backward pass of z[...] adds in an order that threads decide.
    return z.index_select(0, valid.flatten().nonzero()[:, 0].to(z.device, non_blocking=True))


def neighbour_table(grid: tuple[int, int]) -> Tensor:
    """The positions (L, 5) of each token and of its neighbours above, below, left and right; L if there is none."""
    h, w = grid
    index = torch.full((h + 2, w + 2), h * w, dtype=torch.long, device="cpu")
    index[1:-1, 1:-1] = torch.arange(h * w, device="cpu").view(h, w)
    around = (index[1:-1, 1:-1], index[:-2, 1:-1], index[2:, 1:-1], index[1:-1, :-2], index[1:-1, 2:])
    return torch.stack([place.flatten() for place in around], dim=1)


def with_neighbours(z: Tensor, at: Tensor, grid: tuple[int, int]) -> Tensor:
    """z (B, K, 5, C) of the positions `at` (B, K) and of their four neighbours, from z of all tokens (B, L, C)."""
    B, _, C = z.shape
    table = neighbour_table(grid).to(z.device)  # (L, 5); L where there is no neighbour
    padded = torch.cat([z, z.new_zeros(B, 1, C)], dim=1)  # (B, L+1, C)
    index = F.embedding(at, table).flatten(1)  # (B, K 5)
    return gather(padded, index).unflatten(1, (-1, 5))

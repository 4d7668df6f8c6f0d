"""Rotary positions on a grid: queries and keys are rotated by angles that encode the row and the column.

This is eq. 34 of Su et al. 2021 (RoFormer) in two dimensions: of the d/2 pairs of features of a head, the first half is
rotated by the row and the second half by the column. A pair consists of the neighbours (2i, 2i+1).

B sequences, S positions, h heads, d features of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seriatim.nn.linear import at_least_float32

BASE = 10000.0


def rotation(places: Tensor, d: int, base: float = BASE) -> Tensor:
    """Places (S, 2), the row and column as real numbers -> cosine and sine of each pair: (S, d/2, 2), float32.

    Pair i of a half is rotated by place * base^(-2i / (d/2)), i = 0 .. d/4 - 1.
    """
    assert d % 4 == 0, f"rotary positions in two dimensions need heads of 4n features, not {d}"
    half = d // 2
    frequencies = base ** -(torch.arange(0, half, 2, dtype=torch.float32, device=places.device) / half)  # (d/4,)
    angles = (places.float()[:, :, None] * frequencies).flatten(1)  # (S, 2, d/4) -> (S, d/2): rows first
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def grid_places(grid: tuple[int, int], prefix: int, device: torch.device | str = "cpu") -> Tensor:
    """The row and column of `prefix` positions in front of a grid and of its cells: (prefix + h w, 2).

    The positions in front get the places ..., (-2, -2), (-1, -1) on the diagonal to the first cell, so that no two
    positions share a place.
    """
    rows, columns = (torch.arange(n, dtype=torch.float32, device=device) for n in grid)
    cells = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).reshape(-1, 2)
    front = torch.arange(-prefix, 0, dtype=torch.float32, device=device)[:, None].expand(-1, 2)
    return torch.cat([front, cells])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """x (..., S, d) rotated by `table` (S, d/2, 2) or (..., S, d/2, 2); computed in float32 at least and cast back."""
    pairs = torch.view_as_complex(at_least_float32(x).unflatten(-1, (-1, 2)).contiguous())  # (..., S, d/2)
    return torch.view_as_real(pairs * torch.view_as_complex(table)).flatten(-2).to(x.dtype)

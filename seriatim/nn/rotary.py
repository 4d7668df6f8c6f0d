"""Rotary positions on a grid: queries and keys are turned by angles that tell row and column.

Su et al. 2021 (RoFormer), eq. 34, in two dimensions: of the d/2 pairs of a head, the first half turns by the row, the
second by the column. Pairs are neighbours (2i, 2i+1).

B sequences, S positions, h heads, d features of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

BASE = 10000.0


def rotation(places: Tensor, d: int, base: float = BASE) -> Tensor:
    """Places (S, 2), row and column, any real numbers -> cosine and sine of each pair: (S, d/2, 2), float32.

    Pair i of a half turns by place * base^(-2i / (d/2)), i = 0 .. d/4 - 1.
    """
    assert d % 4 == 0, f"rotary positions in two dimensions need heads of 4n features, not {d}"
    half = d // 2
    frequencies = base ** -(torch.arange(0, half, 2, dtype=torch.float32, device=places.device) / half)  # (d/4,)
    angles = (places.float()[:, :, None] * frequencies).flatten(1)  # (S, 2, d/4) -> (S, d/2): rows first
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def grid_places(grid: tuple[int, int], prefix: int, device: torch.device | str = "cpu") -> Tensor:
    """Row and column of `prefix` positions in front and of the cells of a grid: (prefix + h w, 2).

    Those in front stand on the diagonal that leads to the first cell, ..., (-2, -2), (-1, -1): each where no other is.
    """
    rows, columns = (torch.arange(n, dtype=torch.float32, device=device) for n in grid)
    cells = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).reshape(-1, 2)
    front = torch.arange(-prefix, 0, dtype=torch.float32, device=device)[:, None].expand(-1, 2)
    return torch.cat([front, cells])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """x (..., S, d) turned by table (S, d/2, 2), or by one that fits its leading axes: in float32, and back."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())  # (..., S, d/2)
    return torch.view_as_real(pairs * torch.view_as_complex(table)).flatten(-2).to(x.dtype)

"""Embeddings of the positions of tokens and of the timesteps of diffusion."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seriatim.nn.linear import at_least_float32


def learned_positions(count: int, width: int) -> nn.Parameter:
    """Learned vectors for `count` positions, (count, width), initialised from a normal of standard deviation 0.02."""
    return nn.Parameter(torch.randn(count, width) * 0.02)


def sincos_positions(grid: tuple[int, int], width: int, longest: float = 100.0) -> Tensor:
    """Sines and cosines of the row and column of each cell: (h w, width), values in [-1, 1].

    Half of the features encode the row and half the column, at frequencies from 1 down to 1/longest. MAE uses a
    `longest` of 10000, but on a grid of a few cells nearly all of those frequencies are constant.
    """
    h, w = grid
    quarter = -(-width // 4)
    frequencies = longest ** -(torch.arange(quarter) / quarter)
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies for axis in (rows, columns)]  # (h w, quarter) each
    features = [wave(angle) for angle in angles for wave in (torch.sin, torch.cos)]
    return torch.cat(features, dim=1)[:, :width]


def resized_positions(positions: Tensor, grid: tuple[int, int], other: tuple[int, int]) -> Tensor:
    """Position vectors (P, width) of a grid (h, w), resized bicubically to `other`: (P - h w + h' w', width).

    The first P - h w vectors, which belong to a buffer in front of the grid, are not changed.
    """
    if grid == other:
        return positions
    (h, w), first = grid, len(positions) - grid[0] * grid[1]
    image = positions[first:].T.reshape(1, -1, h, w)  # (1, width, h, w)
    image = F.interpolate(image.float(), other, mode="bicubic", antialias=True)
    return torch.cat([positions[:first], image.flatten(2)[0].T.to(positions.dtype)])


def sinusoid(t: Tensor, width: int = 256, longest: float = 10000.0) -> Tensor:
    """Timesteps (T,) -> (T, width): first the cosines, then the sines, of t * longest^(-i / (width/2)).

    t is the raw timestep (Ho et al. 2020); the frequencies are those of DiT and MAR's head.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(longest) / half * torch.arange(half, device=t.device, dtype=torch.float32))
    angles = at_least_float32(t)[:, None] * frequencies  # (T, width/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)

"""Where a token stands, and when a diffusion step is."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def learned_positions(count: int, width: int) -> nn.Parameter:
    """A learned vector for each of `count` positions: (count, width), drawn from N(0, 0.02)."""
    return nn.Parameter(torch.randn(count, width) * 0.02)


def sinusoid(t: Tensor, width: int = 256, longest: float = 10000.0) -> Tensor:
    """(T,) -> (T, width): cosines first, then sines, of t * longest^(-i / (width/2)).

    The argument is the raw timestep (Ho et al. 2020; frequencies as in DiT and MAR's head).
    """
    half = width // 2
    frequencies = torch.exp(-math.log(longest) / half * torch.arange(half, device=t.device, dtype=torch.float32))
    angles = t.float()[:, None] * frequencies  # (T, width/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)

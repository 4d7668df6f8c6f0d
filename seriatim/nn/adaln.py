"""Adaptive layer norm: a residual MLP block whose norm is shifted, scaled and gated by a condition.

A modulation depends only on the condition, so a sampler can compute the modulations of many steps in one large product
before its loop (`modulate`, then `modulated`). Training computes those of a block inside the block (`forward`).

N rows, W width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from seriatim.nn.block import NORM_EPS
from seriatim.nn.linear import Linear


class Modulated(nn.Module):
    """A layer of width W with a modulation: a shift, a scale and perhaps a gate, each W numbers of a condition."""

    modulation: Linear
    modulated: Callable[..., Tensor]  # the layer, given its input and the result of `modulate`

    def modulate(self, condition: Tensor) -> tuple[Tensor, ...]:
        """SiLU(condition) (..., W) -> shift, 1 + scale (and gate): each (..., W)."""
        parts = self.modulation.out_features // self.modulation.in_features
        shift, scale, *gate = self.modulation(condition).chunk(parts, dim=-1)
        return shift, 1 + scale, *gate

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (N, W) -> (N, W), or (N, output), under the condition SiLU(condition) (N, W)."""
        return self.modulated(x, *self.modulate(condition))


class AdaLNBlock(Modulated):
    """x + gate * MLP(LN(x) * (1 + scale) + shift), as in DiT (Peebles & Xie 2023) and MAR's head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.fc1 = Linear(width, width)
        self.fc2 = Linear(width, width)
        self.modulation = Linear(width, 3 * width)  # SiLU(condition) -> shift, scale, gate

    def modulated(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        """x (N, W) -> (N, W); shift, scale and gate are the result of `modulate`."""
        h = torch.addcmul(shift, self.norm(x), scale)
        h = self.fc1(h, then="swish")
        return torch.addcmul(x, gate, self.fc2(h))


class AdaLNOutput(Modulated):
    """Linear(LN(x) * (1 + scale) + shift), where the norm has no learned weights."""

    def __init__(self, width: int, output: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.modulation = Linear(width, 2 * width)  # SiLU(condition) -> shift, scale
        self.linear = Linear(width, output)

    def modulated(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """x (N, W) -> (N, output); shift and scale are the result of `modulate`."""
        return self.linear(torch.addcmul(shift, self.norm(x), scale))

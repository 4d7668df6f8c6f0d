"""The bidirectional transformer block, and the weight initialisation that backbones share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from seriatim.nn.attention import Attention
from seriatim.nn.linear import Linear

NORM_EPS = 1e-6


class MLP(nn.Module):
    """The MLP of a block: Linear, exact GELU, Linear; the hidden width is 4 C by default."""

    def __init__(self, width: int, ratio: float = 4.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.fc1 = Linear(width, int(width * ratio))
        self.fc2 = Linear(int(width * ratio), width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x, then="gelu")
        x = F.dropout(x, self.dropout, self.training)
        return F.dropout(self.fc2(x), self.dropout, self.training)


class Block(nn.Module):
    """Pre-norm transformer block (ViT, Dosovitskiy et al. 2021, eqs. 2 and 3)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attention = Attention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = MLP(width, mlp_ratio, dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """x (B, S, C) -> (B, S, C); with `at` (B, K), only the outputs at these positions: (B, K, C)."""
        seen = self.attention(self.norm1(x), mask, at)
        x = seen + (x if at is None else gather(x, at))
        return x + self.mlp(self.norm2(x))


def gather(x: Tensor, at: Tensor) -> Tensor:
    """The rows of x (B, S, C) at the positions `at` (B, K): (B, K, C)."""
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))


def xavier(module: nn.Module) -> None:
    """Initialise every Linear inside `module` with Xavier-uniform weights and zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

"""Queries, keys and values of positions that are one number each, but for that number: made for all of them at once.

Where a position's input is f e + c_i (a scalar's embedding, and what is added at that place), the layer norm of it is
(f e' + c_i') / std_i(f), with e' and c_i' less their means, and std_i^2 a parabola in f. The modulation and the
product with the weights are linear, so they are done before f is known, and the weights are read once.

B sequences, n positions, C width.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor, nn

from seriatim.nn.causal import LAYER_EPS, CausalBlock

CAP = 1 << 22  # numbers held at most for this: 16 MiB


class Ahead:
    """`ahead(i, f)` is what the attention projects of LN(f e + c_i) * scale + shift."""

    def __init__(self, block: CausalBlock, embed: nn.Linear, added: Tensor, modulation: Sequence[Tensor]) -> None:
        """Of a modulated block; embed makes f e + its bias, added (n, C), modulation as `block.modulate` gives it."""
        _, _, scale, _, shift, _ = modulation  # (B, 1, C) each
        e, c = embed.weight[:, 0], added if embed.bias is None else added + embed.bias
        e, c = e - e.mean(), c - c.mean(dim=1, keepdim=True)
        self.bend = e.square().mean()  # variance = bend (f - lowest)^2 + least: no part of it can round below 0
        self.lowest = -(e * c).mean(dim=1) / self.bend.clamp(min=torch.finfo(e.dtype).tiny)  # (n,)
        self.least = (c + self.lowest[:, None] * e).square().mean(dim=1) + LAYER_EPS  # (n,)
        attention = block.attention
        self.made = attention.qkv(torch.cat([shift, scale * e, scale * c], dim=1))  # (B, 2+n, 3 C)
        if (bias := attention.bias()) is not None:
            self.made[:, 0] += bias

    @staticmethod
    def fits(modulation: Sequence[Tensor], n: int) -> bool:
        """Whether this is worth its memory; and exact, which in half precision it isn't."""
        scale = modulation[2]
        return scale.dtype not in (torch.bfloat16, torch.float16) and 3 * (2 + n) * scale.numel() <= CAP

    def __call__(self, i: int, f: Tensor) -> Tensor:
        """f (B, 1) at position i -> (B, 1, 3 C)."""
        rate = torch.addcmul(self.least[i], self.bend, (f - self.lowest[i]).square()).rsqrt()  # (B, 1)
        y = torch.addcmul(self.made[:, 0], rate, self.made[:, 2 + i])
        return torch.addcmul(y, rate * f, self.made[:, 1])[:, None]

    def first(self, rows: int) -> Ahead:
        """That of the first `rows` sequences, in the same memory."""
        result = copy(self)
        result.made = self.made[:rows]
        return result

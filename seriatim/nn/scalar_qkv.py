"""Precomputes the queries, keys and values of scalar tokens, of which everything but the scalar is known in advance.

ARINAR's inner transformer reads one feature at a time. The input at place i is f e + c_i, where f is the feature, e the
weight of its embedding, and c_i the vector that is added at that place. The layer norm of the input is

    (f (e - mean e) + c_i - mean c_i) / std_i(f),    where std_i^2 is a parabola in f,

and the modulation and the projection to queries, keys and values are linear. So the three products that they need are
computed once for all places before the first feature is known, and their weights are read once instead of at every
step. For an ARINAR head of 1 and 4 tokens, this saves 8 and 14 % of the time of a draw (docs/log.md).

B sequences, n places, C width.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor, nn

from seriatim.nn.causal_block import LAYER_EPS, CausalBlock

CAP = 1 << 22  # the largest number of precomputed float32 values: 16 MiB


class ScalarQKV:
    """`scalar_qkv(i, f)` returns a block's queries, keys and values of the input LN(f e + c_i) * scale + shift."""

    def __init__(self, block: CausalBlock, embed: nn.Linear, added: Tensor, modulation: Sequence[Tensor]) -> None:
        """Precompute for a modulated `block` and its `modulation`; `embed` maps f to f e + bias, `added` is (n, C)."""
        _, _, scale, _, shift, _ = modulation  # (B, 1, C) each
        e, c = embed.weight[:, 0], added if embed.bias is None else added + embed.bias
        e, c = e - e.mean(), c - c.mean(dim=1, keepdim=True)
        # std_i^2 = curvature (f - vertex_i)^2 + minimum_i; in this form rounding can't make it negative.
        self.curvature = e.square().mean()
        self.vertex = -(e * c).mean(dim=1) / self.curvature.clamp(min=torch.finfo(e.dtype).tiny)  # (n,)
        self.minimum = (c + self.vertex[:, None] * e).square().mean(dim=1) + LAYER_EPS  # (n,)
        attention = block.attention
        self.products = attention.qkv(torch.cat([shift, scale * e, scale * c], dim=1))  # (B, 2+n, 3 C)
        if (bias := attention.bias()) is not None:
            self.products[:, 0] += bias

    @staticmethod
    def fits(modulation: Sequence[Tensor], n: int) -> bool:
        """True if the precomputed values take at most CAP numbers and are exact (they are not in half precision)."""
        scale = modulation[2]
        return scale.dtype not in (torch.bfloat16, torch.float16) and 3 * (2 + n) * scale.numel() <= CAP

    def __call__(self, i: int, f: Tensor) -> Tensor:
        """Feature f (B, 1) at place i -> queries, keys and values (B, 1, 3 C)."""
        rate = torch.addcmul(self.minimum[i], self.curvature, (f - self.vertex[i]).square()).rsqrt()  # (B, 1)
        y = torch.addcmul(self.products[:, 0], rate, self.products[:, 2 + i])
        return torch.addcmul(y, rate * f, self.products[:, 1])[:, None]

    def select(self, rows: Tensor | slice) -> ScalarQKV:
        """The precomputed values of the sequences `rows` only; a slice shares memory."""
        result = copy(self)
        result.products = self.products[rows]
        return result

    def join(self, other: ScalarQKV) -> ScalarQKV:
        """The precomputed values of these sequences followed by those of `other`, which must be of the same block."""
        result = copy(self)
        result.products = torch.cat([self.products, other.products])
        return result

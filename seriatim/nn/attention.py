"""Multi-head self-attention.

B sequences, S positions, C width, h heads, d = C/h.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seriatim.nn.kv_cache import causal_mask
from seriatim.nn.linear import Linear

SHORT = 128  # up to this many positions, explicit products are faster than the fused kernel on a CPU in float32


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d)) v over all positions that `mask` allows (Vaswani et al. 2017, eq. 1)."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout  # applies to the attention probabilities and to the output
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """x (B, S, C) -> (B, S, C); mask (B, 1, 1 or S, S) is True where a query may attend to a key.

        With `at` (B, K), only the outputs at these positions are computed: (B, K, C).
        """
        B, S, C = x.shape
        qkv = self.qkv(x).view(B, S, 3, self.heads, C // self.heads)  # (B, S, 3, h, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, h, S, d)
        if at is not None:
            q = q.gather(2, at[:, None, :, None].expand(-1, self.heads, -1, C // self.heads))  # (B, h, K, d)
        dropout = self.dropout if self.training else 0.0
        x = attend(q, k, v, mask, dropout)  # (B, h, S or K, d)
        x = x.transpose(1, 2).flatten(2)  # (B, S or K, C)
        return F.dropout(self.proj(x), self.dropout, self.training)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    *,
    scale: float | None = None,  # None means 1 / sqrt(d)
    causal: bool = False,  # a position attends only to itself and earlier ones; needs as many queries as keys, no mask
) -> Tensor:
    """softmax(scale q k^T) v; all tensors are (B, h, S, d).

    The fused kernel is used, except where explicit products are faster on a CPU: in bfloat16, whose fused backward pass
    takes up to 7 times as long at every length measured, in float32 up to `SHORT` positions (docs/log.md), and for a
    single query over a cache.
    """
    short = k.shape[-2] <= SHORT or q.shape[-2] == 1
    explicit = q.device.type == "cpu" and (q.dtype == torch.bfloat16 or short)
    if not explicit:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale, is_causal=causal)
    if causal:
        mask = causal_mask(q.shape[-2], q.device)
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)  # (B, h, S, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return F.dropout(scores.softmax(dim=-1), dropout) @ v

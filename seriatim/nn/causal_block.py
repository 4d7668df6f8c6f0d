"""The block of a causal transformer, as in LlamaGen (Sun et al. 2024) or, with adaptive norms, VAR (Tian et al. 2024).

B sequences, n positions, C width, A width of the condition, h heads, d = C/h.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seriatim.nn.attention import attend
from seriatim.nn.kv_cache import KVCache, Window
from seriatim.nn.linear import Linear, at_least_float32
from seriatim.nn.rotary import rotate

RMS_EPS, LAYER_EPS = 1e-5, 1e-6
MODULATIONS = 6  # gamma1, gamma2, scale1, scale2, shift1, shift2
NORMS, MLPS = ("rms", "layer"), ("swiglu", "gelu-tanh")


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * w (Zhang & Sennrich 2019); float32 at least up to the product with w."""

    def __init__(self, width: int, *, affine: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(at_least_float32(x), x.shape[-1:], eps=RMS_EPS).to(x.dtype)
        return y if self.weight is None else y * self.weight


def make_norm(kind: str, width: int, affine: bool) -> nn.Module:
    """A norm of the given kind; `affine` is False where a condition provides its weights."""
    if kind == "rms":
        return RMSNorm(width, affine=affine)
    return nn.LayerNorm(width, eps=LAYER_EPS, elementwise_affine=affine)


class CausalAttention(nn.Module):
    """softmax(s q k^T / sqrt(d)) v; keys have no bias, because it would cancel in the softmax."""

    def __init__(self, width: int, heads: int, *, bias: bool = False, scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout  # dropout applies to the output, not to the probabilities
        self.scale = scale * (width // heads) ** -0.5
        self.qkv = Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.v_bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.proj = Linear(width, width, bias=bias)

    def forward(self, x: Tensor, window: Window, cache: KVCache | None = None) -> Tensor:
        """x (B, n, C), the new positions -> (B, n, C); without a cache they attend only to each other."""
        return self.attended(self.projected(x), window, cache)

    def bias(self) -> Tensor | None:
        """The concatenated bias of queries, keys (zero) and values, (3 C,), or None."""
        if self.q_bias is None or self.v_bias is None:
            return None
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

    def projected(self, x: Tensor) -> Tensor:
        """x (B, n, C) -> concatenated queries, keys and values (B, n, 3 C)."""
        qkv: Tensor = self.qkv(x)
        bias = self.bias()
        return qkv if bias is None else qkv + bias

    def attended(self, qkv: Tensor, window: Window, cache: KVCache | None) -> Tensor:
        """Queries, keys and values (B, n, 3 C), as `projected` returns them -> the attention's output (B, n, C)."""
        B, n, C = len(qkv), qkv.shape[1], qkv.shape[2] // 3
        heads = qkv.view(B, n, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)  # (3, B, h, n, d)
        q, k, v = heads
        if window.rotation is not None:
            q, k = rotate(heads[:2], window.rotation)
        if cache is not None:
            k, v = cache.put(k, v, window)
        x = attend(q, k, v, window.mask, scale=self.scale, causal=window.causal)  # (B, h, n, d)
        return F.dropout(self.proj(x.transpose(1, 2).flatten(2)), self.dropout, self.training)


class SwiGLU(nn.Module):
    """The MLP W2 (SiLU(W1 x) * W3 x) (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int, *, bias: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.gate = Linear(width, hidden, bias=bias)
        self.up = Linear(width, hidden, bias=bias)
        self.down = Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x, then="swish")
        return F.dropout(self.down(gate * self.up(x)), self.dropout, self.training)


class TanhMLP(nn.Module):
    """The MLP Linear, GELU (in its tanh approximation), Linear."""

    def __init__(self, width: int, hidden: int, output: int | None = None, *, bias: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.fc1 = Linear(width, hidden, bias=bias)
        self.down = Linear(hidden, output or width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x, then="gelu-tanh")
        return F.dropout(self.down(x), self.dropout, self.training)


class CausalBlock(nn.Module):
    """A pre-norm block: x + Attn(N(x)), then x + MLP(N(x)).

    With `condition`, the block is modulated as in VAR: x + gamma1 * Attn(N(x) (1 + scale1) + shift1), then
    x + gamma2 * MLP(N(x) (1 + scale2) + shift2).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        norm: str = "rms",
        mlp: str = "swiglu",
        bias: bool = False,
        attention_scale: float = 1.0,
        dropout: float = 0.0,
        condition: int | None = None,  # the width of the condition; None means no modulation
    ) -> None:
        super().__init__()
        self.norm1 = make_norm(norm, width, affine=condition is None)
        self.attention = CausalAttention(width, heads, bias=bias, scale=attention_scale, dropout=dropout)
        self.norm2 = make_norm(norm, width, affine=condition is None)
        kind = SwiGLU if mlp == "swiglu" else TanhMLP
        self.mlp = kind(width, hidden, bias=bias, dropout=dropout)
        self.modulation = None if condition is None else Linear(condition, MODULATIONS * width)

    def modulate(self, activated: Tensor) -> tuple[Tensor, ...]:
        """SiLU(condition) (B, A) -> gamma1, gamma2, 1 + scale1, 1 + scale2, shift1, shift2, each (B, 1, C)."""
        assert self.modulation is not None, "this block is built without a condition"
        g1, g2, s1, s2, b1, b2 = self.modulation(activated)[:, None].chunk(MODULATIONS, dim=-1)
        return g1, g2, 1 + s1, 1 + s2, b1, b2

    def forward(
        self,
        x: Tensor,
        window: Window,
        cache: KVCache | None = None,
        modulation: Sequence[Tensor] = (),
        qkv: Tensor | None = None,
    ) -> Tensor:
        """x (B, n, C), the new positions -> (B, n, C).

        `modulation` is the result of `modulate`, or empty without a condition. For a modulated block, `qkv` may hold
        the projected queries, keys and values (B, n, 3 C) if the caller has computed them already.
        """
        if not modulation:
            x = x + self.attention(self.norm1(x), window, cache)
            return x + self.mlp(self.norm2(x))
        g1, g2, s1, s2, b1, b2 = modulation
        if qkv is None:
            qkv = self.attention.projected(torch.addcmul(b1, self.norm1(x), s1))
        x = torch.addcmul(x, g1, self.attention.attended(qkv, window, cache))
        return torch.addcmul(x, g2, self.mlp(torch.addcmul(b2, self.norm2(x), s2)))


class ModulatedNorm(nn.Module):
    """N(x) (1 + scale) + shift, where scale and shift depend on a condition."""

    def __init__(self, width: int, kind: str, condition: int) -> None:
        super().__init__()
        self.norm = make_norm(kind, width, affine=False)
        self.modulation = Linear(condition, 2 * width)  # scale, shift

    def modulate(self, activated: Tensor) -> tuple[Tensor, Tensor]:
        """SiLU(condition) (B, A) -> 1 + scale, shift, each (B, 1, C)."""
        scale, shift = self.modulation(activated)[:, None].chunk(2, dim=-1)
        return 1 + scale, shift

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return torch.addcmul(shift, self.norm(x), scale)

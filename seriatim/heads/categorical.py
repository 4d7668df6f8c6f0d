"""The categorical head: p(code | z) is a softmax over a vocabulary, one Linear from z.

The cross-entropy rows of Li et al. 2024, table 1; Chang et al. 2022 (MaskGIT); Sun et al. 2024 (LlamaGen). Unusual:
- guidance mixes logits, before temperature; then top-k, then top-p, as LlamaGen does;
- a code is drawn by the inverse CDF of one uniform number, so that padding and batches change nothing.

Shapes: N tokens, C width of z, V codes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from seriatim.core.errors import UsageError
from seriatim.core.random import Noise
from seriatim.heads.base import Head, HeadLoss
from seriatim.nn.linear import Linear


class Categorical(Head):
    """p(code | z) = softmax(W z + b)."""

    discrete = True
    has_density = True
    sample_options = frozenset({"top_k", "top_p"})

    def __init__(
        self,
        vocab: int,  # V
        *,
        bias: bool = True,
        label_smoothing: float = 0.0,  # of the loss alone
        z_dim: int | None = None,  # C; None: the model tells
    ) -> None:
        super().__init__()
        if vocab < 2:
            raise UsageError(f"vocab: {vocab!r} is not allowed; it must be at least 2")
        if not 0 <= label_smoothing < 1:
            raise UsageError(f"label_smoothing: {label_smoothing!r} is not allowed; it must be in [0, 1)")
        self.output, self.bias, self.label_smoothing = vocab, bias, label_smoothing
        self.config = {"vocab": vocab, "bias": bias, "label_smoothing": label_smoothing}
        if z_dim is not None:
            self.bind(z_dim)

    def bind(self, z_dim: int) -> None:
        if self.z_dim is None:
            self.logits = Linear(z_dim, self.output, bias=self.bias)
            nn.init.zeros_(self.logits.weight)  # every code alike at first: the loss begins at log V
            if self.bias:
                nn.init.zeros_(self.logits.bias)
        super().bind(z_dim)

    @override
    def loss(self, z: Tensor, target: Tensor, noise: Noise) -> HeadLoss:
        """z (N, C), target (N,) codes -> cross-entropy, in nats."""
        loss = F.cross_entropy(
            self.logits(z).float(), target, reduction="none", label_smoothing=self.label_smoothing
        )  # (N,)
        return HeadLoss(loss, torch.ones_like(loss))

    def log_prob(self, z: Tensor, target: Tensor) -> Tensor:
        """log p(target | z), target (N,) codes: (N,)."""
        return -F.cross_entropy(self.logits(z).float(), target, reduction="none")

    @torch.no_grad()
    @override
    def entropy(self, z: Tensor, tokens: Tensor) -> Tensor:
        """Of the code: (N, 1)."""
        log_p = self.logits(z).float().log_softmax(dim=-1)
        return -(log_p.exp() * log_p).sum(dim=-1, keepdim=True)

    @torch.no_grad()
    def sample(
        self,
        z: Tensor,
        noise: Noise,
        z_null: Tensor | None = None,
        guidance: float | Tensor = 1.0,
        temperature: float = 1.0,
        *,
        top_k: int | None = None,  # the likeliest codes alone, as many as this and those that tie with the last
        top_p: float | None = None,  # the likeliest codes that together reach this probability
        **unknown: Any,
    ) -> Tensor:
        """Codes (N,) int64. A temperature of 0 takes the likeliest."""
        if unknown:
            raise UsageError(f"{sorted(unknown)[0]}: the Categorical head has no such sampling option")
        scale = self.check_sampling(z, z_null, guidance, temperature)  # (N, 1) or None
        check_filter(top_k, top_p)
        return draw_code(filtered(self.guided(z, z_null, scale), temperature, top_k, top_p), noise.uniform())

    def guided(self, z: Tensor, z_null: Tensor | None, scale: Tensor | None) -> Tensor:
        """Logits (N, V) in float32: u + s (c - u)."""
        if scale is None or z_null is None:
            return self.logits(z).float()
        logits, null = self.logits(torch.cat([z, z_null])).float().chunk(2)  # one product: it is the weights that cost
        return null + scale * (logits - null)

    def confidence(self, z: Tensor, codes: Tensor, z_null: Tensor | None, guidance: float | Tensor) -> Tensor:
        """log p of drawn codes (N,) under the guided distribution, at temperature 1: (N,)."""
        scale = self.check_sampling(z, z_null, guidance, 1.0)
        return self.guided(z, z_null, scale).log_softmax(dim=-1).gather(1, codes[:, None])[:, 0]

    def check_options(self, temperature: float = 1.0, **options: Any) -> None:
        super().check_options(temperature, **options)
        check_filter(options.get("top_k"), options.get("top_p"))


# --- formulas -----------------------------------------------------------------------------------------------------


def check_filter(top_k: int | None, top_p: float | None) -> None:
    if top_k is not None and top_k < 1:
        raise UsageError(f"top_k: {top_k!r} is not allowed; it must be at least 1, or left out for all codes")
    if top_p is not None and not 0 < top_p <= 1:
        raise UsageError(f"top_p: {top_p!r} is not allowed; it must be in (0, 1]")


def filtered(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Logits (N, V) at a temperature, -inf for the codes that are left out.

    Ties with the last of the top k stay; of top p, so does the code that crosses p.
    """
    if temperature == 0:
        best = logits.argmax(dim=-1, keepdim=True)  # the lowest of equals
        return torch.full_like(logits, -math.inf).scatter(1, best, 0.0)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]  # (N, 1)
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p is not None and top_p < 1:
        ranked, index = logits.sort(dim=-1, descending=True, stable=True)  # (N, V)
        before = ranked.softmax(dim=-1).cumsum(dim=-1) - ranked.softmax(dim=-1)  # of likelier codes
        drop = before > top_p
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(1, index, drop), -math.inf)
    return logits


def draw_code(logits: Tensor, u: Tensor) -> Tensor:
    """Inverse CDF: the first code whose cumulative probability exceeds u (N,), of logits (N, V) -> (N,)."""
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)  # (N, V)
    # Rounding may leave the last sum below 1: u, at most 1 - 2^-24, is taken as a share of it, and so lies below it.
    return torch.searchsorted(cumulative, u[:, None].to(cumulative) * cumulative[:, -1:], right=True)[:, 0]

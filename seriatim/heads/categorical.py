"""The categorical head, in which p(code | z) is a softmax over a vocabulary, computed by one Linear from z.

It is the head of the cross-entropy rows of Li et al. 2024, table 1, of Chang et al. 2022 (MaskGIT) and of Sun et al.
2024 (LlamaGen). Unusual:
- guidance mixes the logits before the temperature; then top-k and then top-p are applied, as in LlamaGen;
- a code is sampled by the inverse CDF of one uniform number, so that padding and other rows do not change it.

Shapes: N tokens, C width of z, V codes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from seriatim.core.errors import UsageError, check_least
from seriatim.core.keys import Keys
from seriatim.heads.base import Guidance, Head, HeadLoss, Plan, column
from seriatim.nn.linear import Linear, at_least_float32


@dataclass(frozen=True)
class CodeOptions:
    """The options that restrict the codes that may be sampled."""

    top_k: Annotated[int | None, "Sample only from the k likeliest codes, and those that tie with the k-th."] = None
    top_p: Annotated[float | None, "Sample only from the likeliest codes that together reach this probability."] = None


class Categorical(Head):
    """p(code | z) = softmax(W z + b)."""

    discrete = True
    has_density = True
    Options = CodeOptions

    def __init__(
        self,
        vocab: int,  # V
        *,
        bias: bool = True,
        label_smoothing: float = 0.0,  # affects only the loss
        z_dim: int | None = None,  # C; None means that the model sets it
    ) -> None:
        super().__init__()
        check_least(2, vocab=vocab)
        if not 0 <= label_smoothing < 1:
            raise UsageError(f"label_smoothing: {label_smoothing!r} is not allowed; it must be in [0, 1)")
        self.output, self.bias, self.label_smoothing = vocab, bias, label_smoothing
        self.config = {"vocab": vocab, "bias": bias, "label_smoothing": label_smoothing}
        if z_dim is not None:
            self.bind(z_dim)

    def bind(self, z_dim: int) -> None:
        if self.z_dim is None:
            self.logits = Linear(z_dim, self.output, bias=self.bias)
            nn.init.zeros_(self.logits.weight)  # all codes start equally likely, so that the loss starts at log V
            if self.bias:
                nn.init.zeros_(self.logits.bias)
        super().bind(z_dim)

    @override
    def loss(self, z: Tensor, target: Tensor, keys: Keys) -> HeadLoss:
        """The cross-entropy in nats, for z (N, C) and target codes (N,)."""
        loss = F.cross_entropy(
            at_least_float32(self.logits(z)), target, reduction="none", label_smoothing=self.label_smoothing
        )  # (N,)
        return HeadLoss(loss, torch.ones_like(loss))

    def log_prob(self, z: Tensor, target: Tensor) -> Tensor:
        """log p(target | z) in nats, (N,), for target codes (N,)."""
        return -F.cross_entropy(at_least_float32(self.logits(z)), target, reduction="none")

    @torch.no_grad()
    @override
    def entropy(self, z: Tensor, tokens: Tensor) -> Tensor:
        """The entropy of the code in nats: (N, 1)."""
        log_p = at_least_float32(self.logits(z)).log_softmax(dim=-1)
        return -(log_p.exp() * log_p).sum(dim=-1, keepdim=True)

    @torch.no_grad()
    def sample(
        self,
        z: Tensor,
        keys: Keys,
        plan: Plan | None = None,
        z_null: Tensor | None = None,
        guidance: Guidance | None = None,
        temperature: float | Tensor = 1.0,
    ) -> Tensor:
        """Sampled codes (N,) int64; temperature 0 takes the likeliest code."""
        options = self.options() if plan is None else plan.options
        self.check_sampling(z_null, guidance, temperature)
        logits = filtered(self.guided(z, z_null, guidance), column(temperature), options.top_k, options.top_p)
        return draw_code(logits, keys.fold("code").uniform())

    def guided(self, z: Tensor, z_null: Tensor | None, guidance: Guidance | None) -> Tensor:
        """The guided logits u + w (c - u) in float32 at least: (N, V)."""
        if guidance is None or z_null is None:
            return at_least_float32(self.logits(z))
        # Both logits are computed in one product, because most of the time goes into reading the weights.
        logits, null = at_least_float32(self.logits(torch.cat([z, z_null]))).chunk(2)
        return null + guidance.column * (logits - null)

    def confidence(self, z: Tensor, codes: Tensor, z_null: Tensor | None, guidance: Guidance | None) -> Tensor:
        """log p of generated codes (N,) under the guided distribution, at temperature 1: (N,)."""
        self.check_sampling(z_null, guidance, 1.0)
        return self.guided(z, z_null, guidance).log_softmax(dim=-1).gather(1, codes[:, None])[:, 0]

    def check_options(self, options: CodeOptions, temperature: float = 1.0) -> None:
        super().check_options(options, temperature)
        check_filter(options.top_k, options.top_p)


# --- formulas -----------------------------------------------------------------------------------------------------


def check_filter(top_k: int | None, top_p: float | None) -> None:
    if top_k is not None and top_k < 1:
        raise UsageError(f"top_k: {top_k!r} is not allowed; it must be at least 1, or left out for all codes")
    if top_p is not None and not 0 < top_p <= 1:
        raise UsageError(f"top_p: {top_p!r} is not allowed; it must be in (0, 1]")


def filtered(
    logits: Tensor, temperature: float | Tensor = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """The logits (N, V) at a temperature, one number or (N, 1), with -inf for the codes that are excluded.

    Codes that tie with the k-th code are kept, and so is the code that crosses top p.
    """
    if isinstance(temperature, Tensor):  # rows at temperature 0 take the likeliest code, so the others become -inf
        best = logits.argmax(dim=-1, keepdim=True)
        only = torch.full_like(logits, -math.inf).scatter(1, best, 0.0)
        cold = temperature == 0
        logits = torch.where(cold, only, logits / torch.where(cold, 1.0, temperature))
    elif temperature == 0:
        best = logits.argmax(dim=-1, keepdim=True)  # the lowest of equally likely codes
        return torch.full_like(logits, -math.inf).scatter(1, best, 0.0)
    else:
        logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]  # (N, 1)
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p is not None and top_p < 1:
        ranked, index = logits.sort(dim=-1, descending=True, stable=True)  # (N, V)
        before = ranked.softmax(dim=-1).cumsum(dim=-1) - ranked.softmax(dim=-1)  # the probability of likelier codes
        drop = before > top_p
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(1, index, drop), -math.inf)
    return logits


def draw_code(logits: Tensor, u: Tensor) -> Tensor:
    """Codes (N,) by the inverse CDF: the first code of logits (N, V) whose cumulative probability exceeds u (N,).

    For logits that are not finite the result is V, which is not a valid code, so that the fault is noticed.
    """
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)  # (N, V)
    # Rounding may leave the last sum below 1. Scaling u, which is at most 1 - 2^-24, by that sum keeps u below it.
    return torch.searchsorted(cumulative, u[:, None].to(cumulative) * cumulative[:, -1:], right=True)[:, 0]

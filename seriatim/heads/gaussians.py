"""Mixtures of Gaussians, one for each row, with their densities, moments and samples.

This module depends on no network: `Mixture` computes the parameters of whole tokens, and a nested head those of one
feature at a time. All logarithms are natural. Weights are kept as logarithms (log_softmax, never log(softmax)), so that
small weights lose no precision.

Shapes: N rows, K components, D features, S points for a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from seriatim.core.errors import UsageError

REACH, POINTS = 7.0, 65  # quadrature: standard deviations to either side, and points for each component
LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class GaussianMixture:
    """sum_k softmax(logits)_k N(means_k, L_k L_k^T); L_k has exp(log_std_k) on its diagonal and `below_k` below it."""

    logits: Tensor  # (N, K), not normalised
    means: Tensor  # (N, K, D)
    log_std: Tensor  # (N, K, D)
    below: Tensor | None = None  # (N, K, D, D), strictly lower triangular; None means diagonal covariances

    @property
    def scale_tril(self) -> Tensor:
        """The Cholesky factors L: (N, K, D, D)."""
        diagonal = torch.diag_embed(self.log_std.exp())
        return diagonal if self.below is None else diagonal + self.below

    def log_weights(self) -> Tensor:
        """The normalised log weights: (N, K)."""
        return self.logits.log_softmax(dim=-1)

    def log_prob(self, x: Tensor) -> Tensor:
        """The normalised log density in nats, (N,) or (N, S), at x (N, D) or (N, S, D)."""
        if x.ndim == 2:
            return self.log_prob(x[:, None])[:, 0]
        off = x[:, :, None] - self.means[:, None]  # (N, S, K, D)
        if self.below is None:
            squares = (off * (-self.log_std).exp()[:, None]).square().sum(dim=-1)  # (N, S, K)
        else:  # |L^-1 (x - mean)|^2
            columns = off.permute(0, 2, 3, 1)  # (N, K, D, S)
            white = torch.linalg.solve_triangular(self.scale_tril, columns, upper=False)
            squares = white.square().sum(dim=2).transpose(1, 2)  # (N, S, K)
        log_norm = self.log_std.sum(dim=-1) + 0.5 * self.means.shape[-1] * LOG_2PI  # (N, K)
        return ((self.log_weights() - log_norm)[:, None] - 0.5 * squares).logsumexp(dim=-1)

    def component(self, u: Tensor) -> Tensor:
        """The components that uniform numbers u in [0, 1), (N,) or (N, S), select by inverse CDF, in the shape of u."""
        sums = self.logits.softmax(dim=-1).cumsum(dim=-1)  # (N, K)
        sums = sums / sums[:, -1:]  # the last sum is exactly 1, so that no u selects a component without weight
        at = u if u.ndim == 2 else u[:, None]
        return torch.searchsorted(sums, at.contiguous(), right=True).clamp(max=sums.shape[-1] - 1).view_as(u)

    def sample(self, u: Tensor, normal: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
        """Samples mean + temperature L normal of the component that u selects.

        u (N,) and normal (N, D) give samples (N, D); u (N, S) and normal (N, S, D) give (N, S, D). The temperature, a
        number or (N, 1), scales standard deviations and never weights. If the weights of a row are not finite, its
        samples are not finite either, so that the sampler's final check finds the fault.
        """
        rows = torch.arange(len(u), device=u.device).view(-1, *[1] * (u.ndim - 1))  # (N,) or (N, 1), broadcasts with u
        k = self.component(u)
        off = self.log_std.exp()[rows, k] * normal
        if self.below is not None:
            off = off + (self.below[rows, k] @ normal[..., None])[..., 0]
        if isinstance(temperature, Tensor):
            temperature = temperature.view(-1, *[1] * (off.ndim - 1))
        unsound = (0.0 * self.logits.amax(dim=-1)).view(-1, *[1] * (off.ndim - 1))  # 0, or NaN
        return self.means[rows, k] + temperature * off + unsound

    def nucleus(self, top_p: float) -> GaussianMixture:
        """The mixture of the fewest heaviest components that together weigh at least `top_p`."""
        if top_p >= 1:
            return self
        sorted_weights, order = self.logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)  # (N, K)
        before = sorted_weights.cumsum(dim=-1) - sorted_weights
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before >= top_p)
        dropped = dropped.scatter(1, order[:, :1], False)  # keeps the heaviest despite rounding or a tiny top_p
        return replace(self, logits=self.logits.masked_fill(dropped, -math.inf))

    def select(self, rows: Tensor | slice) -> GaussianMixture:
        """The mixtures of the given rows."""
        below = None if self.below is None else self.below[rows]
        return GaussianMixture(self.logits[rows], self.means[rows], self.log_std[rows], below)

    def mean(self) -> Tensor:
        """The mean of the mixture: (N, D)."""
        return (self.logits.softmax(dim=-1)[..., None] * self.means).sum(dim=1)

    def variance(self) -> Tensor:
        """The variance of each feature: (N, D)."""
        weights, off = self.logits.softmax(dim=-1)[..., None], self.means - self.mean()[:, None]
        inside = (2 * self.log_std).exp()  # (N, K, D)
        if self.below is not None:
            inside = inside + self.below.square().sum(dim=-1)
        return (weights * (inside + off.square())).sum(dim=1)

    def feature_entropy(self) -> Tensor:
        """The entropy of each feature's marginal, a mixture in one dimension, in nats: (N, D).

        It is computed by the trapezoidal rule over points around each component, spaced by the component's own width.
        The error is 3e-4 nats in the median and at most 3e-3 over 500 random mixtures of 2 to 8 components, whose
        widths differ by a factor of up to 400.
        """
        diagonal = self.log_std
        if self.below is not None:  # the standard deviations of the marginals are the norms of the rows of L
            diagonal = 0.5 * ((2 * diagonal).exp() + self.below.square().sum(dim=-1)).log()
        N, _, D = self.means.shape
        means, log_std = self.means.transpose(1, 2).flatten(0, 1), diagonal.transpose(1, 2).flatten(0, 1)  # (N D, K)
        alone = GaussianMixture(self.logits.repeat_interleave(D, dim=0), means[..., None], log_std[..., None])
        z = torch.linspace(-REACH, REACH, POINTS).to(means)
        x = (means[..., None] + log_std.exp()[..., None] * z).flatten(1).sort(dim=1).values  # (N D, K S)
        log_p = alone.log_prob(x[..., None])
        return -torch.trapezoid(log_p.exp() * log_p, x, dim=1).view(N, D)

    def entropy(self) -> Tensor:
        """The entropy of a single Gaussian in nats, (N,); raises UsageError for mixtures, which have no closed form."""
        if self.logits.shape[-1] != 1:
            raise UsageError(f"entropy: has no closed form for {self.logits.shape[-1]} components; only for 1")
        return self.log_std[:, 0].sum(dim=-1) + 0.5 * self.means.shape[-1] * (1 + LOG_2PI)

"""Samples from a guided mixture of Gaussians, p_c^w p_u^(1-w), of a conditional and an unconditional mixture.

The product of powers of two mixtures is not a mixture. Its normaliser is not known and may not exist: where
w / sigma_c^2 < (w - 1) / sigma_u^2 the product grows without bound. At temperature T the target here is

    q_T(x) (p_c(x) / p_u(x))^(w-1),      q_T: the conditional mixture with its standard deviations times T

which is p_c^w p_u^(1-w) at T = 1. It is the limit of sampling many candidates at T and choosing one by the weights
(p_c / p_u)^(w-1) (Zhao et al. 2025, ARINAR).

    sample_product     for one feature: samples the target itself, on a bounded support, by one uniform number a row
    resample_product   for any number of features: samples approximately, by choosing among candidates

Shapes: N rows, K components (of each mixture), D features, S candidates, P grid points, G points of evaluation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from seriatim.heads.gaussians import GaussianMixture

REACH = 5.0  # standard deviations from a mean to the end of the support
RAREST = 1e-4  # components with a smaller share of the heaviest one's weight do not extend the support
COLDEST = 1e-4  # lower temperatures are raised to this
NARROWEST = 20.0  # |log standard deviation| is clamped to this, so that squares stay finite even far from the mean
GRID = 104  # points over all components, but at least POINTS for each
POINTS = 13
INSIDE = 32  # parts into which the cell of the sampled number is divided
SMALL = 1e-3  # for smaller differences of logarithms, an exponential is computed as a straight line
LOWEST = -1e30  # replaces the logarithm of 0
CAP = 1 << 22  # numbers held at once: 16 MiB
LOBATTO = (0.2763932022500210, 0.7236067977499790)  # inner nodes on [0, 1]; exact up to degree 5 with the ends
STEEP = 3.0  # for larger changes of log f between nodes, f is integrated as an exponential instead of a polynomial


def sample_product(
    cond: GaussianMixture,
    null: GaussianMixture,
    w: Tensor,  # (N,)
    u: Tensor,  # (N,), in [0, 1)
    temperature: float | Tensor = 1.0,  # one number for all rows, or (N, 1)
) -> Tensor:
    """Samples of the target for D = 1, by its inverse CDF at u: (N,), in the dtype of the parameters.

    The support is the union of the intervals mu_k +- REACH T sigma_k of the components of `cond` that weigh at least
    RAREST of the heaviest one. For w <= 1, where p_u also determines where the product lies, the intervals
    mu_k +- REACH sigma_k of such components of `null` are added. Samples follow the target on this support, even if it
    is improper on the whole line (which is possible for w > 1 and for w < 0). Standard deviations are clamped to
    exp(+-NARROWEST), beyond which float32 can't represent a component's shape anyway.

    Every component adds grid points around itself, so that narrow and distant components are found. The mass of a cell
    is computed by Lobatto's rule, or by exponential pieces where the target is steep, for example at an end of the
    support where an improper target is highest. The cell that u selects is divided into INSIDE exponential parts.
    tests/heads/test_guided.py bounds the errors.
    """
    n = max(POINTS, GRID // (cond.logits.shape[-1] + null.logits.shape[-1]) | 1)
    held = (cond.logits.shape[-1] + null.logits.shape[-1]) ** 2 * n * 3  # numbers held for one row
    rows = max(1, CAP // held)
    if len(u) <= rows:
        return _inverse_cdf(cond, null, w, u, temperature, n)
    parts = [slice(i, i + rows) for i in range(0, len(u), rows)]
    return torch.cat(
        [_inverse_cdf(cond.select(s), null.select(s), w[s], u[s], _rows(temperature, s), n) for s in parts]
    )


def _inverse_cdf(
    cond: GaussianMixture, null: GaussianMixture, w: Tensor, u: Tensor, temperature: float | Tensor, n: int
) -> Tensor:
    warm = temperature.clamp(min=COLDEST) if isinstance(temperature, Tensor) else max(temperature, COLDEST)
    target = Target(cond, null, w, warm)
    x, inside = target.grid(n)  # (N, P), (N, P-1)
    P = x.shape[1]
    left, width = x[:, :-1], x.diff(dim=1)
    inner = [torch.addcmul(left, width, width.new_tensor(at)) for at in LOBATTO]
    at_ends, *at_inner = target.log_density(torch.cat([x, *inner], dim=1)).split([P, P - 1, P - 1], dim=1)
    log_f = torch.stack([at_ends[:, :-1], *at_inner, at_ends[:, 1:]])  # (4, N, P-1)
    log_f = log_f.masked_fill(~inside | (width <= 0), -math.inf)
    mass = width * _cell_mass(log_f - log_f.amax(dim=(0, 2), keepdim=True).clamp(min=LOWEST))  # (N, P-1)
    cell, level = find(mass, u)  # (N, 1) each
    left, width = left.gather(1, cell), width.gather(1, cell)

    steps = torch.linspace(0, 1, INSIDE + 1, dtype=x.dtype, device=x.device)
    log_f = target.log_density(torch.addcmul(left, width, steps))  # (N, INSIDE+1)
    log_f = log_f - log_f.amax(dim=1, keepdim=True)
    part, level = find(exponential(log_f[:, :-1], log_f[:, 1:]), level[:, 0])
    s = exponential_quantile(log_f.gather(1, part + 1) - log_f.gather(1, part), level)
    drawn = left + width * (part + s) / INSIDE  # (N, 1)
    # If the components are too narrow for float32 to represent a cell, the heaviest component's mean is taken.
    heaviest = cond.means[..., 0].gather(1, cond.logits.argmax(dim=1, keepdim=True))
    return torch.where(mass.sum(dim=1, keepdim=True) == 0, heaviest, drawn)[:, 0]


def _cell_mass(log_f: Tensor) -> Tensor:
    """The integral of f over cells of width 1, (...), from log f at their ends and inner nodes, (4, ...)."""
    f = log_f.exp()
    smooth = (f[0] + f[3] + 5 * (f[1] + f[2])) / 12
    lengths = log_f.new_tensor([LOBATTO[0], LOBATTO[1] - LOBATTO[0], LOBATTO[0]]).view(3, *[1] * (log_f.ndim - 1))
    steep = (lengths * exponential(log_f[:-1], log_f[1:])).sum(dim=0)
    return torch.where((log_f.diff(dim=0).abs() > STEEP).any(dim=0), steep, smooth)


def exponential(log_a: Tensor, log_b: Tensor) -> Tensor:
    """The integral over [0, 1] of the exponential with the values a at 0 and b at 1: (b - a) / (log b - log a)."""
    top, drop = torch.maximum(log_a, log_b), (log_a - log_b).abs()
    ratio = torch.where(drop < SMALL, 1 - drop / 2, -torch.expm1(-drop) / drop.clamp(min=SMALL))
    return top.exp() * ratio.nan_to_num(0.0)  # the ratio is NaN where f is 0 at both ends, and the mass is 0 there


def exponential_quantile(rise: Tensor, level: Tensor) -> Tensor:
    """The place in [0, 1] below which an exponential that grows by e^rise has the share `level` of its mass."""
    fall = rise.abs()
    share = torch.where(rise > 0, 1 - level, level)  # measured from the end where the exponential is highest
    s = -torch.log1p(share * torch.expm1(-fall)) / fall.clamp(min=SMALL)
    s = torch.where(fall < SMALL, share, s.clamp(0, 1))
    return torch.where(rise > 0, 1 - s, s)


def find(mass: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The cell (N, 1) that contains the share u (N,) of the cells' mass (N, P), and the place in it, 0 to 1, (N, 1).

    The chosen cell has a positive mass, unless all masses are 0.
    """
    sums = mass.cumsum(dim=1)
    level = (u[:, None] * (1 - 1e-6)) * sums[:, -1:]  # stays below the last sum despite rounding
    cell = torch.searchsorted(sums, level, right=True).clamp(max=mass.shape[1] - 1)
    of = mass.gather(1, cell)
    place = (level - (sums.gather(1, cell) - of)) / of.clamp(min=torch.finfo(mass.dtype).tiny)
    return cell, place.clamp(0, 1)


class Target:
    """The log density of the target, up to a constant for each row, and the grid on which it is evaluated.

    The first axis is the component, (K, N), so that sums over components add contiguous memory.
    """

    def __init__(self, cond: GaussianMixture, null: GaussianMixture, w: Tensor, temperature: float | Tensor) -> None:
        self.w, self.temperature = w.to(cond.means.dtype)[:, None], temperature  # (N, 1)
        self.cond, self.null = _scaled(cond, 1.0), _scaled(null, 1.0)
        same = not isinstance(temperature, Tensor) and temperature == 1.0
        self.drawn = self.cond if same else _scaled(cond, temperature)

    def log_density(self, x: Tensor) -> Tensor:
        """The log density at x (N, G), up to a constant for each row: (N, G)."""
        log_c, log_u = _log_density(x, *self.cond), _log_density(x, *self.null)
        log_q = log_c if self.drawn is self.cond else _log_density(x, *self.drawn)
        return log_q + (self.w - 1) * (log_c - log_u)

    def grid(self, n: int) -> tuple[Tensor, Tensor]:
        """n grid points for each component, ascending (N, P), and a mask of the cells within the support (N, P-1)."""
        (weight, mean, rate), (weight_u, mean_u, rate_u) = self.drawn, self.null
        weight, weight_u = weight - rate.log(), weight_u - rate_u.log()  # log weights, without the factor 1 / std
        counts = torch.cat(  # (2K, N), True for components that extend the support
            [_heavy(weight), _heavy(weight_u) & (self.w <= 1).T]
        )
        reach = REACH / torch.cat([rate, rate_u])
        mean = torch.cat([mean, mean_u])
        low = (mean - reach).masked_fill(~counts, math.inf).amin(dim=0)  # (N,)
        high = (mean + reach).masked_fill(~counts, -math.inf).amax(dim=0)
        steps = torch.linspace(-1, 1, n, dtype=mean.dtype, device=mean.device)
        points = torch.addcmul(mean[..., None], reach[..., None], steps)  # (2K, N, n)
        points = points.clamp(low[:, None], high[:, None])  # points of the other components stay within the support
        begins = torch.zeros_like(points, dtype=torch.int8)  # +1 where a component's interval begins, -1 where it ends
        begins[..., 0], begins[..., -1] = counts, -counts.to(torch.int8)
        x, order = points.transpose(0, 1).flatten(1).sort(dim=1)  # (N, P)
        inside = begins.transpose(0, 1).flatten(1).gather(1, order).cumsum(dim=1)[:, :-1] > 0
        return x, inside


Scaled = tuple[Tensor, Tensor, Tensor]  # (K, N) each: log(weight / std), mean, 1 / std


def _rows(temperature: float | Tensor, rows: slice) -> float | Tensor:
    return temperature[rows] if isinstance(temperature, Tensor) else temperature


def _scaled(mixture: GaussianMixture, temperature: float | Tensor) -> Scaled:
    warmth = temperature.T.log() if isinstance(temperature, Tensor) else math.log(temperature)
    log_std = (mixture.log_std[..., 0].T + warmth).clamp(-NARROWEST, NARROWEST)
    return (mixture.log_weights().T - log_std, mixture.means[..., 0].T, (-log_std).exp())


def _log_density(x: Tensor, weight: Tensor, mean: Tensor, rate: Tensor) -> Tensor:
    """log sum_k weight_k exp(-(x - mean_k)^2 rate_k^2 / 2) at x (N, G): (N, G).

    The form a x^2 + b x + c would take as long and lose all digits of a narrow component far from 0.
    """
    y = torch.sub(x, mean[..., None]).mul_(rate[..., None])  # (K, N, G)
    y = torch.addcmul(weight[..., None], y, y, value=-0.5)
    top = y.amax(dim=0)  # always finite here; the general `torch.logsumexp` takes 1.5 times as long
    return y.sub_(top).exp_().sum(dim=0).log_().add_(top)


def _heavy(log_weight: Tensor) -> Tensor:
    return log_weight >= log_weight.amax(dim=0) + math.log(RAREST)


def resample_product(
    cond: GaussianMixture,
    null: GaussianMixture,
    w: Tensor,  # (N,)
    candidates: tuple[Tensor, Tensor],  # uniform (N, S), normal (N, S, D)
    u: Tensor,  # (N,)
    temperature: float | Tensor = 1.0,  # one number for all rows, or (N, 1)
) -> Tensor:
    """Approximate samples (N, D) of the target: one of S candidates, with weights (p_c / p_u)^(w-1) (Zhao et al. 2025).

    Candidates come from the conditional mixture at the temperature, so regions without candidates are never sampled.
    The further w moves the target away from that mixture, the fewer candidates carry all of the weight.
    """
    uniform, normal = candidates
    rows = max(1, CAP // max(1, normal[0].numel() * cond.logits.shape[-1])) if len(u) else 1
    parts = []
    for i in range(0, len(u), rows):
        s = slice(i, i + rows)
        p_c, p_u = cond.select(s), null.select(s)
        x = p_c.sample(uniform[s], normal[s], _rows(temperature, s))  # (rows, S, D)
        log_ratio = (w[s, None] - 1) * (p_c.log_prob(x) - p_u.log_prob(x))  # (rows, S)
        weights = log_ratio.softmax(dim=1)
        chosen, _ = find(weights, u[s])  # (rows, 1)
        unsound = 0.0 * weights.amax(dim=1, keepdim=True)  # 0, or NaN where weights are NaN, which makes the sample NaN
        parts.append(x.gather(1, chosen[..., None].expand(-1, -1, x.shape[-1]))[:, 0] + unsound)
    return torch.cat(parts) if parts else normal.new_zeros(0, normal.shape[-1])

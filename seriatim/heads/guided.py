"""Draws from a guided mixture of Gaussians: p_c^w p_u^(1-w), of a conditional and an unconditional mixture.

The product of two mixtures to powers is no mixture, has no known normaliser, and may have none at all: where
w / sigma_c^2 < (w - 1) / sigma_u^2 it grows without bound. At temperature T the target here is

    q_T(x) (p_c(x) / p_u(x))^(w-1),      q_T: the conditional mixture, its standard deviations times T

which is p_c^w p_u^(1-w) at T = 1, and what candidates drawn at T and weighted by (p_c / p_u)^(w-1) tend to (Zhao et al.
2025, ARINAR).

    sample_product     one feature: from the target itself, on a bounded support; one uniform number a row
    resample_product   any number of features: approximately, by choosing among candidates

Shapes: N rows, K components (of each mixture), D features, S candidates, P grid points, G points of evaluation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from seriatim.heads.gaussians import GaussianMixture

REACH = 5.0  # standard deviations from a mean to where the support ends
RAREST = 1e-4  # a component's weight beside the heaviest one's from which it has a say in the support
COLDEST = 1e-4  # a temperature below counts as this
NARROWEST = 20.0  # |log| of a standard deviation from which it counts as this: its square has room, far from it too
GRID = 104  # points over all components, but at least POINTS for one
POINTS = 13
INSIDE = 32  # parts of the cell in which the drawn number lies
SMALL = 1e-3  # a difference of logarithms below which an exponential is a straight line
LOWEST = -1e30  # in place of the logarithm of nothing
CAP = 1 << 22  # numbers held at once, 16 MiB
LOBATTO = (0.2763932022500210, 0.7236067977499790)  # inner nodes on [0, 1]; with the ends: degree 5
STEEP = 3.0  # a change of log f between nodes from which f is taken as exponential there, not as a polynomial


def sample_product(
    cond: GaussianMixture,
    null: GaussianMixture,
    w: Tensor,  # (N,)
    u: Tensor,  # (N,), in [0, 1)
    temperature: float | Tensor = 1.0,  # one for all rows, or (N, 1)
) -> Tensor:
    """The inverse CDF of the target at u, for D = 1: (N,), in the dtype of the parameters.

    The support is the union of mu_k +- REACH T sigma_k over the components of `cond` that weigh at least RAREST of the
    heaviest; for w <= 1, where p_u too says where the product lies, also of mu_k +- REACH sigma_k over those of `null`.
    There it is the target, be it improper on the whole line (as it may be for w > 1, and for w < 0) or not. Standard
    deviations are kept within exp(+-NARROWEST), which is where tokens in float32 know neither points nor ends.

    Every component puts grid points where it is, so that narrow and far ones are seen; a cell's mass is by Lobatto's
    rule, or where the target is steep, such as at an end that an improper one climbs to, by exponential pieces; the
    cell that u falls into is cut into INSIDE parts, each exponential. Errors: tests/heads/test_guided.py.
    """
    n = max(POINTS, GRID // (cond.logits.shape[-1] + null.logits.shape[-1]) | 1)
    held = (cond.logits.shape[-1] + null.logits.shape[-1]) ** 2 * n * 3  # of one row
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
    # Where all is so narrow that the numbers have no room for a cell, the heaviest component is a point.
    heaviest = cond.means[..., 0].gather(1, cond.logits.argmax(dim=1, keepdim=True))
    return torch.where(mass.sum(dim=1, keepdim=True) == 0, heaviest, drawn)[:, 0]


def _cell_mass(log_f: Tensor) -> Tensor:
    """log f at the ends and the inner nodes of cells of width 1, (4, ...) -> its integral over each."""
    f = log_f.exp()
    smooth = (f[0] + f[3] + 5 * (f[1] + f[2])) / 12
    lengths = log_f.new_tensor([LOBATTO[0], LOBATTO[1] - LOBATTO[0], LOBATTO[0]]).view(3, *[1] * (log_f.ndim - 1))
    steep = (lengths * exponential(log_f[:-1], log_f[1:])).sum(dim=0)
    return torch.where((log_f.diff(dim=0).abs() > STEEP).any(dim=0), steep, smooth)


def exponential(log_a: Tensor, log_b: Tensor) -> Tensor:
    """The integral over [0, 1] of the exponential that is a at 0 and b at 1: (b - a) / (log b - log a)."""
    top, drop = torch.maximum(log_a, log_b), (log_a - log_b).abs()
    ratio = torch.where(drop < SMALL, 1 - drop / 2, -torch.expm1(-drop) / drop.clamp(min=SMALL))
    return top.exp() * ratio.nan_to_num(0.0)  # where f is 0 at both ends: no mass


def exponential_quantile(rise: Tensor, level: Tensor) -> Tensor:
    """Where in [0, 1] an exponential that grows by e^rise has `level` of its mass behind it."""
    fall = rise.abs()
    share = torch.where(rise > 0, 1 - level, level)  # from the end where it is highest
    s = -torch.log1p(share * torch.expm1(-fall)) / fall.clamp(min=SMALL)
    s = torch.where(fall < SMALL, share, s.clamp(0, 1))
    return torch.where(rise > 0, 1 - s, s)


def find(mass: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """mass (N, P) of cells, u (N,) -> the cell that u of all mass falls into, and u's place in it from 0 to 1: (N, 1).

    The cell has mass, unless none has.
    """
    sums = mass.cumsum(dim=1)
    level = (u[:, None] * (1 - 1e-6)) * sums[:, -1:]  # below the end, however it rounds
    cell = torch.searchsorted(sums, level, right=True).clamp(max=mass.shape[1] - 1)
    of = mass.gather(1, cell)
    place = (level - (sums.gather(1, cell) - of)) / of.clamp(min=torch.finfo(mass.dtype).tiny)
    return cell, place.clamp(0, 1)


class Target:
    """The logarithm of the target but for a constant of each row, and where to look at it.

    Components lie first, (K, N), so that a sum over them runs along memory.
    """

    def __init__(self, cond: GaussianMixture, null: GaussianMixture, w: Tensor, temperature: float | Tensor) -> None:
        self.w, self.temperature = w.to(cond.means.dtype)[:, None], temperature  # (N, 1)
        self.cond, self.null = _scaled(cond, 1.0), _scaled(null, 1.0)
        same = not isinstance(temperature, Tensor) and temperature == 1.0
        self.drawn = self.cond if same else _scaled(cond, temperature)

    def log_density(self, x: Tensor) -> Tensor:
        """x (N, G) -> (N, G)."""
        log_c, log_u = _log_density(x, *self.cond), _log_density(x, *self.null)
        log_q = log_c if self.drawn is self.cond else _log_density(x, *self.drawn)
        return log_q + (self.w - 1) * (log_c - log_u)

    def grid(self, n: int) -> tuple[Tensor, Tensor]:
        """n points for each component, ascending (N, P), and which cells between them the support has (N, P-1)."""
        (weight, mean, rate), (weight_u, mean_u, rate_u) = self.drawn, self.null
        weight, weight_u = weight - rate.log(), weight_u - rate_u.log()  # of a component, not of its density at the top
        counts = torch.cat(  # (2K, N): what has a say in the support
            [_heavy(weight), _heavy(weight_u) & (self.w <= 1).T]
        )
        reach = REACH / torch.cat([rate, rate_u])
        mean = torch.cat([mean, mean_u])
        low = (mean - reach).masked_fill(~counts, math.inf).amin(dim=0)  # (N,)
        high = (mean + reach).masked_fill(~counts, -math.inf).amax(dim=0)
        steps = torch.linspace(-1, 1, n, dtype=mean.dtype, device=mean.device)
        points = torch.addcmul(mean[..., None], reach[..., None], steps)  # (2K, N, n)
        points = points.clamp(low[:, None], high[:, None])  # those that have no say stay inside
        begins = torch.zeros_like(points, dtype=torch.int8)  # +1 where a component's stretch begins, -1 where it ends
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
    """log sum_k weight_k exp(-(x - mean_k)^2 rate_k^2 / 2), x (N, G) -> (N, G).

    Not as a x^2 + b x + c, which takes as long and loses all digits of a narrow component far from 0.
    """
    y = torch.sub(x, mean[..., None]).mul_(rate[..., None])  # (K, N, G)
    y = torch.addcmul(weight[..., None], y, y, value=-0.5)
    top = y.amax(dim=0)  # finite: `torch.logsumexp`, which expects anything, takes half as long again
    return y.sub_(top).exp_().sum(dim=0).log_().add_(top)


def _heavy(log_weight: Tensor) -> Tensor:
    return log_weight >= log_weight.amax(dim=0) + math.log(RAREST)


def resample_product(
    cond: GaussianMixture,
    null: GaussianMixture,
    w: Tensor,  # (N,)
    candidates: tuple[Tensor, Tensor],  # uniform (N, S), normal (N, S, D)
    u: Tensor,  # (N,)
    temperature: float | Tensor = 1.0,  # one for all rows, or (N, 1)
) -> Tensor:
    """Approximately from the target: one of S candidates, by weights (p_c / p_u)^(w-1): (N, D) (Zhao et al. 2025).

    Candidates are of the conditional mixture at the temperature: where it has none, nothing is drawn, and the more w
    moves the target away from it, the fewer candidates carry all the weight.
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
        unsound = 0.0 * weights.amax(dim=1, keepdim=True)  # 0, or NaN: what is drawn by weights that are NaN is NaN
        parts.append(x.gather(1, chosen[..., None].expand(-1, -1, x.shape[-1]))[:, 0] + unsound)
    return torch.cat(parts) if parts else normal.new_zeros(0, normal.shape[-1])

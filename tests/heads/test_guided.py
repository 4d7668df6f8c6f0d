"""Guided draws of one feature against quadrature; and resampling against them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from seriatim.heads import guided
from seriatim.heads.gaussians import GaussianMixture
from seriatim.heads.guided import RAREST, REACH, resample_product, sample_product

Stretch = tuple[float, float]


def mixture(*components: tuple[float, float, float]) -> GaussianMixture:
    """(weight, mean, standard deviation) of each component, as one row."""
    weight, mean, std = torch.tensor(components).T
    return GaussianMixture(weight.log()[None], mean[None, :, None], std.log()[None, :, None])


def repeated(row: GaussianMixture, count: int) -> GaussianMixture:
    return GaussianMixture(*(t.expand(count, *t.shape[1:]) for t in (row.logits, row.means, row.log_std)))


def double(row: GaussianMixture) -> GaussianMixture:
    return GaussianMixture(row.logits.double(), row.means.double(), row.log_std.double())


def stretches(row: GaussianMixture, temperature: float) -> list[Stretch]:
    weights, means, stds = row.log_weights()[0], row.means[0, :, 0], row.log_std[0, :, 0].exp() * temperature * REACH
    heavy = weights >= weights.max() + math.log(RAREST)
    return [(float(m - s), float(m + s)) for m, s, h in zip(means, stds, heavy, strict=True) if h]


def quadrature(cond: GaussianMixture, null: GaussianMixture, w: float, temperature: float) -> tuple[Tensor, Tensor]:
    """The target's CDF on the support that `sample_product` documents: points, and what lies below: float64."""
    cond, null = double(cond), double(null)
    drawn = GaussianMixture(cond.logits, cond.means, cond.log_std + math.log(temperature))
    parts = sorted(stretches(cond, temperature) + (stretches(null, 1.0) if w <= 1 else []))
    union: list[Stretch] = []
    for low, high in parts:
        if union and low <= union[-1][1]:
            union[-1] = (union[-1][0], max(union[-1][1], high))
        else:
            union.append((low, high))
    points, logs = [], []
    for low, high in union:
        near = [torch.linspace(low, high, 20_001, dtype=torch.float64)]
        for row in (cond, null, drawn):
            for mean, log_std in zip(row.means[0, :, 0], row.log_std[0, :, 0], strict=True):
                near.append(mean + log_std.exp() * torch.linspace(-6, 6, 2401, dtype=torch.float64))
        ends = torch.logspace(-9, 0, 2000, dtype=torch.float64) * (high - low) / 2
        x = torch.cat([*near, low + ends, high - ends]).sort().values
        x = x[(x >= low) & (x <= high)]
        at = x[None, :, None]
        points.append(x)
        logs.append((drawn.log_prob(at) + (w - 1) * (cond.log_prob(at) - null.log_prob(at)))[0])
    top = max(float(log.max()) for log in logs)
    sums, total = [], 0.0
    for x, log in zip(points, logs, strict=True):
        below = torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumulative_trapezoid((log - top).exp(), x)])
        sums.append(below + total)
        total = float(sums[-1][-1])
    return torch.cat(points), torch.cat(sums) / total


def interpolated(x: Tensor, values: Tensor, at: Tensor) -> Tensor:
    i = torch.searchsorted(x, at).clamp(1, len(x) - 1)
    share = ((at - x[i - 1]) / (x[i] - x[i - 1]).clamp(min=1e-300)).clamp(0, 1)
    return values[i - 1] + share * (values[i] - values[i - 1])


def random(K: int, g: torch.Generator, low: float, high: float) -> GaussianMixture:
    log_std = low + (high - low) * torch.rand(1, K, 1, generator=g)
    return GaussianMixture(torch.randn(1, K, generator=g), torch.randn(1, K, 1, generator=g), log_std)


def check(cond: GaussianMixture, null: GaussianMixture, w: float, temperature: float, most: float) -> None:
    """CDF distance, mean and standard deviation of the draws at 1001 evenly spread u."""
    x, cdf = quadrature(cond, null, w, temperature)
    u = (torch.arange(1001) + 0.5) / 1001
    drawn = sample_product(repeated(cond, 1001), repeated(null, 1001), torch.full((1001,), w), u, temperature).double()
    distance = float((interpolated(x, cdf, drawn) - u).abs().max())
    assert distance < most, f"w {w}, temperature {temperature}: the CDF is off by {distance:.1e}"
    # The same levels of the true CDF: what is compared is the inverse, not 1001 points with an integral.
    i = torch.searchsorted(cdf, u.double()).clamp(1, len(x) - 1)
    share = (u - cdf[i - 1]) / (cdf[i] - cdf[i - 1]).clamp(min=1e-300)
    true = x[i - 1] + share.clamp(0, 1) * (x[i] - x[i - 1])
    spread = float(true.std()) + 1e-6
    assert abs(float(drawn.mean() - true.mean())) < 5e-3 * spread
    assert float(drawn.std()) == pytest.approx(spread, rel=1e-2, abs=1e-5)


@pytest.mark.parametrize("K", [1, 2, 4, 8])
@pytest.mark.parametrize("w", [-1.0, 0.0, 0.5, 1.5, 3.0, 4.5, 8.0])
def test_exact_against_quadrature(K: int, w: float) -> None:
    g = torch.Generator().manual_seed(100 * K + int(10 * w))
    for temperature in (1.0, 0.8, 1.2):
        check(random(K, g, -1.5, 0.5), random(K, g, -1.0, 0.8), w, temperature, 1e-3)


SPECIAL = {
    "proper, far from the conditional mean": (((1.0, 0.0, 1.0),), ((1.0, -0.6, 1.0),)),
    "improper: the unconditional one is narrower": (((1.0, 0.0, 1.0),), ((1.0, 0.3, 0.5),)),
    "improper on one side": (((0.7, -1.0, 0.5), (0.3, 1.0, 1.0)), ((1.0, -1.0, 0.4),)),
    "far apart": (((0.5, -100.0, 0.5), (0.3, 0.0, 0.5), (0.2, 300.0, 2.0)), ((1.0, 0.0, 100.0),)),
    "far apart, nothing between": (((0.5, -50.0, 0.1), (0.5, 50.0, 0.1)), ((0.9, -50.0, 0.2), (0.1, 50.0, 0.2))),
    "very different widths": (((0.3, 3.0, 1e-3), (0.7, 0.0, 1.0)), ((0.1, 3.0, 2e-3), (0.9, 0.5, 2.0))),
    "a light component far away": (((1 - 1e-7, 0.0, 1.0), (1e-7, 40.0, 1.0)), ((1.0, 0.0, 1.2),)),
}  # fmt: skip


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("w", [0.3, 2.0, 5.0])
def test_exact_where_it_is_hard(name: str, w: float) -> None:
    cond, null = SPECIAL[name]
    check(mixture(*cond), mixture(*null), w, 1.0, 2e-3)


def test_the_closed_form_of_two_gaussians() -> None:
    """Precision w/s_c^2 + (1-w)/s_u^2, and the mean that it weighs."""
    w, (m_c, s_c), (m_u, s_u) = 2.5, (0.5, 0.4), (0.3, 0.9)
    precision = w / s_c**2 + (1 - w) / s_u**2
    mean, std = (w * m_c / s_c**2 + (1 - w) * m_u / s_u**2) / precision, precision**-0.5
    u = torch.tensor([0.01, 0.2, 0.5, 0.8, 0.99])
    cond, null = repeated(mixture((1.0, m_c, s_c)), 5), repeated(mixture((1.0, m_u, s_u)), 5)
    drawn = sample_product(cond, null, torch.full((5,), w), u)
    expected = mean + std * math.sqrt(2) * torch.erfinv(2 * u - 1)
    assert torch.allclose(drawn, expected, atol=1e-3 * std)


def test_guidance_of_one_is_the_conditional_mixture_and_of_zero_the_other() -> None:
    cond, null = mixture((0.3, -1.0, 0.2), (0.7, 1.0, 0.5)), mixture((0.6, 0.0, 0.3), (0.4, 2.0, 0.4))
    u = torch.linspace(0.001, 0.999, 999)
    for w, of in ((1.0, cond), (0.0, null)):
        x = sample_product(repeated(cond, 999), repeated(null, 999), torch.full((999,), w), u)
        cdf = torch.distributions.Normal(of.means[0, :, 0], of.log_std[0, :, 0].exp()).cdf(x[:, None])
        assert torch.allclose((cdf * of.logits.softmax(dim=1)).sum(dim=1), u, atol=1e-5)


def test_rows_are_independent_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    cond, null = (GaussianMixture(torch.randn(7, 3, generator=g), torch.randn(7, 3, 1, generator=g),
                                  torch.randn(7, 3, 1, generator=g) - 1) for _ in range(2))  # fmt: skip
    w, u = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 4.0, 9.0]), torch.rand(7, generator=g)
    candidates = torch.rand(7, 50, generator=g), torch.randn(7, 50, 1, generator=g)
    together, resampled = sample_product(cond, null, w, u), resample_product(cond, null, w, candidates, u)
    monkeypatch.setattr(guided, "CAP", 1)
    assert torch.allclose(sample_product(cond, null, w, u), together, atol=1e-5)
    assert torch.allclose(resample_product(cond, null, w, candidates, u), resampled, atol=1e-5)
    one = slice(3, 4)
    assert torch.allclose(sample_product(cond.select(one), null.select(one), w[one], u[one]), together[one], atol=1e-5)


def test_a_temperature_of_zero_draws_means() -> None:
    """A mean by its weight times (p_c / p_u)^(w-1) there."""
    cond, null = mixture((0.5, -1.0, 0.2), (0.5, 1.0, 0.2)), mixture((0.8, -1.0, 0.2), (0.2, 1.0, 0.2))
    u = (torch.arange(1000) + 0.5) / 1000
    x = sample_product(repeated(cond, 1000), repeated(null, 1000), torch.full((1000,), 2.0), u, temperature=0.0)
    assert float((x.abs() - 1).abs().max()) < 1e-3
    assert float((x > 0).float().mean()) == pytest.approx(0.8, abs=2e-3)


def test_components_too_narrow_for_numbers_are_points() -> None:
    cond, null = mixture((1.0, 3.0, 1e-12)), mixture((1.0, 3.0, 1.0))
    assert float(sample_product(cond, null, torch.tensor([2.0]), torch.tensor([0.7]))) == 3.0


@pytest.mark.parametrize("w", [-1.0, 0.0, 0.5, 1.5, 4.5])
def test_widths_whose_squares_overflow_still_draw(w: float) -> None:
    """A pixel that never changes is learned as an ever narrower Gaussian; others beside it may be wide."""
    u = torch.linspace(0.01, 0.99, 9)
    rows = {width: mixture((1.0, 0.3, 1.0)) for width in (-60.0, 0.0, 50.0)}
    for width, row in rows.items():
        row.log_std.fill_(width)
    both = mixture((0.5, 0.0, 1.0), (0.5, -0.2, 1.0))
    both.log_std[:, 0] = -60.0
    for cond in (*rows.values(), both):
        for null in (*rows.values(), both):
            x = sample_product(repeated(cond, 9), repeated(null, 9), torch.full((9,), w), u)
            assert x.isfinite().all() and (x.diff() >= 0).all(), "finite, and the inverse of what only grows"
    point = sample_product(repeated(rows[-60.0], 9), repeated(rows[0.0], 9), torch.full((9,), w), u)
    if w >= 0.5:
        assert torch.allclose(point, torch.tensor(0.3)), "where it is, be it ever so narrow"


def test_no_rows() -> None:
    row = mixture((0.5, 0.0, 1.0), (0.5, 1.0, 1.0)).select(slice(0, 0))
    none = torch.zeros(0)
    assert sample_product(row, row, none, none).shape == (0,)
    assert resample_product(row, row, none, (torch.zeros(0, 9), torch.zeros(0, 9, 1)), none).shape == (0, 1)


@pytest.mark.parametrize("temperature", [1.0, 0.8])
@pytest.mark.parametrize("w", [0.5, 3.0])
def test_resampling_tends_to_the_exact_draws(w: float, temperature: float) -> None:
    """Kolmogorov's distance of 2000 draws at 1 %; the bias of 1000 candidates lies below it."""
    g, N, M = torch.Generator().manual_seed(6), 2000, 4001
    cond, null = mixture((0.6, -0.5, 0.4), (0.4, 0.8, 0.3)), mixture((0.5, -0.3, 0.7), (0.5, 0.5, 0.6))
    u = (torch.arange(M) + 0.5) / M
    exact = sample_product(repeated(cond, M), repeated(null, M), torch.full((M,), w), u, temperature)
    candidates = torch.rand(N, 1000, generator=g), torch.randn(N, 1000, 1, generator=g)
    scale, pick = torch.full((N,), w), torch.rand(N, generator=g)
    about = resample_product(repeated(cond, N), repeated(null, N), scale, candidates, pick, temperature)[:, 0]
    below = torch.searchsorted(exact, about.sort().values) / M
    assert float((below - (torch.arange(N) + 0.5) / N).abs().max()) < 1.63 / math.sqrt(N)
    assert abs(float(about.std() / exact.std()) - 1) < 0.05


def test_resampling_by_hand() -> None:
    """Candidates, weights by the densities that temper nothing, and the inverse CDF."""
    cond, null = mixture((0.6, -0.5, 0.4), (0.4, 0.8, 0.3)), mixture((1.0, -0.3, 0.7))
    uniform, normal = torch.tensor([[0.1, 0.7, 0.5]]), torch.tensor([[[0.3], [-1.0], [2.0]]])
    x = torch.tensor([-0.5 + 0.9 * 0.4 * 0.3, 0.8 - 0.9 * 0.3, -0.5 + 0.9 * 0.4 * 2.0])
    at = x[None, :, None]
    weights = ((cond.log_prob(at) - null.log_prob(at)) * 1.5).softmax(dim=1)[0].cumsum(dim=0)
    for u in (0.0, float(weights[0]) + 1e-3, float(weights[1]) + 1e-3, 0.999):
        drawn = resample_product(cond, null, torch.tensor([2.5]), (uniform, normal), torch.tensor([u]), 0.9)
        assert float(drawn) == pytest.approx(float(x[int((u >= weights).sum().clamp(max=2))]), abs=1e-6)

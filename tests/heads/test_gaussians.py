"""Mixtures of Gaussians as parameters: densities against torch.distributions, moments and draws against each other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, distributions

from seriatim.core.errors import UsageError
from seriatim.heads.gaussians import GaussianMixture


def made(N: int = 3, K: int = 4, D: int = 2, full: bool = False) -> GaussianMixture:
    g = torch.Generator().manual_seed(N + K + D)
    below = torch.randn(N, K, D, D, generator=g).tril(-1) if full else None
    log_std = 0.4 * torch.randn(N, K, D, generator=g) - 0.5
    return GaussianMixture(3 * torch.randn(N, K, generator=g), torch.randn(N, K, D, generator=g), log_std, below)


def truth(mixture: GaussianMixture, x: Tensor) -> Tensor:
    parts = distributions.MultivariateNormal(mixture.means, scale_tril=mixture.scale_tril)
    return distributions.MixtureSameFamily(distributions.Categorical(logits=mixture.logits), parts).log_prob(x)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("D", [1, 3])
def test_the_density(D: int, full: bool) -> None:
    mixture, x = made(D=D, full=full), torch.randn(3, 5, D)
    expected = torch.stack([truth(mixture, x[:, s]) for s in range(5)], dim=1)
    assert torch.allclose(mixture.log_prob(x), expected, atol=1e-4)
    assert torch.allclose(mixture.log_prob(x[:, 2]), expected[:, 2], atol=1e-4)


def test_a_weight_that_underflows_is_still_a_density() -> None:
    """softmax gives 0 for it, whose logarithm is no number; log_softmax does not."""
    mixture = GaussianMixture(torch.tensor([[0.0, -200.0]]), torch.zeros(1, 2, 1), torch.zeros(1, 2, 1))
    mixture.means[0, 0] = 1e4
    assert float(mixture.log_prob(torch.zeros(1, 1))) == pytest.approx(-200 - 0.5 * math.log(2 * math.pi), rel=1e-5)


@pytest.mark.parametrize("full", [False, True])
def test_draws_have_the_moments_of_the_parameters(full: bool) -> None:
    mixture, n = made(1, 3, 2, full), 40_000
    g = torch.Generator().manual_seed(1)
    u, normal = torch.rand(1, n, generator=g), torch.randn(1, n, 2, generator=g)
    x = mixture.sample(u, normal)  # (1, n, 2)
    assert torch.allclose(x.mean(dim=1), mixture.mean(), atol=0.03)
    assert torch.allclose(x.var(dim=1), mixture.variance(), rtol=0.05)
    weights = mixture.component(u)[0].bincount(minlength=3)
    assert torch.allclose(weights / n, mixture.logits.softmax(dim=-1)[0], atol=0.01)
    per_row = GaussianMixture(*(None if t is None else t.expand(n, *t.shape[1:]) for t in vars(mixture).values()))  # type: ignore[arg-type]
    assert torch.allclose(per_row.sample(u[0], normal[0]), x[0]), "rows and candidates are the same draws"
    cold = mixture.sample(u, normal, temperature=0.0)
    assert torch.equal(cold[0], mixture.means[0, mixture.component(u)[0]]), "a temperature of 0 leaves the means"


def test_the_component_is_the_inverse_cdf() -> None:
    mixture = made(2, 5, 1)
    u = torch.tensor([0.0, 1 - 2**-24])
    sums = mixture.logits.softmax(dim=1).cumsum(dim=1)
    u[0] = sums[0, 1]  # on the edge: the next component
    assert mixture.component(u).tolist() == [2, 4]


def test_the_nucleus() -> None:
    weights = torch.tensor([[0.5, 0.1, 0.3, 0.1], [0.25, 0.25, 0.25, 0.25]])
    mixture = GaussianMixture(weights.log(), torch.zeros(2, 4, 1), torch.zeros(2, 4, 1))
    kept = mixture.nucleus(0.6).logits.softmax(dim=1)
    assert torch.allclose(kept[0], torch.tensor([0.625, 0.0, 0.375, 0.0])) and int((kept[1] > 0).sum()) == 3
    assert (mixture.nucleus(1e-9).logits.softmax(dim=1).sort(descending=True).values[:, 0] == 1).all()
    assert mixture.nucleus(1.0) is mixture
    high = torch.tensor([1 - 2**-24] * 2)
    assert mixture.nucleus(0.6).component(high).tolist() == [2, 2], "what has no weight is never drawn"


def test_entropy() -> None:
    one = made(2, 1, 3)
    x = one.sample(torch.zeros(2, 20_000), torch.randn(2, 20_000, 3, generator=torch.Generator().manual_seed(0)))
    assert torch.allclose(one.entropy(), -one.log_prob(x).mean(dim=1), atol=0.05)
    with pytest.raises(UsageError, match="entropy: has no closed form for 4 components"):
        made().entropy()


@pytest.mark.parametrize("full", [False, True])
def test_the_entropy_of_each_feature(full: bool) -> None:
    """Of one Gaussian, whose form is closed; of several against a dense sum over one feature's own density."""
    one = made(K=1, D=3, full=full)
    closed = 0.5 * (1 + math.log(2 * math.pi) + one.variance().log())
    assert torch.allclose(one.feature_entropy(), closed, atol=1e-4)
    mixture = made(K=4, D=3, full=full)
    std = (mixture.scale_tril.square().sum(dim=-1)).sqrt()  # (N, K, D), of the features alone
    x = torch.linspace(-60, 60, 400_001)
    for n in range(3):
        for d in range(3):
            parts = distributions.Normal(mixture.means[n, :, d], std[n, :, d])
            density = distributions.MixtureSameFamily(distributions.Categorical(logits=mixture.logits[n]), parts)
            log_p = density.log_prob(x)
            expected = -torch.trapezoid(log_p.exp() * log_p, x)
            assert float(mixture.feature_entropy()[n, d]) == pytest.approx(float(expected), abs=2e-3), (n, d)


def test_the_entropy_of_a_spike_beside_a_plain() -> None:
    """Widths that differ by 1000, in one place: log 2 more than the mean of both, nearly."""
    log_std = torch.tensor([0.0, -math.log(1000)])
    mixture = GaussianMixture(torch.zeros(1, 2), torch.zeros(1, 2, 1), log_std.view(1, 2, 1))
    each = 0.5 * (1 + math.log(2 * math.pi)) + log_std
    assert float(mixture.feature_entropy()) == pytest.approx(float(each.mean()) + math.log(2), abs=0.01)

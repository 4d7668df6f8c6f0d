"""The mixture head: its layout, its loss, what it draws, what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import drawn, many, randomise, replay

from seriatim.core.errors import UsageError
from seriatim.core.keys import Keys, ReplayKeys
from seriatim.heads import mixture
from seriatim.heads.guided import resample_product, sample_product
from seriatim.heads.mixture import Mixture
from seriatim.models.build import seeded
from seriatim.models.registry import HEADS
from seriatim.testing import check_head


@pytest.mark.parametrize(("dim", "covariance"), [(1, "diagonal"), (3, "diagonal"), (1, "full"), (3, "full")])
def test_the_contract_and_a_known_density(dim: int, covariance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture, "CANDIDATES", 50)
    learn = covariance == "diagonal" or dim == 3
    check_head(Mixture, dim=dim, components=4, width=32, depth=1, covariance=covariance, learn=learn, steps=300)
    check_head(Mixture, dim=dim, components=2, depth=0, covariance=covariance, learn=False)
    assert HEADS["mixture"] is Mixture


def made(dim: int = 1, components: int = 3, scale: float = 0.3, **config: Any) -> Mixture:
    with seeded(0):
        head = Mixture(dim, components, z_dim=5, **{"width": 16, "depth": 1, **config})
    randomise(head, scale=scale)
    return head


def some(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_at_first_weights_are_equal_and_tokens_of_about_unit_variance() -> None:
    with seeded(0):
        head = Mixture(4, 8, width=32, depth=2, z_dim=5)
    made = head.mixture(torch.zeros(1, 5))
    assert torch.allclose(made.logits.softmax(dim=1), torch.full((1, 8), 1 / 8), atol=1e-5)
    assert torch.allclose(made.log_std, torch.zeros(1, 8, 4), atol=1e-5)
    assert 0.2 < float(made.means.std()) < 0.8, "apart, or components would learn the same"


@torch.no_grad()
def test_depth_0_is_one_linear_laid_out_as_published() -> None:
    """[K D means | K D log-variances | K logits], component by component (arXiv 2503.02883)."""
    head = made(dim=2, depth=0)
    assert sorted(head.state_dict()) == ["final.bias", "final.weight"]
    assert head.final.weight.shape == (2 * 3 * 2 + 3, 5)
    z = some(4)
    flat = z @ head.final.weight.T + head.final.bias
    parts = head.mixture(z)
    assert torch.allclose(parts.means[:, 1], flat[:, 2:4], atol=1e-6), "component 1 of 3 comes second"
    assert torch.allclose((2 * parts.log_std)[:, 2], flat[:, 6 + 4 : 6 + 6], atol=1e-6)
    assert torch.allclose(parts.logits, flat[:, 12:], atol=1e-6)


@torch.no_grad()
def test_full_covariances_go_on_below_the_diagonal() -> None:
    head = made(dim=3, depth=0, covariance="full")
    flat = head(some(4))
    assert flat.shape == (4, 2 * 9 + 3 + 3 * 3)
    lower = head.mixture(some(4)).scale_tril  # (4, 3, 3, 3)
    assert torch.allclose(lower[:, 1, 1, 0], flat[:, 24]) and torch.allclose(lower[:, 1, 2, 1], flat[:, 26])
    assert torch.allclose(lower[:, 0, 2, 2], (0.5 * flat[:, 9 + 2]).exp()) and not lower.triu(1).any()


@torch.no_grad()
@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_the_loss_is_the_likelihood_by_hand(covariance: str) -> None:
    head = made(dim=2, covariance=covariance)
    z, x = some(6), torch.randn(6, 2)
    loss = head.loss(z, x, ReplayKeys({}, 6))  # draws nothing
    parts = head.mixture(z)
    for n in range(6):
        density = 0.0
        for k in range(3):
            normal = torch.distributions.MultivariateNormal(parts.means[n, k], scale_tril=parts.scale_tril[n, k])
            density += float(parts.logits[n].softmax(dim=0)[k]) * math.exp(float(normal.log_prob(x[n])))
        assert float(loss.sum[n]) == pytest.approx(-math.log(density), abs=1e-4)
    assert torch.equal(head.log_prob(z, x), -loss.sum) and loss.count.tolist() == [1] * 6


@torch.no_grad()
def test_the_density_integrates_to_one() -> None:
    head, grid = made(), torch.linspace(-20, 20, 8001)
    p = head.log_prob(some(1).expand(8001, -1), grid[:, None]).exp()
    assert float(torch.trapezoid(p, grid)) == pytest.approx(1, abs=1e-4)


@torch.no_grad()
def test_draws_are_of_the_density() -> None:
    """Kolmogorov's distance at 1 %, in one dimension; in two, moments."""
    head, N = made(), 4000
    z = some(1).expand(N, -1)
    x = head.sample(z, many(0, N))[:, 0].sort().values
    parts = head.mixture(z[:1])
    cdf = torch.distributions.Normal(parts.means[..., 0], parts.log_std[..., 0].exp()).cdf(x[:, None])
    cdf = (cdf * parts.logits.softmax(dim=1)).sum(dim=1)
    assert float((cdf - (torch.arange(N) + 0.5) / N).abs().max()) < 1.63 / math.sqrt(N)
    head = made(dim=2, covariance="full")
    x, parts = head.sample(z, many(1, N)), head.mixture(z[:1])
    assert torch.allclose(x.mean(dim=0), parts.mean()[0], atol=0.1)
    assert torch.allclose(x.var(dim=0), parts.variance()[0], rtol=0.1)


@torch.no_grad()
def test_draws_by_hand() -> None:
    """First a uniform number for the component, then D normal ones; the temperature is the standard deviation's."""
    head, z = made(dim=2), some(3)
    parts = head.mixture(z)
    weights = parts.logits.softmax(dim=1).cumsum(dim=1)
    u, normal = torch.tensor([0.0, float(weights[1, 0]) + 1e-4, 1 - 1e-7]), torch.randn(3, 2)
    x = drawn(head, z, replay({"component/uniform": u, "value/normal": normal}), temperature=0.7)
    for n, k in enumerate((0, 1, 2)):
        expected = parts.means[n, k] + 0.7 * parts.log_std[n, k].exp() * normal[n]
        assert torch.allclose(x[n], expected, atol=1e-6)


@torch.no_grad()
def test_top_p_draws_the_heaviest_alone() -> None:
    head, z = made(depth=0, scale=0.0), some(4)
    head.final.weight.zero_()
    head.final.bias.copy_(torch.tensor([-5.0, 0.0, 5.0, -4.0, -4.0, -4.0, math.log(0.2), math.log(0.5), math.log(0.3)]))
    u, normal = torch.tensor([0.01, 0.3, 0.7, 0.99]), torch.zeros(4, 1)
    for top_p, expected in ((1.0, [-5, 0, 5, 5]), (0.8, [0, 0, 5, 5]), (0.4, [0, 0, 0, 0])):
        x = drawn(head, z, replay({"component/uniform": u, "value/normal": normal}), top_p=top_p)
        assert x[:, 0].tolist() == expected, top_p
    guided = drawn(head, z, replay({"product/uniform": u}), some(4, 1), 2.0, top_p=0.4)
    assert float(guided.abs().max()) < 1


@torch.no_grad()
@pytest.mark.parametrize(("dim", "mode"), [(1, None), (1, "resample"), (2, None)])
def test_guided_draws(dim: int, mode: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of scale 1 draw as ever, the others as `guided.py` has it: exactly where D is 1."""
    monkeypatch.setattr(mixture, "CANDIDATES", 20)
    head, z, z_null = made(dim=dim), some(4), some(4, 1)
    w = torch.tensor([2.0, 1.0, 0.5, 1.0])
    x = drawn(head, z, Keys.of_seeds(range(4)), z_null, w, 0.9, guidance_mode=mode)
    plain, of = torch.tensor([1, 3]), torch.tensor([0, 2])
    assert torch.allclose(x[plain], head.sample(z[plain], Keys.of_seeds([1, 3]), temperature=0.9), atol=1e-5)
    cond, null, keys = head.mixture(z[of]), head.mixture(z_null[of]), Keys.of_seeds([0, 2])
    if dim == 1 and mode is None:
        expected = sample_product(cond, null, w[of], keys.fold("product").uniform(), 0.9)[:, None]
    else:
        some_keys = keys.fold("candidates")
        candidates = some_keys.fold("component").uniform(20), some_keys.fold("value").normal(20, dim)
        expected = resample_product(cond, null, w[of], candidates, keys.fold("choice").uniform(), temperature=0.9)
    assert torch.allclose(x[of], expected, atol=1e-5)


@torch.no_grad()
def test_float32_under_autocast() -> None:
    head, z = made(), some(4)
    x = head.sample(z, Keys.of_seeds(range(4)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head.sample(z, Keys.of_seeds(range(4))), x)
        assert head.loss(z, x, Keys.of_seeds(range(4))).sum.dtype == torch.float32


@pytest.mark.parametrize("mode", ["free", "exact", "resample"])
@pytest.mark.parametrize("at", [0, 4, 7], ids=["mean", "log-variance", "logit"])
@torch.no_grad()
def test_of_a_parameter_that_is_nan_comes_nothing_finite(at: int, mode: str) -> None:
    """Neither a loss nor, as soon as the component is drawn, a token: whoever trains or samples finds it at the end."""
    head, z, keys = made(depth=0), some(50), Keys.of_seeds(range(50))
    head.final.bias[at] = math.nan
    assert bool(head.loss(z, torch.zeros(50, 1), keys).sum.isnan().all())
    if mode == "free":
        assert bool(drawn(head, z, keys).isnan().any())
    else:
        assert bool(drawn(head, z, keys, some(50, 1), 2.0, guidance_mode=mode).isnan().all())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"dim": 0}, "dim: 0 is not allowed; it must be at least 1"),
        ({"components": 0}, "components: 0 is not allowed; it must be at least 1"),
        ({"depth": -1}, "depth: -1 is not allowed; it must be at least 0"),
        ({"covariance": "ful"}, "covariance: 'ful' is not known; did you mean 'full'"),
    ],
)
def test_bad_settings_are_named(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        Mixture(**{"dim": 2, **config})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": 2}, "top_k: the Mixture head has no such option"),
        ({"top_p": 0.0}, "top_p: 0.0 is not allowed"),
        ({"top_p": float("nan")}, "top_p: nan is not allowed"),
        ({"guidance_mode": "exakt"}, "guidance_mode: 'exakt' is not known; did you mean 'exact'"),
        (
            {"guidance_mode": "exact"},
            "guidance_mode: 'exact' is only for one feature, and this head has 2",
        ),
        ({"temperature": float("nan")}, "temperature: nan"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], words: str) -> None:
    head = made(dim=2)
    with pytest.raises(UsageError, match=words) as caught:
        drawn(head, some(1), Keys.of_seeds([0]), **options)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=words):  # before any work
        head.check_options(head.options(**{k: v for k, v in options.items() if k != "temperature"}), float("nan"))

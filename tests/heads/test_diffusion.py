"""The diffusion head: its formulas, its sampler, a density it must learn."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import drawn, many, randomise, replay
from typing_extensions import override

from seriatim.core.errors import UsageError
from seriatim.core.keys import Keys
from seriatim.heads import denoiser, diffusion
from seriatim.heads.ddpm import full_chain, respaced
from seriatim.heads.diffusion import Diffusion, DiffusionOptions, DiffusionPlan, log_variance, normal_kl, predict_x0
from seriatim.testing import check_head


def test_the_contract_and_a_known_density() -> None:
    check_head(Diffusion, width=64, depth=2)


@pytest.fixture
def head() -> Diffusion:
    made = Diffusion(4, 32, 2, z_dim=8)
    randomise(made, scale=0.1)
    return made


def test_at_first_the_head_predicts_no_noise() -> None:
    eps, v = Diffusion(4, 32, 2, z_dim=8)(torch.randn(5, 4), torch.arange(5), torch.randn(5, 8))
    assert not eps.any() and not v.any()


def naive(
    head: Diffusion,
    z: torch.Tensor,
    draws: torch.Tensor,
    steps: int,
    z_null: torch.Tensor,
    w: float,
    temperature: float,
) -> torch.Tensor:
    """Algorithm 2 of Ho et al. 2020, step by step through `head.forward`, guided; draws (T+1, N, D)."""
    chain = respaced(steps)
    x = draws[0]
    for i in range(steps - 1, -1, -1):
        t = torch.full((len(z),), int(chain.timesteps[i]))
        eps, v = head(x, t, z)
        eps_null, _ = head(x, t, z_null)
        eps = eps_null + w * (eps - eps_null)
        where = torch.tensor(i)
        x0 = predict_x0(chain, x, where, eps)
        x = chain.at("posterior_mean_coef1", where) * x0 + chain.at("posterior_mean_coef2", where) * x
        if i:
            x = x + temperature * torch.exp(0.5 * log_variance(chain, where, v)) * draws[steps - i]
    return x


@torch.no_grad()
@pytest.mark.parametrize("cap", [1, 5000, 1 << 24])
def test_the_fast_sampler_is_the_naive_one(head: Diffusion, monkeypatch: pytest.MonkeyPatch, cap: int) -> None:
    """Modulations of many steps at once, in chunks of any size, change nothing."""
    monkeypatch.setattr(denoiser, "MODULATION_CAP", cap)
    z, z_null, draws = torch.randn(6, 8), torch.randn(6, 8), torch.randn(21, 6, 4)
    x = drawn(head, z, replay({"noise/normal": draws.transpose(0, 1)}), z_null, 2.5, 0.9, num_diffusion_steps=20)
    expected = naive(head, z, draws, 20, z_null, 2.5, 0.9)
    assert torch.allclose(x, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_sampler_is_float32_under_autocast(head: Diffusion) -> None:
    z = torch.randn(3, 8)
    plain = drawn(head, z, Keys.of_seeds([1, 2, 3]), num_diffusion_steps=10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(drawn(head, z, Keys.of_seeds([1, 2, 3]), num_diffusion_steps=10), plain)


class Perfect(Diffusion):
    """Knows the data, N(mean, std^2): eps is E[eps | x_t], and v gives the true variance of x_{t-1} given x_t."""

    mean, std = 0.3, 0.5

    @override
    def plan(self, options: DiffusionOptions | None = None, device: torch.device | str = "cpu") -> DiffusionPlan:
        plan = super().plan(options, device)
        self._steps, self._i = plan.chain, len(plan.chain) - 1
        return plan

    @override
    def network(self, x: torch.Tensor, modulations: object) -> torch.Tensor:
        chain, i = self._steps, self._i
        self._i -= 1
        abar = float(chain.alphas_cumprod[i])
        marginal = abar * self.std**2 + 1 - abar
        eps = math.sqrt(1 - abar) * (x - math.sqrt(abar) * self.mean) / marginal
        of_x0 = self.std**2 * (1 - abar) / marginal  # Var[x_0 | x_t]
        low, high = chain.posterior_log_variance_clipped[i], chain.log_betas[i]
        true = math.log(chain.posterior_variance[i] + chain.posterior_mean_coef1[i] ** 2 * of_x0)
        return torch.cat([eps, torch.full_like(x, 2 * (true - low) / (high - low) - 1)], dim=-1)


@pytest.mark.parametrize("steps", [100, 25, 10])
def test_a_perfect_head_draws_the_data(steps: int) -> None:
    """The closed form of a Gaussian: mean and standard deviation within 5 % (DESIGN section 4)."""
    head = Perfect(2, 8, 1, z_dim=3)
    x = drawn(head, torch.zeros(4000, 3), many(0, 4000), num_diffusion_steps=steps)
    assert float(x.mean()) == pytest.approx(0.3, abs=0.03)
    assert float(x.std()) == pytest.approx(0.5, rel=0.05)


def test_an_untrained_head_stays_finite_from_the_stable_start_only() -> None:
    """The published start multiplies by 20291 while eps is 0; ours does not (mar.md section 4, point 9)."""
    head = Diffusion(4, 16, 1, z_dim=3)
    ours = head.sample(torch.zeros(200, 3), many(0, 200))
    published = drawn(head, torch.zeros(200, 3), many(0, 200), start_timestep=999)
    assert float(ours.std()) < 100
    assert float(published.std()) > 5000


@torch.no_grad()
def test_the_loss_by_hand(head: Diffusion) -> None:
    z, x0 = torch.randn(3, 8), torch.randn(3, 4)
    t, eps = torch.randint(1, 1000, (4, 3)), torch.randn(4, 3, 4)
    loss = head.loss(z, x0, replay({"t/integers": t.T, "eps/normal": eps.transpose(0, 1)}))
    chain = full_chain()
    for n in range(3):
        mse = vb = 0.0
        for m in range(4):
            abar = float(chain.alphas_cumprod[t[m, n]])
            x_t = math.sqrt(abar) * x0[n] + math.sqrt(1 - abar) * eps[m, n]
            guess, v = head(x_t[None], t[m, n][None], z[n][None])
            mse += float((guess[0] - eps[m, n]).square().mean())
            where = t[m, n]
            c1, c2 = float(chain.posterior_mean_coef1[where]), float(chain.posterior_mean_coef2[where])
            mean = c1 * x0[n] + c2 * x_t
            mean_p = c1 * predict_x0(chain, x_t, where, guess[0]) + c2 * x_t
            true = torch.distributions.Normal(mean, math.sqrt(chain.posterior_variance[where]))
            model = torch.distributions.Normal(mean_p, torch.exp(0.5 * log_variance(chain, where, v[0])))
            vb += float(torch.distributions.kl_divergence(true, model).mean()) / math.log(2)
        assert float(loss.parts["mse"][n]) == pytest.approx(mse, rel=1e-4)
        assert float(loss.parts["vb"][n]) == pytest.approx(vb, rel=1e-3)
        assert float(loss.sum[n]) == pytest.approx(mse + vb, rel=1e-3)
    assert loss.count.tolist() == [4, 4, 4]


def test_the_variance_term_does_not_train_eps(head: Diffusion) -> None:
    draws = replay({"t/integers": torch.randint(1, 1000, (3, 4)), "eps/normal": torch.randn(3, 4, 4)})
    loss = head.loss(torch.randn(3, 8), torch.randn(3, 4), draws)
    loss.parts["vb"].sum().backward()
    gradient = head.final.linear.weight.grad
    assert gradient is not None and not gradient[:4].any() and gradient[4:].any()


def test_first_step_likelihood_is_a_distribution() -> None:
    """The bins of the t = 0 term: probabilities of all 256 values sum to 1."""
    x = torch.linspace(-1, 1, 256)
    total = diffusion.binned_log_likelihood(x, torch.full_like(x, 0.2), torch.full_like(x, -2.0)).exp().sum()
    assert float(total) == pytest.approx(1.0, abs=1e-4)


@torch.no_grad()
def test_the_term_at_the_first_timestep_by_value(head: Diffusion) -> None:
    """At t = 0 the variational term is the likelihood of a bin of 2/255 under the model's Gaussian, in bits."""
    chain, x0, eps = full_chain(), torch.tensor([[0.3, -0.5, 1.2, -1.5]]), torch.randn(1, 4)
    t = torch.zeros(1, dtype=torch.long)
    z, draws = torch.randn(1, 8), replay({"t/integers": t.repeat(1, 4), "eps/normal": eps.repeat(1, 4, 1)})
    loss = head.loss(z, x0, draws)
    x_t = chain.at("sqrt_alphas_cumprod", t) * x0 + chain.at("sqrt_one_minus_alphas_cumprod", t) * eps
    guess, v = head(x_t, t, z)
    mean = predict_x0(chain, x_t, t, guess)  # at t = 0 the posterior mean is x_0 itself
    model = torch.distributions.Normal(mean, torch.exp(0.5 * log_variance(chain, t, v)))
    upper, lower = model.cdf(x0 + 1 / 255), model.cdf(x0 - 1 / 255)
    inside, low, high = (upper - lower), upper, 1 - lower
    share = torch.where(x0 < -0.999, low, torch.where(x0 > 0.999, high, inside)).clamp(min=1e-12)
    expected = -share.log2().mean() * 4
    assert float(loss.parts["vb"][0]) == pytest.approx(float(expected), rel=0.03), "tanh stands in for the CDF"


def test_normal_kl_of_equals_is_zero() -> None:
    a, b = torch.randn(5), torch.randn(5)
    assert not normal_kl(a, b, a, b).any()


def test_one_time_embedding_for_each_timestep_is_the_same(head: Diffusion) -> None:
    t = torch.randint(0, 1000, (1500,))
    assert torch.allclose(head.embed_times(t), torch.cat([head.embed_times(s) for s in t.split(500)]), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_steps": 5}, "num_steps: the Diffusion head has no such"),
        ({"num_diffusion_steps": 0}, "num_diffusion_steps: 0"),
        ({"timesteps": [5, 2, 900]}, "timesteps: must ascend"),
        ({"timesteps": [0, 1000]}, "timesteps: must ascend"),
        ({"temperature": float("nan")}, "temperature: nan"),
        ({"scale": float("inf"), "z_null": torch.zeros(1, 8)}, "guidance: the scale must be finite"),
    ],
)
def test_bad_options_are_named(head: Diffusion, options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        drawn(head, torch.zeros(1, 8), Keys.of_seeds([0]), **options)  # type: ignore[arg-type]

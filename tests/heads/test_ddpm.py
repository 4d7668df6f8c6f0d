"""The diffusion's tables against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from seriatim.core.errors import UsageError
from seriatim.core.random import Noise
from seriatim.heads import ddpm
from seriatim.heads.diffusion import Diffusion


def test_cosine_chain() -> None:
    chain = ddpm.full_chain()
    assert len(chain) == 1000
    assert (chain.betas == 0.999).sum() == 1 and chain.betas[-1] == 0.999, "only the last is capped"
    assert chain.alphas_cumprod[-1] == pytest.approx(2.429e-9, rel=1e-3)
    assert chain.sqrt_recip_alphas_cumprod[-1] == pytest.approx(20291, rel=1e-4)
    t = 400
    u = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in (0, t + 1)]
    assert chain.alphas_cumprod[t] == pytest.approx(u[1] / u[0])


@pytest.mark.parametrize(("count", "start"), [(100, 999), (50, 999), (10, 980), (7, 500), (2, 999)])
def test_a_restricted_chain_has_the_same_marginals(count: int, start: int) -> None:
    full, few = ddpm.full_chain(), ddpm.respaced(count, start)
    assert few.timesteps[0] == 0 and few.timesteps[-1] == start and len(few) == count
    assert np.allclose(few.alphas_cumprod, full.alphas_cumprod[few.timesteps], rtol=1e-12)
    assert np.all(np.diff(few.timesteps) > 0)


def test_official_timesteps() -> None:
    """mar.md section 3."""
    assert ddpm.spread(100, 999)[:5] == [0, 10, 20, 30, 40] and ddpm.spread(100, 999)[-2:] == [989, 999]
    assert ddpm.spread(50, 999)[:4] == [0, 20, 41, 61]
    assert ddpm.spread(25, 999)[:4] == [0, 42, 83, 125]
    assert ddpm.spread(10, 999)[:2] == [0, 111]


def test_the_posterior_is_that_of_two_gaussians() -> None:
    """q(x_{t-1} | x_t, x_0) by Bayes' rule, for a step of a respaced chain (Ho et al. 2020, eqs. 6 and 7)."""
    chain = ddpm.respaced(20)
    for i in (1, 7, 19):
        before, beta = chain.alphas_cumprod[i - 1], chain.betas[i]
        x0, xt = 0.7, -0.4
        # prior N(sqrt(abar_{t-1}) x0, 1 - abar_{t-1}); likelihood x_t ~ N(sqrt(1 - beta) x_{t-1}, beta)
        precision = 1 / (1 - before) + (1 - beta) / beta
        mean = (math.sqrt(before) * x0 / (1 - before) + math.sqrt(1 - beta) * xt / beta) / precision
        assert chain.posterior_mean_coef1[i] * x0 + chain.posterior_mean_coef2[i] * xt == pytest.approx(mean)
        assert chain.posterior_variance[i] == pytest.approx(1 / precision)
    assert chain.posterior_variance[0] == 0
    assert chain.posterior_log_variance_clipped[0] == chain.posterior_log_variance_clipped[1]


def test_stable_start() -> None:
    assert ddpm.respaced(100).timesteps[-1] == 980 and ddpm.respaced(11).timesteps[-1] == 980
    assert ddpm.respaced(10).timesteps[-1] == 950 and ddpm.respaced(1).timesteps.tolist() == [950]
    chain = ddpm.respaced(100)
    gain = chain.posterior_mean_coef1[-1] * chain.sqrt_recipm1_alphas_cumprod[-1]
    official = ddpm.respaced(100, 999)
    assert official.posterior_mean_coef1[-1] * official.sqrt_recipm1_alphas_cumprod[-1] == pytest.approx(316, abs=1)
    assert gain < 2, "an error of the network at the first step is hardly amplified"


def test_lookup() -> None:
    chain = ddpm.full_chain()
    t = torch.tensor([0, 999, 5])
    out = chain.at("betas", t)
    assert out.shape == (3, 1) and out.dtype == torch.float32
    assert torch.equal(out[:, 0], torch.from_numpy(chain.betas).float()[t])


@pytest.mark.parametrize(("count", "start"), [(0, None), (1001, None), (50, 20), (10, 1000), (10, -1)])
def test_bad_chains_are_refused(count: int, start: int | None) -> None:
    with pytest.raises(UsageError):
        ddpm.respaced(count, start)


@pytest.mark.parametrize("steps", [2, 3, 5, 10, 40])
def test_a_short_chain_is_sampled(steps: int) -> None:
    head = Diffusion(dim=3, width=8, depth=1, train_steps=steps, z_dim=4)
    head.check_options(num_diffusion_steps=steps)
    for count in {1, 2, steps}:
        drawn = head.sample(torch.zeros(5, 4), Noise.per_image(range(5)), num_diffusion_steps=count)
        assert drawn.shape == (5, 3) and bool(drawn.isfinite().all())
    with pytest.raises(UsageError, match=f"num_diffusion_steps: {steps + 1} is not allowed"):
        head.check_options(num_diffusion_steps=steps + 1)

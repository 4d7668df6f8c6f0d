"""The solvers against diffusers' schedulers, closed forms, and a mixture whose eps is known."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import drawn, randomise, replay
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from seriatim.core.errors import UsageError
from seriatim.core.keys import Keys, ReplayKeys
from seriatim.heads.ddpm import Tables, full_chain, ode_spread, respaced, restricted, spread
from seriatim.heads.diffusion import Diffusion
from seriatim.heads.solvers import ODES, SDES, SOLVERS, Predict, from_noise

# --- diffusers ----------------------------------------------------------------------------------------------------


def smooth(x: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """A network: eps and v that depend smoothly on x (N, D) and t, and mix the features."""
    eps = 0.8 * torch.tanh(x + math.sin(t / 200)) + 0.3 * x.roll(1, dims=1)
    return eps, torch.sin(x + t / 300)


def of(chain: Tables) -> Predict:
    return lambda i, x: smooth(x, int(chain.timesteps[i]))


def scheduler(kind: str, timesteps: list[int], **options: Any) -> Any:
    """diffusers' scheduler with our betas, that visits these timesteps (ascending)."""
    import diffusers

    made = getattr(diffusers, kind)(trained_betas=full_chain().betas, **options)
    if kind == "DDIMScheduler":  # takes no timesteps of one's own
        made.set_timesteps(len(timesteps))
    else:
        made.set_timesteps(timesteps=timesteps[::-1])
    assert made.timesteps.tolist() == timesteps[::-1]
    return made


def close(ours: Tensor, theirs: Tensor) -> bool:
    """To 1e-4 of the largest: diffusers multiplies its alphas in float32, we do in float64."""
    return float((ours - theirs).abs().max()) < 1e-4 * float(theirs.abs().max())


@pytest.mark.parametrize("timesteps", [spread(10, 950), spread(25, 980), spread(50, 999)], ids=len)
def test_ddpm_is_diffusers(timesteps: list[int]) -> None:
    theirs = scheduler("DDPMScheduler", timesteps, variance_type="learned_range", clip_sample=False)
    start, chain = torch.randn(32, 4), restricted(full_chain(), timesteps)
    g = torch.Generator().manual_seed(1)
    noise = [torch.randn(32, 4, generator=g) for _ in timesteps]
    x, g = start, torch.Generator().manual_seed(1)  # a draw for each step but the last, which has no noise
    for t in theirs.timesteps:
        x = theirs.step(torch.cat(smooth(x, int(t)), dim=1), t, x, generator=g).prev_sample
    assert close(SOLVERS["ddpm"](chain, of(chain), start, torch.stack(noise), 1.0), x)


@pytest.mark.parametrize(("spacing", "count"), [("leading", 10), ("leading", 50), ("trailing", 25)])
def test_ddim_is_diffusers(spacing: str, count: int) -> None:
    """Equal steps only, those that diffusers can make: 0 to 900 or 980, and 39 to 999."""
    timesteps = list(range(0 if spacing == "leading" else 1000 // count - 1, 1000, 1000 // count))
    theirs = scheduler("DDIMScheduler", timesteps, clip_sample=False, timestep_spacing=spacing)
    start, chain = torch.randn(32, 4), restricted(full_chain(), timesteps)
    x = start
    for t in theirs.timesteps:
        x = theirs.step(smooth(x, int(t))[0], t, x, eta=0.0).prev_sample
    assert close(SOLVERS["ddim"](chain, of(chain), start, start[:0], 1.0), x)


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers makes NumPy arrays of tensors
@pytest.mark.parametrize(("count", "start"), [(1, 950), (2, 950), (10, 950), (15, 980), (25, 980), (25, 999)])
def test_dpm_plus_plus_is_diffusers(count: int, start: int) -> None:
    """From 15 steps up diffusers would keep the second order to the end, but a final sigma of 0 has h = inf."""
    timesteps = ode_spread(count, start, ODES["dpm++"], full_chain())
    theirs = scheduler("DPMSolverMultistepScheduler", timesteps, solver_order=2, final_sigmas_type="zero")
    begin, chain = torch.randn(32, 4), restricted(full_chain(), timesteps)
    x = begin
    for t in theirs.timesteps:
        x = theirs.step(smooth(x, int(t))[0], t, x).prev_sample
    assert close(SOLVERS["dpm++"](chain, of(chain), begin, begin[:0], 1.0), x)


@pytest.mark.filterwarnings("ignore:__array__ implementation")
@pytest.mark.parametrize(("count", "start"), [(1, 950), (2, 950), (10, 950), (15, 965), (25, 999)])
def test_sde_dpm_plus_plus_is_diffusers(count: int, start: int) -> None:
    timesteps = ode_spread(count, start, SDES["sde-dpm++"], full_chain())
    options = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2, "final_sigmas_type": "zero"}
    theirs = scheduler("DPMSolverMultistepScheduler", timesteps, **options)
    begin, noise, chain = torch.randn(32, 4), torch.randn(count, 32, 4), restricted(full_chain(), timesteps)
    x = begin
    for t, of_step in zip(theirs.timesteps, noise, strict=True):
        x = theirs.step(smooth(x, int(t))[0], t, x, variance_noise=of_step).prev_sample
    assert close(SOLVERS["sde-dpm++"](chain, of(chain), begin, noise, 1.0), x)


def test_the_first_order_of_the_sde_is_ddpm() -> None:
    """Two timesteps: the first step has none before it. The variance is the lower bound, v = -1."""
    chain = restricted(full_chain(), [300, 700])
    start, noise = torch.randn(32, 4), torch.randn(2, 32, 4)
    for temperature in (1.0, 0.5, 0.0):
        mine = SOLVERS["sde-dpm++"](chain, of(chain), start, noise, temperature)
        lowest = SOLVERS["ddpm"](
            chain, lambda i, x: (of(chain)(i, x)[0], -torch.ones(32, 4)), start, noise, temperature
        )
        assert torch.allclose(mine, lowest, atol=1e-4, rtol=1e-4)


# --- the truth ----------------------------------------------------------------------------------------------------

RING = 1.2 * torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1], [0.3, 0.3]])  # (K, D)
STD = 0.25


def mixture(chain: Tables) -> Predict:
    """The eps, and the v that gives the true variance of x_{t-1} given x_t, of equal Gaussians N(RING[k], STD^2)."""

    def predict(i: int, x: Tensor) -> tuple[Tensor, Tensor]:
        abar = float(chain.alphas_cumprod[i])
        marginal = abar * STD**2 + 1 - abar
        off = x[:, None] - math.sqrt(abar) * RING  # (N, K, D)
        share = (-0.5 * off.square().sum(dim=-1) / marginal).softmax(dim=1)[..., None]  # (N, K, 1)
        eps_k = math.sqrt(1 - abar) * off / marginal
        eps = (share * eps_k).sum(dim=1)  # (N, D)
        between = (share * (eps_k - eps[:, None]).square()).sum(dim=1)
        of_x0 = STD**2 * (1 - abar) / marginal + between * (1 - abar) / abar  # Var[x_0 | x_t]
        low, high = chain.posterior_log_variance_clipped[i], chain.log_betas[i]
        true = torch.log(chain.posterior_variance[i] + chain.posterior_mean_coef1[i] ** 2 * of_x0 + 1e-20)
        return eps, 2 * (true - low) / (high - low) - 1

    return predict


def truth(count: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    k = torch.randint(len(RING), (count,), generator=g)
    return RING[k] + STD * torch.randn(count, 2, generator=g)


def distance(a: Tensor, b: Tensor) -> float:
    """sqrt(2 int (F - G)^2), its square averaged over directions: 0 for equal distributions of (N, 2)."""
    angle = torch.arange(8) * math.pi / 8
    directions = torch.stack([angle.cos(), angle.sin()])  # (2, P)
    both, order = torch.cat([a @ directions, b @ directions]).double().sort(dim=0)
    gap = torch.where(order < len(a), 1 / len(a), -1 / len(b)).cumsum(dim=0)
    return math.sqrt((2 * gap[:-1].square() * both.diff(dim=0)).sum(dim=0).mean())


def draw(solver: str, steps: int, start: int | None = None, count: int = 6000) -> Tensor:
    chain = respaced(steps, start, ode_share=(ODES | SDES).get(solver))
    draws = torch.randn(steps + 1, count, 2, generator=torch.Generator().manual_seed(1))
    begin = (mixture(chain), draws[0])
    if solver in ODES and start != 999:
        begin = from_noise(chain, *begin)
    return SOLVERS[solver](chain, *begin, draws[1:], 1.0)


FLOOR = 0.025  # 6000 samples of the truth are up to this far from 30,000 others


def test_the_truth_is_at_the_floor() -> None:
    assert all(distance(truth(6000, seed), truth(30_000, 99)) < FLOOR for seed in range(4))


@pytest.mark.parametrize("start", [None, 999])
@pytest.mark.parametrize(
    ("solver", "few", "many"), [("ddpm", 10, 100), ("sde-dpm++", 5, 25), ("ddim", 10, 100), ("dpm++", 5, 15)]
)
def test_each_solver_converges_to_the_truth(solver: str, few: int, many: int, start: int | None) -> None:
    """A perfect eps: even the published start is harmless. dpm++ needs a seventh of the steps."""
    far, near = (distance(draw(solver, steps, start), truth(30_000, 99)) for steps in (few, many))
    assert near < FLOOR < far, (far, near)


@pytest.mark.parametrize("steps", [10, 15, 25, 50])
def test_the_standard_deviation_is_that_of_the_data(steps: int) -> None:
    """Within 5 % from 10 steps up with the stable start (DESIGN section 4); ddim, of first order, from 25."""
    expected = truth(30_000, 99).std(dim=0)
    for solver in SOLVERS:
        ratio = draw(solver, steps).std(dim=0) / expected
        if solver == "ddim" and steps < 25:
            assert bool((ratio > 0.9).all()) and bool((ratio < 0.96).all()), "docs/sampling.md says narrower"
        else:
            assert bool(((ratio - 1).abs() < 0.05).all()), (solver, ratio)


@pytest.mark.parametrize(("solver", "count"), [("ddim", 100), ("dpm++", 10), ("dpm++", 15), ("dpm++", 100)])
def test_an_ode_that_begins_as_pure_noise_keeps_the_mean(solver: str, count: int) -> None:
    """One Gaussian N(m, s^2): a sample is mean + std x its noise. N(0, 1) at the last timestep misses the mean."""
    m, s, noise = 2.0, 0.5, torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    chain, asked = respaced(count, ode_share=ODES[solver]), []

    def predict(i: int, x: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(i)
        abar = float(chain.alphas_cumprod[i])
        eps = math.sqrt(1 - abar) * (x - math.sqrt(abar) * m) / (abar * s**2 + 1 - abar)
        return eps, eps

    def moments(predict: Predict, start: Tensor) -> tuple[float, float]:
        low, high = SOLVERS[solver](chain, predict, start, noise[:0], 1.0).flatten().tolist()
        return low, high - low

    mean, std = moments(*from_noise(chain, predict, noise))
    assert asked == list(range(count))[::-1], "nothing is predicted twice"
    assert mean == pytest.approx(m, abs=0.01) and std == pytest.approx(s, rel=0.02)
    assert moments(predict, noise)[0] < m - 0.045, "about alpha m s is missing"


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("dpm++", 2)])
def test_the_order_of_the_odes(solver: str, order: int) -> None:
    """One Gaussian N(m, s^2): at any t, (x_t - alpha m) / sqrt(alpha^2 s^2 + sigma^2) is what it was at the start."""
    m, s, x = 0.4, 0.5, torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]

    def error(steps: int) -> float:
        chain = restricted(full_chain(), [round(200 + 600 * i / (steps - 1)) for i in range(steps)])
        alpha, sigma = chain.sqrt_alphas_cumprod, chain.sqrt_one_minus_alphas_cumprod

        def scale(i: int) -> float:
            return float(math.sqrt(alpha[i] ** 2 * s**2 + sigma[i] ** 2))

        def predict(i: int, y: Tensor) -> tuple[Tensor, Tensor]:
            eps = sigma[i] * (y - alpha[i] * m) / scale(i) ** 2
            return eps, eps

        exact = alpha[0] * m + scale(0) * (x - alpha[-1] * m) / scale(-1)  # at the lowest timestep, 200
        eps, _ = predict(0, exact)
        exact = (exact - sigma[0] * eps) / alpha[0]  # and the last jump, the same for all
        return float((SOLVERS[solver](chain, predict, x, x[:0], 1.0) - exact).abs().max())

    assert math.log2(error(13) / error(25)) == pytest.approx(order, abs=0.4)


# --- in the head --------------------------------------------------------------------------------------------------


@pytest.fixture
def head() -> Diffusion:
    made = Diffusion(4, 32, 2, z_dim=8)
    randomise(made, scale=0.1)
    return made


@torch.no_grad()
@pytest.mark.parametrize("start", [None, 999])
@pytest.mark.parametrize("solver", SOLVERS)
def test_guidance_is_on_eps_and_leaves_the_variance(head: Diffusion, solver: str, start: int | None) -> None:
    z, z_null, scale = torch.randn(6, 8), torch.randn(6, 8), torch.tensor([1.0, 2, 3, 0, 1.5, 2.5])
    options: dict[str, Any] = {"num_diffusion_steps": 12, "start_timestep": start, "solver": solver}
    chain = head.chain(head.options(**options))
    draws = torch.randn(1 if solver in ODES else 13, 6, 4)  # an ODE's solver draws its start, and nothing else

    def predict(i: int, x: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.full((6,), int(chain.timesteps[i]))
        (eps, v), (eps_null, _) = head(x, t, z), head(x, t, z_null)
        return eps_null + scale[:, None] * (eps - eps_null), v

    keys = replay({"noise/normal": draws.transpose(0, 1)})
    x = drawn(head, z, keys, z_null, scale, **options)
    begin = (predict, draws[0]) if solver not in ODES or start == 999 else from_noise(chain, predict, draws[0])
    expected = SOLVERS[solver](chain, *begin, draws[1:], 1.0)
    assert not keys.unused() and x.dtype == torch.float32
    assert float((x - expected).abs().max()) < 1e-4 * float(expected.abs().max() + 1)


@torch.no_grad()
@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_are_float32_under_autocast(head: Diffusion, solver: str) -> None:
    z = torch.randn(3, 8)
    options: dict[str, Any] = {"num_diffusion_steps": 10, "solver": solver}
    plain = drawn(head, z, Keys.of_seeds([1, 2, 3]), **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(drawn(head, z, Keys.of_seeds([1, 2, 3]), **options), plain)
    assert drawn(head, z[:0], Keys.of_seeds([]), **options).shape == (0, 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"solver": "dpm+"}, "solver: 'dpm+' is not known; did you mean 'dpm++'?"),
        ({"solver": "euler"}, "solver: 'euler' is not known; allowed: ddpm, sde-dpm++, ddim, dpm++"),
        (
            {"solver": "dpm++", "temperature": 0.9},
            "temperature: 0.9 is not allowed; the dpm++ solver solves an ODE and has no temperature; use "
            "solver=ddpm, or set temperature=1",
        ),
        ({"solver": "ddim", "temperature": 1.1}, "temperature: 1.1 is not allowed; the ddim solver"),
        ({"solver": "ddim", "num_diffusion_steps": 0}, "num_diffusion_steps: 0"),
        ({"temperature": -1.0}, "temperature: -1.0 is not allowed"),
    ],
)
def test_what_is_refused_is_refused_before_any_work(head: Diffusion, options: dict[str, Any], words: str) -> None:
    temperature = options.pop("temperature", 1.0)
    with pytest.raises(UsageError) as caught:
        head.check_options(head.options(**options), temperature)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UsageError) as caught:
        drawn(head, torch.zeros(1, 8), ReplayKeys({}, 1), temperature=temperature, **options)
    assert words in str(caught.value)


@torch.no_grad()
def test_a_solver_of_ones_own(head: Diffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOLVERS, "start", lambda _chain, _predict, start, _noise, _temperature: start)
    draws, z = torch.randn(11, 2, 4), torch.zeros(2, 8)
    options: dict[str, Any] = {"num_diffusion_steps": 10, "solver": "start"}
    assert torch.equal(drawn(head, z, replay({"noise/normal": draws.transpose(0, 1)}), **options), draws[0])
    monkeypatch.setitem(ODES, "start", 1.0)  # as an ODE's it draws its start alone, and begins as pure noise
    noise, chain = draws[:1], head.chain(head.options(**options))
    keys = replay({"noise/normal": noise.transpose(0, 1)})
    x = drawn(head, z, keys, **options)
    eps, _ = head(noise[0], torch.full((2,), int(chain.timesteps[-1])), z)
    sigma = float(chain.sqrt_one_minus_alphas_cumprod[-1])
    assert torch.allclose(x, noise[0] - sigma * eps + sigma * noise[0], atol=1e-5)
    for as_it_is in ({"start_timestep": 999}, {"timesteps": chain.timesteps.tolist()}):
        assert torch.equal(drawn(head, z, keys, **options, **as_it_is), noise[0])


@given(count=st.integers(1, 60), start=st.integers(0, 999), share=st.floats(0, 1))
def test_timesteps_of_an_ode_ascend_to_the_start(count: int, start: int, share: float) -> None:
    count = min(count, start + 1)
    steps = ode_spread(count, start, share, full_chain())
    assert len(steps) == count and steps[-1] == start and steps[0] >= 0
    assert all(a < b for a, b in pairwise(steps))


def test_timesteps_of_an_ode_are_equal_in_t_or_in_lambda() -> None:
    chain = full_chain()
    assert ode_spread(10, 950, 0.0, chain) == [50, 150, 250, 350, 450, 550, 650, 750, 850, 950]
    few = restricted(chain, ode_spread(8, 950, 1.0, chain))
    gaps = torch.from_numpy(few.sqrt_alphas_cumprod / few.sqrt_one_minus_alphas_cumprod).log().diff()
    assert torch.allclose(gaps, gaps.mean(), rtol=0.1), gaps

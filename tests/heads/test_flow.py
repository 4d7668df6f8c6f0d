"""The flow head: closed forms of a Gaussian, its sampler, its density."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from helpers import drawn, many, randomise, replay
from pretend_cuda import pretend, pretend_cuda, real
from torch import Tensor
from typing_extensions import override

from seriatim.core.errors import UsageError
from seriatim.core.keys import Keys
from seriatim.heads import denoiser, flow
from seriatim.heads.flow import Flow
from seriatim.models.build import seeded
from seriatim.models.registry import HEADS
from seriatim.nn.prepare import packs, prepare
from seriatim.testing import check_head

MEAN, STD = 0.4, 0.3  # of the Gaussian


def exact(t: float, x: Tensor) -> Tensor:
    """The velocity E[x_1 - eps | x_t] of a Gaussian N(MEAN, STD^2)."""
    variance = (1 - t) ** 2 + t**2 * STD**2
    return MEAN + (t * STD**2 - (1 - t)) / variance * (x - t * MEAN)


class Perfect(Flow):
    """Knows the data: its modulations are the time alone."""

    @override
    def walk(self, times: Tensor, condition: Tensor):
        count = len(times) - 1
        ascending = getattr(self, "ascending", False)
        for i in range(count, -1, -1):
            yield i, [[torch.tensor(i / count if ascending else 1 - i / count)]]

    def network(self, x: Tensor, modulations: object) -> Tensor:
        return exact(float(modulations[0][0]), x)  # type: ignore[index]


@pytest.fixture
def head() -> Flow:
    with seeded(0):
        made = Flow(4, 32, 2, z_dim=8)
    randomise(made, scale=0.1)
    return made


def test_the_contract_and_a_known_density() -> None:
    trained = check_head(Flow, width=48, depth=2)
    assert HEADS["flow"] is type(trained) is Flow


def test_at_first_the_velocity_is_zero() -> None:
    assert not Flow(4, 32, 2, z_dim=8)(torch.randn(5, 4), torch.rand(5), torch.randn(5, 8)).any()


@torch.no_grad()
def test_the_loss_by_hand(head: Flow) -> None:
    head.time_mean, head.time_std = 0.5, 2.0
    z, x = torch.randn(3, 8), torch.randn(3, 4)
    u, eps = torch.randn(4, 3), torch.randn(4, 3, 4)
    loss = head.loss(z, x, replay({"t/normal": u.T, "eps/normal": eps.transpose(0, 1)}))
    for n in range(3):
        total = 0.0
        for m in range(4):
            t = 1 / (1 + math.exp(-(0.5 + 2.0 * float(u[m, n]))))
            x_t = (1 - t) * eps[m, n] + t * x[n]
            v = head(x_t[None], torch.tensor([t]), z[n][None])[0]
            total += float((v - (x[n] - eps[m, n])).square().mean())
        assert float(loss.sum[n]) == pytest.approx(total, rel=1e-4)
    assert loss.count.tolist() == [4, 4, 4] and not loss.parts


def test_times_are_logit_normal() -> None:
    """Esser et al. 2024: the median is sigmoid(mean), a sixth lies beyond sigmoid(mean + std)."""
    seen: list[Tensor] = []

    class Watch(Flow):
        def embed_times(self, t: Tensor) -> Tensor:
            seen.append(t)
            return super().embed_times(t)

    made = Watch(2, 8, 1, time_mean=-0.5, time_std=0.7, z_dim=3)
    made.loss(torch.zeros(5000, 3), torch.zeros(5000, 2), many(0, 5000))
    t = seen[0]
    assert float((t < 1 / (1 + math.exp(0.5))).float().mean()) == pytest.approx(0.5, abs=0.01)
    assert float((t > 1 / (1 + math.exp(-0.2))).float().mean()) == pytest.approx(0.1587, abs=0.01)


# --- sampling -----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("cap", [1, 5000, 1 << 24])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_fast_sampler_is_the_naive_one(head: Flow, monkeypatch: pytest.MonkeyPatch, cap: int, solver: str) -> None:
    """Modulations of many steps at once, in chunks of any size, change nothing."""
    monkeypatch.setattr(denoiser, "MODULATION_CAP", cap)
    z, z_null, start, steps = torch.randn(6, 8), torch.randn(6, 8), torch.randn(6, 4), 9
    w = torch.tensor([0.0, 0.5, 1.0, 2.0, 3.0, 4.0])

    def velocity(t: float, x: Tensor) -> Tensor:
        at = torch.full((6,), t)
        return head(x, at, z_null) + w[:, None] * (head(x, at, z) - head(x, at, z_null))

    x = start
    for i in range(steps):
        v = velocity(i / steps, x)
        if solver == "heun":
            v = (v + velocity((i + 1) / steps, x + v / steps)) / 2
        x = x + v / steps
    fast = drawn(head, z, replay({"noise/normal": start}), z_null, w, num_diffusion_steps=steps, solver=solver)
    assert torch.allclose(fast, x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_the_exact_velocity_transports_a_gaussian(solver: str, order: int) -> None:
    """x_1 = MEAN + STD x_0; halving the step divides the error by 2^order."""
    head = Perfect(1, 8, 1, z_dim=3)
    start = torch.linspace(-3, 3, 9, dtype=torch.float64)[:, None]
    errors = []
    for steps in (40, 80, 160):
        keys = replay({"noise/normal": start})
        x = drawn(head, torch.zeros(9, 3), keys, num_diffusion_steps=steps, solver=solver)
        errors.append(float((x - MEAN - STD * start).abs().max()))
    assert errors[-1] < (0.02 if order == 1 else 2e-4)
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@torch.no_grad()
def test_the_sampler_is_float32_under_autocast(head: Flow) -> None:
    z = torch.randn(3, 8)
    plain = drawn(head, z, Keys.of_seeds([1, 2, 3]), num_diffusion_steps=10)
    density = head.log_prob(z, plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(drawn(head, z, Keys.of_seeds([1, 2, 3]), num_diffusion_steps=10), plain)
        assert torch.equal(head.log_prob(z, plain), density)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_steps": 5}, "num_steps: the Flow head has no such"),
        ({"start_timestep": 999}, "start_timestep: the Flow head has no such"),
        ({"num_diffusion_steps": 0}, "num_diffusion_steps: 0 is not allowed"),
        ({"solver": "huen"}, "solver: 'huen' is not known to the Flow head; did you mean 'heun'"),
        ({"solver": "ddpm"}, "solver: 'ddpm' is not known to the Flow head; allowed: euler, heun"),
        ({"temperature": 0.9}, "temperature: the Flow head can't sample at 0.9"),
        ({"scale": 2.0}, "guidance: a scale other than 1 needs z_null"),
    ],
)
def test_bad_options_are_named(head: Flow, options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        drawn(head, torch.zeros(1, 8), Keys.of_seeds([0]), **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Flow(0), "dim: 0"),
        (lambda: Flow(2, time_std=0.0), "time_std: 0.0 is not allowed"),
        (lambda: Flow(2, time_mean=float("nan")), "time_mean: nan is not allowed"),
    ],
)
def test_bad_settings_are_named(make: Callable[[], Flow], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make()


# --- density ------------------------------------------------------------------------------------------------------


def test_the_density_of_a_gaussian() -> None:
    """Within 1e-4 nats of the truth, out to four standard deviations, and of the fourth order."""
    head = Perfect(3, 8, 1, z_dim=3)
    head.ascending = True  # type: ignore[assignment]
    x = MEAN + STD * torch.linspace(-4, 4, 21)[:, None] * torch.tensor([1.0, -0.5, 0.2])
    truth = torch.distributions.Normal(MEAN, STD).log_prob(x).sum(dim=1)
    errors = [float((head.log_prob(torch.zeros(21, 3), x, steps) - truth).abs().max()) for steps in (4, 8, 32)]
    assert errors[-1] < 1e-4
    assert math.log2(errors[0] / errors[1]) > 3


@torch.no_grad()
def test_the_density_is_normalised_and_that_of_the_samples() -> None:
    """Of a network with random weights: it integrates to 1, and its quantiles are those of what the head draws."""
    with seeded(0):
        made = Flow(1, 16, 2, z_dim=4)
    randomise(made, scale=0.15)
    z = torch.randn(1, 4, generator=torch.Generator().manual_seed(0))
    grid = torch.linspace(-8, 8, 801)[:, None]
    p = made.log_prob(z.expand(801, -1), grid, steps=100).exp().double()
    cdf = torch.cumulative_trapezoid(p, dx=0.02)
    assert float(cdf[-1]) == pytest.approx(1, abs=1e-3)
    x = drawn(made, z.expand(4000, -1), many(0, 4000), num_diffusion_steps=200, solver="heun")
    empirical = torch.arange(1, 4001) / 4000
    index = torch.searchsorted(grid[1:, 0], x[:, 0].sort().values).clamp(max=799)
    assert float((cdf[index] - empirical).abs().max()) < 1.63 / math.sqrt(4000) + 0.01, "Kolmogorov, at 1 %"


def test_the_divergence_is_the_trace(head: Flow) -> None:
    z, x = torch.randn(3, 8), torch.randn(3, 4)
    t = torch.full((3,), 0.3)
    v, divergence = flow.velocity_and_divergence(lambda x: head(x, t, z), x)
    for n in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda row, n=n: head(row[None], t[:1], z[n][None])[0], x[n])
        assert float(divergence[n]) == pytest.approx(float(jacobian.trace()), rel=1e-4, abs=1e-5)
    assert not v.requires_grad and torch.allclose(v, head(x, t, z))


def test_no_density_of_many_features() -> None:
    made = Flow(33, 8, 1, z_dim=3)
    assert not made.has_density and Flow(32, 8, 1).has_density
    with pytest.raises(UsageError, match="log_prob: the Flow head has 33 features"):
        made.log_prob(torch.zeros(1, 3), torch.zeros(1, 33))


@pytest.mark.skipif(not packs(torch.float32), reason="no packed weights in this build")
def test_weights_packed_for_sampling_have_no_density() -> None:
    made = Flow(2, 128, 1, z_dim=3)
    prepare(made)
    with pytest.raises(UsageError, match="packed for sampling"):
        made.log_prob(torch.zeros(1, 3), torch.zeros(1, 2))


@torch.no_grad()
def test_nothing_of_float64_is_sent_to_the_device(head: Flow) -> None:
    """Apple's GPU has no float64; what is drawn there is what is drawn here."""
    z, target = torch.randn(3, 8), torch.randn(3, 4)
    keys = Keys.of_seeds([1, 2, 3])
    plans = [head.options(num_diffusion_steps=steps) for steps in (5, 10)]
    expected = [head.sample(z, keys, head.plan(options)) for options in plans] + [head.log_prob(z, target, steps=4)]
    with pretend_cuda(float64=False):
        pretend(head)
        there_keys = keys.to("cuda")
        found = [head.sample(pretend(z), there_keys, head.plan(options, "cuda")) for options in plans]
        found.append(head.log_prob(pretend(z), pretend(target), steps=4))
        head.loss(pretend(z), pretend(target), there_keys)
    for there, here in zip(found, expected, strict=True):
        assert torch.allclose(real(there), here, atol=1e-5)

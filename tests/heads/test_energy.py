"""The energy head: its loss by hand, closed forms of the energy score, a known density, guidance and temperature."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import drawn, many, randomise, replay
from pretend_cuda import pretend, pretend_cuda, real

from seriatim.core.errors import UsageError
from seriatim.core.keys import Keys
from seriatim.heads.base import Guidance
from seriatim.heads.energy import Energy, distance
from seriatim.models.build import seeded
from seriatim.models.registry import HEADS
from seriatim.nn.prepare import packs, prepare
from seriatim.testing import check_head


@pytest.fixture
def head() -> Energy:
    with seeded(0):
        made = Energy(4, 32, 2, noise=6, z_dim=8)
    randomise(made, scale=0.1)
    return made


def test_the_contract_and_a_known_density() -> None:
    trained = check_head(Energy, width=48, depth=2, noise=32, steps=400)
    assert HEADS["energy"] is type(trained) is Energy


def test_at_first_every_token_is_zero() -> None:
    assert not Energy(4, 32, 2, z_dim=8)(torch.randn(5, 8), torch.rand(5, 64) - 0.5).any()


@torch.no_grad()
def test_the_loss_by_hand(head: Energy) -> None:
    head.alpha, head.tau = 1.5, 0.75
    z, y, uniform = torch.randn(3, 8), torch.randn(3, 4), torch.rand(3, 2, 2, 6)
    loss = head.loss(z, y, replay({"noise/uniform": uniform}))
    for n in range(3):
        attraction, spread = 0.0, 0.0
        for pair in uniform[n]:
            x, other = (head(z[n][None], u[None] - 0.5)[0] for u in pair)
            attraction += float((x - y[n]).norm() ** 1.5 + (other - y[n]).norm() ** 1.5)
            spread += float((x - other).norm() ** 1.5)
        assert float(loss.sum[n]) == pytest.approx(attraction - 0.75 * spread, rel=1e-4)
        assert float(loss.parts["attraction"][n]) == pytest.approx(attraction, rel=1e-4)
        assert float(loss.parts["spread"][n]) == pytest.approx(spread, rel=1e-4)
    assert loss.count.tolist() == [2, 2, 2]


class Perfect(Energy):
    """A head that draws standard normals: noise through the inverse of the normal distribution."""

    def forward(self, z: torch.Tensor, noise: torch.Tensor, temperature: float | torch.Tensor = 1.0) -> torch.Tensor:
        drawn = torch.special.ndtri(noise.double() + 0.5)[:, : self.output].float()
        return drawn * temperature + 0 * z[:, :1]


@pytest.mark.parametrize("dim", [1, 16])
@torch.no_grad()
def test_the_loss_where_model_and_data_are_standard_normal(dim: int) -> None:
    """2 Gamma((D+1)/2) / Gamma(D/2) with alpha = tau = 1; and any other spread of the samples has a larger one."""
    head, N = Perfect(dim, 8, 1, noise=dim, draws=1, z_dim=2), 40_000
    y, keys = Keys.of("data").fold(torch.arange(N)).normal(dim), Keys.of("noise").fold(torch.arange(N))
    loss = head.loss(torch.zeros(N, 2), y, keys).sum
    expected = 2 * math.exp(math.lgamma((dim + 1) / 2) - math.lgamma(dim / 2))
    assert float(loss.mean()) == pytest.approx(expected, abs=4 * float(loss.std()) / math.sqrt(N))
    x, other = torch.special.ndtri(keys.fold("noise").uniform(1, 2, dim).double())[:, 0].float().unbind(1)
    for scale in (0.7, 1.4):
        wrong = (scale * x - y).norm(dim=1) + (scale * other - y).norm(dim=1) - scale * (x - other).norm(dim=1)
        assert float((wrong - loss).mean()) > 4 * float((wrong - loss).std()) / math.sqrt(N)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5])
def test_gradients_of_a_fresh_head_are_finite(alpha: float) -> None:
    """Both samples of a pair are equal at first, where a distance with an exponent below 1 is infinitely steep."""
    head = Energy(4, 16, 1, alpha=alpha, z_dim=8)
    optimiser = torch.optim.SGD(head.parameters(), lr=0.01)
    for _ in range(3):
        optimiser.zero_grad()
        head.loss(torch.ones(5, 8), torch.ones(5, 4), Keys.of_seeds(range(5))).sum.sum().backward()
        assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in head.parameters())
        optimiser.step()
    spread = head.loss(torch.ones(5, 8), torch.ones(5, 4), Keys.of_seeds(range(5))).parts["spread"].detach()
    assert float(spread.sum()) > 0


def test_distances() -> None:
    difference = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    made = distance(difference, 1.5)
    assert made.tolist() == [pytest.approx(5**1.5), 0.0]
    made.sum().backward()
    assert difference.grad is not None
    assert torch.allclose(difference.grad, torch.tensor([[0.9, 1.2], [0.0, 0.0]]) * math.sqrt(5))


@torch.no_grad()
def test_guidance_acts_on_z_and_the_temperature_on_the_shifts_of_blocks(head: Energy) -> None:
    z, z_null, uniform = torch.randn(3, 8), torch.randn(3, 8), torch.rand(3, 6)
    scales = torch.tensor([1.0, 2.5, -1.0])
    guided = head.sample(z, replay({"noise/uniform": uniform}), None, z_null, Guidance.of(scales, 3, "cpu"), 0.7)
    assert torch.allclose(guided, head(z_null + scales[:, None] * (z - z_null), uniform - 0.5, 0.7), atol=1e-5)
    plain = head.sample(z, replay({"noise/uniform": uniform}), temperature=torch.tensor([1.0, 0.7, 0.0]))
    assert torch.allclose(plain[:1], head(z[:1], uniform[:1] - 0.5), atol=1e-6)
    assert torch.allclose(plain[2:], head(z[2:], uniform[2:] - 0.5, 0.0), atol=1e-6)
    for block in head.blocks:  # without shifts of blocks the temperature changes nothing
        block.modulation.weight[:32] = 0
        block.modulation.bias[:32] = 0
    cold, warm = (head.sample(z, replay({"noise/uniform": uniform}), temperature=t) for t in (0.0, 1.0))
    assert torch.equal(cold, warm)


@torch.no_grad()
def test_rows_do_not_depend_on_the_batch_and_packed_weights_draw_the_same(head: Energy) -> None:
    z, keys = torch.randn(40, 8), many(0, 40)
    whole = drawn(head, z, keys)
    alone = drawn(head, z[7:8], keys.select(slice(7, 8)))
    assert torch.allclose(whole[7:8], alone, atol=1e-5)
    prepare(head)
    assert not packs(torch.float32) or torch.allclose(drawn(head, z, keys), whole, atol=1e-4)


@torch.no_grad()
def test_the_sampler_is_float32_under_autocast(head: Energy) -> None:
    z, keys = torch.randn(3, 8), Keys.of_seeds([1, 2, 3])
    plain = drawn(head, z, keys)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(drawn(head, z, keys), plain)
        assert drawn(head, z.bfloat16(), keys).dtype == torch.float32


@torch.no_grad()
def test_nothing_of_float64_is_sent_to_the_device(head: Energy) -> None:
    """Apple's GPU has no float64; what is drawn there is what is drawn here."""
    z, target, keys = torch.randn(3, 8), torch.randn(3, 4), Keys.of_seeds([1, 2, 3])
    expected = drawn(head, z, keys)
    with pretend_cuda(float64=False):
        pretend(head)
        found = head.sample(pretend(z), keys.to("cuda"))
        head.loss(pretend(z), pretend(target), keys.to("cuda"))
    assert torch.allclose(real(found), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"alpha": 0.0}, "alpha: 0.0 is not allowed; it must be above 0 and below 2"),
        ({"alpha": 2.0}, "alpha: 2.0"),
        ({"alpha": math.nan}, "alpha: nan"),
        ({"tau": 1.5}, "tau: 1.5 is not allowed"),
        ({"tau": math.nan}, "tau: nan"),
        ({"noise": 0}, "noise: 0"),
        ({"draws": 0}, "draws: 0"),
        ({"depth": 0}, "depth: 0"),
    ],
)
def test_bad_settings_are_named(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Energy(4, **{"width": 8, "depth": 1, **config})


def test_what_it_does_not_have_is_said(head: Energy) -> None:
    with pytest.raises(UsageError, match="num_diffusion_steps: the Energy head has no options; leave it out"):
        head.options(num_diffusion_steps=20)
    with pytest.raises(UsageError, match="no density"):
        head.log_prob(torch.randn(2, 8), torch.randn(2, 4))
    with pytest.raises(UsageError, match="no density"):
        head.entropy(torch.randn(2, 8), torch.randn(2, 4))
    with pytest.raises(UsageError, match="temperature: -1"):
        head.sample(torch.randn(2, 8), Keys.of_seeds([1, 2]), temperature=-1.0)

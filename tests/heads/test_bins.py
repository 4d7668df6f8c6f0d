"""Bins: a real feature as one of B intervals."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import drawn, many

from seriatim.core.errors import UsageError
from seriatim.core.keys import Keys
from seriatim.heads.bins import Bins, equal_bins
from seriatim.testing import check_head


def test_it_is_a_head() -> None:
    check_head(Bins, learn=False)


def test_bins_are_equally_likely() -> None:
    """64 bins over +-3 standard deviations, which are +-5 of a feature; each stands for its mean."""
    head = Bins(1)
    assert head.edges.shape == (65,) and float(head.edges[0]) == -5 and float(head.edges[-1]) == 5
    edges, means = equal_bins(64, 3.0)
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x[x.abs() < 3]
    index = torch.bucketize(x, torch.tensor(edges[1:-1]))
    counts = torch.bincount(index, minlength=64).double()
    assert float((counts / len(x) * 64 - 1).abs().max()) < 0.1
    measured = torch.zeros(64, dtype=torch.float64).index_add(0, index, x) / counts
    assert float((measured - torch.tensor(means)).abs().max()) < 0.02
    assert torch.equal(head.bin_of(head.means), torch.arange(64))
    assert head.bin_of(torch.tensor([-9.0, 9.0])).tolist() == [0, 63]


@torch.no_grad()
def test_quantising_costs_little_and_the_density_is_one() -> None:
    head = Bins(1, z_dim=4)
    head.final.weight.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(1))
    error = (head.means[head.bin_of(x)] - x).square().mean()
    assert float(error) < 0.005, "of features with unit variance"
    z = torch.randn(1, 4, generator=torch.Generator().manual_seed(2))
    grid = torch.linspace(-6, 6, 24_001)[:, None]
    density = head.log_prob(z.expand(len(grid), -1), grid).exp()
    assert abs(float(density.sum()) * 12 / 24_000 - 1) < 5e-3
    assert float(density[0]) == 0.0
    loss = head.loss(z, torch.tensor([[0.3]]), Keys.of_seeds([0])).sum
    width = head.edges.diff()[head.bin_of(torch.tensor(0.3))]
    assert torch.allclose(loss, -head.log_prob(z, torch.tensor([[0.3]])) - width.log(), atol=1e-5)


@torch.no_grad()
def test_sampling() -> None:
    """Odds are those of the softmax; guidance mixes logits; the coldest is the likeliest."""
    head = Bins(1, bins=4, z_dim=4)
    head.final.weight.copy_(torch.eye(4))
    odds = torch.tensor([0.1, 0.2, 0.3, 0.4])
    z = odds.log().expand(4000, -1)
    bins = head.bin_of(head.sample(z, many(0, 4000)))
    assert torch.allclose(torch.bincount(bins[:, 0], minlength=4) / 4000, odds, atol=0.03)
    assert (head.bin_of(drawn(head, z[:9], many(0, 9), temperature=0.0)) == 3).all()
    assert (head.bin_of(drawn(head, z[:9], many(0, 9), top_k=1)) == 3).all()
    squared = head.bin_of(drawn(head, z, many(0, 4000), torch.zeros_like(z), 2.0))
    share = torch.bincount(squared[:, 0], minlength=4) / 4000
    assert torch.allclose(share, odds.square() / odds.square().sum(), atol=0.03)


def test_what_is_not_allowed() -> None:
    for arguments, message in (
        ({"bins": 1}, "bins: 1 is not allowed; it must be at least 2"),
        ({"clip": math.inf}, "clip: inf is not allowed"),
        ({"sigmas": 0.0}, r"sigmas: 0\.0 is not allowed"),
    ):
        with pytest.raises(UsageError, match=message):
            Bins(1, **arguments)


def test_the_entropy_is_that_of_its_histogram() -> None:
    head = Bins(2, bins=16, z_dim=3)
    torch.nn.init.normal_(head.final.weight, generator=torch.Generator().manual_seed(0))
    z = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    tokens = head.means[:, None].expand(-1, 2)  # each bin once, of both features
    for n in range(5):
        log_p = torch.stack([Bins.log_prob(head, z[n : n + 1], t[None]) for t in tokens])  # the two features together
        mass = head.logits(z[n : n + 1]).softmax(dim=-1)[0]  # (2, B)
        single = (mass.log() - head.edges.diff().log()).T  # (B, 2)
        assert torch.allclose(single.sum(dim=1), log_p[:, 0], atol=1e-4)
        assert torch.allclose(head.entropy(z, tokens)[n], -(mass.T * single).sum(dim=0), atol=1e-4)


@torch.no_grad()
def test_of_logits_that_are_not_finite_comes_nan() -> None:
    head = Bins(2, bins=4, z_dim=3)
    head.final.bias[5] = math.nan  # of the second feature
    x = head.sample(torch.zeros(6, 3), many(0, 6))
    assert bool(x[:, 0].isfinite().all()) and bool(x[:, 1].isnan().all())

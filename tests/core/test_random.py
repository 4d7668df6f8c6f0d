"""Noise: one generator per image, whatever the batch."""

from __future__ import annotations

import pytest
import torch

from seriatim.core.errors import UsageError
from seriatim.core.random import Noise, ReplayNoise, derive_seed


def test_seeds_are_stable_and_apart() -> None:
    assert derive_seed(7, 0) == 926381044385793237, "a change here changes every image that anybody ever drew"
    seeds = {derive_seed(a, b) for a in range(30) for b in range(30)}
    assert len(seeds) == 900
    assert all(0 <= s < 2**63 for s in seeds)


def draws(noise: Noise) -> list[torch.Tensor]:
    return [
        noise.permutation(9),
        noise.normal(4, draws=3).transpose(0, 1),
        noise.uniform(),
        noise.integers(1000, draws=2).transpose(0, 1),
        noise.normal(2, 5),
    ]


def test_an_image_gets_the_same_numbers_alone_and_in_a_batch() -> None:
    together = draws(Noise.per_image([11, 22, 33]))
    for i, seed in enumerate([11, 22, 33]):
        for many, one in zip(together, draws(Noise.per_image([seed])), strict=True):
            assert torch.equal(many[i], one[0])


def test_rows_are_drawn_from_their_owner_in_any_order() -> None:
    images = Noise.per_image([1, 2])
    mixed = images.select(torch.tensor([1, 0, 1, 0, 0])).normal(3)  # (5, 3)
    first = Noise.per_image([1, 2]).select(torch.tensor([0, 0, 0])).normal(3)
    second = Noise.per_image([2]).select(torch.tensor([0, 0])).normal(3)
    assert torch.equal(mixed[[1, 3, 4]], first)
    assert torch.equal(mixed[[0, 2]], second)


def test_selection_goes_on_where_the_generators_were() -> None:
    noise, same = Noise.per_image([5]), Noise.per_image([5])
    first, second = noise.normal(3), noise.select(torch.tensor([0])).normal(3)
    both = [same.normal(3), same.normal(3)]
    assert torch.equal(first, both[0]) and torch.equal(second, both[1]) and not torch.equal(first, second)


def test_no_rows_draw_nothing() -> None:
    noise = Noise.per_image([5])
    assert noise.select(torch.empty(0, dtype=torch.long)).normal(3, draws=4).shape == (4, 0, 3)
    assert torch.equal(noise.normal(3), Noise.per_image([5]).normal(3)), "padding advanced a generator"


def test_kinds_of_numbers() -> None:
    noise = Noise.shared(0, 4000)
    assert noise.normal(5).std() == pytest.approx(1, abs=0.03)
    u = noise.uniform()
    assert 0 <= u.min() and u.max() < 1 and u.mean() == pytest.approx(0.5, abs=0.03)
    i = noise.integers(7)
    assert i.dtype == torch.int64 and set(i.tolist()) == set(range(7))
    p = noise.permutation(6)
    assert torch.equal(p.sort(dim=1).values, torch.arange(6).expand(4000, 6))
    counts = torch.bincount(p[:, 0], minlength=6)
    assert counts.min() > 500, "each number comes first about as often"


def test_torchs_own_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    draws(Noise.per_image([1, 2]))
    assert torch.equal(before, torch.get_rng_state())


def test_owner_must_exist() -> None:
    with pytest.raises(UsageError, match="owner"):
        Noise([torch.Generator()], torch.tensor([0, 1]))


def test_replay_plays_in_order_and_checks_shapes() -> None:
    a, b = torch.randn(3, 2), torch.randn(4, 3, 2)
    noise = ReplayNoise(normal=[a, b], once=[0.25])
    assert torch.equal(noise.select(torch.tensor([0])).normal(2), a)
    assert not noise.exhausted()
    assert torch.equal(noise.normal(2, draws=4), b) and noise.once() == 0.25 and noise.exhausted()
    with pytest.raises(AssertionError, match="no recorded draw"):
        noise.normal(2)
    with pytest.raises(AssertionError, match="shape"):
        ReplayNoise(normal=[a]).normal(3)


@pytest.mark.parametrize("owner", [[-1], [0, -2], [2], [0, 5]])
def test_an_owner_that_is_none(owner: list[int]) -> None:
    with pytest.raises(UsageError, match="owner: names images"):
        Noise([torch.Generator(), torch.Generator()], torch.tensor(owner))

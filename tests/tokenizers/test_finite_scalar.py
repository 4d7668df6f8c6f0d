"""Finite scalar quantisation: codes and codewords, the gradient, and a tokenizer with it."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seriatim.checkpoints.tokenizer import load_tokenizer, save_tokenizer
from seriatim.core.errors import ConfigError, UsageError
from seriatim.core.keys import Keys
from seriatim.models.build import seeded
from seriatim.testing import check_tokenizer
from seriatim.tokenizers.finite_scalar import FiniteScalar
from seriatim.tokenizers.kinds import build_tokenizer, tokenizer_config
from seriatim.tokenizers.vq import FSQ

LEVELS = st.lists(st.integers(2, 9), min_size=1, max_size=4)
TINY: dict[str, Any] = {"kind": "fsq", "size": 8, "latent_channels": 4, "layers_per_block": 1}


@settings(max_examples=30, deadline=None)
@given(LEVELS)
def test_codes_and_codewords_are_one_to_one(levels: list[int]) -> None:
    """Every code's codeword has that code, all are different, and the grid is the product of evenly spaced levels."""
    fsq = FiniteScalar(levels)
    every = torch.arange(math.prod(levels))
    words = fsq.lookup(every)
    assert fsq.vocab == len(every) and fsq.dim == len(levels)
    assert torch.equal(fsq.codes(torch.atanh(words * 0.9999)), every)
    steps = [[2 * q / (n - 1) - 1 for q in range(n)] for n in levels]
    grid = [word[::-1] for word in itertools.product(*steps[::-1])]  # the first feature counts fastest
    assert torch.allclose(words, torch.tensor(grid), atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(LEVELS, st.integers(0, 10**6))
def test_a_vector_gets_the_nearest_level_of_each_feature(levels: list[int], seed: int) -> None:
    fsq, z = FiniteScalar(levels), 2 * torch.randn(50, len(levels), generator=torch.Generator().manual_seed(seed))
    found = fsq(z)
    assert torch.equal(fsq.lookup(found.codes), found.values) and not found.losses
    assert torch.equal(found.codes, fsq.codes(z)) and torch.equal(found.vectors, z.tanh())
    for i, n in enumerate(levels):
        steps = torch.linspace(-1, 1, n)
        nearest = (z[:, i : i + 1].tanh() - steps).abs().min(dim=1).values
        assert torch.allclose((found.values - z.tanh())[:, i].abs(), nearest, atol=1e-6)


def test_the_gradient_is_that_of_tanh() -> None:
    z = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.arange(21.0).view(7, 3)
    (FiniteScalar([4, 5, 2])(z).values * weight).sum().backward()
    assert z.grad is not None
    assert torch.allclose(z.grad, weight * (1 - z.detach().tanh().square()))


def test_rounding_is_the_same_under_autocast() -> None:
    fsq, z = FiniteScalar([8, 8, 8]), torch.randn(500, 3, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fsq.codes(z), fsq.codes(z.clone())) and fsq(z).values.dtype == torch.float32
        inside = fsq.codes(z)
    assert torch.equal(inside, fsq.codes(z))


@pytest.mark.parametrize("levels", [[], [1, 5], [8, 0], [-3], [300] * 4])
def test_levels_that_are_none(levels: list[int]) -> None:
    with pytest.raises(UsageError, match="code_levels: ") as caught:
        FiniteScalar(levels)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"tokenizer\.code_levels: "):
        build_tokenizer({**TINY, "code_levels": levels})


def test_the_tokenizer(tmp_path: Path) -> None:
    with seeded(0):
        tokenizer = build_tokenizer({**TINY, "code_levels": [5, 3, 2], "stride": 2, "width": 24})
    assert isinstance(tokenizer, FSQ) and tokenizer.vocab == 30 and tokenizer.dim == 3 and tokenizer.grid == (4, 4)
    check_tokenizer(tokenizer)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    codes = tokenizer.tokens(tokenizer.moments(images))
    assert torch.equal(tokenizer.look(codes, torch.ones(2, 16, dtype=torch.bool)), tokenizer.decode(codes))
    tokenizer.requires_grad_(True)
    coded = tokenizer.coded(images, Keys.of_seeds([1, 2]))
    assert coded.codes is not None and torch.equal(coded.codes, codes) and not coded.losses
    tokenizer.draw(coded.latents).square().mean().backward()
    assert all(p.grad is not None for p in tokenizer.parameters())
    again = load_tokenizer(save_tokenizer(tokenizer, tmp_path / "fsq"))
    assert tokenizer_config(again) == tokenizer_config(tokenizer) and again.fingerprint() == tokenizer.fingerprint()
    other = build_tokenizer({**TINY, "code_levels": [2, 3, 5], "stride": 2, "width": 24})
    other.load_state_dict(tokenizer.state_dict())
    assert other.moments_fingerprint() != tokenizer.moments_fingerprint(), "other levels give other codes"

"""Pixels: exact both ways, any size, unit variance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from seriatim.core.errors import ConfigError, DataError, UsageError
from seriatim.nn.patch import patchify
from seriatim.tokenizers.base import to_uint8
from seriatim.tokenizers.kinds import build_tokenizer, tokenizer_config
from seriatim.tokenizers.pixels import STD_FLOOR, Pixels


@settings(deadline=None, max_examples=40)
@given(h=st.integers(1, 11), w=st.integers(1, 11), p=st.integers(1, 5), c=st.sampled_from([1, 3]))
def test_images_come_back_whatever_their_size(h: int, w: int, p: int, c: int) -> None:
    if p > min(h, w):
        return
    images = torch.rand(4, c, h, w) * 2 - 1
    tokenizer = Pixels((h, w), p, c)
    tokenizer.fit([images])
    tokens = tokenizer.tokens(tokenizer.moments(images))
    assert tokens.shape == (4, tokenizer.count, tokenizer.dim)
    assert torch.allclose(tokenizer.decode(tokens), images, atol=1e-5)


def test_tokens_have_zero_mean_and_unit_variance() -> None:
    images = torch.randn(200, 3, 8, 8).mul(0.1).add(0.3).clamp(-1, 1)
    tokenizer = Pixels(8, 2, 3)
    tokenizer.fit(images.split(64))
    tokens = tokenizer.tokens(tokenizer.moments(images)).flatten(0, 1)
    assert torch.allclose(tokens.mean(dim=0), torch.zeros(12), atol=1e-4)
    assert torch.allclose(tokens.std(dim=0), torch.ones(12), atol=1e-2)


def test_a_feature_that_never_varies_is_not_blown_up() -> None:
    tokenizer = Pixels(4, 2, 1)
    tokenizer.fit([torch.zeros(10, 1, 4, 4)])
    assert torch.equal(tokenizer.std, torch.full((4,), STD_FLOOR))
    with pytest.raises(DataError, match="no images"):
        tokenizer.fit([])


def test_decode_stays_in_range() -> None:
    assert Pixels(4, 2, 1).decode(torch.randn(3, 4, 4) * 100).abs().max() <= 1


def test_fingerprint_knows_settings_and_statistics() -> None:
    a, b, c = Pixels(4, 2, 1), Pixels(4, 2, 1), Pixels(4, 1, 1)
    assert a.fingerprint() == b.fingerprint() != c.fingerprint()
    b.fit([torch.rand(5, 1, 4, 4)])
    assert a.fingerprint() != b.fingerprint()


def test_config_round_trip() -> None:
    tokenizer = Pixels((5, 7), 3, 1, levels=17)
    config = tokenizer_config(tokenizer)
    assert tokenizer_config(build_tokenizer(config)) == config == {
        "kind": "pixels", "size": [5, 7], "patch": 3, "channels": 1, "levels": 17
    }  # fmt: skip
    with pytest.raises(ConfigError, match="did you mean 'patch'"):
        build_tokenizer({"kind": "pixels", "size": 4, "pach": 2})
    with pytest.raises(ConfigError, match="did you mean 'pixels'"):
        build_tokenizer({"kind": "pixel"})


def test_uint8_rounds() -> None:
    values = torch.tensor([-1.0, 1.0, 0.0, -2.0, 2.0, -1 + 1.4 / 127.5]).view(6, 1, 1, 1)
    assert to_uint8(values).flatten().tolist() == [0, 255, 128, 0, 255, 1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"channels": 4}, "channels: 4"),
        ({"patch": 0}, "patch: 0"),
        ({"patch": 9}, "patch: 9"),
        ({"levels": 1}, "levels: 1"),
    ],
)
def test_bad_settings_are_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Pixels(8, **{"patch": 2, **arguments})


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(DataError, match=r"images: shape \(1, 3, 8, 8\) is not \(B, 1, 8, 8\)"):
        Pixels(8, 2, 1).moments(torch.zeros(1, 3, 8, 8))


def test_whitening_evens_out_the_components_of_a_patch() -> None:
    """Smooth images: wholly whitened, tokens have the unit covariance; half, the roots; and decoding undoes it."""
    seeded = torch.Generator().manual_seed(0)
    smooth = F.interpolate(torch.randn(400, 3, 4, 4, generator=seeded), 16, mode="bilinear").clamp(-1, 1) * 0.9
    images = (smooth + 0.1 * torch.randn(400, 3, 16, 16, generator=seeded)).clamp(-1, 1)
    plain = Pixels(16, 4)
    plain.fit([images])
    spreads = {}
    for whiten in (0.5, 1.0):
        tokenizer = Pixels(16, 4, whiten=whiten)
        tokenizer.fit(images.split(150))
        tokens = tokenizer.tokens(images)
        assert torch.allclose(tokenizer.decode(tokens), images, atol=1e-5)
        covariance = tokens.flatten(0, 1).T.cov(correction=0)
        assert covariance.diagonal().mean() == pytest.approx(1.0, abs=1e-4)
        assert (covariance - covariance.diagonal().diag()).abs().max() < 1e-4, "components don't vary together"
        spreads[whiten] = (covariance.diagonal().max() / covariance.diagonal().min()).item()
        again = Pixels(**tokenizer.config)
        again.load_state_dict(tokenizer.state_dict())
        assert torch.equal(again.tokens(images), tokens)
    of_pixels = torch.linalg.eigvalsh(plain.tokens(images).flatten(0, 1).T.cov())
    assert spreads[1.0] == pytest.approx(1.0, abs=1e-3) and 5 < spreads[0.5] < of_pixels.max() / of_pixels.min()
    with pytest.raises(UsageError, match="whiten: 2 is not allowed"):
        Pixels(16, 4, whiten=2)


def test_a_patch_of_one_colour_is_not_blown_up() -> None:
    tokenizer = Pixels(8, 4, whiten=1.0)
    flat = torch.linspace(-0.5, 0.5, 20).view(20, 1, 1, 1).expand(20, 3, 8, 8)
    tokenizer.fit([flat])
    assert torch.isfinite(tokenizer.tokens(flat)).all() and tokenizer.tokens(flat).abs().max() < 20
    assert torch.allclose(tokenizer.decode(tokenizer.tokens(flat)), flat, atol=1e-5)


def test_components_keep_what_varies_most() -> None:
    """The error of decoding is the variance of the components left out: no other choice of as many loses less."""
    images = torch.rand(200, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.2 - 0.1
    images = images + torch.linspace(-0.6, 0.6, 200).view(-1, 1, 1, 1) + torch.linspace(-0.2, 0.2, 16).view(1, 1, 1, -1)
    patches = patchify(images, 4).flatten(0, 1).double()
    variances = torch.linalg.eigvalsh(patches.T.cov(correction=0)).flip(0)
    for count in (1, 6, 48):
        tokenizer = Pixels(16, 4, components=count, whiten=0.5)
        tokenizer.fit([images])
        tokens = tokenizer.tokens(images)
        assert tokens.shape == (200, 16, count) and tokenizer.dim == count
        error = (tokenizer.decode(tokens) - images).square().mean().item()
        assert error == pytest.approx(variances[count:].sum().item() / 48, rel=1e-3, abs=1e-9)
    with pytest.raises(UsageError, match="components: 49 is not allowed"):
        Pixels(16, 4, components=49)

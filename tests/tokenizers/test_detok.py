"""l-DeTok's tokenizer beside the golden tests: hidden patches, training, statistics, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from seriatim.checkpoints.tokenizer import load_tokenizer, save_tokenizer
from seriatim.core.errors import ConfigError
from seriatim.core.keys import Keys
from seriatim.models.build import seeded
from seriatim.testing import check_tokenizer
from seriatim.tokenizers.detok import Detok
from seriatim.tokenizers.kinds import build_tokenizer, tokenizer_config

TINY: dict[str, Any] = {"stride": 4, "latent_channels": 3, "width": [16, 24], "depth": [1, 2], "heads": [2, 3]}


def tiny(size: Any = 8, **more: Any) -> Detok:
    with seeded(0):
        made = Detok(size, **{**TINY, **more})
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def images_of(count: int, size: tuple[int, int] = (8, 8), channels: int = 3) -> Tensor:
    return torch.rand(count, channels, *size, generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.mark.parametrize("more", [{}, {"channels": 1}, {"size": (8, 16)}, {"patch": 2, "size": (16, 8)}])
def test_the_contract(more: dict[str, Any]) -> None:
    tokenizer = tiny(**more)
    tokenizer.fit([images_of(4, tokenizer.size, tokenizer.channels)])
    check_tokenizer(tokenizer)


def test_hidden_patches_are_not_looked_at() -> None:
    """Other pixels there change nothing, those of a patch that is seen change all latents."""
    tokenizer, images, keys = tiny((8, 12)), images_of(2, (8, 12)), Keys.of_seeds([1, 2])
    kept = torch.tensor([[1, 1, 0, 1, 0, 1], [0, 1, 1, 1, 1, 0]], dtype=torch.bool)
    before = tokenizer.coded(images, keys, kept)
    other = images.clone()
    other[0, :, :4, 8:] = 0.3  # patch 2 of the first image
    other[1, :, 4:, 8:] = -0.9  # patch 5 of the second
    after = tokenizer.coded(other, keys, kept)
    assert torch.equal(before.latents, after.latents) and torch.equal(before.losses["kl"], after.losses["kl"])
    flat = before.latents.flatten(2)
    assert torch.equal((flat != 0).all(dim=1), kept), "hidden latents are zero"
    other[0, :, :4, :4] += 0.1
    changed = (tokenizer.coded(other, keys, kept).latents != before.latents).flatten(2).any(dim=1)
    assert torch.equal(changed[0], kept[0]) and not changed[1].any()
    shifted = before.latents + (~kept).view(2, 1, 2, 3)
    assert torch.equal(tokenizer.draw(before.latents, kept), tokenizer.draw(shifted, kept)), "nor drawn from"


def test_all_kept_is_the_same_as_no_mask_and_draws_do_not_depend_on_it() -> None:
    tokenizer, images, keys = tiny(), images_of(3), Keys.of_seeds([4, 5, 6])
    everything = torch.ones(3, 4, dtype=torch.bool)
    masked, whole = tokenizer.coded(images, keys, everything), tokenizer.coded(images, keys)
    assert torch.allclose(masked.latents, whole.latents, atol=1e-6)
    assert torch.allclose(masked.losses["kl"], whole.losses["kl"])
    alone = tokenizer.coded(images[1:2], keys.select(slice(1, 2)))
    assert torch.allclose(alone.latents[0], whole.latents[1], atol=1e-6), "an image's draw is its own"
    mean, std = tokenizer.posterior(tokenizer.moments(images))
    many = torch.stack([tokenizer.coded(images[:1], Keys.of(i)).latents[0] for i in range(400)])
    assert torch.allclose(many.mean(dim=0), mean[0], atol=5 * float(std[0].max()) / 400**0.5)
    assert torch.allclose(many.std(dim=0), std[0], rtol=0.25)


def test_it_learns_an_image() -> None:
    """With hidden patches and noise too, far better than the mean pixel; and every parameter takes part."""
    tokenizer, images = tiny(), images_of(4)
    tokenizer.requires_grad_(True)
    optimiser = torch.optim.Adam(tokenizer.parameters(), lr=1e-2)
    errors = []
    for step in range(100):
        keys = Keys.of(step).fold(torch.arange(4))
        kept = keys.fold("mask").permutation(4) < 3
        coded = tokenizer.coded(images, keys, kept)
        t = keys.fold("level").uniform().view(-1, 1, 1, 1) * 0.3
        noisy = (1 - t) * coded.latents + t * keys.fold("noise").normal(3, 2, 2)
        error = (tokenizer.draw(noisy, kept) - images).square().mean()
        optimiser.zero_grad()
        (error + 1e-4 * coded.losses["kl"]).backward()
        assert all(p.grad is not None for p in tokenizer.parameters())
        optimiser.step()
        errors.append(float(error.detach()))
    assert sum(errors[-5:]) / 5 < 0.65 * float(images.var())


def test_statistics_are_those_of_means_and_are_measured_once() -> None:
    tokenizer, images = tiny(), images_of(16)
    means = tokenizer.posterior(tokenizer.moments(images))[0]
    tokenizer.fit([images[:10], images[10:]])
    assert torch.allclose(tokenizer.mean, means.mean(dim=(0, 2, 3)), atol=1e-6)
    assert torch.allclose(tokenizer.std, means.std(dim=(0, 2, 3), unbiased=False), atol=1e-6)
    assert tokenizer.tokens(tokenizer.moments(images)).std() == pytest.approx(1, abs=0.02)
    before = tokenizer.mean.clone()
    tokenizer.fit([-images])
    assert torch.equal(tokenizer.mean, before)


def test_given_statistics_are_kept_and_saved(tmp_path: Path) -> None:
    tokenizer = tiny(statistics="fixed", mean=[1, 2, 3], std=[0.5, 1, 2])
    tokenizer.fit([images_of(4)])
    assert tokenizer.mean.tolist() == [1, 2, 3] and tokenizer.std.tolist() == [0.5, 1, 2]
    again = load_tokenizer(save_tokenizer(tokenizer, tmp_path / "detok"))
    assert tokenizer_config(again) == tokenizer_config(tokenizer) and again.fingerprint() == tokenizer.fingerprint()
    assert torch.equal(again.moments(images_of(2)), tokenizer.moments(images_of(2)))
    with pytest.raises(ConfigError, match=r"tokenizer\.size: does not go with the weights"):
        load_tokenizer(tmp_path / "detok", size=16)


def test_a_cache_outlives_another_decoder_and_other_statistics() -> None:
    one, other = tiny(), tiny(statistics="fixed", mean=[1, 2, 3], std=[1, 2, 3], depth=[1, 3])
    other.autoencoder.encoder.load_state_dict(one.autoencoder.encoder.state_dict())
    assert one.moments_fingerprint() == other.moments_fingerprint() and one.fingerprint() != other.fingerprint()
    other.get_parameter("autoencoder.encoder.patch_embed.bias").data += 1
    assert one.moments_fingerprint() != other.moments_fingerprint()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"size": 10}, "size: 10x10 is not allowed; both sides must be multiples of 4, the stride"),
        ({"size": 12, "patch": 2}, "size: 12x12 is not allowed; both sides must be multiples of 8"),
        ({"stride": 0}, "stride: 0 is not allowed"),
        ({"latent_channels": 0}, "latent_channels: 0 is not allowed"),
        ({"channels": 4}, "channels: 4 is not allowed"),
        ({"width": [16, 24, 8]}, "width: [16, 24, 8] is not allowed; give one number, or [encoder, decoder]"),
        ({"depth": [1, 0]}, "depth: 0 is not allowed"),
        ({"heads": 0}, "heads: 0 is not allowed"),
        ({"heads": 5}, "heads: 5 is not allowed with width 16; the features of a head"),
        ({"heads": [4, 3]}, "heads: 4 is not allowed with width 16"),
        ({"width": 36, "heads": 2}, "heads: 2 is not allowed with width 36"),
        ({"mean": [0, 1]}, "mean: 2 numbers are not allowed; give 3, one for each channel of a latent"),
        ({"mean": [0.0] * 6}, "of which the first half counts"),
        ({"std": [1, 0, 1]}, "std: [1.0, 0.0, 1.0] is not allowed; all must be finite and positive"),
        ({"mean": [0, 1, float("nan")]}, "mean: [0.0, 1.0, nan] is not allowed; all must be finite"),
        ({"std": ["a"]}, "tokenizer.std: "),
    ],
)
def test_settings_are_checked(more: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_tokenizer({"kind": "detok", "size": 8, **TINY, **more})
    assert words in str(caught.value) and "\n" not in str(caught.value)

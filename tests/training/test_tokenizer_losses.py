"""The terms of a tokenizer's loss: closed forms and properties."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from seriatim.core.keys import Keys
from seriatim.evaluation.base import FeatureExtractor, Features
from seriatim.training.discriminator import PatchDiscriminator
from seriatim.training.perceptual import PerceptualDistance, layer_distance
from seriatim.training.tokenizer_losses import (
    Transform,
    adaptive_weight,
    drawn_transform,
    hinge_of_discriminator,
    hinge_of_generator,
    kept_patches,
    psnr_of,
    reconstruction_error,
    transformed,
    with_interpolated_noise,
    with_latent_noise,
)

MANY = Keys.of(3).fold(torch.arange(4000))


def test_errors_and_psnr_of_a_constant_difference() -> None:
    images = torch.rand(5, 3, 4, 4) - 0.5
    decoded = images + torch.tensor([0.1, -0.1, 0.2, 0.4, 0.0]).view(-1, 1, 1, 1)
    sizes = torch.tensor([0.1, 0.1, 0.2, 0.4, 0.0])
    assert torch.allclose(reconstruction_error(decoded, images, "l1"), sizes, atol=1e-6)
    assert torch.allclose(reconstruction_error(decoded, images, "l2"), sizes**2, atol=1e-6)
    assert torch.allclose(psnr_of(decoded, images)[:4], 20 * torch.log10(2 / sizes[:4]), atol=1e-3)
    assert psnr_of(decoded, images)[4] == pytest.approx(100)


# --- latents ----------------------------------------------------------------------------------------------------------


def test_latent_noise_has_the_size_that_it_says_relative_to_the_latents() -> None:
    """E[(t s eps)^2] = s^2 most^2 / 3 for t uniform from 0 to `most`; ten times the latents have ten times the noise.

    Here s is the spread of an image's latents.
    """
    latents = torch.randn(4000, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    noise = with_latent_noise(latents, 0.6, MANY) - latents
    spread = latents.flatten(1).std(dim=1, unbiased=False)
    found = (noise.flatten(1).square().mean(dim=1) / spread**2).mean()
    assert found == pytest.approx(0.36 / 3, rel=0.05)
    assert torch.allclose(with_latent_noise(10 * latents, 0.6, MANY), 10 * (latents + noise), atol=1e-3)


def test_the_encoder_cannot_escape_latent_noise_by_its_scale() -> None:
    latents = torch.randn(3, 2, 4, 4, requires_grad=True)
    with_latent_noise(latents, 2.0, Keys.of(0).fold(torch.arange(3))).sum().backward()
    assert latents.grad is not None and torch.allclose(latents.grad, torch.ones_like(latents)), "the noise has none"


def test_interpolated_noise_is_between_the_latents_and_noise_of_size_gamma() -> None:
    latents = torch.full((4000, 1, 4, 4), 5.0)
    noisy = with_interpolated_noise(latents, 3.0, MANY)
    level = MANY.fold("level").uniform()
    assert torch.allclose(noisy.mean(dim=(1, 2, 3)), 5 * (1 - level), atol=4.0)
    assert (noisy - 5 * (1 - level).view(-1, 1, 1, 1)).div(
        level.clamp(min=1e-3).view(-1, 1, 1, 1)
    ).std() == pytest.approx(3, rel=0.02)


def test_kept_patches_are_as_many_as_the_share_of_the_step_says_and_differ_between_images() -> None:
    images, shares = Keys.of(1).fold(torch.arange(8)), []
    for number in range(300):
        kept = kept_patches(16, 0.7, images, Keys.of(2).fold(number))
        if kept is None:
            shares.append(0.0)
            continue
        counts = kept.sum(dim=1)
        assert kept.shape == (8, 16) and len(counts.unique()) == 1, "each image keeps equally many"
        assert 16 * 0.3 - 1e-6 <= int(counts[0]) <= 16
        shares.append(1 - int(counts[0]) / 16)
    assert shares.count(0.0) / 300 == pytest.approx(1 / 8 + 0.04, abs=0.07), "in an eighth nothing is masked"
    assert max(shares) > 0.6
    kept = next(k for k in (kept_patches(16, 0.7, images, Keys.of(2).fold(n)) for n in range(9, 99)) if k is not None)
    assert len({tuple(row) for row in kept.tolist()}) > 1


def test_transforms_have_the_share_the_turns_and_the_scales_of_the_paper() -> None:
    found = [drawn_transform(0.5, (8, 8), Keys.of(0).fold(n), scales=True) for n in range(400)]
    some = [each for each in found if each is not None]
    assert len(some) / 400 == pytest.approx(0.5, abs=0.08)
    assert {each.turns for each in some} == {0, 1, 2, 3}
    assert {each.sides[0] for each in some} == set(range(2, 9)) and all(each.sides[0] == each.sides[1] for each in some)
    oblong = [drawn_transform(1.0, (4, 8), Keys.of(0).fold(n), scales=False) for n in range(50)]
    assert {(each.sides, each.turns) for each in oblong if each} == {((4, 8), 2)}, "without scales something turns"
    square = [drawn_transform(1.0, (4, 4), Keys.of(0).fold(n), scales=False) for n in range(50)]
    assert {(each.sides, each.turns) for each in square if each} == {((4, 4), n) for n in (1, 2, 3)}
    assert drawn_transform(0.0, (8, 8), Keys.of(0), scales=True) is None


def test_a_turn_is_exact_and_a_scale_keeps_what_is_constant() -> None:
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(transformed(x, Transform((4, 4), 1)), x.rot90(1, dims=(2, 3)))
    assert torch.equal(transformed(transformed(x, Transform((4, 4), 3)), Transform((4, 4), 1)), x)
    flat = transformed(torch.full((1, 1, 16, 16), 0.25), Transform((3, 3), 2), stride=2)
    assert flat.shape == (1, 1, 6, 6) and torch.allclose(flat, torch.tensor(0.25), atol=1e-6)


def test_the_equivariance_loss_is_zero_for_an_equivariant_autoencoder() -> None:
    """An identity with stride 1 commutes with turns; one that adds a picture of its own does not."""
    x = torch.rand(2, 3, 4, 4)
    turn = Transform((4, 4), 1)
    assert reconstruction_error(transformed(x, turn), transformed(x, turn, 1), "l2").max() == 0
    own = torch.arange(16.0).view(1, 1, 4, 4)
    assert reconstruction_error(transformed(x + own, turn) - own, transformed(x, turn, 1), "l2").min() > 1


# --- the adversarial term ---------------------------------------------------------------------------------------------


def test_hinge_losses_of_known_logits() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]).view(3, 1, 1, 1), torch.tensor([-3.0, 0.0, 1.0]).view(3, 1, 1, 1)
    assert hinge_of_discriminator(real, fake).tolist() == [0.0, (0.5 + 1.0) / 2, (2.0 + 2.0) / 2]
    assert hinge_of_generator(fake).tolist() == [3.0, 0.0, -1.0]


def test_the_adaptive_weight_makes_both_gradients_equally_long() -> None:
    a, b = torch.randn(3, 3), 50 * torch.randn(3, 3)
    weight = adaptive_weight(a, b)
    assert (weight * b).norm() == pytest.approx(float(a.norm()), rel=1e-3)
    assert adaptive_weight(a, torch.zeros(2)) == pytest.approx(min(1e4, float(a.norm()) / 1e-4), rel=1e-3)
    assert adaptive_weight(1e9 * a, torch.zeros(2)) == 1e4


def test_the_discriminator_judges_each_image_alone_and_learns_to_tell_two_kinds_apart() -> None:
    torch.manual_seed(0)
    net = PatchDiscriminator(width=16, layers=2)
    x = torch.rand(4, 3, 16, 16)
    assert torch.allclose(net(x)[1:2], net(x[1:2]), atol=1e-5)
    optimiser = torch.optim.Adam(net.parameters(), 1e-3, betas=(0.5, 0.9))
    for _ in range(60):
        real = torch.rand(8, 3, 1, 1).expand(8, 3, 16, 16)
        fake = real + 0.3 * torch.randn(8, 3, 16, 16)
        loss = hinge_of_discriminator(net(real), net(fake)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.5


# --- the perceptual term ----------------------------------------------------------------------------------------------


class Edges(FeatureExtractor):
    """Two layers: horizontal differences and their squares."""

    name, dim = "edges", 3

    def __init__(self) -> None:
        super().__init__()
        self.config = {}
        self.first = torch.nn.Conv2d(3, 4, 3)
        self.second = torch.nn.Conv2d(4, 5, 3)

    def forward(self, images: Tensor) -> Features:
        return Features(self.second(self.first(images).relu()).mean(dim=(2, 3)))


def test_the_distance_of_a_layer_is_that_of_directions() -> None:
    y = torch.tensor([[3.0, 4.0], [1.0, 0.0], [1.0, 0.0]])[:, :, None, None]
    other = torch.tensor([[6.0, 8.0], [0.0, 2.0], [-1.0, 0.0]])[:, :, None, None]
    assert torch.allclose(layer_distance(y, other), torch.tensor([0.0, 2.0, 4.0]), atol=1e-6)
    assert torch.allclose(layer_distance(y, other, torch.tensor([0.5, 0.0])), torch.tensor([0.0, 0.5, 2.0]), atol=1e-6)
    assert torch.allclose(layer_distance(y[..., 0, 0], other[..., 0, 0]), torch.tensor([0.0, 2.0, 4.0]), atol=1e-6)


def test_a_perceptual_distance_is_the_sum_over_its_layers_and_reaches_the_reconstruction_alone() -> None:
    torch.manual_seed(0)
    extractor = Edges()
    both = PerceptualDistance(extractor, ["first", "second"])
    x = torch.rand(2, 3, 8, 8)
    y = (x + 0.1 * torch.randn_like(x)).requires_grad_(True)
    assert both(x, x).abs().max() < 1e-9
    each = [PerceptualDistance(extractor, [name])(y, x) for name in ("first", "second")]
    assert torch.allclose(both(y, x), each[0] + each[1])
    assert torch.allclose(PerceptualDistance(extractor)(y, x), layer_distance(extractor(y)[0], extractor(x)[0]))
    both(y, x).sum().backward()
    assert y.grad is not None and y.grad.abs().max() > 0 and all(p.grad is None for p in extractor.parameters())
    assert math.isfinite(float(both(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))))
    assert not extractor.first._forward_hooks

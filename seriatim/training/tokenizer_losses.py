"""The terms of a tokenizer's loss, and what happens to its latents before they are decoded, as pure functions.

Shapes: B images, c channels, H x W pixels in [-1, 1], z channels of a latent, h x w latents of an image, s the stride.
Every random number of an image depends on its key alone.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from seriatim.core.keys import Keys
from seriatim.nn.linear import at_least_float32

GAN_FLOOR = 1e-4  # added to the norm of the adversarial gradient before it divides
MOST_GAN = 1e4  # the largest adaptive factor
LEAST_SCALE = 0.25  # of the sides of latents in the equivariance term


def reconstruction_error(decoded: Tensor, images: Tensor, kind: Literal["l1", "l2"]) -> Tensor:
    """The mean absolute error (l1) or squared error (l2) of each image: (B,)."""
    difference = at_least_float32(decoded) - at_least_float32(images)
    return (difference.abs() if kind == "l1" else difference.square()).flatten(1).mean(dim=1)


def psnr_of(decoded: Tensor, images: Tensor) -> Tensor:
    """The peak signal-to-noise ratio of each image in dB: (B,), 10 log10(2^2 / MSE), at most 100."""
    error = (decoded.detach().clamp(-1, 1) - images).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(4 / error.clamp(min=4e-10))


# --- latents ------------------------------------------------------------------------------------------------------


def with_latent_noise(latents: Tensor, most: float, keys: Keys) -> Tensor:
    """Latents (B, z, h, w) plus noise, so that the decoder learns to bear what a generator gets wrong.

    z' = z + t eps, t ~ U(0, most) std(z), eps ~ N(0, 1): the noise-augmented decoding of RAE (Zheng et al. 2025, arXiv
    2510.11690), there with a normal t. The spread std(z) of an image's latents has no gradient, so that the encoder
    can't escape the noise by making its latents larger.
    """
    keys = keys.to(latents.device)
    spread = at_least_float32(latents.detach()).flatten(1).std(dim=1, unbiased=False)
    level = most * keys.fold("level").uniform() * spread  # (B,)
    return latents + level.view(-1, 1, 1, 1) * keys.fold("noise").normal(*latents.shape[1:])


def with_interpolated_noise(latents: Tensor, gamma: float, keys: Keys) -> Tensor:
    """Latents (B, z, h, w) interpolated with noise: z' = (1 - t) z + t gamma eps, t ~ U(0, 1) for each image.

    l-DeTok, Yang et al. 2025, arXiv 2507.15856, section 3.
    """
    keys = keys.to(latents.device)
    level = keys.fold("level").uniform().view(-1, 1, 1, 1)
    return (1 - level) * latents + level * gamma * keys.fold("noise").normal(*latents.shape[1:])


def kept_patches(count: int, most: float, keys: Keys, step: Keys) -> Tensor | None:
    """A mask (B, count) of the patches that the encoder sees; None if it sees all of them.

    l-DeTok, Yang et al. 2025, arXiv 2507.15856, section 3: the masked share of a step is max(0, U(-0.1, most)), and
    each image keeps its own random ceil(count (1 - share)) patches.
    """
    share = float(step.host.fold("mask").uniform()) * (most + 0.1) - 0.1
    if share <= 0:
        return None
    number = -int(-count * (1 - share) // 1)  # rounded up, so at least 1
    return keys.to("cpu").fold("mask").permutation(count) < number


class Transform(NamedTuple):
    """A change of position that latents and images share: a scale of the sides, then quarter turns."""

    sides: tuple[int, int]  # (h', w'), the sides of the scaled latents
    turns: int  # quarter turns against the clock


def drawn_transform(share: float, sides: tuple[int, int], step: Keys, *, scales: bool) -> Transform | None:
    """The transform tau of this step, or None in the other 1 - `share` of the steps.

    EQ-VAE, Kouzelis et al. 2025, arXiv 2502.09509, section 3: rotations by multiples of a quarter turn, and scales from
    0.25 to 1. Without `scales` the scale is 1, and some turn is made. Latents that are not square turn by half a turn.
    """
    first, second, third = (float(step.host.fold(name).uniform()) for name in ("whether", "turn", "scale"))
    if first >= share:
        return None
    square = sides[0] == sides[1]
    choices = [0, 1, 2, 3] if square else [0, 2]
    choices = choices if scales else choices[1:]
    turns = choices[int(second * len(choices))]
    scale = LEAST_SCALE + (1 - LEAST_SCALE) * third if scales else 1.0
    return Transform((max(1, round(sides[0] * scale)), max(1, round(sides[1] * scale))), turns)


def transformed(x: Tensor, transform: Transform, stride: int = 1) -> Tensor:
    """Latents (B, z, h, w), or with their `stride` images (B, c, H, W), scaled and turned."""
    sides = (transform.sides[0] * stride, transform.sides[1] * stride)
    if x.shape[-2:] != sides:
        x = F.interpolate(x, sides, mode="bicubic", antialias=True)
    return x.rot90(transform.turns, dims=(-2, -1))


# --- the adversarial term -----------------------------------------------------------------------------------------


def hinge_of_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """What the discriminator minimises, of its logits (B, 1, m, n) for images and reconstructions: (B,).

    (max(0, 1 - D(x)) + max(0, 1 + D(x^))) / 2: Lim and Ye 2017, arXiv 1705.02894, with VQGAN's factor of one half
    (Esser et al. 2021, arXiv 2012.09841).
    """
    losses = (F.relu(1 - at_least_float32(real)) + F.relu(1 + at_least_float32(fake))) / 2
    return losses.flatten(1).mean(dim=1)


def hinge_of_generator(fake: Tensor) -> Tensor:
    """What the autoencoder minimises, of the discriminator's logits (B, 1, m, n) for reconstructions: -D(x^), (B,)."""
    return -at_least_float32(fake).flatten(1).mean(dim=1)


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor) -> Tensor:
    """The factor of the adversarial term, from the gradients of both terms with respect to the last layer: ().

    lambda = |grad L_rec| / (|grad L_GAN| + delta), between 0 and 10^4 (VQGAN, Esser et al. 2021, arXiv 2012.09841, eq.
    7), so that both pull the last layer equally hard.
    """
    return (reconstruction.norm() / (adversarial.norm() + GAN_FLOOR)).clamp(0, MOST_GAN).detach()

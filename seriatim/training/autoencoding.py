"""A tokenizer in training: the loss of a batch of images, with the discriminator that the adversarial term needs.

Shapes: B images, c channels, H x W pixels in [-1, 1], z channels of a latent, h x w latents of an image, V codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from seriatim.core.keys import Keys
from seriatim.models.base import Loss
from seriatim.tokenizers.base import Tokenizer
from seriatim.tokenizers.code_watch import CodeWatch
from seriatim.tokenizers.trainable import Coded, Trainable
from seriatim.training.config import Objective
from seriatim.training.discriminator import PatchDiscriminator
from seriatim.training.perceptual import PerceptualDistance
from seriatim.training.tokenizer_losses import (
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


class Autoencoding(nn.Module):
    """A tokenizer, its opponent if there is one, and the objective. Calling it gives the loss, as DDP needs.

    The watch counts codes, if tokens are codes. Checkpoints hold it, so that a resumed run logs and revives the same.
    """

    def __init__(self, tokenizer: Tokenizer, objective: Objective) -> None:
        super().__init__()
        self.tokenizer, self.objective = tokenizer, objective
        self.discriminator: PatchDiscriminator | None = None
        if objective.gan:
            self.discriminator = PatchDiscriminator(objective.gan_width, objective.gan_layers)
        self.watch: CodeWatch | None = None
        if tokenizer.vocab is not None:
            quantiser = cast(Any, tokenizer).quantiser
            quantiser.entropy = objective.entropy > 0  # otherwise it isn't computed, as it is expensive
            revive = objective.revive_images > 0
            self.watch = CodeWatch(quantiser, tokenizer.count, objective.revive_images, revive=revive)
        self.coded: Coded | None = None  # of the last call

    def forward(
        self,
        images: Tensor,
        keys: Keys,
        step: Keys,
        *,
        perceptual: PerceptualDistance | None = None,
        adversarial: bool = False,
        total: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> Loss:
        """The loss of images (B, c, H, W) as a sum over B, with one of the `keys` (B,) each and the key of the step.

        `adversarial` tells whether the discriminator takes part. Its own loss is then added: each of both has gradients
        only for its own side. `total` sums gradients over all processes, so that they use the same adaptive factor.
        """
        objective, tokenizer = self.objective, cast(Trainable, self.tokenizer)
        kept = kept_patches(self.tokenizer.count, objective.mask, keys, step) if objective.mask else None
        coded = self.coded = tokenizer.coded(images, keys.fold("posterior"), kept)
        latents, target = coded.latents, images
        if objective.latent_noise:
            latents = with_latent_noise(latents, objective.latent_noise, keys)
        if objective.interpolated_noise:
            latents = with_interpolated_noise(latents, objective.interpolated_noise, keys)
        sides = (latents.shape[-2], latents.shape[-1])
        transform = drawn_transform(objective.equivariance, sides, step, scales=not tokenizer.masks)
        if transform is not None:
            latents, target = transformed(latents, transform), transformed(images, transform, tokenizer.stride)
        decoded = tokenizer.draw(latents, kept)
        pair = [decoded, target]
        if transform is not None and (perceptual is not None or adversarial):  # these were built for the whole size
            pair = [F.interpolate(x, images.shape[-2:], mode="bilinear") for x in pair]

        terms = {"reconstruction": reconstruction_error(decoded, target, objective.reconstruction)}  # (B,) each
        weights = {"reconstruction": 1.0}
        if perceptual is not None:
            terms["perceptual"], weights["perceptual"] = perceptual(*pair), objective.perceptual
        likeness = weighted(terms, weights)  # what the adaptive factor compares the adversarial term with
        for name, value in coded.losses.items():
            terms[name], weights[name] = value.expand(len(images)), getattr(objective, name)
        loss = weighted(terms, weights)
        if adversarial:
            generator, discriminator = self.opposed(*pair)
            pulls = [torch.autograd.grad(x, self.last_layer, retain_graph=True)[0] for x in (likeness, generator.sum())]
            factor = objective.gan * adaptive_weight(*(total(pull).to(pull.dtype) for pull in pulls))
            loss = loss + factor * generator.sum() + discriminator.sum()
            terms |= {"gan": generator, "discriminator": discriminator}
        parts = {f"loss_{name}": value.detach().sum() for name, value in terms.items()}
        return Loss(loss, loss.new_tensor(float(len(images))), parts | {"psnr": psnr_of(decoded, target).sum()})

    @property
    def last_layer(self) -> Tensor:
        """The weights of the decoder's last layer."""
        return cast(Trainable, self.tokenizer).last_layer

    def opposed(self, decoded: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """The loss (B,) of the autoencoder, without gradients for the discriminator, and the reverse."""
        opponent = self.discriminator
        assert opponent is not None, "objective.gan has a weight"
        fixed = {name: parameter.detach() for name, parameter in opponent.named_parameters()}
        generator = hinge_of_generator(functional_call(opponent, fixed, (decoded,)))
        return generator, hinge_of_discriminator(opponent(images.detach()), opponent(decoded.detach()))


def weighted(terms: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """The sum over terms and images: (); a term of weight 0 is left out, since it may be infinite."""
    return torch.stack([weight * terms[name].sum() for name, weight in weights.items() if weight]).sum()

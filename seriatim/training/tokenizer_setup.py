"""Build what a recipe of `kind: tokenizer` trains, and refuse settings that can't be followed or have no effect."""

from __future__ import annotations

from typing import Any

import torch

from seriatim.checkpoints.run_names import is_local
from seriatim.checkpoints.tokenizer import load_tokenizer
from seriatim.core.construct import check_room
from seriatim.core.errors import ConfigError
from seriatim.core.files import expanded
from seriatim.core.random import derive_seed
from seriatim.data.base import ImageData
from seriatim.data.held_out import build_divided
from seriatim.models.build import seeded
from seriatim.tokenizers.base import Tokenizer
from seriatim.tokenizers.finite_scalar import FiniteScalar
from seriatim.tokenizers.kinds import TOKENIZERS, build_tokenizer
from seriatim.tokenizers.latent import Latent
from seriatim.tokenizers.trainable import Trainable
from seriatim.training.autoencoding import Autoencoding
from seriatim.training.config import Objective, TokenizerRecipe
from seriatim.training.discriminator import check_discriminator
from seriatim.training.freezing import freeze
from seriatim.training.perceptual import PerceptualDistance, open_perceptual
from seriatim.training.setup import check_kind

OF_LATENTS = ("kl", "latent_noise", "interpolated_noise", "mask")  # terms that tokenizers of codes don't have
OF_CODES = ("codebook", "commitment", "entropy", "revive_images")


def build_autoencoding(recipe: TokenizerRecipe) -> tuple[ImageData, Autoencoding]:
    """The data, and the tokenizer with its objective. Initial weights depend on the recipe's seed alone.

    `tokenizer: {from: FOLDER}` begins with the weights of a saved tokenizer, whose statistics are measured anew.
    """
    data = build_divided(recipe.data)
    if data.cached or not data.pictures:
        raise ConfigError(
            f"data.kind: {recipe.data.get('kind')!r} is not allowed, as a tokenizer is trained on pictures; name a "
            "folder of them"
        )
    given = {"size": list(data.size), "channels": data.channels, **recipe.tokenizer}
    with seeded(derive_seed(recipe.seed, "weights")):
        tokenizer = begun_tokenizer(given, data)
        check_objective(recipe.objective, tokenizer)
        model = Autoencoding(tokenizer.requires_grad_(True), recipe.objective)
    freeze(tokenizer, recipe.training.freeze)
    codebook = getattr(getattr(tokenizer, "quantiser", None), "codebook", None)
    if recipe.objective.revive_images and codebook is not None and not codebook.requires_grad:
        raise ConfigError("objective.revive_images: would change codewords, but training.freeze holds the codebook")
    if recipe.objective.gan:
        check_discriminator(data.size, recipe.objective.gan_layers)
        if not model.last_layer.requires_grad:
            raise ConfigError(
                "training.freeze: the decoder's last layer is frozen, but objective.gan needs its gradient"
            )
    return data, model


def begun_tokenizer(given: dict[str, Any], data: ImageData) -> Tokenizer:
    """The tokenizer with which a run begins: fresh weights, or those of a folder."""
    source = given.pop("from", None)
    if source is not None and not (isinstance(source, str) and is_local(expanded(source))):
        raise ConfigError(
            f"tokenizer.from: there is no folder {source!r}; name a tokenizer or its run, or leave it out"
        )
    if source is None:
        check_kind(given.get("kind"), data)
        kind = TOKENIZERS.get(str(given.get("kind")))
        if kind is not None and issubclass(kind, Latent):
            given.setdefault("statistics", "channel")
        if given.get("path") is None:
            check_room(lambda: build_tokenizer(given), given, "tokenizer")
        tokenizer = build_tokenizer(given)
    else:
        tokenizer = load_tokenizer(expanded(source), **given)
    if not isinstance(tokenizer, Trainable):
        kinds = ", ".join(name for name, cls in TOKENIZERS.items() if hasattr(cls, "coded"))
        raise ConfigError(f"tokenizer.kind: {type(tokenizer).__name__} has nothing to train; name one of {kinds}")
    return tokenizer


def check_objective(objective: Objective, tokenizer: Any) -> None:
    """Raise ConfigError for a term that this tokenizer does not have, but for one that is as by default."""
    absent: tuple[str, ...]
    if tokenizer.vocab is None:
        absent, what = OF_CODES, "continuous latents"
    elif isinstance(getattr(tokenizer, "quantiser", None), FiniteScalar):
        absent, what = OF_CODES + OF_LATENTS, "levels, which need no term"
    else:
        absent, what = OF_LATENTS, "codes"
    for name in absent:
        if getattr(objective, name) != type(objective).model_fields[name].default:
            raise ConfigError(
                f"objective.{name}: has no effect, as the tokens of {type(tokenizer).__name__} are {what}; leave it out"
            )
    if objective.mask and not tokenizer.masks:
        raise ConfigError(
            f"objective.mask: {type(tokenizer).__name__} can't leave patches out, since convolutions see whole images; "
            "use the kind detok, or leave it out"
        )
    if objective.mask and objective.equivariance:
        raise ConfigError(
            "objective.equivariance: can't go with objective.mask, which has its own places; leave one out"
        )


def perceptual_of(objective: Objective, data: ImageData, device: torch.device) -> PerceptualDistance | None:
    """The perceptual term of an objective, if it has one."""
    if not objective.perceptual:
        return None
    which = str(objective.perceptual_features)
    return open_perceptual(which, objective.perceptual_layers, size=data.size, channels=data.channels, device=device)


def adversarial_groups(model: Autoencoding) -> list[dict[str, Any]]:
    """The optimiser's groups: the tokenizer's weights, and the discriminator's with settings of their own.

    One AdamW with both groups computes what two optimisers would: each loss has gradients for its own side only, and
    both sides are updated from the same reconstructions. The betas are those of VQGAN's code.
    """
    trained = [parameter for parameter in model.tokenizer.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": trained}]
    if model.discriminator is not None:
        rate = model.objective.gan_learning_rate
        parameters = list(model.discriminator.parameters())
        own = {"betas": (0.5, 0.9), "weight_decay": 0.0, "relative_rate": rate, "opponent": True}
        groups.append({"params": parameters, **own})
    return groups

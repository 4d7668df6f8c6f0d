"""Begin a run with the weights of another model (`training.init_from`), if both compute the same function of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from seriatim.checkpoints.native import Bundle, load_bundle
from seriatim.core.errors import CheckpointError, ConfigError, one_line
from seriatim.core.names import find_name
from seriatim.models.base import SequenceModel
from seriatim.models.build import model_config
from seriatim.tokenizers.base import Tokenizer
from seriatim.tokenizers.kinds import tokenizer_config
from seriatim.tokenizers.latent import Latent
from seriatim.tokenizers.vq import CodeAutoencoder

CLASSES = "conditioner.class_embedding"
MISSING = object()
LONGEST = 80  # characters of a value in a message
STATISTICS = {"mean", "std", "measured"}  # of a tokenizer of latents; they come with the initial weights
# Keys, at any level of a model's config, that may differ: sizes to which weights are adapted, sizes that follow from
# the tokenizer, and settings that only training uses.
MAY_DIFFER = {"tokens", "grid", "classes", "dim", "vocab"} | {
    "dropout",
    "label_dropout",
    "label_smoothing",
    "draws",
    "time_mean",
    "time_std",
    "min_mask_ratio",
    "mask_ratio_std",
    "mask_ratio_per",
}


def initialise_from(folder: str, model: SequenceModel, tokenizer: Tokenizer, class_names: list[str]) -> None:
    """Initialise a model with the weights and token statistics of another; classes of the same name keep their vectors.

    Raises ConfigError, which names every setting that differs, unless both models compute the same function. They may
    differ in their classes, in what only training uses, and in the grid of tokens, to which positions are interpolated.
    """
    source = matching(folder, model, tokenizer)
    theirs, ours = resized(source, model, tokenizer), model.state_dict()
    merged = {name: theirs.get(name, tensor).clone() for name, tensor in ours.items()}
    if CLASSES in ours:
        merged[CLASSES] = ours[CLASSES].clone()
        if CLASSES in theirs:
            # A new class begins at the mean of the old ones, which gives better images than a random vector.
            merged[CLASSES][:] = theirs[CLASSES].mean(dim=0)
            for row, name in enumerate(class_names):
                for place in find_name(name, source.class_names)[:1]:
                    merged[CLASSES][row] = theirs[CLASSES][place]
    model.load_state_dict(merged)
    with torch.no_grad():
        tokenizer.load_state_dict(source.tokenizer.state_dict())


def matching(folder: str, model: SequenceModel, tokenizer: Tokenizer) -> Bundle:
    """The bundle in a folder. Raises ConfigError, which names what differs, if its weights don't fit the model."""
    try:
        source = load_bundle(folder)
    except CheckpointError as error:
        raise CheckpointError(f"training.init_from: {one_line(error)}") from error
    refuse_other(folder, described(source.model, source.tokenizer), described(model, tokenizer))
    refuse_other_network(folder, source.tokenizer, tokenizer)
    ours, theirs = model.state_dict(), resized(source, model, tokenizer)
    for name, tensor in ours.items():
        if name != CLASSES and (name not in theirs or theirs[name].shape != tensor.shape):
            shape = tuple(theirs[name].shape) if name in theirs else "none"
            raise ConfigError(
                f"training.init_from: {folder} has {shape} for {name!r}, the recipe's model {tuple(tensor.shape)}; "
                "use the same model and the same number of tokens"
            )
    return source


def refuse_other_network(folder: str, theirs: Tokenizer, ours: Tokenizer) -> None:
    """Raise ConfigError if the recipe names a tokenizer whose network has other weights, which would not be used."""
    name = other_weight(ours, theirs.state_dict())
    if name is not None:
        raise ConfigError(
            f"training.init_from: the tokenizer of {folder} has other weights ({name}) than the one of "
            f"tokenizer.from; set tokenizer.from={folder}, on whose tokens the model was trained"
        )


def other_weight(tokenizer: Tokenizer, tensors: Mapping[str, Tensor]) -> str | None:
    """The first weight of a tokenizer's network that `tensors` has otherwise; None if all agree, or it has none."""
    if not isinstance(tokenizer, (Latent, CodeAutoencoder)):
        return None
    weights = tokenizer.state_dict()
    differing = (
        name
        for name, tensor in tensors.items()
        if name not in STATISTICS and not torch.equal(tensor.cpu(), weights[name].cpu())
    )
    return next(differing, None)


def resized(source: Bundle, model: SequenceModel, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """The weights of a bundle, with positions interpolated to the grid of the model's tokens."""
    return model.backbone.resized(source.model.state_dict(), source.tokenizer.grid, tokenizer.grid)


def described(model: SequenceModel, tokenizer: Tokenizer) -> dict[str, Any]:
    """All settings by their keys in a recipe, such as `{"model.width": 64, ...}`, but for those that may differ."""
    of_tokenizer = {key: value for key, value in tokenizer_config(tokenizer).items() if key != "size"}
    return settings(of_tokenizer, "tokenizer", set()) | settings(model_config(model), "model", MAY_DIFFER)


def settings(config: Mapping[str, Any], prefix: str, without: set[str]) -> dict[str, Any]:
    """A nested config as a flat mapping from dotted keys to plain values, without some keys at any level."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= settings(value, f"{prefix}.{key}", without)
        elif key not in without:
            found[f"{prefix}.{key}"] = json.loads(json.dumps(value))  # tuples become lists, as in a stored config
    return found


def refuse_other(folder: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise ConfigError, which names each setting that differs and how to change it, if there is one."""
    keys = [key for key in {**theirs, **ours} if theirs.get(key, MISSING) != ours.get(key, MISSING)]
    if not keys:
        return
    kinds = tuple(key.removesuffix("kind") for key in keys if key.endswith(".kind"))
    named = [key for key in keys if key.endswith(".kind") or not key.startswith(kinds)]  # other kinds have other keys
    pairs = ", ".join(f"{key} ({text(theirs, key)} there, {text(ours, key)} in the recipe)" for key in named)
    wanted = [f"{key}={plain(theirs[key])}" for key in keys if key in theirs]
    absent = [key for key in keys if key not in theirs]
    if any(key == "tokenizer.kind" or key.startswith("tokenizer.autoencoder.") for key in keys):
        wanted, absent = ([each for each in some if not each.startswith("tokenizer.")] for some in (wanted, absent))
        wanted.insert(0, f"'tokenizer={{from: {folder}}}'")
    steps = [("set ", " ".join(wanted)), ("leave out ", ", ".join(absent))]
    raise ConfigError(
        f"training.init_from: {folder} holds a model that computes something else with its weights: {pairs}; "
        + " and ".join(verb + names for verb, names in steps if names)
    )


def text(values: Mapping[str, Any], key: str) -> str:
    """A value for a message, shortened."""
    found = plain(values[key]) if key in values else "none"
    return found if len(found) <= LONGEST else f"{found[: LONGEST - 3]}..."


def plain(value: Any) -> str:
    """A value as YAML that needs no quotes in a shell, so that it can be used as an override."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))

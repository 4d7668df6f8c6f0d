"""A tokenizer's own folder, for many recipes to begin with.

    config.json            the tokenizer and where it came from
    tokenizer.safetensors  its weights and statistics
    manifest.json          bytes and sha256 of the two, written last

A model folder holds the same, and more: it can stand in for one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from seriatim.checkpoints.native import (
    CONFIG,
    MODEL,
    TOKENIZER,
    fill,
    opened,
    replaceable,
    save_folder,
    section,
    stored_tokenizer,
)
from seriatim.checkpoints.run_names import RAW, find
from seriatim.core.errors import CheckpointError, ConfigError, UsageError, one_line
from seriatim.tokenizers.base import Tokenizer
from seriatim.tokenizers.kinds import build_tokenizer, tokenizer_config
from seriatim.tokenizers.latent import Latent


def save_tokenizer(
    tokenizer: Tokenizer, folder: Path | str, provenance: Mapping[str, Any] | None = None, *, card: str | None = None
) -> Path:
    """Write a tokenizer folder, replacing one that is there only when the new one is complete.

    `card` becomes its README.md, which the manifest leaves out, because people may edit it.
    """
    config = {"tokenizer": tokenizer_config(tokenizer), "provenance": dict(provenance or {})}
    return save_folder(writable(folder), config, {TOKENIZER: tokenizer}, card)


def writable(folder: Path | str) -> Path:
    """Refuse to write a tokenizer over anything but a tokenizer folder or an empty one."""
    folder = replaceable(folder)
    if (folder / MODEL).exists():
        raise UsageError(f"folder: {folder} holds a model, which a tokenizer would replace; choose another")
    return folder


def load_tokenizer(folder: Path | str, /, **overrides: Any) -> Tokenizer:
    """The tokenizer of a tokenizer folder, a model folder, a run or its checkpoint; `overrides` change its config.

    Statistics are kept (they are those of channels, whatever size and patch), unless `scale` or `statistics` change.
    Raises CheckpointError where a file is missing, damaged or does not fit, ConfigError where an override does not.
    """
    folder, stored, _ = read(folder)
    changed = {key: value for key, value in overrides.items() if stored.get(key) != value}
    if "scale" in changed and "statistics" not in overrides:
        changed["statistics"] = "fixed"  # a scale that somebody gives is not to be measured
    with torch.device("meta"):  # no memory and no random numbers for weights that are about to be replaced
        try:
            tokenizer = build_tokenizer(stored, stored=True)
        except ConfigError as error:
            raise CheckpointError(f"{folder / CONFIG} cannot be used: {one_line(error)}") from error
        if changed:
            shapes = {name: tensor.shape for name, tensor in tokenizer.state_dict().items()}
            tokenizer = build_tokenizer({**stored, **changed})
            if shapes != {name: tensor.shape for name, tensor in tokenizer.state_dict().items()}:
                names = ", ".join(f"tokenizer.{key}" for key in sorted(changed))
                raise ConfigError(f"{names}: does not go with the weights in {folder}; leave it out")
    fill(tokenizer, stored_tokenizer(folder))
    if isinstance(tokenizer, Latent) and changed.keys() & {"scale", "statistics"}:
        tokenizer.forget_statistics()
    return tokenizer.eval()


def read_provenance(folder: Path | str) -> dict[str, Any]:
    """What a tokenizer or model folder says of where it came from."""
    return read(folder)[2]


def read(folder: Path | str) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The folder that holds the files, the tokenizer's config and the provenance; every file is checked."""
    found = find(folder)
    with opened(found.folder, TOKENIZER) as (config, _):
        if "model" not in config and found.weights == MODEL and str(folder).endswith(f":{RAW}"):
            raise CheckpointError(f"{folder}: only the averaged weights of a tokenizer are kept; leave out :{RAW}")
        return found.folder, section(config, "tokenizer"), section(config, "provenance")

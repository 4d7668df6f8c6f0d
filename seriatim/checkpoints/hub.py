"""Where a model is: a folder, or a repository of the hub."""

from __future__ import annotations

import re
from pathlib import Path

from seriatim.checkpoints.native import CONFIG
from seriatim.core.errors import CheckpointError, nearest, one_line
from seriatim.core.files import present_or_previous
from seriatim.zoo import PRESETS


def download(repository: str) -> Path:
    """A hub repository's model folder, in the hub's own cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=["*.json", "*.safetensors"], etag_timeout=10))
    except Exception as error:  # the hub's client raises a dozen kinds: offline, not found, no permission, ...
        reason = one_line(error)[:160]
        raise CheckpointError(
            f"model: there is no folder {repository!r}, and it could not be fetched as a hub repository ({reason})"
        ) from error


def located(name: str) -> Path:
    """The folder of that name, or the hub's, downloaded."""
    folder = present_or_previous(Path(name))
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; name the model folder that holds {CONFIG}")
    if folder.is_dir():
        if not any(folder.iterdir()):
            raise CheckpointError(f"{folder} is empty: no model was saved there; check the path")
        return folder
    if name in PRESETS:
        hint = PRESETS[name].recipe
        how = f"train it with `seriatim train {hint} --out runs/{name}`" if hint else "train or convert it first"
        raise CheckpointError(f"{name} is a preset and has no weights; {how}, then name the model's folder")
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        return download(name)
    raise CheckpointError(f"model: {name!r} is no folder, preset or hub repository{nearest(name, PRESETS)}")

"""Where a model is: a folder, or a repository of the hub."""

from __future__ import annotations

from pathlib import Path

from seriatim.checkpoints.native import CLASSIFIER, CONFIG, MODEL, TOKENIZER
from seriatim.core.errors import CheckpointError, nearest, shown
from seriatim.core.files import MANIFEST, present_or_previous
from seriatim.core.hub import fetch, repository
from seriatim.zoo import PRESETS


def located(name: str) -> Path:
    """The folder of that name, or that of a hub repository, `hf://owner/name` or `owner/name`, once it is fetched."""
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
    if "/" not in name:
        hint = nearest(name[:100], PRESETS)
        raise CheckpointError(f"model: {shown(name)} is no folder, preset or hub repository{hint}")
    # Exactly these files: a pattern such as *.json would also match those of every folder of the repository.
    return fetch(repository(name, "model"), (CONFIG, MODEL, TOKENIZER, CLASSIFIER, MANIFEST), "model")

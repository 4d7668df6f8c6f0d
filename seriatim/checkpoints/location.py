"""Where a model is: a folder, a checkpoint of a run, in the package, or a repository of the hub."""

from __future__ import annotations

import os
from pathlib import Path

from seriatim.checkpoints.native import CLASSIFIER, CONFIG, MODEL, TOKENIZER
from seriatim.checkpoints.packaged import packaged, packaged_names
from seriatim.checkpoints.run_names import is_local
from seriatim.core.errors import CheckpointError, UsageError, nearest, shown
from seriatim.core.files import MANIFEST, expanded, present_or_previous
from seriatim.core.hub import SCHEME, USUAL, Access, fetch, repository
from seriatim.zoo import PRESETS


def located(name: str, revision: str | None = None, access: Access = USUAL) -> Path:
    """The path of a model by its name; a hub repository, `hf://owner/name` or `owner/name`, is fetched first.

    The path of a folder is returned as it is, and so is a name such as `RUN@latest`, which `load_bundle` understands.

    `revision` is a commit, a tag or a branch of a repository, as `hf://owner/name@REVISION` names it.
    """
    folder = packaged(name) or present_or_previous(expanded(name))
    here = is_local(name) or os.path.exists(folder)
    if here and (revision is not None or access != USUAL):
        given = "revision" if revision is not None else next(k for k, v in access._asdict().items() if v)
        raise UsageError(f"{given}: only valid for a hub repository, and {folder} is here; leave it out")
    if os.path.isfile(folder):
        raise CheckpointError(f"{folder} is a file; name the model folder that holds {CONFIG}")
    if here:
        if os.path.isdir(folder) and not any(folder.iterdir()):
            raise CheckpointError(f"{folder} is empty: no model was saved there; check the path")
        return folder
    if name in PRESETS:
        hint = PRESETS[name].recipe
        how = f"train it with `seriatim train {hint} --out runs/{name}`" if hint else "train or convert it first"
        raise CheckpointError(f"{name} is a preset and has no weights; {how}, then name the model's folder")
    if "/" not in name:
        hint = nearest(name[:100], [*PRESETS, *packaged_names()])
        raise CheckpointError(f"model: {shown(name)} is no folder, packaged model, preset or hub repository{hint}")
    # Exactly these files: a pattern such as *.json would also match those of every folder of the repository.
    wanted = repository(name, "model")
    if revision is not None:
        if wanted.revision not in (None, revision):
            raise UsageError(f"revision: {shown(revision)} is given, and the name says {wanted.revision}; give one")
        wanted = repository(f"{SCHEME}{wanted.name}@{revision}", "revision")
    return fetch(wanted, (CONFIG, MODEL, TOKENIZER, CLASSIFIER, MANIFEST), "model", access=access)

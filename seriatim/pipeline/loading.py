"""From a name to a `Pipeline`: `load` takes a model folder, a run or its checkpoint, or a repository of the hub."""

from __future__ import annotations

import os

import torch

from seriatim.pipeline.pipeline import Pipeline


def load(
    name: str | os.PathLike[str],
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    prepare: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Pipeline:
    """A pipeline from a model folder, a run, a checkpoint of a run, or a hub repository `owner/name`.

    A checkpoint is named `RUN@latest`, `RUN@best` or `RUN@250000` (images seen); its averaged weights are taken, or the
    weights themselves with `:raw` at the end, as in `RUN@latest:raw`.

    Four arguments are for repositories of the hub alone, and mean what they mean in diffusers: `revision`, a commit,
    tag or branch; `token`, for private ones; `cache_dir`, where fetched files are kept; `local_files_only`, to use
    what was fetched before and ask nobody.

    `dtype` is that of the backbone: "auto" is bfloat16 on an accelerator that has it, float32 elsewhere. Every file is
    checked against its sha256. Raises CheckpointError when there is nothing to load or it is damaged. With `prepare`
    weights are laid out for sampling alone (`Pipeline.prepare`); without, the model can be trained on.
    """
    return Pipeline.from_pretrained(
        name,
        device=device,
        dtype=dtype,
        prepare=prepare,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )

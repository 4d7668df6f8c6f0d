"""Folders that samples are saved to: whose they are, and what in them may be replaced."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from PIL import Image

from seriatim.core.errors import UsageError
from seriatim.core.ownership import json_of, owned
from seriatim.pipeline.metadata import KEY

SAMPLES, SAYS = "samples.npy", "samples.json"  # of what is no picture
GRID, ANIMATION = "grid.png", "animation.gif"
LOOKED_AT = 100  # pictures of a folder in which the request of one is searched for


def is_sample(path: Path) -> bool:
    """Whether a PNG carries the request that made it; its pixels are not decoded."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return KEY in image.info
    except Exception:  # Pillow raises OSError, ValueError, SyntaxError, ... for what is no PNG
        return False


def holds_samples(folder: Path) -> bool:
    """Whether samples were saved to the folder, as they prove themselves."""
    if {"request", "model_sha256", "seeds"} <= json_of(folder / SAYS).keys():
        return True
    names = (path for path in folder.iterdir() if re.fullmatch(r"[0-9]{4,}-.+\.png", path.name))
    return any(map(is_sample, islice(names, LOOKED_AT)))


def check_samples_folder(folder: Path, files: Sequence[Path], *, overwrite: bool) -> list[Path]:
    """Refuse to save `files` to a folder that is neither new nor empty nor one of samples; touches nothing.

    A file that is there is refused too, unless it is to be replaced and a sample was saved under that name. Returns
    those that will be replaced.
    """
    owned(folder, "folder of samples", holds_samples)
    taken = [file for file in files if os.path.lexists(file)]
    if taken and not overwrite:
        raise UsageError(f"out: {taken[0]} exists already; choose another folder or pass --overwrite")
    for file in taken:
        ours = file.name in (SAMPLES, SAYS, GRID, ANIMATION) or is_sample(file)
        if not ours or file.is_symlink() or not file.is_file():
            raise UsageError(f"out: {file} is no sample that Seriatim wrote and would be lost; choose another folder")
    return taken

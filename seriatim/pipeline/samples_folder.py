"""Check the folder that samples are saved to, so that nothing but earlier samples is ever replaced."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Container, Sequence
from itertools import islice
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from seriatim.core.errors import SeriatimError, UsageError
from seriatim.core.files import atomic_write
from seriatim.core.images import BadImage, read_png
from seriatim.core.ownership import json_of, owned
from seriatim.pipeline.metadata import KEY, alone, pixels_sha256, read_recorded
from seriatim.pipeline.request import SampleRequest

SAMPLES, SAYS = "samples.npy", "samples.json"  # the files of a model that does not generate pictures
GRID, ANIMATION = "grid.png", "animation.gif"
GRID_KEY = f"{KEY}-grid"
LOOKED_AT = 100  # at most this many pictures of a folder are searched for a request


def is_sample(path: Path) -> bool:
    """Whether a PNG holds the request that made it. Its pixels are not decoded."""
    try:
        return KEY in read_png(path, decode=False).info
    except BadImage:
        return False


def save_grid(image: Image.Image, path: Path) -> Path:
    """Write grid.png with a mark, so that a picture of somebody else under that name is not taken for it."""
    info = PngInfo()
    info.add_text(GRID_KEY, "an overview of the samples beside it")
    return atomic_write(path, lambda file: image.save(file, format="PNG", pnginfo=info))


def is_grid(path: Path) -> bool:
    """Whether a PNG has the mark of `save_grid`."""
    try:
        return GRID_KEY in read_png(path, decode=False).info
    except BadImage:
        return False


def holds_samples(folder: Path) -> bool:
    """Whether samples were saved to the folder. Their metadata must prove it, not just their names."""
    if {"request", "model_sha256", "seeds"} <= json_of(folder / SAYS).keys():
        return True
    names = (path for path in folder.iterdir() if re.fullmatch(r"[0-9]{4,}-.+\.png", path.name))
    return any(map(is_sample, islice(names, LOOKED_AT)))


def is_there(file: Path, request: SampleRequest, i: int, model_sha256: str) -> bool:
    """Whether `file` is intact and holds image i of this very request to this model, however it was computed."""
    if not file.is_file():
        return False
    try:
        image, says = read_recorded(file)
    except SeriatimError:
        return False
    same = says.request == alone(request, i) and says.model_sha256 == model_sha256 and not says.edited
    return same and says.pixels_sha256 == pixels_sha256(image)


def is_damaged(file: Path, request: SampleRequest, i: int, model_sha256: str) -> bool:
    """Whether `file` says that it is image i of this very request, but its pixels can't be read; also if it is empty.

    Nothing that somebody made is lost if it is drawn again. A file whose pixels are readable may have been edited.
    """
    if file.is_symlink() or not file.is_file():
        return False
    try:
        if file.stat().st_size == 0:
            return True
        says = read_recorded(file, decode=False)[1]
        if says.request != alone(request, i) or says.model_sha256 != model_sha256 or says.edited:
            return False
    except (SeriatimError, OSError):
        return False
    try:
        read_recorded(file)
    except SeriatimError:
        return True
    return False


def seed_of(folder: Path) -> int:
    """The seed of the samples in the folder, so that their command can go on without it; 0 where there are none."""
    for path in sorted(folder.glob("[0-9]*.png")):  # the first that is intact
        with contextlib.suppress(SeriatimError):
            return read_recorded(path)[1].sample_request().seed
    return 0


def check_samples_folder(
    folder: Path, files: Sequence[Path], *, overwrite: bool, begun: Container[str] = (), resumed: bool = False
) -> list[Path]:
    """The files that saving `files` to the folder would replace; nothing is written yet.

    Raises UsageError if the folder is neither new nor empty nor one of samples, or if a file exists already. With
    `overwrite` an existing file is allowed if it is a sample. Names in `begun` prove nothing and are allowed. If the
    samples are `resumed`, existing files among `files` are known to be others than the command makes.
    """
    owned(folder, "folder of samples", holds_samples, begun=begun)
    taken = [file for file in files if os.path.lexists(file)]
    if taken and not overwrite:
        other = " and is of another request or model, or was changed" if resumed else ""
        raise UsageError(f"out: {taken[0]} exists already{other}; choose another folder or pass --overwrite")
    for file in taken:
        ours = file.name in (SAMPLES, SAYS, GRID, ANIMATION) or is_sample(file)
        if not ours or file.is_symlink() or not file.is_file():
            raise UsageError(
                f"out: {file} is not a sample that Seriatim wrote and would be lost; choose another folder"
            )
    return taken

"""Check the folder that samples are saved to, so that nothing but earlier samples is ever replaced."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from seriatim.core.errors import DataError, SeriatimError, UsageError, shown
from seriatim.core.files import atomic_write
from seriatim.core.images import BadImage, read_png
from seriatim.core.ownership import json_of, owned
from seriatim.core.reading import Unreadable, read_text
from seriatim.pipeline.metadata import (
    KEY,
    LONGEST,
    Recorded,
    picture_and_text,
    read_recorded,
    recorded_in,
    said_beside,
)
from seriatim.pipeline.picture_files import FORMATS

SAMPLES, SAYS = "samples.npy", "samples.json"  # the files of a model that does not generate pictures
GRID, ANIMATION = "grid.png", "animation.gif"
GRID_KEY = f"{KEY}-grid"
SUFFIXES = tuple(f".{name}" for name in FORMATS)
LOOKED_AT = 100  # at most this many pictures of a folder are searched for a request


def is_sample(path: Path) -> bool:
    """Whether a file holds a picture with the request that made it, or that request. Its pixels are not decoded."""
    try:
        if path.suffix == ".json":
            recorded_in(read_text(path, LONGEST + 1), path)
            return True
        text = picture_and_text(path, decode=False)[1]
        if text is not None and path.suffix == ".npy":  # any JSON file may be beside an array
            recorded_in(text, path)
        return text is not None
    except (BadImage, Unreadable, DataError):
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
    return any(map(is_sample, islice(pictures_in(folder), LOOKED_AT)))


def pictures_in(folder: Path) -> Iterator[Path]:
    """The files of a folder that may be pictures of ours by their names, in no order."""
    apart = (GRID, ANIMATION, SAMPLES)
    return (
        path
        for path in folder.iterdir()
        if path.suffix in SUFFIXES and path.name not in apart and not path.name.startswith(".")
    )


def is_there(file: Path, request: Mapping[str, Any], model_sha256: str) -> bool:
    """Whether `file` is intact and holds the image of this very request to this model, however it was computed."""
    if not file.is_file():
        return False
    try:
        image, says = read_recorded(file)
    except SeriatimError:
        return False
    return not difference(says, request, model_sha256) and says.matches(image)


def is_damaged(file: Path, request: Mapping[str, Any], model_sha256: str) -> bool:
    """Whether `file` says that it is the image of this very request, but its pixels can't be read, or it is empty.

    Nothing that somebody made is lost if it is drawn again. A file whose pixels are readable may have been edited.
    """
    if file.is_symlink() or not file.is_file():
        return False
    try:
        if file.stat().st_size == 0 or is_cut_webp(file):
            return True
        if difference(read_recorded(file, decode=False)[1], request, model_sha256):
            return False
    except (SeriatimError, OSError):
        return False
    try:
        read_recorded(file)
    except SeriatimError:
        return True
    return False


def is_cut_webp(file: Path) -> bool:
    """Whether a WebP file is shorter than it says. Its metadata stand at its end, so it can't tell whose it was."""
    with open(file, "rb") as stream:
        head = stream.read(12)
    is_webp = head[:4] == b"RIFF" and head[8:] == b"WEBP"
    return is_webp and int.from_bytes(head[4:8], "little") + 8 > file.stat().st_size


def is_begun(file: Path, request: Mapping[str, Any], model_sha256: str) -> bool:
    """Whether only the metadata of an array were written, because the process ended before the array itself."""
    beside = said_beside(file)
    if os.path.lexists(file) or beside.is_symlink() or not beside.is_file():
        return False
    try:
        says = recorded_in(read_text(beside, LONGEST + 1), beside)
    except (Unreadable, DataError):
        return False
    return not difference(says, request, model_sha256)


def difference(says: Recorded, request: Mapping[str, Any], model_sha256: str) -> str:
    """What a picture's metadata say differently than the request for one image and the model; empty if nothing."""
    if says.edited:
        return "it was edited from another picture"
    if says.model_sha256 != model_sha256:
        return f"the model's sha256 is {says.model_sha256[:12]}... there, {model_sha256[:12]}... here"
    there, here = ({**each, **(each.get("head_options") or {})} for each in (says.request, request))
    names = [name for name in {**here, **there} if name != "head_options" and there.get(name) != here.get(name)]
    if len(names) > 1 and "seeds" in names:
        names.remove("seeds")  # they follow from other settings
    told = [f"{name} is {shown(there.get(name), 40)} there, {shown(here.get(name), 40)} here" for name in names[:3]]
    return "; ".join(told) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")


def what_differs(file: Path, request: Mapping[str, Any], model_sha256: str) -> str:
    """Why `file`, which exists, is not the image of this request to this model, in a few words."""
    try:
        says = read_recorded(file, decode=False)[1]
    except SeriatimError:
        return "it holds no request"
    return difference(says, request, model_sha256) or "its pixels were changed"


def refuse_others(
    folder: Path, names: Sequence[str], request_of: Callable[[int], Mapping[str, Any]], model_sha256: str
) -> None:
    """Raise UsageError if the folder holds a sample under a name that is not among `names`.

    `request_of(i)` is the request for the image of name i. What is resumed must not be mixed with other pictures.
    """
    if not folder.is_dir():
        return
    wanted = set(names)
    for path in sorted(pictures_in(folder)):
        if path.name in wanted or not is_sample(path):
            continue
        with contextlib.suppress(DataError):
            says = read_recorded(path, decode=False)[1]
            some = [request_of(i) for i in range(min(len(names), LOOKED_AT))]
            near = next((request for request in some if request["seeds"] == says.request.get("seeds")), some[0])
            why = difference(says, near, model_sha256) or "--format or --name-pattern was another"
            raise UsageError(
                f"out: {path} is not among the images of this command ({why}); repeat the command as it was, or choose "
                "another folder"
            )


def seed_of(folder: Path) -> int:
    """The seed of the samples in the folder, so that their command can go on without it; 0 where there are none."""
    for path in sorted(pictures_in(folder)) if folder.is_dir() else ():  # the first that is intact
        with contextlib.suppress(SeriatimError):
            return read_recorded(path)[1].sample_request().seed
    return 0


def check_samples_folder(
    folder: Path,
    files: Sequence[Path],
    *,
    overwrite: bool,
    begun: Container[str] = (),
    why: Callable[[Path], str] | None = None,
) -> list[Path]:
    """The files that saving `files` to the folder would replace; nothing is written yet.

    Raises UsageError if the folder is neither new nor empty nor one of samples, or if a file exists already. With
    `overwrite` an existing file is allowed if it is a sample. Names in `begun` prove nothing and are allowed. If
    samples are resumed, `why` tells how an existing file differs from what the command makes.
    """
    owned(folder, "folder of samples", holds_samples, begun=begun)
    taken = [file for file in files if os.path.lexists(file)]
    if taken and not overwrite:
        other = f" and is not what this command makes ({why(taken[0])})" if why else ""
        raise UsageError(f"out: {taken[0]} exists already{other}; choose another folder or pass --overwrite")
    for file in taken:
        ours = file.name in (SAMPLES, SAYS, GRID, ANIMATION) or is_sample(file)
        if not ours or file.is_symlink() or not file.is_file():
            raise UsageError(
                f"out: {file} is not a sample that Seriatim wrote and would be lost; choose another folder"
            )
    return taken

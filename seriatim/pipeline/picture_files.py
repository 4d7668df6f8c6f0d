"""Write a picture with its metadata in one of several formats; `metadata.read_recorded` reads all of them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features

from seriatim.core.errors import UsageError, check_known
from seriatim.core.files import atomic_write, write_text
from seriatim.core.images import DESCRIPTION, read_stored
from seriatim.pipeline.metadata import KEY, LONGEST, Recorded, chunk, pixels_sha256, said_beside

FORMATS = ("png", "jpg", "webp", "npy")
LOSSY = ("jpg", "webp")
QUALITY = 90  # of the lossy formats, when the caller gives none
MOST_IN_EXIF = 65_000  # characters; the EXIF data of a JPEG have at most 64 KiB


def check_format(name: str, quality: int | None = None) -> None:
    """Raise UsageError if pictures can't be written in this format and quality."""
    check_known(FORMATS, format=name)
    if name == "webp" and not features.check("webp"):
        raise UsageError("format: 'webp' can't be written by the installed Pillow; take png, jpg or npy")
    if quality is None:
        return
    if name not in LOSSY:
        raise UsageError(f"quality: only valid with format {' or '.join(LOSSY)} (got {name!r}); leave it out")
    if isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 100:
        raise UsageError(f"quality: {quality!r} is not allowed; it must be a whole number from 1 to 100")


def check_holds(name: str, says: str) -> None:
    """Raise UsageError if the metadata are too long for a file of this format."""
    most = MOST_IN_EXIF - 500 if name == "jpg" else LONGEST - 500  # the rest of the metadata takes a few hundred
    if len(says) > most:
        raise UsageError(
            f"format: {name} files hold metadata of at most {most:,} characters and this request has {len(says):,}; "
            "give a shorter order"
        )


def save_picture(image: Image.Image, path: Path | str, says: Recorded, *, quality: int | None = None) -> Path:
    """Write a picture with its metadata, in the format of the suffix of `path`, and return the path."""
    path = Path(path)
    kind = path.suffix.removeprefix(".")
    if kind == "npy":
        # The metadata come first: a picture that is there has them, and without a picture they are written again.
        write_text(said_beside(path), says.text())
        return atomic_write(path, lambda file: write_array(np.asarray(image), file))
    if kind in LOSSY:
        return save_lossy(image, path, says, quality or QUALITY)
    return atomic_write(path, lambda file: image.save(file, format="PNG", pnginfo=chunk(says)))


def save_lossy(image: Image.Image, path: Path, says: Recorded, quality: int) -> Path:
    """Write a JPEG or WebP file. Its metadata hold the hash of the pixels in the file, which differ from `image`."""
    form = "JPEG" if path.suffix == ".jpg" else "WEBP"
    stored = io.BytesIO()
    image.save(stored, format=form, quality=quality)
    decoded = read_stored(stored, kinds=(form,))
    exif = Image.Exif()
    exif[DESCRIPTION] = f"{KEY} {says.model_copy(update={'stored_sha256': pixels_sha256(decoded)}).text()}"
    return atomic_write(path, lambda file: image.save(file, format=form, quality=quality, exif=exif))


def write_array(array: Any, file: Path) -> None:
    with open(file, "wb") as stream:  # given a name instead, numpy would append .npy to it
        np.save(stream, array, allow_pickle=False)

"""The metadata of a saved picture: its request, the model's hash and the versions, which suffice to generate it again.

The metadata is JSON: in a text chunk named `seriatim` of a PNG, in the EXIF description of a JPEG or WebP file, and in
a file of the same name that ends in .json beside a .npy file. A file may come from anywhere, so reading is careful: the
size of the JSON is bounded, it is parsed as plain data and validated like any request, and it may ask for one image
only.
"""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from pydantic import Field

from seriatim import __version__
from seriatim.core.array_reading import map_npy
from seriatim.core.errors import DataError, UsageError
from seriatim.core.images import BadImage, read_stored
from seriatim.core.reading import Unreadable, parse_json, read_text
from seriatim.core.validation import Strict, parse
from seriatim.pipeline.request import SampleRequest

KEY = "seriatim"
LONGEST = 64 * 1024  # characters of the chunk at most; a request has a few hundred
MOST_PIXELS = 1 << 25


class Recorded(Strict):
    """What a file says of its picture."""

    format: Literal[1] = 1
    request: dict[str, Any]  # a request that generates this image alone
    label: str | None = None  # the name of the class
    model_sha256: str = Field("", max_length=64)  # the sha256 of the weights
    pixels_sha256: str = Field(max_length=64)  # of the pixels that were drawn
    stored_sha256: str = Field("", max_length=64)  # of the pixels in the file if its format changes them, as JPEG does
    edited: bool = False  # an edited image can't be generated from the request without the original and the mask
    versions: dict[str, str] = Field(default_factory=dict)

    def sample_request(self) -> SampleRequest:
        return parse(SampleRequest, self.request, where="the picture's request", error=DataError)

    def text(self) -> str:
        """These metadata as they are written into a file."""
        without = set() if self.stored_sha256 else {"stored_sha256"}
        return json.dumps(self.model_dump(mode="json", exclude=without), ensure_ascii=True)

    def matches(self, image: Image.Image) -> bool:
        """Whether these are the pixels that were written, so that the file is intact and nobody changed it."""
        return pixels_sha256(image) == (self.stored_sha256 or self.pixels_sha256)


def versions(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, str]:
    return {
        "seriatim": __version__,
        "torch": str(torch.__version__),
        "machine": platform.machine(),
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
    }


def pixels_sha256(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()


def alone(request: SampleRequest, i: int) -> dict[str, Any]:
    """A request for image i of `request` alone, as plain data. It states every setting, since defaults may change."""
    return request.part([i]).model_dump(mode="json")


def chunk(recorded: Recorded) -> PngImagePlugin.PngInfo:
    """The metadata as the text of a PNG file."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(KEY, recorded.text())
    return info


def said_beside(path: Path) -> Path:
    """The file that holds the metadata of an array, which has no place for them."""
    return path.with_suffix(".json")


def picture_and_text(path: Path, *, decode: bool = True) -> tuple[Image.Image, str | None]:
    """A picture and the text of its metadata, which is None if it has none. Raises BadImage.

    Without `decode` the picture has no pixels.
    """
    if path.suffix.lower() == ".npy":
        try:
            text = read_text(said_beside(path), LONGEST + 1)
            return (read_array(path) if decode else Image.new("L", (1, 1))), text
        except Unreadable as error:
            raise BadImage(f"not a picture with metadata: {path.name} or {said_beside(path).name} {error}") from error
    image = read_stored(path, MOST_PIXELS, decode=decode)
    if image.format == "PNG":
        return image, image.info.get(KEY)
    described = image.info.get("description")
    mark = f"{KEY} "
    text = described if isinstance(described, str) else ""
    return image, text.removeprefix(mark) if text.startswith(mark) else None


def read_array(path: Path) -> Image.Image:
    """The picture in a .npy file: (H, W) or (H, W, 3) uint8; raises Unreadable."""
    array = map_npy(path)
    if array.dtype != np.uint8 or array.shape[2:] not in ((), (3,)) or array.ndim < 2 or array.size > 3 * MOST_PIXELS:
        raise Unreadable(f"holds an array {array.shape} of {array.dtype}, not a picture (H, W) or (H, W, 3) of uint8")
    if not array.size:
        raise Unreadable("holds an empty array")
    return Image.fromarray(np.array(array))


def read_recorded(path: Path | str, *, decode: bool = True) -> tuple[Image.Image, Recorded]:
    """A picture and its metadata. Raises DataError if it is not a picture of ours or its metadata can't be used.

    Without `decode` only the metadata are read, so that the pixels may be damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"from: {path} is not a file; name a picture that `seriatim sample` has written")
    try:
        image, text = picture_and_text(path, decode=decode)
    except BadImage as error:
        raise DataError(f"{path} is {error}") from error
    if text is None:
        raise DataError(f"{path}: has no metadata: `seriatim sample` did not write it, or another program removed it")
    recorded = recorded_in(text, path)
    request = recorded.sample_request()
    if request.num_images != 1:
        raise DataError(f"{path}: its request asks for {request.num_images} images; that of a picture asks for one")
    return image, recorded


def recorded_in(text: str, path: Path) -> Recorded:
    """The metadata in a text that was found in the file `path`; raises DataError."""
    if len(text) > LONGEST:
        raise DataError(f"{path}: its request is {len(text)} characters long; at most {LONGEST} are read")
    try:
        values = parse_json(text, dict)
    except Unreadable as error:
        raise DataError(f"{path}: its request {error}; the image can't be repeated") from error
    return parse(Recorded, values, where=str(path), error=DataError)

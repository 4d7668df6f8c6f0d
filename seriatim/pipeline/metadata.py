"""The metadata of a saved PNG: its request, the model's hash and the versions, which suffice to generate it again.

The metadata is JSON in one text chunk named `seriatim`. A PNG may come from anywhere, so reading is careful: the size
of the chunk is bounded, it is parsed as plain data and validated like any request, and it may ask for one image only.
"""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, PngImagePlugin
from pydantic import Field

from seriatim import __version__
from seriatim.core.errors import DataError, UsageError
from seriatim.core.images import BadImage, read_png
from seriatim.core.reading import Unreadable, parse_json
from seriatim.core.validation import Strict, parse
from seriatim.pipeline.request import SampleRequest

KEY = "seriatim"
LONGEST = 64 * 1024  # characters of the chunk at most; a request has a few hundred
MOST_PIXELS = 1 << 25


class Recorded(Strict):
    """The content of the text chunk."""

    format: Literal[1] = 1
    request: dict[str, Any]  # a request that generates this image alone
    label: str | None = None  # the name of the class
    model_sha256: str = Field("", max_length=64)  # the sha256 of the weights
    pixels_sha256: str = Field(max_length=64)
    edited: bool = False  # an edited image can't be generated from the request without the original and the mask
    versions: dict[str, str] = Field(default_factory=dict)

    def sample_request(self) -> SampleRequest:
        return parse(SampleRequest, self.request, where="the picture's request", error=DataError)


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
    info = PngImagePlugin.PngInfo()
    info.add_itxt(KEY, json.dumps(recorded.model_dump(mode="json"), ensure_ascii=True))
    return info


def read_recorded(path: Path | str, *, decode: bool = True) -> tuple[Image.Image, Recorded]:
    """A picture and its metadata. Raises DataError if it is not a PNG or has no metadata that can be used.

    Without `decode` only the metadata are read, which stand before the pixels, so that those may be damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"from: {path} is not a file; name a PNG that `seriatim sample` has written")
    try:
        image = read_png(path, MOST_PIXELS, decode=decode)
    except BadImage as error:
        raise DataError(f"{path} is {error}") from error
    text = image.info.get(KEY)
    if text is None:
        raise DataError(f"{path}: has no metadata: `seriatim sample` did not write it, or another program removed it")
    if len(text) > LONGEST:
        raise DataError(f"{path}: its request is {len(text)} characters long; at most {LONGEST} are read")
    try:
        values = parse_json(text, dict)
    except Unreadable as error:
        raise DataError(f"{path}: its request {error}; the image can't be repeated") from error
    recorded = parse(Recorded, values, where=str(path), error=DataError)
    request = recorded.sample_request()
    if request.num_images != 1:
        raise DataError(f"{path}: its request asks for {request.num_images} images; that of a picture asks for one")
    return image, recorded

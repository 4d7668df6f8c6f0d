"""What a PNG says of itself: the request that made it, the model's hash, versions; enough to draw it again.

It is one text chunk named `seriatim`, JSON. What is read back comes from anywhere: its size is bounded, it is parsed as
plain data and validated like any request, and it only ever asks for one image.
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
from seriatim.core.errors import DataError, SeriatimError, UsageError, one_line
from seriatim.core.reading import Unreadable, parse_json
from seriatim.core.validation import Strict, parse
from seriatim.pipeline.request import Label, SampleRequest

KEY = "seriatim"
LONGEST = 64 * 1024  # characters of the chunk: a request is a few hundred
MOST_PIXELS = 1 << 25


class Recorded(Strict):
    """The chunk."""

    format: Literal[1] = 1
    request: dict[str, Any]  # that this image alone repeats
    label: str | None = None  # the class by name
    model_sha256: str = Field("", max_length=64)  # of the weights
    pixels_sha256: str = Field(max_length=64)
    edited: bool = False  # from another picture: that and the mask are needed to repeat it
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
    """The request for image i of `request` and no other, as plain data: all of it, since defaults may change."""
    label: Label = request.image_labels()[i]
    update = {"class_labels": (label,), "num_images_per_label": 1, "seeds": (request.image_seeds()[i],)}
    order = getattr(request, "order", None)
    if isinstance(order, tuple) and order and isinstance(order[0], tuple) and len(order) == request.num_images:
        update["order"] = (order[i],)
    return request.model_copy(update=update).model_dump(mode="json")


def chunk(recorded: Recorded) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_itxt(KEY, json.dumps(recorded.model_dump(mode="json"), ensure_ascii=True))
    return info


def read_recorded(path: Path | str) -> tuple[Image.Image, Recorded]:
    """A picture and what it says of itself; raises DataError, one line, where it says nothing that can be used."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"from: {path} is no file; name a PNG that `seriatim sample` has written")
    try:
        with Image.open(path, formats=("PNG",)) as image:
            if image.width * image.height > MOST_PIXELS:
                raise DataError(f"{path}: {image.width}x{image.height} pixels, more than any model here draws")
            image.load()
            text = image.text.get(KEY)  # type: ignore[attr-defined]
    except SeriatimError:
        raise
    except Exception as error:  # Pillow raises OSError, ValueError, SyntaxError, ... for what is no whole PNG
        raise DataError(f"{path}: is not a readable PNG ({one_line(error)[:120]})") from error
    if text is None:
        raise DataError(f"{path}: carries no request: it was not written by `seriatim sample`, or lost it on the way")
    if len(text) > LONGEST:
        raise DataError(f"{path}: its request is {len(text)} characters long, at most {LONGEST} are read")
    try:
        values = parse_json(text, dict)
    except Unreadable as error:
        raise DataError(f"{path}: its request {error}; there is nothing to repeat") from error
    recorded = parse(Recorded, values, where=str(path), error=DataError)
    request = recorded.sample_request()
    if request.num_images != 1:
        raise DataError(f"{path}: its request asks for {request.num_images} images; a picture is one")
    return image, recorded

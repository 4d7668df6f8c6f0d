"""What a call gives: images, and all that is needed to draw them again."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from seriatim.core.errors import UsageError, nearest
from seriatim.core.files import atomic_write, writable_folder
from seriatim.sampling.metadata import Recorded, alone, chunk, pixels_sha256
from seriatim.sampling.request import SampleRequest

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass(frozen=True)
class Result:
    """Images in the order of the labels, and their tokens."""

    images: Any  # list of PIL images; or (B, H, W, c) uint8; or (B, c, H, W) in [-1, 1]; or tokens (B, L, D)
    labels: list[str | None]  # the class of each image, by name
    seeds: list[int]  # of each image
    request: SampleRequest
    tokens: Tensor  # (B, L, D)
    model_sha256: str = ""  # of the weights
    versions: dict[str, str] = field(default_factory=dict)
    edited: bool = False  # made from other pictures or tokens: the request alone does not repeat it
    kept: tuple[Tensor, Tensor] | None = field(default=None, repr=False)  # of an edit: pixels, and where others replace

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write the images as PNG files that carry their request; `seriatim sample MODEL --from FILE` repeats one."""
        if not isinstance(self.images, list):
            raise UsageError("output_type: only PIL images are saved; call with output_type='pil'")
        root = writable_folder(Path(folder))
        files = [root / f"{i:04d}-{safe_name(label or 'image')}.png" for i, label in enumerate(self.labels)]
        return [save_image(self.images[i], file, self.recorded(i)) for i, file in enumerate(files)]

    def recorded(self, i: int) -> Recorded:
        """What the PNG of image i says of it."""
        return recorded(
            self.images[i], self.request, i, self.labels[i], self.model_sha256, self.versions, edited=self.edited
        )


def recorded(
    image: Image.Image,
    request: SampleRequest,
    i: int,
    label: str | None,
    model_sha256: str,
    versions: dict[str, str],
    *,
    edited: bool = False,
) -> Recorded:
    """What the PNG of image i of a request says of it."""
    return Recorded(
        request=alone(request, i),
        label=label,
        model_sha256=model_sha256,
        pixels_sha256=pixels_sha256(image),
        edited=edited,
        versions=versions,
    )


def save_image(image: Image.Image, path: Path | str, says: Recorded) -> Path:
    return atomic_write(path, lambda file: image.save(file, format="PNG", pnginfo=chunk(says)))


def safe_name(name: str) -> str:
    """A class name as part of a file name: letters, digits, - and _ of any script; at most 40."""
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name)[:40] or "image"


def as_pil(arrays: Tensor) -> list[Image.Image]:
    """(B, H, W, c) uint8 -> pictures."""
    return [Image.fromarray(a[..., 0] if a.shape[-1] == 1 else a) for a in arrays.numpy()]


def check_output(output_type: str) -> None:
    if output_type not in OUTPUT_TYPES:
        raise UsageError(f"output_type: {output_type!r} is not known{nearest(output_type, OUTPUT_TYPES)}")

"""The result of a call: images, and all that is needed to generate them again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from seriatim.core.errors import UsageError
from seriatim.core.files import atomic_write, writable_folder, write_json
from seriatim.pipeline.editing import composite
from seriatim.pipeline.labels import names_of
from seriatim.pipeline.metadata import Recorded, alone, pixels_sha256
from seriatim.pipeline.picture_files import save_picture, write_array
from seriatim.pipeline.picture_names import file_names
from seriatim.pipeline.request import SampleRequest
from seriatim.pipeline.sample_image import SampleImage, png_bytes
from seriatim.pipeline.samples_folder import SAMPLES, SAYS, check_samples_folder
from seriatim.tokenizers.base import to_uint8

OUTPUT_TYPES = ("pil", "np", "pt", "tokens")


@dataclass(frozen=True)
class Result:
    """Images in the order of the labels, and their tokens.

    `images` depends on output_type: a list of PIL images; (B, H, W, c) or (B, c, H, W) in [0, 1]; or tokens (B, L, D).
    A model that does not generate pictures gives (B, L, D) in the units of its data, or codes (B, L). PIL images are
    `SampleImage`s: a PNG file that the caller saves carries its request, like those of `save`.
    """

    images: Any
    classes: list[int]  # the number of each image's class; -1 for no class
    class_names: Sequence[str]
    request: SampleRequest
    tokens: Tensor  # (B, L, D)
    model_sha256: str = ""  # the sha256 of the weights
    versions: dict[str, str] = field(default_factory=dict)
    edited: bool = False  # the request alone can't repeat images made from other pictures or tokens
    kept: tuple[Tensor, Tensor] | None = field(default=None, repr=False)  # an edit's original pixels and mask

    def __post_init__(self) -> None:
        if isinstance(self.images, list):
            each = zip(self.images, self.labels, strict=True)
            marked = [SampleImage.of(image, self._says(image, i, label)) for i, (image, label) in enumerate(each)]
            object.__setattr__(self, "images", marked)  # the class is frozen

    def _says(self, image: Image.Image, i: int, label: str | None) -> Recorded:
        """The metadata of image i, with the pixels that were generated even if they were changed since."""
        if isinstance(image, SampleImage) and image.says is not None:
            return image.says
        return recorded(image, self.request, i, label, self.model_sha256, self.versions, edited=self.edited)

    @property
    def labels(self) -> list[str | None]:
        """The name of each image's class; None for no class."""
        return names_of(self.classes, self.class_names)

    @property
    def seeds(self) -> list[int]:
        """The seed of each image."""
        return self.request.image_seeds()

    def png(self, i: int = 0) -> bytes:
        """The bytes of a PNG file of image i with its request, as `save` writes it: for a web page, a database, ...

        Raises UsageError if the images are not PIL images, or if there is no image i.
        """
        if not isinstance(self.images, list):
            raise UsageError("output_type: only PIL images have PNG bytes; call with output_type='pil'")
        if not 0 <= i < len(self.images):
            raise UsageError(f"i: {i!r} is not allowed; the result has images 0 to {len(self.images) - 1}")
        return png_bytes(self.images[i], self._says(self.images[i], i, self.labels[i]))

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> list[Path]:
        """Write the images as PNG files that hold their request; `seriatim sample MODEL --from FILE` repeats one.

        If the model does not generate pictures, an array samples.npy and its request samples.json are written. The
        folder must be new, empty, or hold samples already. Raises UsageError, before anything is written, if it holds
        something else, or if a file of the same name exists; `overwrite` replaces samples of the same names.
        """
        arrays = isinstance(self.images, np.ndarray) and self.images.ndim < 4
        if not arrays and not isinstance(self.images, list):
            raise UsageError("output_type: only PIL images can be saved; call with output_type='pil'")
        root = Path(folder)
        files = [root / name for name in ((SAMPLES, SAYS) if arrays else file_names(self.labels))]
        check_samples_folder(root, files, overwrite=overwrite)
        writable_folder(root)
        if arrays:
            return self.save_arrays(root)
        return [
            save_picture(image, file, self._says(image, i, label))
            for i, (image, file, label) in enumerate(zip(self.images, files, self.labels, strict=True))
        ]

    def save_arrays(self, folder: Path) -> list[Path]:
        """Write samples.npy and samples.json into a folder that is there, and return their paths."""
        says = {
            "request": self.request.model_dump(mode="json"),
            "labels": self.labels,
            "seeds": self.seeds,
            "model_sha256": self.model_sha256,
            "edited": self.edited,
            "versions": self.versions,
        }
        return [save_array(self.images, folder / SAMPLES), write_json(folder / SAYS, says)]


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
    """The metadata for the PNG of image i of a request."""
    return Recorded(
        request=alone(request, i),
        label=label,
        model_sha256=model_sha256,
        pixels_sha256=pixels_sha256(image),
        edited=edited,
        versions=versions,
    )


def save_array(array: Any, path: Path | str) -> Path:
    """Write a .npy file and return its path."""
    return atomic_write(path, lambda file: write_array(array, file))


def converted(decoded: Tensor, output_type: str, pictures: bool, keep: tuple[Tensor, Tensor] | None) -> Any:
    """What a tokenizer decoded, converted to an output type (named as in diffusers).

    Pictures (B, c, H, W) in [-1, 1] come to the CPU: "pil" gives a list; "np" gives (B, H, W, c) float32 in [0, 1];
    "pt" gives (B, c, H, W) float32 in [0, 1], which is rounded to 8 bits only if an edit puts pixels back. `keep` holds
    the original pixels of an edit and its mask. What is not `pictures` is a tensor for "pt", otherwise an array.
    """
    if not pictures:
        return decoded if output_type == "pt" else decoded.cpu().numpy()
    if keep is None and output_type == "pt":
        return ((decoded.float() + 1) / 2).clamp(0, 1).cpu()
    arrays = to_uint8(decoded)  # (B, H, W, c)
    if keep is not None:
        arrays = composite(arrays, *keep)
    if output_type == "pt":
        return arrays.permute(0, 3, 1, 2).float() / 255
    return arrays.numpy().astype(np.float32) / 255 if output_type == "np" else as_pil(arrays)


def as_pil(arrays: Tensor) -> list[Image.Image]:
    """A list of PIL images from (B, H, W, c) uint8."""
    return [Image.fromarray(a[..., 0] if a.shape[-1] == 1 else a) for a in arrays.numpy()]

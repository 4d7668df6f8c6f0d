"""A generated picture that is saved with its request, wherever the user's own code saves it."""

from __future__ import annotations

import os
from io import BytesIO
from typing import IO, Any

from PIL import Image
from typing_extensions import override

from seriatim.pipeline.metadata import Recorded, chunk

EXTENSIONS = (".png", ".apng")


class SampleImage(Image.Image):
    """A PIL image of a result; `save` to a PNG file adds the metadata that `seriatim sample --from FILE` reads.

    Copies and everything that is derived from it (`resize`, `convert`, ...) are ordinary images without metadata,
    because their pixels are not those of the request. Pixels that are changed in place no longer have the recorded
    sha256, so that `--from` notices it. Other formats and a `pnginfo` of the caller's own are left alone.
    """

    says: Recorded | None = None

    @classmethod
    def of(cls, image: Image.Image, says: Recorded) -> SampleImage:
        """The same picture with its metadata; what has metadata already is returned unchanged."""
        if isinstance(image, cls):
            return image
        new = cls()
        Image.Image.__setstate__(new, image.__getstate__())
        new.says = says
        return new

    @override
    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:
        """Write the picture as `PIL.Image.Image.save` does, and its request too if the file is a PNG."""
        if self.says is not None and is_png(fp, format):
            params.setdefault("pnginfo", chunk(self.says))
        super().save(fp, format, **params)

    @override
    def __getstate__(self) -> list[Any]:
        return [*super().__getstate__(), self.says]

    @override
    def __setstate__(self, state: list[Any]) -> None:
        super().__setstate__(state[:-1])
        self.says = state[-1]


def is_png(file: str | bytes | os.PathLike[Any] | IO[bytes], format: str | None) -> bool:
    """Whether Pillow writes a PNG for these arguments of `save`: the format counts, or else the file's extension."""
    if format is not None:
        return format.upper() == "PNG"
    name = file if isinstance(file, (str, bytes, os.PathLike)) else getattr(file, "name", "")
    if not isinstance(name, (str, bytes, os.PathLike)):  # the number of an open file
        return False
    return os.path.splitext(os.fsdecode(name))[1].lower() in EXTENSIONS


def png_bytes(image: Image.Image, says: Recorded) -> bytes:
    """The bytes of a PNG file with this metadata."""
    file = BytesIO()
    Image.Image.save(image, file, "PNG", pnginfo=chunk(says))
    return file.getvalue()

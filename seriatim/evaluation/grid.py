"""Many images as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from seriatim.core.files import atomic_write


def grid(
    images: Sequence[Image.Image],
    columns: int,
    *,
    side: int = 32,
    gap: int = 2,
    smooth: bool = False,
    background: int = 128,
) -> Image.Image:
    """Images row by row, `columns` in a row; those smaller than `side` enlarged by a whole number."""
    width, height = images[0].size
    factor = max(1, side // max(width, height))
    width, height = width * factor, height * factor
    rows = -(-len(images) // columns)
    mode = images[0].mode
    fill = background if mode == "L" else (background,) * 3
    size = (columns * (width + gap) + gap, rows * (height + gap) + gap)
    sheet = Image.new(mode, size, fill)
    resample = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    for i, image in enumerate(images):
        place = (gap + i % columns * (width + gap), gap + i // columns * (height + gap))
        sheet.paste(image.resize((width, height), resample), place)
    return sheet


def save_png(image: Image.Image, path: Path | str) -> Path:
    return atomic_write(path, lambda file: image.save(file, format="PNG"))

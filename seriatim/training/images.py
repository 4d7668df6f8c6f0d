"""One image file, safely: bounded from its header, decoded, turned upright, cropped.

Files come from anywhere: truncated, renamed, huge, 390 bytes that claim 80,000 rows. Whatever is wrong becomes a
`BadImage` with a reason; memory stays within a small multiple of `MAX_PIXELS`. Nothing here needs torch.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from seriatim.core.errors import one_line

Source = Path | str | bytes

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # no format whose decoder runs programs or has had holes of late
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}
MAX_PIXELS = 1 << 25  # 33.6 megapixels: 100 MB decoded
MAX_ASPECT = 8.0  # a crop scales the short side up: 1 x 80000 would become 256 x 20,480,000
SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")


class BadImage(Exception):
    """This file is not an image that can be used; the message says why."""


def read_image(path: Source, channels: int) -> Image.Image:
    """The first frame of a file, or of the bytes of one: upright, 8 bits, transparency over white.

    "RGB" for 3 channels, "L" for 1.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.simplefilter("ignore", UserWarning)  # odd metadata of an image that decodes
            with Image.open(io.BytesIO(path) if isinstance(path, bytes) else path, formats=FORMATS) as image:
                check_header(image.size)
                image.load()
                return flatten(ImageOps.exif_transpose(image), "RGB" if channels == 3 else "L")
    except BadImage:
        raise
    except Image.UnidentifiedImageError:
        size = len(path) if isinstance(path, bytes) else Path(path).stat().st_size
        raise BadImage("empty file" if size == 0 else f"not a {', '.join(FORMATS)} file") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImage(f"more than {MAX_PIXELS / 1e6:.0f} megapixels") from None
    except FileNotFoundError:
        raise BadImage("no such file") from None
    except MemoryError:
        raise BadImage("out of memory while decoding") from None
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, struct.error, ...
        raise BadImage(one_line(error)[:120]) from None


def check_header(size: tuple[int, int]) -> None:
    """Refuse what would take too much memory, before a pixel is decoded."""
    width, height = size
    if min(size) < 1:
        raise BadImage(f"{width}x{height} pixels")
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width}x{height} pixels, more than {MAX_PIXELS / 1e6:.0f} megapixels")
    if max(size) > MAX_ASPECT * min(size):
        raise BadImage(f"{width}x{height} pixels, more than {MAX_ASPECT:g} times as long as wide")


def flatten(image: Image.Image, mode: str) -> Image.Image:
    """Any mode to 8-bit "RGB" or "L"."""
    if image.mode in SIXTEEN_BIT:  # Pillow's own conversion would clip at 255
        values = np.asarray(image).astype(np.float64).clip(0, 65535)
        image = Image.fromarray((values / 257).round().astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert(mode)


def centre_crop(image: Image.Image, size: Sequence[int]) -> Image.Image:
    """The largest centred part of the shape of `size` (H, W), scaled to it.

    ADM's preprocessing (Dhariwal & Nichol 2021): halve by boxes while both sides stay at least twice the target's,
    then one bicubic resize, then the crop.
    """
    H, W = size
    while image.width >= 2 * W and image.height >= 2 * H:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(W / image.width, H / image.height)
    if scale != 1.0:
        scaled = (max(W, round(image.width * scale)), max(H, round(image.height * scale)))
        image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (image.width - W) // 2, (image.height - H) // 2
    return image.crop((left, top, left + W, top + H))


def load_pixels(path: Source, size: Sequence[int], channels: int) -> npt.NDArray[np.uint8]:
    """(c, H, W) uint8 of one file; raises BadImage."""
    array = np.asarray(centre_crop(read_image(path, channels), size))
    return np.ascontiguousarray(array[None] if channels == 1 else array.transpose(2, 0, 1))

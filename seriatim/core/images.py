"""The only image decoder of this package, used for training data, hub datasets, caches, evaluation, edits and masks.

An image is read as a person sees it: the first frame, upright, in 8-bit sRGB, with transparent parts over a background
colour. Files come from anywhere and may be truncated, renamed or huge, or may claim 80,000 rows in 390 bytes. Every
fault raises `BadImage` with a reason of one line. This module does not import torch.

The header is checked before any pixel is decoded, and only the first frame is decoded. Decoding takes at most about
16 bytes a pixel (for the largest WebP files; 8 for most files), which is 0.8 GB at `MAX_PIXELS`. Each process decodes
only one image of more than `LARGE` pixels at a time.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import struct
import threading
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from seriatim.core.errors import UsageError, one_line
from seriatim.core.flatten import WHITE, Colour, flatten, turn_of, upright
from seriatim.core.names import printable
from seriatim.core.paring import pared

Source = Path | str | bytes

MAX_PIXELS = 3 << 24  # 50.3 megapixels (8192 x 6144), so that photographs of 48 and 50 megapixels are read
MOST_PIXELS = 178_000_000  # Pillow itself refuses larger images
LARGE = 1 << 24  # pixels; a larger image is decoded alone
MAX_ASPECT = 8.0  # a crop scales the short side up, so 1 x 80000 pixels would become 256 x 20,480,000

FORMAT_OF = {  # suffix -> Pillow's name of the format; formats whose decoder runs other programs are left out
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
    ".mpo": "JPEG",
    ".png": "PNG",
    ".apng": "PNG",
    ".webp": "WEBP",
    ".gif": "GIF",
    ".bmp": "BMP",
    ".dib": "DIB",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".avif": "AVIF",
    ".ppm": "PPM",
    ".pgm": "PPM",
    ".pbm": "PPM",
    ".pnm": "PPM",
    ".heic": "HEIF",
    ".heif": "HEIF",
}
UNREAD = set(  # image suffixes that may be unreadable here; they show that a folder was meant as a folder of images
    ".avif .heic .heif .hif .avifs .jp2 .j2k .jpf .jpx .jxl .jxr .qoi .tga .psd .psb .xcf .svg .svgz .eps .ai .ico "
    ".icns .pcx .sgi .dds .exr .hdr .pfm .fits .raw .dng .cr2 .cr3 .nef .arw .orf .raf .rw2 .pef .srw".split()
)
ACROSS = (Image.Transpose.TRANSPOSE, Image.Transpose.TRANSVERSE)
TILE_SIDES = (322, 323)  # the TIFF tags TileWidth and TileLength
DESCRIPTION = 0x010E  # the EXIF tag ImageDescription


# Each process id has its own lock, because a lock copied by a fork may be held by a thread of the parent process only.
LARGE_ONES: defaultdict[int, threading.Lock] = defaultdict(threading.Lock)


class BadImage(Exception):
    """A file is not a usable image; the message gives the reason on one line."""


class NoMemory(BadImage):
    """There was not enough memory to decode an image; at another time there may be."""


# --- settings -----------------------------------------------------------------------------------------------------


@functools.cache
def formats() -> tuple[str, ...]:
    """The formats of `FORMAT_OF` that the installed Pillow reads (HEIF needs a registered plugin)."""
    from PIL import features

    Image.init()
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # keeps Pillow's own log messages off the screen
    lacks = {"AVIF", "WEBP"} - {name.upper() for name in ("avif", "webp") if features.check(name)}
    return tuple(name for name in dict.fromkeys(FORMAT_OF.values()) if name in Image.OPEN and name not in lacks)


@functools.cache
def suffixes() -> frozenset[str]:
    """The lower-case suffixes of the files that can be read here."""
    return frozenset(suffix for suffix, name in FORMAT_OF.items() if name in formats())


def check_max_pixels(value: int, argument: str = "max_pixels") -> int:
    if not 1 <= value <= MOST_PIXELS:
        raise UsageError(
            f"{argument}: {value!r} is not allowed; it must be a number of pixels from 1 to {MOST_PIXELS:,}, such as "
            f"{MAX_PIXELS} (a picture takes up to 16 bytes a pixel while it is decoded)"
        )
    return value


# --- reading ------------------------------------------------------------------------------------------------------


def read_image(source: Source, channels: int, background: Colour = WHITE, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image in a file or in the bytes of a file, as a person sees it, in mode "RGB" (3 channels) or "L" (1).

    Transparent parts show `background`. Raises BadImage for a file that can't be decoded, and for more than
    `max_pixels` pixels, which the header tells before anything is decoded.
    """
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise BadImage("not a regular file" if Path(source).exists() else "no such file")
    mode = mode_of(channels)
    try:
        with SILENCE:
            try:
                return decoded(
                    io.BytesIO(source) if isinstance(source, bytes) else source, mode, background, max_pixels
                )
            except (BadImage, MemoryError):
                raise
            except Exception as error:
                for copy in pared(source):
                    with contextlib.suppress(OSError, ValueError, SyntaxError, LookupError, struct.error):
                        return decoded(copy, mode, background, max_pixels)
                raise error
    except BadImage:
        raise
    except Image.UnidentifiedImageError:
        raise unidentified(len(source) if isinstance(source, bytes) else Path(source).stat().st_size) from None
    except Image.DecompressionBombError:
        raise BadImage(f"more than {max_pixels / 1e6:.0f} megapixels") from None
    except MemoryError:
        raise NoMemory("out of memory while decoding") from None
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, struct.error, ...
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        raise BadImage(printable(reason)[:120]) from None


class Header(NamedTuple):
    """What the beginning of an image file says."""

    width: int  # of the upright picture
    height: int
    clear: bool  # whether parts of the picture may be transparent


def read_header(path: Path, max_pixels: int = MAX_PIXELS) -> Header:
    """What the beginning of an image file says; no pixels are decoded. Raises BadImage as `read_image` does."""
    try:
        with SILENCE, Image.open(path, formats=formats()) as image:
            check_header(image, max_pixels)
            clear = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
            turn = turn_of(image)
            sideways = turn in (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270, *ACROSS)
            width, height = image.size[::-1] if sideways else image.size
            return Header(width, height, clear)
    except (BadImage, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise unidentified(path.stat().st_size) from None
    except Exception as error:
        raise BadImage(printable(one_line(error))[:120]) from None


def unidentified(size: int) -> BadImage:
    """The error for a file of `size` bytes in which no format is recognised."""
    return BadImage("empty file" if size == 0 else f"not a {', '.join(formats())} file")


def read_png(path: Path, max_pixels: int = MOST_PIXELS, *, decode: bool = True) -> Image.Image:
    """A PNG that this package wrote, as it is stored, with its texts in `info`. Raises BadImage for any other file.

    Without `decode` the image has no pixels, and only the texts that stand before them.
    """
    return read_stored(path, max_pixels, decode=decode, kinds=("PNG",))


def read_stored(
    path: Path | BinaryIO,
    max_pixels: int = MOST_PIXELS,
    *,
    decode: bool = True,
    kinds: Sequence[str] = ("PNG", "JPEG", "WEBP"),
) -> Image.Image:
    """A picture in a file of one of these formats, as it is stored, with its texts in `info`; raises BadImage.

    The description in the EXIF data of a JPEG or WebP file is `info["description"]`.
    """
    try:
        with SILENCE, Image.open(path, formats=tuple(kinds)) as image:
            if image.width * image.height > max_pixels:
                raise BadImage(f"{image.width}x{image.height} pixels, more than any model here draws")
            if decode:
                image.load()
            if image.format != "PNG" and "exif" in image.info:
                image.info["description"] = image.getexif().get(DESCRIPTION)
            return image
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # Pillow raises OSError, ValueError, SyntaxError, ... for a damaged file
        said = " or ".join(kinds)
        raise BadImage(f"not a readable {said} ({printable(one_line(error))[:120]})") from error


def load_pixels(
    source: Source,
    size: Sequence[int],
    channels: int,
    background: Colour = WHITE,
    max_pixels: int = MAX_PIXELS,
) -> npt.NDArray[np.uint8]:
    """The pixels of a file, or of the bytes of one, cropped to `size`: (c, H, W) uint8; raises BadImage."""
    array = np.asarray(centre_crop(read_image(source, channels, background, max_pixels), size))
    return np.ascontiguousarray(array[None] if channels == 1 else array.transpose(2, 0, 1))


def as_seen(image: Image.Image, channels: int, background: Colour = WHITE) -> Image.Image:
    """An image that is already in memory, upright and in 8 bits as `read_image` returns it; raises BadImage."""
    try:
        with SILENCE:
            flat = flatten(image, mode_of(channels), background)
            return upright(flat, turn_of(image))
    except Exception as error:
        raise BadImage(printable(one_line(error))[:120]) from None


def mode_of(channels: int) -> str:
    return "RGB" if channels == 3 else "L"


def decoded(file: Path | str | BinaryIO, mode: str, background: Colour, max_pixels: int) -> Image.Image:
    """The first frame of an image file, upright, in `mode` "RGB" or "L", without transparency."""
    with contextlib.ExitStack() as alone:
        with Image.open(file, formats=formats()) as image:
            check_header(image, max_pixels)
            if image.width * image.height > LARGE:
                alone.enter_context(LARGE_ONES[os.getpid()])
            flat = flatten(image, mode, background)
            turn = turn_of(image)
        del image  # frees its memory before `upright` makes another copy
        return upright(flat, turn)


def check_header(image: Image.Image, max_pixels: int) -> None:
    """Raise BadImage for an image that would take too much memory; called before any pixel is decoded."""
    width, height = image.size
    if min(width, height) < 1:
        raise BadImage(f"{width}x{height} pixels")
    if width * height > max_pixels:
        raise BadImage(f"{width}x{height} pixels, more than {max_pixels / 1e6:.0f} megapixels (max_pixels)")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImage(f"{width}x{height} pixels, more than {MAX_ASPECT:g} times as long as wide")
    tags: Any = getattr(image, "tag_v2", {})
    wide, high = (tags.get(tag, 1) for tag in TILE_SIDES)
    if isinstance(wide, int) and isinstance(high, int) and wide * high > max(max_pixels, LARGE):
        raise BadImage(f"tiles of {wide}x{high} pixels in a picture of {width}x{height}")


class Silence:
    """A context manager that hides Pillow's warnings about odd metadata while any thread is inside.

    `warnings.catch_warnings` alone is not thread-safe: overlapping threads would restore each other's filters.
    """

    def __init__(self) -> None:
        self.lock, self.inside = threading.Lock(), 0
        self.before = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                self.before = warnings.catch_warnings()
                self.before.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                self.before.__exit__(None, None, None)


SILENCE = Silence()


def centre_crop(image: Image.Image, size: Sequence[int]) -> Image.Image:
    """The largest centred crop with the aspect ratio of `size` (H, W), scaled to `size`.

    This is ADM's preprocessing (Dhariwal & Nichol 2021): box downsampling by 2 while both sides are at least twice the
    target's, then one bicubic resize, then the crop.
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

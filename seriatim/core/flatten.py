"""Converts a decoded image to what a person sees: 8-bit sRGB or grey, upright, with transparency over a background.

Images are converted strip by strip, so that only a few megabytes are needed beside the image and the result.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageColor

from seriatim.core.errors import UsageError

Colour = tuple[int, int, int]

WHITE: Colour = (255, 255, 255)
BLACK: Colour = (0, 0, 0)
STRIP = 1 << 18  # pixels that are converted at a time
SAME = 3  # a profile that changes no colour by more than this many 8-bit levels counts as sRGB
PALETTES, NUMBERS = ("P", "PA"), ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
GREYS = ("1", "L", "LA", "La", *NUMBERS)
SCALED = {"L;2": 85, "L;4": 17}  # Pillow's name for grey PNGs of 2 and 4 bits -> its factor on their levels
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0  # the TIFF tag that says what the levels mean, and its value for negatives
ORIENTATION = 0x0112  # the EXIF tag of the orientation
TURNS = {  # EXIF orientation -> the operation that makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def as_colour(value: str | Sequence[int], argument: str = "background") -> Colour:
    """The (red, green, blue) levels, 0 to 255, of a name ("white"), "#rrggbb" or three numbers; raises UsageError."""
    try:
        levels = ImageColor.getrgb(value) if isinstance(value, str) else tuple(value)
    except (ValueError, TypeError):
        levels = ()
    if len(levels) == 3 and all(type(level) is int and 0 <= level <= 255 for level in levels):
        return levels[0], levels[1], levels[2]
    raise UsageError(
        f"{argument}: {value!r} is not a colour; name one such as white or '#ffffff', or give [red, green, blue], "
        "each from 0 to 255"
    )


# --- turning ------------------------------------------------------------------------------------------------------


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """The operation that makes a loaded image upright; None if it is upright or its EXIF block can't be read."""
    try:
        value = image.getexif().get(ORIENTATION)
    except Exception:  # damaged metadata does not damage the pixels
        return None
    return TURNS.get(value) if isinstance(value, int) else None


def upright(flat: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    """The image after `turn`, without its metadata, which has been applied to the pixels."""
    result = flat if turn is None else flat.transpose(turn)
    result.info = {}
    return result


# --- colours ------------------------------------------------------------------------------------------------------


def flatten(image: Image.Image, mode: str, background: Colour) -> Image.Image:
    """An image of any mode, converted to `mode` "RGB" or "L" over the background.

    16-bit levels are scaled to 8 bits. Floating-point levels are taken to range from 0 to 1, or from 0 to 255 if any of
    them is above 1.
    """
    tile = (getattr(image, "tile", None) or [None])[0]
    packed = str(tile.args) if tile else ""  # the pixel format in the file, which is lost when the image is loaded
    image.load()
    key = clear_colour(image, packed)
    profile = image.info.get("icc_profile")
    to_srgb = srgb_transform(profile, profile_mode(image.mode)) if profile and isinstance(profile, bytes) else None
    if image.mode == mode and key is None and to_srgb is None:
        return image
    scale = 255 if image.mode == "F" and not highest(image) > 1 else 1
    negative = is_negative(image)
    result = Image.new(mode, image.size)
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        colour, alpha = separated(strip, key, scale, negative)
        if to_srgb is not None:
            colour = ImageCms.applyTransform(colour, to_srgb)  # type: ignore[assignment]
        if alpha is not None:
            colour = colour.convert("RGB")
            colour.putalpha(alpha)
            colour = Image.alpha_composite(Image.new("RGBA", colour.size, (*background, 255)), colour)
        result.paste(colour.convert(mode), (0, top))
    return result


def is_negative(image: Image.Image) -> bool:
    """Whether a TIFF has levels of 16 bits or in floating point that are 0 for white, which Pillow leaves as they are.

    Levels of up to 8 bits are inverted by Pillow while it decodes them.
    """
    tags: Any = getattr(image, "tag_v2", {})
    return image.mode in NUMBERS and bool(tags.get(PHOTOMETRIC) == WHITE_IS_ZERO)


def highest(image: Image.Image) -> float:
    extremes: Any = image.getextrema()
    return float(extremes[1])


def clear_colour(image: Image.Image, packed: str) -> Any:
    """The colour that an image without an alpha channel declares transparent, in the levels of its pixels, or None."""
    key = image.info.get("transparency")
    if key is None or image.mode not in ("1", "L", "RGB", *NUMBERS):
        return None
    if image.mode == "RGB":
        if not isinstance(key, tuple) or len(key) != 3:
            return None
        return tuple(level >> 8 for level in key) if "16" in packed else key  # Pillow keeps the upper 8 of 16 bits
    if not isinstance(key, int):
        return None
    return (255 if key else 0) if image.mode == "1" else key * SCALED.get(packed, 1)


def separated(
    strip: Image.Image, key: Any, scale: int, negative: bool = False
) -> tuple[Image.Image, Image.Image | None]:
    """The 8-bit colours of a strip, in mode "RGB", "L" or "CMYK", and its alpha channel, in mode "L", or None.

    The colours are inverted if `negative`, which only images of numbers are.
    """
    if strip.mode in PALETTES:
        strip = strip.convert("RGBA" if strip.has_transparency_data else "RGB")
    strip.info = {}
    if strip.mode in ("RGBa", "La"):  # in these modes the colours are multiplied by alpha
        strip = strip.convert({"RGBa": "RGBA", "La": "LA"}[strip.mode])
    if strip.mode in ("RGBA", "LA"):
        return strip.convert(strip.mode[:-1]), strip.getchannel("A")
    alpha = None
    if key is not None:
        clear = np.asarray(strip if strip.mode != "1" else strip.convert("L")) == np.asarray(key)
        alpha = Image.fromarray(np.where(clear.all(axis=-1) if clear.ndim == 3 else clear, 0, 255).astype(np.uint8))
    if strip.mode in NUMBERS:
        levels = eight_bits(np.asarray(strip), scale)
        strip = Image.fromarray(255 - levels if negative else levels)
    if strip.mode not in ("RGB", "L", "CMYK"):
        strip = strip.convert("L" if strip.mode == "1" else "RGB")
    return strip, alpha


def eight_bits(levels: Any, scale: int) -> Any:
    """The levels as uint8, from 16-bit levels in any integer type or from floats, which are multiplied by `scale`."""
    if levels.dtype.kind == "f":
        return (np.nan_to_num(levels, nan=0.0) * np.float32(scale) + np.float32(0.5)).clip(0, 255).astype(np.uint8)
    return ((levels.clip(0, 65535).astype(np.uint32) + 128) // 257).astype(np.uint8)


# --- colour profiles ----------------------------------------------------------------------------------------------


def profile_mode(mode: str) -> str:
    """The mode of the colours that `separated` returns for an image of this mode."""
    return "L" if mode in GREYS else "CMYK" if mode == "CMYK" else "RGB"


@functools.lru_cache(maxsize=16)
def srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform from a colour profile to sRGB; None if the colours are sRGB already or the profile is unusable."""
    try:
        theirs = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(theirs, ImageCms.createProfile("sRGB"), mode, "RGB")
    except Exception:  # a damaged profile, or a Pillow without colour management, must not make the image unreadable
        return None
    if mode == "CMYK":
        return transform
    steps = np.linspace(0, 255, 9).astype(np.uint8)
    lattice = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(27, 27, 3)
    colours = Image.fromarray(lattice if mode == "RGB" else lattice[..., 0])
    after: Any = ImageCms.applyTransform(colours, transform)
    change = np.abs(np.asarray(after).astype(int) - np.asarray(colours.convert("RGB")))
    return None if change.max() <= SAME else transform

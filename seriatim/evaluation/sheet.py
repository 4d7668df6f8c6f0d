"""Many images as one picture with words: a row for each class, the name at its left, columns under headings.

The picture's file also tells where each image lies, so that another picture can be put together from several sheets.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from seriatim.core.files import atomic_write
from seriatim.core.reading import Unreadable, parse_json

SIDE = 64  # images whose longer side is smaller are enlarged by a whole number to at least this many pixels
GAP = 2  # pixels between images
APART = 10  # pixels between groups of columns
MARGIN = 6  # pixels beside a text
TEXT = 13  # the height of letters in pixels
WIDEST = 180  # pixels of the longest text at the left of a row
PAPER, INK = (232, 232, 232), (16, 16, 16)  # paper that is neither white nor black, as edges of pictures often are
PLACES = "seriatim-sheet"  # the PNG's text that holds the places

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Row:
    """Images that stand side by side, and the words at their left."""

    words: str
    images: Sequence[Image.Image]


@dataclass(frozen=True)
class Places:
    """Where the images of a sheet lie, in pixels."""

    lefts: tuple[int, ...]  # of each column
    tops: tuple[int, ...]  # of each row
    width: int  # of an image
    height: int
    words: tuple[str, ...]  # of each row

    def box(self, row: int, column: int) -> tuple[int, int, int, int]:
        left, top = self.lefts[column], self.tops[row]
        return left, top, left + self.width, top + self.height


def sheet(
    rows: Sequence[Row], headings: Sequence[tuple[str, int]] = (), *, side: int = SIDE
) -> tuple[Image.Image, Places]:
    """The rows as a picture, and where each image lies in it. All images have one size.

    `headings` are words above groups of columns, each with the number of its columns; the groups stand a little apart.
    """
    width, height = rows[0].images[0].size
    factor = max(1, -(-side // max(width, height)))
    width, height = width * factor, height * factor
    columns = max(len(row.images) for row in rows)
    headings = headings or [("", columns)]
    font = letters()
    words = [shortened(row.words, font, WIDEST) for row in rows]
    edge = max((length(text, font) for text in words), default=0)
    lefts, x = [], (edge + 2 * MARGIN if edge else 0) + GAP
    middles = []  # of the groups
    for text, group in headings:
        taken = group * (width + GAP) - GAP
        room = max(taken, min(length(text, font) + MARGIN, WIDEST))
        lefts += [x + (room - taken) // 2 + i * (width + GAP) for i in range(group)]
        middles.append(x + room / 2)
        x += room + APART
    top = (TEXT + 2 * MARGIN if any(text for text, _ in headings) else 0) + GAP
    tops = [top + i * (height + GAP) for i in range(len(rows))]
    picture = Image.new("RGB", (x - APART + GAP, tops[-1] + height + GAP), PAPER)
    draw = ImageDraw.Draw(picture)
    for (text, count), middle in zip(headings, middles, strict=True):
        room = max(WIDEST, count * (width + GAP))
        draw.text((middle, top / 2), shortened(text, font, room), INK, font, anchor="mm")
    for text, row, y in zip(words, rows, tops, strict=True):
        draw.text((edge + MARGIN, y + height / 2), text, INK, font, anchor="rm")
        for image, left in zip(row.images, lefts, strict=False):
            picture.paste(image.convert("RGB").resize((width, height), Image.Resampling.NEAREST), (left, y))
    return picture, Places(tuple(lefts), tuple(tops), width, height, tuple(row.words for row in rows))


def save_sheet(picture: Image.Image, places: Places, path: Path | str) -> Path:
    """Write a sheet as a PNG that tells where its images lie."""
    texts = PngInfo()
    texts.add_text(PLACES, json.dumps(asdict(places)))
    return atomic_write(path, lambda file: picture.save(file, format="PNG", pnginfo=texts))


def places_of(picture: Image.Image) -> Places | None:
    """Where the images of a sheet lie, as its file tells; None for any other picture."""
    try:
        told: dict[str, Any] = parse_json(str(picture.info[PLACES]), dict)
        told |= {name: tuple(told[name]) for name in ("lefts", "tops", "words")}
        places = Places(**told)
        numbers = (*places.lefts, *places.tops, places.width, places.height)
        inside = all(type(number) is int and 0 <= number <= max(picture.size) for number in numbers)
    except (Unreadable, KeyError, TypeError):
        return None
    whole = inside and places.lefts and places.tops and all(isinstance(text, str) for text in places.words)
    return places if whole and len(places.words) == len(places.tops) else None


# --- letters --------------------------------------------------------------------------------------------------------


@functools.cache
def letters(size: int = TEXT) -> Font:
    """A font with Latin, Greek, Cyrillic and many other letters: the one that comes with matplotlib."""
    try:
        from matplotlib import get_data_path

        return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
    except (ImportError, OSError):
        return ImageFont.load_default(size)


def length(text: str, font: Font) -> int:
    return round(font.getlength(text)) if text else 0


def shortened(text: str, font: Font, room: float) -> str:
    """The text on one line, cut where it would be wider than `room` pixels."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if length(text, font) <= room:
        return text
    while text and length(text + "…", font) > room:
        text = text[:-1]
    return text + "…" if text else ""


def legible(text: str) -> bool:
    """Whether the font has every letter of a text."""
    font = letters()
    if not isinstance(font, ImageFont.FreeTypeFont):
        return text.isascii()
    unknown = bytes(font.getmask("\uffff"))
    return all(c.isspace() or bytes(font.getmask(c)) != unknown for c in text if c.isprintable())

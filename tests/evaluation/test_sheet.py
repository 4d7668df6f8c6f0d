"""Sheets of images with words: every image lies where the file says, and words fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seriatim.core.images import read_png
from seriatim.evaluation.sheet import PLACES, Row, legible, length, letters, places_of, save_sheet, sheet, shortened


def picture(number: int, side: int = 8) -> Image.Image:
    return Image.fromarray(np.full((side, side, 3), number, np.uint8))


def rows(count: int, columns: int, side: int = 8) -> list[Row]:
    return [Row(f"class {i}", [picture(10 * i + k, side) for k in range(columns)]) for i in range(count)]


@pytest.mark.parametrize("side", [8, 32, 48, 100])
@pytest.mark.parametrize("headings", [[], [("guidance 1", 2), ("guidance 12.5", 1)]])
def test_images_lie_where_the_file_says(tmp_path: Path, side: int, headings: list[tuple[str, int]]) -> None:
    made = sheet(rows(3, 3, side), headings)
    path = save_sheet(*made, tmp_path / "sheet.png")
    opened = read_png(path)
    places = places_of(opened)
    assert places is not None and places.words == ("class 0", "class 1", "class 2")
    assert places.width == places.height >= 64 and places.width % side == 0
    boxes = []
    for i in range(3):
        for k in range(3):
            box = places.box(i, k)
            assert (np.asarray(opened.crop(box)) == 10 * i + k).all()
            boxes.append(box)
    assert all(right <= opened.width and bottom <= opened.height for _, _, right, bottom in boxes)
    apart = [a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1] for a in boxes for b in boxes if a != b]
    assert all(apart)


def test_words_are_drawn_beside_and_above() -> None:
    made, places = sheet(rows(2, 2), [("first", 1), ("second", 1)])
    left = np.asarray(made.crop((0, places.tops[0], places.lefts[0], made.height)))
    above = np.asarray(made.crop((0, 0, made.width, places.tops[0])))
    assert left.min() < 100 and above.min() < 100
    plain, places = sheet([Row("", [picture(1), picture(2)])])
    assert (places.lefts[0], places.tops[0]) == (2, 2) and plain.width == 2 * 64 + 3 * 2, "no room for no words"


def test_a_heading_that_is_wider_than_its_columns_has_room() -> None:
    narrow, _ = sheet(rows(1, 2), [("a", 1), ("b", 1)])
    wide, places = sheet(rows(1, 2), [("guidance 12.5", 1), ("guidance 100", 1)])
    assert wide.width > narrow.width and places.lefts[1] - places.lefts[0] > 64 + 10


def test_no_other_picture_is_taken_for_a_sheet(tmp_path: Path) -> None:
    made, places = sheet(rows(2, 2))
    assert places_of(made) is None, "only a file tells"
    for text in ("[]", "{}", "no json", '{"lefts": [1], "tops": [1], "width": 9, "height": 9, "words": []}',
                 '{"lefts": [-1], "tops": [1], "width": 9, "height": 9, "words": [""]}',
                 '{"lefts": ["1"], "tops": [1], "width": 9, "height": 9, "words": [""]}',
                 '{"lefts": [1], "tops": [1], "width": 99999, "height": 9, "words": [""]}',
                 '{"lefts": [], "tops": [], "width": 9, "height": 9, "words": []}',
                 '{"lefts": 3, "tops": [1], "width": 9, "height": 9, "words": [""]}',
                 '{"lefts": [1], "tops": [1], "width": 9, "height": 9, "words": [""], "more": 1}'):  # fmt: skip
        made.info[PLACES] = text
        assert places_of(made) is None, text
    assert places_of(read_png(save_sheet(made, places, tmp_path / "x.png"))) == places


def test_long_words_are_cut() -> None:
    font = letters()
    text = shortened("a very long name of a class\nthat nobody would read to its end", font, 100)
    assert text.endswith("…") and length(text, font) <= 100 and "\n" not in text
    assert shortened("short", font, 100) == "short" and shortened("wide", font, 1) == ""


def test_what_the_font_can_draw() -> None:
    assert legible("chien") and legible("Ψ β") and legible("собака")
    assert not legible("犬") and not legible("\U0001f9ff")

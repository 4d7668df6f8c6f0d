"""A picture of two models: the same labels from the same seeds, the row of A above the row of B."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from seriatim.evaluation.sheet import Row, save_sheet, sheet

PICTURE = "compare.png"
CLASSES, COLUMNS = 8, 8  # of the picture: classes that are shown, and seeds of each
ROWS = 4  # pairs of rows in the picture of models without classes


def shown(num: int, classes: int) -> list[list[int]]:
    """The numbers of the images in each pair of rows: some classes, evenly chosen, with their first images."""
    if not classes:
        return [list(range(row, min(row + COLUMNS, num))) for row in range(0, min(num, ROWS * COLUMNS), COLUMNS)]
    count = min(CLASSES, classes, num)
    step = min(classes, num) / count
    each = max(1, min(COLUMNS, num // classes))
    return [[int(i * step) + classes * j for j in range(each)] for i in range(count)]


def save_picture(
    folder: Path, pictures: Mapping[str, Sequence[Image.Image]], chosen: Sequence[Sequence[int]], classes: Sequence[str]
) -> None:
    rows, first = [], 0
    for images in chosen:
        some = slice(first, first + len(images))
        words = f"{classes[images[0] % len(classes)]}: " if classes else ""
        rows += [Row(f"{words}A", pictures["a"][some]), Row("B", pictures["b"][some])]
        first += len(images)
    save_sheet(*sheet(rows), folder / PICTURE)

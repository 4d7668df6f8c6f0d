"""List the pictures of a folder with the classes that its metadata.jsonl names, as `imagefolder` data sets have them.

Each line is a JSON object with the path of a picture, relative to the folder, under `file_name`, and columns of text
or numbers.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from seriatim.core.errors import DataError, nearest
from seriatim.core.names import as_text
from seriatim.core.reading import LISTING_BYTES, Unreadable, parse_json, read_or_raise, read_text
from seriatim.data.listing import Entry, Listing, Walk, as_class

FILE, NAME = "metadata.jsonl", "file_name"
USUAL = ("label", "class", "category", "labels", "classes", "cls", "fine_label")  # columns that hold classes
MOST_CLASSES = 200  # a column with more values than this describes pictures, and does not sort them
FEWEST_EACH = 5  # pictures that at least half of the classes have
COMPLETE = 0.9  # the share of the lines that have a class


def read_metadata(root: Path) -> list[dict[str, Any]]:
    """The lines of metadata.jsonl. Raises DataError for a line that is no object with a file name."""
    path = root / FILE
    remedy = (
        f"repair it (each line is an object with {NAME!r}), or set data.classes=true for classes by folder, or false"
    )
    text = read_or_raise(lambda: read_text(path, LISTING_BYTES), path, DataError, remedy)
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row: dict[str, Any] = parse_json(line, dict)
        except Unreadable as error:
            raise DataError(f"{path}: line {number} {error}; {remedy}") from error
        if not isinstance(row.get(NAME), str) or not is_inside(row[NAME]):
            raise DataError(f"{path}: line {number} has no {NAME!r} of a file in the folder; {remedy}")
        rows.append(row)
    return rows


def is_inside(name: str) -> bool:
    """Whether a relative path stays in its folder."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def list_metadata(root: Path, column: str) -> Listing:
    """The pictures that metadata.jsonl names, sorted by class and name; `column` has the class of each.

    Pictures that it does not name, or without a class, are passed over. Raises DataError if there is no such column.
    """
    rows = read_metadata(root)
    columns = {name for row in rows for name in row if name != NAME}
    if column not in columns:
        raise DataError(f"data.classes: {root / FILE} has no column {column!r}{nearest(column, sorted(columns))}")
    walk = Walk(root)
    pictures = dict(walk.pictures(str(root)))
    walk.passed_over.pop(FILE, None)  # it is used
    label_of = {os.path.normpath(row[NAME]).replace(os.sep, "/"): text_of(row.get(column)) for row in rows}
    names = sorted({label for name, label in label_of.items() if label is not None and name in pictures})
    number = {name: i for i, name in enumerate(names)}
    entries = []
    for name, stamp in pictures.items():
        label = label_of.get(name)
        if label is None:
            walk.passed_over[name] = f"no class in {FILE}" if name in label_of else f"not in {FILE}"
        else:
            entries.append(Entry(name, number[label], stamp))
    for name in label_of.keys() - pictures.keys() - walk.passed_over.keys():
        walk.passed_over[name] = f"named in {FILE}, but not a picture in the folder"
    entries.sort(key=lambda entry: (entry.label, entry.path.replace("/", "\0")))
    return Listing(entries, names, walk.passed_over)


def text_of(value: Any) -> str | None:
    """The name of a class; None for a value that names none, such as a list."""
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        return None
    return as_class(as_text(str(value)))


def class_column(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The column that sorts the pictures into classes best: one with a usual name, or else that with the fewest values.

    None if no column does: its values must be few, nearly every line must have one, and most must be shared.
    """
    fitting: list[tuple[int, int, str]] = []
    for name in {name for row in rows for name in row if name != NAME}:
        values = Counter(value for row in rows if (value := text_of(row.get(name))) is not None)
        counts = sorted(values.values())
        few = 2 <= len(values) <= MOST_CLASSES and counts[len(counts) // 2] >= FEWEST_EACH
        if few and sum(counts) >= COMPLETE * len(rows):
            rank = USUAL.index(name.lower()) if name.lower() in USUAL else len(USUAL)
            fitting.append((rank, len(values), name))
    return min(fitting)[2] if fitting else None


def has_metadata(root: Path) -> bool:
    try:
        return stat.S_ISREG(os.stat(root / FILE).st_mode)
    except OSError:
        return False

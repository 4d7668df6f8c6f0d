"""Whatever Hugging Face `datasets` loads: image folders, parquet, WebDataset tars, the hub; on the disk or streamed.

B images, c channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seriatim.core.errors import ConfigError, DataError, UsageError, nearest, one_line
from seriatim.core.flatten import WHITE, as_colour
from seriatim.core.images import MAX_PIXELS, BadImage, Source, check_max_pixels, load_pixels
from seriatim.core.random import derive_seed
from seriatim.data.base import ImageData, Position, Row, StreamData
from seriatim.data.folder import check_all, refuse_bad, square
from seriatim.data.listing import say_unused

LABELS = ("label", "labels", "cls", "class", "fine_label")  # looked for where none is named


class HuggingFace(ImageData):
    """`datasets.load_dataset(path, data_dir=..., data_files=..., split=...)`, images read as safely as files."""

    def __init__(
        self,
        path: str,  # "imagefolder", "parquet", "webdataset", a folder, or a repository of the hub
        size: int | Sequence[int] = 256,
        channels: int = 3,
        *,
        name: str | None = None,  # a configuration of the data set
        split: str = "train",
        data_dir: str | None = None,
        data_files: str | Sequence[str] | Mapping[str, str] | None = None,
        image: str | None = None,  # column of images; None: the first that holds any
        label: str | None = None,  # column of classes; None: a usual name, or unconditional
        flip: bool = True,
        max_bad: float = 0.01,
        check: bool = True,
        background: str | Sequence[int] = "white",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.background, self.max_pixels = as_colour(background), check_max_pixels(max_pixels)
        self.size, self.channels, self.flips = square(size, channels), channels, flip
        loaded, self.source = open_data(path, name, split, data_dir, data_files, streaming=False)
        self.source += f" {loaded._fingerprint}"
        self.image, label = columns(loaded.features, image, label)
        self.rows = as_bytes(loaded, self.image)
        self.class_names, labels = classes_of(loaded, label)
        self.bad: dict[str, str] = {}
        kept = list(range(len(self.rows)))
        if check:
            reasons = check_all(kept, lambda i: self._load(i))
            self.bad = {self._name(i): why for i, why in zip(kept, reasons, strict=True) if why}
            kept = [i for i, why in zip(kept, reasons, strict=True) if not why]
        refuse_bad(path, self.bad, len(self.rows), max_bad, len(kept))
        say_unused(path, self.bad, {})
        self.kept, self.count = kept, len(kept)
        self._labels = torch.tensor([labels[i] for i in kept]) if labels else None

    def _load(self, row: int) -> Any:
        return decode(self.rows[row][self.image], self)

    def _name(self, row: int) -> str:
        return f"row {row}" + file_name(self.rows[row][self.image])

    def images(self, index: Tensor) -> Tensor:
        """index (B,) -> (B, c, H, W) uint8."""
        try:
            return torch.from_numpy(np.stack([self._load(self.kept[int(i)]) for i in index]))
        except BadImage as error:
            raise DataError(f"data: an image can't be read any more ({error}), or data.check is off") from error

    def labels(self, index: Tensor) -> Tensor | None:
        return None if self._labels is None else self._labels[index]

    def name(self, i: int) -> str:
        return self._name(self.kept[i])

    def fingerprint(self) -> str:
        return f"{self.source} {self.count}{over(self)}"


class HuggingFaceStream(StreamData):
    """The same, read as it comes: nothing is downloaded beforehand, nothing kept.

    Shuffled through a buffer of `buffer` rows, anew each time the stream ends. What can't be used is met on the way:
    it is left out and listed, and more than `max_bad` of the rows is an error. One worker at most reads ahead.
    """

    def __init__(
        self,
        path: str,
        size: int | Sequence[int] = 256,
        channels: int = 3,
        *,
        name: str | None = None,
        split: str = "train",
        data_dir: str | None = None,
        data_files: str | Sequence[str] | Mapping[str, str] | None = None,
        image: str | None = None,
        label: str | None = None,
        classes: Sequence[str] | None = None,  # names; needed where the stream doesn't tell them itself
        buffer: int = 1000,  # rows among which one is drawn
        flip: bool = True,
        max_bad: float = 0.01,
        background: str | Sequence[int] = "white",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.background, self.max_pixels = as_colour(background), check_max_pixels(max_pixels)
        self.size, self.channels, self.flips, self.max_bad = square(size, channels), channels, flip, max_bad
        if not 0 <= max_bad <= 1:
            raise UsageError(f"max_bad: {max_bad!r} is not allowed; it must be a share from 0 to 1")
        if buffer < 1:
            raise UsageError(f"buffer: {buffer!r} is not allowed; it must be a number of rows, 1 or more")
        loaded, self.source = open_data(path, name, split, data_dir, data_files, streaming=True)
        if loaded.features is None:  # some formats tell their columns only by their rows
            loaded = loaded._resolve_features()
        self.image, self.label = columns(loaded.features, image, label)
        self.stream, self.buffer = as_bytes(loaded, self.image), buffer
        if next(iter(self.stream), None) is None:
            raise DataError(f"data.path: {path!r} streams no rows")
        names = getattr(loaded.features[self.label], "names", None) if self.label else None
        if self.label and not (classes or names):
            raise UsageError(
                f"classes: column {self.label!r} has no names of its classes and a stream can't be searched for them; "
                "give data.classes=[first, second, ...], or data.label=none for a model without classes"
            )
        self.class_names = [str(n) for n in (classes or names or [])] if self.label else []
        self.number = {name: i for i, name in enumerate(self.class_names)}
        info = (getattr(loaded.info, "splits", None) or {}).get(split)
        self.count = int(getattr(info, "num_examples", 0) or 0)
        self.bad: dict[str, str] = {}

    def fingerprint(self) -> str:
        return f"{self.source} buffer={self.buffer} {self.image} {self.label} {self.class_names}{over(self)}"

    def rows(self, seed: int, begin: Position) -> Iterator[Row]:
        """Rows from a position on: the same for the same (seed, position)."""
        epoch, first = begin
        while True:
            shuffled = self.stream.shuffle(seed=derive_seed(seed, "stream", epoch) % 2**32, buffer_size=self.buffer)
            number = first - 1
            for number, value in enumerate(shuffled.skip(first), first):
                label, why, pixels = 0, None, None
                try:
                    label = self._class(value)
                    pixels = decode(value[self.image], self)
                except BadImage as error:
                    why = str(error)
                name = f"row {number} of pass {epoch}" + file_name(value[self.image])
                yield Row(pixels, label, name, why, Position(epoch, number + 1))
            if number < 0:
                raise DataError("data: the stream has no rows any more")
            epoch, first = epoch + 1, 0

    def _class(self, value: Mapping[str, Any]) -> int:
        if self.label is None:
            return 0
        given = value[self.label]
        if given is None or given == -1:  # how data sets say that a row has no class
            return -1
        if isinstance(given, int) and 0 <= given < len(self.class_names):
            return given
        if str(given) in self.number:
            return self.number[str(given)]
        raise BadImage(f"class {given!r} is none of the {len(self.class_names)} classes")


def open_data(
    path: str,
    name: str | None,
    split: str,
    data_dir: str | None,
    data_files: str | Sequence[str] | Mapping[str, str] | None,
    *,
    streaming: bool,
) -> tuple[Any, str]:
    """The library's data set, and a line that says which it is."""
    try:
        import datasets
    except ImportError as error:
        raise ConfigError('data.kind: hf needs the library datasets; pip install ".[data]"') from error
    files = data_files if data_files is None or isinstance(data_files, (str, Mapping)) else list(data_files)
    try:
        datasets.disable_progress_bars()  # ours are one line
        loaded = datasets.load_dataset(
            path, name, split=split, data_dir=data_dir, data_files=files, streaming=streaming
        )
    except Exception as error:  # the library raises a dozen kinds: not found, no network, no such split, ...
        raise DataError(f"data.path: {path!r} can't be loaded ({one_line(error)[:200]})") from error
    return loaded, f"{path} {name or ''} {split} {data_dir or ''} {data_files or ''}"


def columns(features: Mapping[str, Any], image: str | None, label: str | None) -> tuple[str, str | None]:
    """The columns of images and of classes: as named, or found."""
    found = image or next((name for name, kind in features.items() if type(kind).__name__ == "Image"), None)
    if found is None or found not in features:
        raise UsageError(f"image: {image!r} is no column of images{nearest(str(image), features)}")
    if label == "none":
        return found, None
    label = label or next((c for c in LABELS if c in features), None)
    if label is not None and label not in features:
        raise UsageError(f"label: {label!r} is no column{nearest(label, features)}")
    return found, label


def as_bytes(loaded: Any, image: str) -> Any:
    """The data set with its images as they are stored: `images.py` decodes them, with bounds."""
    import datasets

    return loaded.cast_column(image, datasets.Image(decode=False))


def decode(value: Mapping[str, Any] | None, data: HuggingFace | HuggingFaceStream) -> Any:
    """(c, H, W) uint8 of a stored image, as the data set's settings say; raises BadImage."""
    source: Source | None = (value or {}).get("bytes") or (value or {}).get("path")
    if not source:
        raise BadImage("no image")
    return load_pixels(source, data.size, data.channels, data.background, data.max_pixels)


def over(data: ImageData) -> str:
    """The background as a part of a fingerprint; nothing where it is white."""
    return "" if data.background == WHITE else f" over {data.background}"


def file_name(value: Mapping[str, Any] | None) -> str:
    """ " (name.jpg)" where the stored image came from a file."""
    path = (value or {}).get("path")
    return f" ({Path(path).name})" if path else ""


def classes_of(loaded: Any, label: str | None) -> tuple[list[str], list[int]]:
    """Names of the classes and the class of each row (-1: none), from a ClassLabel, from integers or from text."""
    if label is None:
        return [], []
    values = list(loaded[label])
    for row, value in enumerate(values):
        if value is not None and not isinstance(value, (int, str)):
            raise UsageError(
                f"label: column {label!r} has {value!r} in row {row}, which is no number or name of a class"
            )
    names = getattr(loaded.features[label], "names", None)
    if names:
        return [str(name) for name in names], [-1 if value is None else int(value) for value in values]
    distinct = sorted(
        {value for value in values if value is not None}, key=lambda value: (isinstance(value, str), value)
    )
    number = {value: i for i, value in enumerate(distinct)}
    return [str(value) for value in distinct], [number.get(value, -1) for value in values]

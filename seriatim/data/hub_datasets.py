"""Data sources for all that Hugging Face `datasets` can load: parquet, WebDataset tars, the hub; local or streamed.

Shapes: B images, c channels, H x W pixels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from seriatim.core.errors import ConfigError, DataError, UsageError, nearest, one_line
from seriatim.core.files import sha256
from seriatim.core.flatten import WHITE, as_colour
from seriatim.core.images import MAX_PIXELS, BadImage, Source, check_max_pixels, load_pixels
from seriatim.core.random import derive_seed
from seriatim.data.base import ImageData, Position, Row, StreamData
from seriatim.data.folder import VERSION, apart, joined, reader_of, refuse_bad, square
from seriatim.data.known_files import Files, examine
from seriatim.data.listing import say_unused

LABELS = ("label", "labels", "cls", "class", "fine_label")  # the columns to look for if no column is named


class HuggingFace(ImageData):
    """The images of `datasets.load_dataset(path, data_dir=..., data_files=..., split=...)`, decoded within bounds."""

    def __init__(
        self,
        path: str,  # "imagefolder", "parquet", "webdataset", a folder, or a hub repository
        size: int | Sequence[int] = 256,
        channels: int = 3,
        *,
        name: str | None = None,  # a configuration of the data set
        split: str = "train",
        data_dir: str | None = None,
        data_files: str | Sequence[str] | Mapping[str, str] | None = None,
        image: str | None = None,  # the column of images; None takes the first that holds images
        label: str | None = None,  # the column of classes; None looks for a usual name; "none" means unconditional
        flip: bool = True,
        max_bad: float = 0.01,
        check: bool | Literal["full"] = True,
        background: str | Sequence[int] = "white",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.background, self.max_pixels = as_colour(background), check_max_pixels(max_pixels)
        self.size, self.channels, self.flips = square(size, channels), channels, flip
        loaded, self.source = open_data(path, name, split, data_dir, data_files, streaming=False)
        self._loaded = str(loaded._fingerprint)
        self.source += f" {self._loaded}"
        self.image, label = columns(loaded.features, image, label)
        self.rows = as_bytes(loaded, self.image)
        self.class_names, labels = classes_of(loaded, label)
        self.bad: dict[str, str] = {}
        self.kept = list(range(len(self.rows)))
        self._hashes: bytes | None = None
        if check:
            known = examine(self._files(decode=True), again=check == "full")
            self.bad = {self._name(i): about.verdict for i, about in enumerate(known) if isinstance(about.verdict, str)}
            self.kept = [i for i, about in enumerate(known) if about.verdict is True]
            self._hashes = joined(known[i] for i in self.kept)
        self.count = len(self.kept)
        refuse_bad(path, self.bad, len(self.rows), max_bad, self.count)
        say_unused(path, self.bad, {})
        self._labels = torch.tensor([labels[i] for i in self.kept]) if labels else None

    def _load(self, row: int) -> Any:
        return decode(self.rows[row][self.image], self)

    def _name(self, row: int) -> str:
        return f"row {row}" + file_name(self.rows[row][self.image])

    def images(self, index: Tensor) -> Tensor:
        """The images (B, c, H, W) uint8 with the numbers `index` (B,)."""
        try:
            return torch.from_numpy(np.stack([self._load(self.kept[int(i)]) for i in index]))
        except BadImage as error:
            raise DataError(
                f"data: an image can't be read ({error}); it was damaged after training began, or data.check is off"
            ) from error

    def labels(self, index: Tensor) -> Tensor | None:
        return None if self._labels is None else self._labels[index]

    def name(self, i: int) -> str:
        return self._name(self.kept[i])

    def fingerprint(self) -> str:
        """The sha256 of the rows' images and classes and their order; copies of the data have the same."""
        listing = [[] if self._labels is None else self._labels.tolist(), over(self)]
        return VERSION + hashlib.sha256(json.dumps(listing).encode() + self._sha256s()).hexdigest()

    def fingerprints(self) -> tuple[str, ...]:
        return self.fingerprint(), f"{self.source} {self.count}{over(self)}"

    def contents(self) -> Iterator[bytes]:
        return apart(self._sha256s())

    def _sha256s(self) -> bytes:
        """The sha256 of each row's image, one after another."""
        if self._hashes is None:
            known = examine(self._files(decode=False))
            self._hashes = joined(known[i] for i in self.kept)
        return self._hashes

    def _files(self, *, decode: bool) -> Files:
        """The rows as files. The library's own fingerprint in `source` changes when they do."""
        count = len(self.rows)
        return Files(
            f"datasets {self._loaded} {self.image}",
            [str(i) for i in range(count)],
            [(0, 0)] * count,
            digest=lambda i: digest_of(self.rows[i][self.image]),
            stamp=lambda _: (0, 0),
            decode=self._load if decode else None,
            reader=reader_of(self.channels, self.max_pixels),
        )


class HuggingFaceStream(StreamData):
    """The images of a streamed data set: nothing is downloaded beforehand, and nothing is stored.

    Rows are shuffled through a buffer of `buffer` rows, with a new seed for each pass over the stream. Unusable rows
    are met during training; they are left out and listed, and DataError is raised if their share exceeds `max_bad`. At
    most one worker can read ahead.
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
        classes: Sequence[str] | None = None,  # the names of the classes, if the data set doesn't state them
        buffer: int = 1000,  # each row is drawn at random among this many
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
        if loaded.features is None:  # some formats state their columns only in their rows
            loaded = loaded._resolve_features()
        self.image, self.label = columns(loaded.features, image, label)
        self.stream, self.buffer = as_bytes(loaded, self.image), buffer
        if next(iter(self.stream), None) is None:
            raise DataError(f"data.path: {path!r} streams no rows")
        names = getattr(loaded.features[self.label], "names", None) if self.label else None
        if self.label and not (classes or names):
            raise UsageError(
                f"classes: column {self.label!r} has no class names, and a stream can't be searched for them; "
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
        """Yield the rows from a position on; they depend on (seed, position) alone."""
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
        if given is None or given == -1:  # data sets mark rows without a class by -1
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
    """The data set as the library loads it, and a text that identifies it."""
    try:
        import datasets
    except ImportError as error:
        raise ConfigError('data.kind: hf needs the library datasets; pip install ".[data]"') from error
    files = data_files if data_files is None or isinstance(data_files, (str, Mapping)) else list(data_files)
    try:
        datasets.disable_progress_bars()  # Seriatim shows its own
        loaded = datasets.load_dataset(
            path, name, split=split, data_dir=data_dir, data_files=files, streaming=streaming
        )
    except Exception as error:  # the library raises a dozen kinds: not found, no network, no such split, ...
        raise DataError(f"data.path: {path!r} can't be loaded ({one_line(error)[:200]})") from error
    return loaded, f"{path} {name or ''} {split} {data_dir or ''} {data_files or ''}"


def columns(features: Mapping[str, Any], image: str | None, label: str | None) -> tuple[str, str | None]:
    """The names of the columns of images and of classes, which are searched for if they are not given."""
    found = image or next((name for name, kind in features.items() if type(kind).__name__ == "Image"), None)
    if found is None or found not in features:
        raise UsageError(f"image: {image!r} is not a column of images{nearest(str(image), features)}")
    if label == "none":
        return found, None
    label = label or next((c for c in LABELS if c in features), None)
    if label is not None and label not in features:
        raise UsageError(f"label: {label!r} is not a column{nearest(label, features)}")
    return found, label


def as_bytes(loaded: Any, image: str) -> Any:
    """The data set with encoded images, because `core/images.py` decodes them within bounds."""
    import datasets

    return loaded.cast_column(image, datasets.Image(decode=False))


def decode(value: Mapping[str, Any] | None, data: HuggingFace | HuggingFaceStream) -> Any:
    """The pixels (c, H, W) uint8 of a stored image, decoded with the settings of `data`. Raises BadImage."""
    source: Source | None = (value or {}).get("bytes") or (value or {}).get("path")
    if not source:
        raise BadImage("no image")
    return load_pixels(source, data.size, data.channels, data.background, data.max_pixels)


def digest_of(value: Mapping[str, Any] | None) -> str:
    """The sha256 of a stored image, which is in the row itself or in a file that the row names."""
    content, path = (value or {}).get("bytes"), (value or {}).get("path")
    return hashlib.sha256(content or b"").hexdigest() if content or not path else sha256(path)


def over(data: ImageData) -> str:
    """The background as a part of a fingerprint; an empty text if it is white."""
    return "" if data.background == WHITE else f" over {data.background}"


def file_name(value: Mapping[str, Any] | None) -> str:
    """The file name of a stored image as " (name.jpg)"; an empty text if it did not come from a file."""
    path = (value or {}).get("path")
    return f" ({Path(path).name})" if path else ""


def classes_of(loaded: Any, label: str | None) -> tuple[list[str], list[int]]:
    """The names of the classes, and the class of each row (-1 for none), from a ClassLabel, integers or text."""
    if label is None:
        return [], []
    values = list(loaded[label])
    for row, value in enumerate(values):
        if value is not None and not isinstance(value, (int, str)):
            raise UsageError(
                f"label: column {label!r} has {value!r} in row {row}, which is not a number or name of a class"
            )
    names = getattr(loaded.features[label], "names", None)
    if names:
        return [str(name) for name in names], [-1 if value is None else int(value) for value in values]
    distinct = sorted(
        {value for value in values if value is not None}, key=lambda value: (isinstance(value, str), value)
    )
    number = {value: i for i, value in enumerate(distinct)}
    return [str(value) for value in distinct], [number.get(value, -1) for value in values]

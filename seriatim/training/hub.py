"""Whatever Hugging Face `datasets` loads: image folders, parquet, WebDataset tars, the hub.

B images, c channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seriatim.core.errors import ConfigError, DataError, UsageError, nearest, one_line
from seriatim.training.data import ImageData
from seriatim.training.folder import check_all, refuse_bad, square
from seriatim.training.images import BadImage, Source, load_pixels

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
    ) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ConfigError('data.kind: hf needs the library datasets; pip install ".[data]"') from error
        self.size, self.channels, self.flips = square(size, channels), channels, flip
        files = data_files if data_files is None or isinstance(data_files, (str, Mapping)) else list(data_files)
        try:
            loaded = datasets.load_dataset(path, name, split=split, data_dir=data_dir, data_files=files)
        except Exception as error:  # the library raises a dozen kinds: not found, no network, no such split, ...
            raise DataError(f"data.path: {path!r} can't be loaded ({one_line(error)[:200]})") from error
        self.source = f"{path} {name or ''} {split} {data_dir or ''} {data_files or ''} {loaded._fingerprint}"
        self.image = pick_column(loaded, image)
        if (image is None and self.image is None) or self.image not in loaded.column_names:
            raise UsageError(f"image: {image!r} is no column of images{nearest(str(image), loaded.column_names)}")
        label = label or next((c for c in LABELS if c in loaded.column_names), None)
        if label is not None and label not in loaded.column_names:
            raise UsageError(f"label: {label!r} is no column{nearest(label, loaded.column_names)}")
        self.rows = loaded.cast_column(self.image, datasets.Image(decode=False))  # bytes: decoded here, with bounds
        self.class_names, labels = classes_of(loaded, label)
        self.bad: dict[str, str] = {}
        kept = list(range(len(self.rows)))
        if check:
            reasons = check_all(kept, lambda i: self._load(i))
            self.bad = {self._name(i): why for i, why in zip(kept, reasons, strict=True) if why}
            kept = [i for i, why in zip(kept, reasons, strict=True) if not why]
        refuse_bad(path, self.bad, len(self.rows), max_bad, len(kept))
        self.kept, self.count = kept, len(kept)
        self._labels = torch.tensor([labels[i] for i in kept]) if labels else None

    def _load(self, row: int) -> Any:
        value = self.rows[row][self.image] or {}
        source: Source | None = value.get("bytes") or value.get("path")
        if not source:
            raise BadImage("no image")
        return load_pixels(source, self.size, self.channels)

    def _name(self, row: int) -> str:
        path = (self.rows[row][self.image] or {}).get("path")
        return f"row {row}" + (f" ({Path(path).name})" if path else "")

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
        return f"{self.source} {self.count}"


def pick_column(loaded: Any, image: str | None) -> str | None:
    """The named column, or the first that holds images."""
    if image is not None:
        return image
    return next((name for name, kind in loaded.features.items() if type(kind).__name__ == "Image"), None)


def classes_of(loaded: Any, label: str | None) -> tuple[list[str], list[int]]:
    """Names of the classes and the class of each row, from a ClassLabel, from integers or from text."""
    if label is None:
        return [], []
    values = list(loaded[label])
    names = getattr(loaded.features[label], "names", None)
    if names:
        return [str(name) for name in names], [int(value) for value in values]
    distinct = sorted(set(values))
    number = {value: i for i, value in enumerate(distinct)}
    return [str(value) for value in distinct], [number[value] for value in values]

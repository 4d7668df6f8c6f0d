"""The data source for tokens in a .npy or .safetensors file, such as sequences that are not pictures.

Shapes: N sequences, L tokens of D features (N, L, D) in floating point, or L codes (N, L) as integers; labels (N,).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seriatim.core.array_reading import map_npy, read_safetensors
from seriatim.core.errors import ConfigError, DataError
from seriatim.core.files import expanded, sha256
from seriatim.core.reading import read_or_raise
from seriatim.data.base import ImageData
from seriatim.tokenizers.arrays import Arrays
from seriatim.tokenizers.base import Tokenizer

TOKENS, LABELS = "tokens", "labels"  # the names of the tensors in a safetensors file
MOST_TOKENS = 1 << 20  # the limit for the tokens of a sequence, and for the features of a token
MOST_CLASSES = 1 << 20
SAVE_AGAIN = "save the array again"
AT_ONCE = 1 << 22  # numbers that are checked at once, to bound memory


class ArrayData(ImageData):
    """The tokens in `path`: the array of a .npy file, or the tensors `tokens` and `labels` of a .safetensors file.

    `labels` names a .npy file of whole numbers from 0. The "images" of this source are moments (B, D, 1, L), or codes
    (B, 1, 1, L), for the tokenizer `arrays`. Every number is checked before training begins. A .npy file may be larger
    than memory.
    """

    cached = True
    pictures = False

    def __init__(self, path: str, labels: str | None = None) -> None:
        self.root = expanded(path)
        held = read(self.root, "data.path")
        if TOKENS not in held:
            raise DataError(f"data.path: {self.root} has no tensor {TOKENS!r}; it has {', '.join(map(repr, held))}")
        self._rows: Any = held[TOKENS]  # (N, L, D) or (N, L)
        shape, kind = tuple(self._rows.shape), str(self._rows.dtype).removeprefix("torch.")
        floats, whole = kind.startswith(("float", "bfloat")), kind.startswith(("int", "uint"))
        if not (floats or whole):
            raise DataError(f"data.path: {self.root} holds {kind}; tokens are floating-point features or integer codes")
        if len(shape) != (3 if floats else 2):
            wanted = "(sequences, tokens, features)" if floats else "(sequences, tokens)"
            raise DataError(f"data.path: {self.root} has shape {shape} of {kind}; reshape it to {wanted}")
        if not all(shape):
            raise DataError(f"data.path: {self.root} has shape {shape}: no tokens at all; name another file")
        if shape[1] > MOST_TOKENS or shape[-1] > MOST_TOKENS:
            raise DataError(f"data.path: {self.root} has shape {shape}; a row has at most {MOST_TOKENS:,} tokens")
        self.codes, self.count, self.size = whole, shape[0], (1, shape[1])
        self.channels = 1 if whole else shape[2]
        self.least, self.most = self._look_over()
        self._labels, self._label_file = None, None
        if labels is not None:
            self._label_file = expanded(labels)
            given = read(self._label_file, "data.labels")
            if LABELS not in given and TOKENS not in given:
                raise DataError(f"data.labels: {self._label_file} has no tensor {LABELS!r}")
            self._labels = self._checked(given.get(LABELS, given.get(TOKENS)), str(self._label_file))
        elif LABELS in held:
            self._labels = self._checked(held[LABELS], str(self.root))
        self.class_names = [] if self._labels is None else [str(i) for i in range(int(self._labels.max()) + 1)]

    def _look_over(self) -> tuple[int, int]:
        """The least and the largest code; both are 0 for features. Raises DataError if a feature is not finite."""
        size = max(1, AT_ONCE // (self.size[1] * self.channels))
        least, most = 0, 0
        for first in range(0, self.count, size):
            rows = self._read(slice(first, first + size))  # (n, L, D) or (n, L)
            if self.codes:
                least, most = min(least, int(rows.min())), max(most, int(rows.max()))
                continue
            bad = (~torch.isfinite(rows)).flatten(1).any(dim=1)
            if bool(bad.any()):
                row = first + int(bad.nonzero()[0])
                raise DataError(f"data.path: {self.root}: row {row} has values that are not finite as float32; mend it")
        return least, most

    def _read(self, rows: Any) -> Tensor:
        found = self._rows[rows]
        if not isinstance(found, Tensor):
            wanted = np.int64 if self.codes else np.float32
            with np.errstate(over="ignore"):  # too large a number becomes infinite, which is reported later
                found = torch.from_numpy(np.array(found, dtype=wanted))
        return found.to(torch.int64 if self.codes else torch.float32)

    def _checked(self, given: Any, where: str) -> Tensor:
        if isinstance(given, np.ndarray) and given.dtype.kind not in "biuf":
            raise DataError(f"data.labels: {where} has {given.dtype}; give {self.count} whole numbers")
        labels = torch.as_tensor(np.array(given) if isinstance(given, np.ndarray) else given)
        whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
        if labels.ndim != 1 or not whole:
            kind = str(labels.dtype).removeprefix("torch.")
            raise DataError(
                f"data.labels: {where} has {kind} of shape {tuple(labels.shape)}; give {self.count} whole numbers"
            )
        if len(labels) != self.count:
            raise DataError(f"data.labels: {where} has {len(labels)} labels for {self.count} sequences; give each one")
        labels = labels.long()
        if int(labels.min()) < 0:
            raise DataError(f"data.labels: {where} has the label {int(labels.min())}; classes are numbered from 0")
        if int(labels.max()) >= MOST_CLASSES:
            most = f"classes are numbered from 0 to {MOST_CLASSES - 1:,}"
            raise DataError(f"data.labels: {where} has the label {int(labels.max())}; {most}")
        return labels

    def images(self, index: Tensor) -> Tensor:
        """The moments (B, D, 1, L) float32, or codes (B, 1, 1, L) int64, of the rows `index` (B,)."""
        rows = self._read(index.numpy())
        return rows[:, None, None] if self.codes else rows.transpose(1, 2)[:, :, None]

    def labels(self, index: Tensor) -> Tensor | None:
        return None if self._labels is None else self._labels[index]

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        if not isinstance(tokenizer, Arrays):
            raise ConfigError(
                f"tokenizer: {type(tokenizer).__name__} takes pictures, but {self.root} holds tokens; use kind: arrays"
            )
        if not self.codes and tokenizer.vocab is not None:
            raise ConfigError(f"tokenizer.vocab: {self.root} holds features, not codes; leave it out")
        if self.codes and tokenizer.vocab is None:
            raise ConfigError(f"tokenizer.vocab: is required; {self.root} holds codes up to {self.most}: set how many")
        if self.codes and tokenizer.vocab is not None and not 0 <= self.least <= self.most < tokenizer.vocab:
            raise DataError(
                f"data.path: {self.root} holds codes from {self.least} to {self.most}, outside the vocabulary of "
                f"{tokenizer.vocab}; set tokenizer.vocab, or correct the codes"
            )

    def name(self, i: int) -> str:
        return f"row {i}"

    def contents(self) -> Iterator[bytes] | None:
        """The sha256 of each row of features. Rows of codes have none, as short ones may be equal by chance."""
        if self.codes:
            return None
        size = max(1, AT_ONCE // (self.size[1] * self.channels))
        parts = (self._read(slice(first, first + size)) for first in range(0, self.count, size))
        return (hashlib.sha256(row.numpy().tobytes()).digest() for rows in parts for row in rows)

    def fingerprint(self) -> str:
        """The sha256 of the files."""
        files = [self.root, *([self._label_file] if self._label_file else [])]
        return hashlib.sha256(" ".join(sha256(file) for file in files).encode()).hexdigest()


def read(path: Path, argument: str) -> dict[str, Any]:
    """The arrays of a file by name. The array of a .npy file is named `tokens`, and is mapped into memory."""
    if path.suffix not in (".npy", ".safetensors"):
        raise DataError(f"{argument}: {path} is neither .npy nor .safetensors; save the array as one of these")
    if not path.is_file():
        raise DataError(f"{argument}: there is no file {path}")
    if path.suffix == ".npy":
        return {TOKENS: read_or_raise(lambda: map_npy(path), f"{argument}: {path}", DataError, SAVE_AGAIN)}
    return dict(read_or_raise(lambda: read_safetensors(path), f"{argument}: {path}", DataError, SAVE_AGAIN))

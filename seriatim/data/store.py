"""Shards: numbered files of tensors, each beside a small file that says what it is; for caches and evaluations.

    FOLDER/NAME.safetensors  the tensors
    FOLDER/NAME.json         {"images", "bytes", "sha256", "key"}, written after the tensors

A shard is whole where both files are there and agree. What was interrupted or damaged is made anew by whoever comes
next.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load
from torch import Tensor

from seriatim.checkpoints.native import write_tensors
from seriatim.core.errors import CheckpointError
from seriatim.core.files import atomic_write, sha256, sweep, write_json
from seriatim.core.reading import Unreadable, read_json
from seriatim.core.terminal import say

STATED = {"images", "bytes", "sha256", "key"}  # the keys of a sidecar


@dataclass(frozen=True)
class Shards:
    """The shards of a folder. `key` tells what they are part of: one of another key doesn't pass for one of these."""

    folder: Path
    name: Callable[[int], str]  # of a shard by its number, without a suffix
    images: Callable[[int], int]  # in a shard
    key: str

    def path(self, number: int) -> Path:
        return self.folder / f"{self.name(number)}.safetensors"

    def sidecar(self, number: int) -> Path:
        return self.folder / f"{self.name(number)}.json"

    def there(self, number: int) -> bool:
        """Whether a shard was written, which its sidecar, written last, tells. Whether it is whole takes reading it."""
        return self.sidecar(number).is_file() and self.path(number).is_file()

    def _as_it_is(self, number: int) -> dict[str, Any]:
        path = self.path(number)
        return {"images": self.images(number), "bytes": path.stat().st_size, "sha256": sha256(path), "key": self.key}

    def whole(self, number: int) -> str | None:
        """The sha256 of a shard that is what its sidecar says; None where it has to be made, which is said."""
        if not self.sidecar(number).is_file():
            return None
        with contextlib.suppress(Unreadable, OSError):
            stated = read_json(self.sidecar(number), dict)
            if stated == self._as_it_is(number):
                return str(stated["sha256"])
        say(f"mending: {self.path(number)} is not what {self.sidecar(number).name} says; making it again")
        return None

    def write(self, number: int, tensors: Mapping[str, Tensor]) -> str:
        """Write a shard and then its sidecar; return its sha256."""
        self.sidecar(number).unlink(missing_ok=True)  # that of a damaged one must not be taken for this one's
        atomic_write(self.path(number), partial(write_tensors, tensors=dict(tensors)))
        stated = self._as_it_is(number)
        write_json(self.sidecar(number), stated)
        return str(stated["sha256"])

    def read(self, number: int) -> dict[str, Tensor]:
        """The tensors of a shard; raises CheckpointError where it is not whole."""
        if self.whole(number) is None:
            raise CheckpointError(f"{self.path(number)} is damaged; the same command makes it again")
        return load(self.path(number).read_bytes())

    def sweep(self, number: int) -> None:
        """Remove what a process that was killed left half-written of a shard."""
        sweep(self.folder, {self.path(number).name, self.sidecar(number).name}.__contains__)

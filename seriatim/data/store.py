"""Shards: numbered files of tensors, each with a small sidecar file that describes it; for caches and evaluations.

    FOLDER/NAME.safetensors  the tensors
    FOLDER/NAME.json         the sidecar {"images", "bytes", "sha256", "key"}, written after the tensors

A shard is whole if both files exist and agree. The next process makes interrupted or damaged shards again.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from seriatim.core.errors import CheckpointError
from seriatim.core.files import atomic_write, sha256, sweep, write_json
from seriatim.core.reading import Unreadable, read_json
from seriatim.core.terminal import say

STATED = {"images", "bytes", "sha256", "key"}  # the keys of a sidecar


@dataclass(frozen=True)
class Shards:
    """The shards of a folder. `key` identifies what they are part of; a shard with another key is not accepted."""

    folder: Path
    name: Callable[[int], str]  # the name of a shard by its number, without a suffix
    images: Callable[[int], int]  # the number of images in a shard
    key: str

    def path(self, number: int) -> Path:
        return self.folder / f"{self.name(number)}.safetensors"

    def sidecar(self, number: int) -> Path:
        return self.folder / f"{self.name(number)}.json"

    def lock(self, number: int) -> Path:
        """The lock file of a shard, for `claims`."""
        return self.folder / f".{self.name(number)}.lock"

    def there(self, number: int) -> bool:
        """Whether a shard was written, without reading it to find out whether it is whole."""
        return self.sidecar(number).is_file() and self.path(number).is_file()

    def _as_it_is(self, number: int) -> dict[str, Any]:
        path = self.path(number)
        return self._described(number, path.stat().st_size, sha256(path))

    def _described(self, number: int, size: int, sha: str) -> dict[str, Any]:
        return {"images": self.images(number), "bytes": size, "sha256": sha, "key": self.key}

    def whole(self, number: int) -> str | None:
        """The sha256 of a shard that agrees with its sidecar; None if it has to be made. Damage is reported."""
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
        self.sidecar(number).unlink(missing_ok=True)  # the sidecar of a damaged shard must not describe this one
        # safetensors' own writer would make a file whose name `sweep` does not know, and a kill would leave it here
        content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        atomic_write(self.path(number), lambda file: file.write_bytes(content))
        stated = self._as_it_is(number)
        write_json(self.sidecar(number), stated)
        return str(stated["sha256"])

    def read(self, number: int) -> dict[str, Tensor]:
        """The tensors of a shard. Raises CheckpointError if it is not whole."""
        with contextlib.suppress(Unreadable, OSError):
            content = self.path(number).read_bytes()  # what is checked is what is used
            if read_json(self.sidecar(number), dict) == self._described(
                number, len(content), hashlib.sha256(content).hexdigest()
            ):
                return load(content)
        raise CheckpointError(f"{self.path(number)} is damaged; repeat the command to mend it")

    def sweep(self, number: int) -> None:
        """Remove half-written files of a shard that a killed process left behind."""
        sweep(self.folder, {self.path(number).name, self.sidecar(number).name}.__contains__)

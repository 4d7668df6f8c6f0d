"""The only reader of arrays in files: .npy, .npz and .safetensors, used for data, references, caches and weights.

Files come from anywhere and may be damaged, hold pickled programs, or claim more than a thousand times their size.
Nothing pickled is run, and what an archive declares is checked before any array of it is read. Every fault raises
`Unreadable`, whose text completes the sentence "this file ...", and lack of memory raises ResourceError.
"""

from __future__ import annotations

import contextlib
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from torch import Tensor

from seriatim.core.errors import ResourceError, is_out_of_memory, one_line
from seriatim.core.files import utf8_path
from seriatim.core.reading import Unreadable

HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class Declared(NamedTuple):
    """What an archive says of one of its arrays."""

    name: str
    shape: tuple[int, ...]
    bytes: int  # once it is unpacked
    packing: float  # how many times that is its size in the file


@contextlib.contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Name the file in an error of memory, and turn every other one into Unreadable."""
    try:
        yield
    except (Unreadable, ResourceError):
        raise
    except Exception as error:  # zipfile's, zlib's, those of numpy's parsers: a damaged file makes them raise anything
        if is_out_of_memory(error):
            raise ResourceError(f"{path}: out of memory ({one_line(error)[:80]}); use a smaller file") from error
        reason = one_line(error)
        if "allow_pickle" in reason:
            reason = "it holds Python objects, which could run any program; none was run"
        raise Unreadable(f"is not a readable {what} file ({reason[:160]})") from error


def map_npy(path: Path) -> npt.NDArray[Any]:
    """The array of a .npy file, mapped into memory, so that it may be larger than memory."""
    with reading(path, ".npy"):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray):  # it is an archive of arrays in spite of its name
            array.close()
            raise ValueError("it is an archive, not one array")
        return array


def read_npz(path: Path, names: Iterable[str], check: Callable[[Declared], None]) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a .npz file among `names`.

    `check` may refuse each of them by what the file declares, before any is read, by raising Unreadable.
    """
    with reading(path, ".npz"):
        with zipfile.ZipFile(path) as archive:
            held = [name for name in names if f"{name}.npy" in archive.namelist()]
            for name in held:
                check(declared(archive, name))
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in held}


def declared(archive: zipfile.ZipFile, name: str) -> Declared:
    """What an archive says of an array. Raises ValueError unless the array has as many bytes as that takes."""
    entry = archive.getinfo(f"{name}.npy")
    with archive.open(entry) as member:
        version = np.lib.format.read_magic(member)
        if version not in HEADERS:
            raise ValueError(f"{name} is of an unknown version {version}")
        shape, _, dtype = HEADERS[version](member)
        begin = member.tell()
    size = math.prod(shape) * dtype.itemsize
    if dtype.hasobject or size != entry.file_size - begin:
        raise ValueError(f"{name} is not the array of {dtype} and shape {shape} that it says it is")
    return Declared(name, shape, size, size / max(1, entry.compress_size))


def open_safetensors(path: Path) -> Any:
    """A safetensors file whose tensors are read when they are asked for by name."""
    with reading(path, "safetensors"), utf8_path(path) as readable:
        return safe_open(readable, framework="pt")


def slice_of(path: Path, name: str) -> Any:
    """One tensor of a safetensors file, whose rows are read when they are asked for by indexing."""
    with reading(path, "safetensors"):
        return open_safetensors(path).get_slice(name)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file by name."""
    with reading(path, "safetensors"):
        file = open_safetensors(path)
        return {name: file.get_tensor(name) for name in file.keys()}  # the handle itself can't be iterated

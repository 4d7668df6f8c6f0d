"""The reader of arrays: what it gives back, and what it refuses of damaged, hostile and misnamed files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from seriatim.core import array_reading
from seriatim.core.array_reading import Declared, map_npy, open_safetensors, read_npz, read_safetensors, slice_of
from seriatim.core.errors import ResourceError
from seriatim.core.reading import Unreadable


def accept(_: Declared) -> None:
    """Every array is wanted."""


READERS: dict[str, Callable[[Path], Any]] = {
    ".npy": map_npy,
    ".npz": lambda path: read_npz(path, ["a", "b"], accept),
    ".safetensors": read_safetensors,
}


def write(path: Path) -> Path:
    a, b = np.arange(600, dtype=np.float32).reshape(20, 30), np.arange(7)
    if path.suffix == ".npy":
        np.save(path, a)
    elif path.suffix == ".npz":
        np.savez(path, a=a, b=b, other=a)
    else:
        save_file({"a": torch.from_numpy(a), "b": torch.from_numpy(b)}, path)
    return path


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    mapped = map_npy(write(tmp_path / "x.npy"))
    assert isinstance(mapped, np.memmap) and mapped[19, 29] == 599
    asked: list[Declared] = []
    found = read_npz(write(tmp_path / "x.npz"), ["a", "b", "missing"], asked.append)
    assert found.keys() == {"a", "b"} and found["a"].shape == (20, 30)
    assert [(says.name, says.shape, says.bytes) for says in asked] == [("a", (20, 30), 2400), ("b", (7,), 56)]
    tensors = read_safetensors(write(tmp_path / "x.safetensors"))
    assert tensors.keys() == {"a", "b"} and tensors["b"].tolist() == list(range(7))
    assert slice_of(tmp_path / "x.safetensors", "a")[3:5].tolist() == tensors["a"][3:5].tolist()
    assert set(open_safetensors(tmp_path / "x.safetensors").keys()) == {"a", "b"}


@pytest.mark.parametrize("suffix", READERS)
def test_names_that_are_not_utf8(suffix: str, tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff" + suffix.encode()))
    assert len(READERS[suffix](write(tmp_path / f"plain{suffix}").rename(odd))) > 0


@pytest.mark.parametrize("suffix", READERS)
def test_damage_anywhere_is_one_line_that_completes_a_sentence(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"x{suffix}")
    whole = path.read_bytes()
    damaged = [b"", b"nothing of the kind", whole[: len(whole) // 2], whole[:20] + bytes(40) + whole[60:]]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(Unreadable, match=rf"^is not a readable {suffix.replace('.s', 's')} file \(.+\)$"):
            READERS[suffix](path)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_nothing_pickled_is_run(suffix: str, tmp_path: Path) -> None:
    evil = np.array([{"a": 1}], dtype=object)
    path = tmp_path / f"x{suffix}"
    np.save(path, evil, allow_pickle=True) if suffix == ".npy" else np.savez(path, a=evil)
    with pytest.raises(Unreadable, match=r"Python objects|is not the array"):
        READERS[suffix](path)


def test_an_archive_named_as_an_array_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unreadable, match="it is an archive, not one array"):
        map_npy(write(tmp_path / "x.npz").rename(tmp_path / "x.npy"))


def test_a_refused_array_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(says: Declared) -> None:
        raise Unreadable(f"has {says.name} of {says.bytes} bytes")

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("read before it was refused")

    path = write(tmp_path / "x.npz")
    monkeypatch.setattr(np, "load", never)
    with pytest.raises(Unreadable, match=r"^has a of 2400 bytes$"):
        read_npz(path, ["a"], refuse)


@pytest.mark.parametrize("suffix", READERS)
def test_lack_of_memory_is_no_damage(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise MemoryError("Unable to allocate 9 GiB")

    path = write(tmp_path / f"x{suffix}")
    monkeypatch.setattr(np, "load", full)
    monkeypatch.setattr(array_reading, "safe_open", full)
    with pytest.raises(ResourceError, match=r"x\.\w+: out of memory \(Unable to allocate 9 GiB\)"):
        READERS[suffix](path)

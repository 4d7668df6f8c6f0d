"""Folders of damaged and hostile pictures, and arrays that lie about their size (rows 12, 13 and 14 of the page)."""

from __future__ import annotations

import io
import os
import random
import resource
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import command, inside
from PIL import GifImagePlugin, Image

from seriatim.core.errors import DataError
from seriatim.core.images import load_pixels
from seriatim.data.array_file import ArrayData
from seriatim.data.folder import Folder


def picture(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    pixels = np.random.default_rng(5).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, format=kind, **options)
    return buffer.getvalue()


def sideways() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 8
    return picture("JPEG", exif=exif)


def deep() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((9, 9), 40_000, dtype=np.uint16)).save(buffer, format="PNG")
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def claim(width: int, height: int) -> bytes:
    """A grey PNG of 100 bytes that says it is this large."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def flipped(data: bytes, bit: int) -> bytes:
    broken = bytearray(data)
    broken[bit // 8] ^= 1 << bit % 8
    return bytes(broken)


SOUND = {
    "ink.jpg": picture("JPEG", "CMYK"),
    "palette.png": picture("PNG", "P"),
    "moving.gif": picture("GIF"),
    "sideways.jpg": sideways(),
    "deep.png": deep(),
    "small.webp": picture("WEBP"),
    "one.png": picture("PNG", "1"),
}
BAD = {
    "cut.jpg": picture("JPEG")[:-300],
    "cut.png": picture("PNG")[:-40],
    "half.gif": picture("GIF")[:20],
    "nothing.png": b"",
    "words.jpg": b"a letter to the editor",
    "bit.png": flipped(picture("PNG"), 8 * 80),
    "program.png": b"#!/bin/sh\ntouch ran\n",
    "wide.png": claim(90_000, 1),
    "tall.png": claim(2, 40_000),
    "vast.png": claim(60_000, 60_000),
    "negative.png": claim(2**31, 2**31),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for place, (name, data) in enumerate({**SOUND, **BAD}.items()):
        path = tmp_path / "pets" / ("cat" if place % 2 else "dog") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "pets"


def test_exactly_the_bad_files_are_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each with a reason of one line; the others are in the same order each time, wherever they were made."""
    found = [Folder(str(folder), 8, max_bad=0.9) for _ in range(2)]
    assert {Path(name).name for name in found[0].bad} == set(BAD)
    assert all(why and why.isprintable() for why in found[0].bad.values()), found[0].bad
    reasons = {Path(name).name: why for name, why in found[0].bad.items()}
    assert all("times as long as wide" in reasons[name] for name in ("wide.png", "tall.png")), reasons
    assert "megapixels" in reasons["vast.png"], "its header is enough to refuse it"
    order = [entry.path for entry in found[0].entries]
    assert sorted(Path(name).name for name in order) == sorted(SOUND)
    assert order == [entry.path for entry in found[1].entries] == sorted(order)
    with inside(folder.parent):
        words = ["train", "mar-cifar10-tiny", "data.path=pets", "data.size=8", "--out", "run"]
        code, lines = command(words, capsys)
    assert code == 3 and len(lines) == 1 and f"{len(BAD)} of {len(SOUND) + len(BAD)} files can't be used" in lines[0]
    assert not (folder.parent / "run" / "model").exists()


def test_a_moving_picture_of_a_hundred_thousand_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only its first frame is looked at."""
    looked: list[int] = []
    true = GifImagePlugin.GifImageFile._seek

    def seek(self: Any, frame: int, update_image: bool = True) -> None:
        looked.append(frame)
        true(self, frame, update_image)

    monkeypatch.setattr(GifImagePlugin.GifImageFile, "_seek", seek)
    start = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + b"\xff\x00\x00\x00\x00\xff"
    frame = b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    data = start + frame * 100_000 + b";"
    assert load_pixels(data, (2, 2), 3)[:, 0, 0].tolist() == [255, 0, 0]
    assert max(looked, default=0) <= 1 and len(looked) <= 3


@pytest.mark.fresh_process
def test_hostile_pictures_and_arrays_take_no_memory(folder: Path, tmp_path: Path) -> None:
    """In a process that may grow by 300 MB, every bad picture and array is refused as bad data."""
    for shape in ((2**40, 1, 4), (2**62, 4, 4), (10**6, 10**3, 10**3)):
        header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
        name = f"{random.Random(str(shape)).randrange(10**9)}.npy"
        (tmp_path / name).write_bytes(b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + bytes(4096))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 300_000_000,) * 2)
            assert len(Folder(str(folder), 8, max_bad=0.9).bad) == len(BAD)
            arrays = sorted(tmp_path.glob("*.npy"))
            for path in arrays:
                with pytest.raises(DataError, match="is not a readable"):
                    ArrayData(str(path))
            code = 0 if len(arrays) == 3 else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

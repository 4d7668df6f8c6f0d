"""Files from anywhere: each kind of damage has a reason, and memory stays bounded."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from seriatim.core import images
from seriatim.core.errors import UsageError
from seriatim.core.images import BadImage, centre_crop, check_max_pixels, load_pixels, read_image


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int) -> bytes:
    """A grey PNG of any size, a few hundred bytes: rows of zeros compress to nothing."""
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(b"\0" * (width + 1)) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def photo(width: int = 40, height: int = 30) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


BAD = {
    "long.png": (png(1, 80000), "1x80000 pixels, more than 8 times as long as wide"),
    "huge.png": (png(13000, 13000), "more than 50 megapixels"),
    "truncated.jpg": (encoded(photo(), "JPEG")[:-200], "runcated"),
    "truncated.png": (encoded(photo(), "PNG")[:-60], ""),
    "empty.jpg": (b"", "empty file"),
    "text.jpg": (b"these are not the pixels you are looking for", "not a JPEG, PNG"),
    "flipped.png": (encoded(photo(), "PNG").replace(b"IDAT", b"IDAX"), ""),
    "postscript.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a JPEG, PNG"),
    "half.png": (b"\x89PNG\r\n\x1a\n", ""),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_bad_has_a_reason(tmp_path: Path, name: str) -> None:
    data, reason = BAD[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BadImage) as caught:
        read_image(tmp_path / name, 3)
    assert reason in str(caught.value) and "\n" not in str(caught.value) and str(caught.value)


def test_the_long_one_is_small_on_the_disk() -> None:
    assert len(BAD["long.png"][0]) < 700 and len(BAD["huge.png"][0]) < 500_000


def test_memory_is_bounded(tmp_path: Path) -> None:
    """In a child that may take 300 MB more than it starts with, every hostile file is refused and a good one read."""
    for name, (data, _) in BAD.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "good.png").write_bytes(encoded(photo(2000, 1500), "PNG"))
    code = f"""
import resource, pathlib
from seriatim.core.images import BadImage, load_pixels
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + (300 << 20)
resource.setrlimit(resource.RLIMIT_AS, (size, size))
for path in sorted(pathlib.Path({str(tmp_path)!r}).iterdir()):
    try:
        print(path.name, load_pixels(path, (256, 256), 3).shape)
    except BadImage as error:
        print(path.name, "bad")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-500:]
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert lines.pop("good.png") == "(3, 256, 256)"
    assert lines == {name: "bad" for name in BAD}


SIDES = (1600, 1600)
LARGE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "grey16.png": ("I;16", "PNG", {}),
    "clear16.png": ("I;16", "PNG", {"transparency": 7}),
    "alpha.png": ("RGBA", "PNG", {"compress_level": 1}),
    "greyalpha.png": ("LA", "PNG", {}),
    "clear.png": ("RGB", "PNG", {"transparency": (1, 2, 3)}),
    "palette.png": ("P", "PNG", {"transparency": 3}),
    "one.png": ("1", "PNG", {}),
    "turned.png": ("RGB", "PNG", {"exif": b"II*\0\x08\0\0\0\x01\0\x12\x01\3\0\1\0\0\0\6\0\0\0\0\0\0\0"}),
    "float.tif": ("F", "TIFF", {}),
    "whole.tif": ("I", "TIFF", {}),
    "ink.tif": ("CMYK", "TIFF", {}),
    "ink.jpg": ("CMYK", "JPEG", {}),
    "alpha.webp": ("RGBA", "WEBP", {"quality": 1, "method": 0}),
}


def deep(bits: int, kind: int, samples: int, width: int, height: int) -> bytes:
    """A PNG of 16 bits and several samples a pixel, all of them 0."""
    packer = zlib.compressobj(1)
    row = b"\0" * (1 + width * samples * bits // 8)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_any_kind_of_picture_takes_few_bytes_a_pixel(tmp_path: Path) -> None:
    """In a child that may take 16 bytes a pixel and 12 MB more than it starts with."""
    for name, (mode, kind, options) in LARGE.items():
        (tmp_path / name).write_bytes(encoded(Image.new(mode, SIDES), kind, **options))
    for name, colour, samples in (("rgb16.png", 2, 3), ("rgba16.png", 6, 4), ("la16.png", 4, 2)):
        (tmp_path / name).write_bytes(deep(16, colour, samples, *SIDES))
    code = f"""
import resource, pathlib
from PIL import Image
from seriatim.core.images import load_pixels
load_pixels(pathlib.Path({str(tmp_path / "one.png")!r}), (8, 8), 3)  # what is loaded once
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 16 * {SIDES[0] * SIDES[1]} + (12 << 20),) * 2)
for path in sorted(pathlib.Path({str(tmp_path)!r}).iterdir()):
    assert load_pixels(path, (64, 64), 3).shape == (3, 64, 64), path
print("all read")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "all read\n", done.stderr[-500:]


def test_a_photograph_of_48_megapixels_is_read() -> None:
    data = encoded(Image.new("1", (8064, 6048), 1), "PNG", compress_level=1)
    assert load_pixels(data, (8, 8), 1).min() == 255
    with pytest.raises(BadImage, match=r"8064x6048 pixels, more than 49 megapixels \(max_pixels\)"):
        read_image(data, 1, max_pixels=8064 * 6048 - 1)
    with pytest.raises(UsageError, match=r"max_pixels: 0 is not allowed; .* from 1 to 178,000,000"):
        check_max_pixels(0)
    with pytest.raises(UsageError, match="data: 178000001 is not allowed"):
        check_max_pixels(178_000_001, "data")


def test_a_header_does_not_decide_how_much_is_done(tmp_path: Path) -> None:
    """Tiles far larger than the picture, and files that are no files."""
    tags = {256: 16, 257: 16, 258: 8, 259: 5, 262: 1, 277: 1, 322: 1 << 15, 323: 1 << 15, 324: 8, 325: 8}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    tiled = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + b"\0" * 64
    with pytest.raises(BadImage, match="tiles of 32768x32768 pixels in a picture of 16x16"):
        read_image(tiled, 3)
    os.mkfifo(tmp_path / "pipe.png")
    for name, why in (("pipe.png", "not a regular file"), (".", "not a regular file"), ("none.png", "no such file")):
        with pytest.raises(BadImage, match=why):
            read_image(tmp_path / name, 3)


def test_large_pictures_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    data, inside, most = encoded(photo(200, 200), "PNG"), 0, []
    flatten = images.flatten

    def counted(*arguments: Any) -> Image.Image:
        nonlocal inside
        inside += 1
        most.append(inside)
        time.sleep(0.01)
        result = flatten(*arguments)
        inside -= 1
        return result

    monkeypatch.setattr(images, "flatten", counted)
    for limit, expected in ((100 * 100, 1), (images.LARGE, 4)):
        monkeypatch.setattr(images, "LARGE", limit)
        most.clear()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: read_image(data, 3), range(8)))
        assert max(most) <= expected and (max(most) > 1) == (expected > 1)


def centre(path: Path, channels: int = 3) -> list[int]:
    image = np.asarray(read_image(path, channels))
    return np.atleast_1d(image[image.shape[0] // 2, image.shape[1] // 2]).tolist()


def test_unusual_but_sound_files_are_read(tmp_path: Path) -> None:
    red = Image.new("RGB", (20, 20), (200, 30, 40))
    files = {
        "cmyk.jpg": encoded(red.convert("CMYK"), "JPEG", quality=100),
        "palette.png": encoded(red.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
        "anim.gif": encoded(red, "GIF", save_all=True, append_images=[Image.new("RGB", (20, 20), "blue")]),
        "photo.webp": encoded(red, "WEBP", lossless=True),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        assert centre(tmp_path / name) == pytest.approx([200, 30, 40], abs=3), name
    deep = Image.fromarray(np.full((20, 20), 40000, dtype=np.uint16))
    (tmp_path / "deep.png").write_bytes(encoded(deep, "PNG"))
    assert centre(tmp_path / "deep.png") == [156, 156, 156], "16 bits are scaled, not clipped"
    clear = Image.new("RGBA", (20, 20), (200, 30, 40, 0))
    (tmp_path / "clear.png").write_bytes(encoded(clear, "PNG"))
    assert centre(tmp_path / "clear.png") == [255, 255, 255], "transparency is over white"
    (tmp_path / "grey.png").write_bytes(encoded(Image.new("L", (20, 20), 77), "PNG"))
    assert centre(tmp_path / "grey.png") == [77, 77, 77] and centre(tmp_path / "grey.png", 1) == [77]


def test_a_photograph_taken_sideways_is_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20))
    image.paste((255, 0, 0), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    (tmp_path / "a.jpg").write_bytes(encoded(image, "JPEG", quality=100, exif=exif))
    upright = np.asarray(read_image(tmp_path / "a.jpg", 3))
    assert upright.shape == (40, 20, 3) and upright[5, 10, 0] > 200 and upright[35, 10, 0] < 50


@pytest.mark.parametrize(
    ("size", "target"), [((40, 30), (16, 16)), ((300, 100), (32, 32)), ((9, 9), (32, 16)), ((33, 77), (8, 24))]
)
def test_the_crop_is_centred_and_of_the_asked_size(size: tuple[int, int], target: tuple[int, int]) -> None:
    width, height = size
    x = np.broadcast_to(np.linspace(0, 255, width), (height, width))
    y = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    cropped = np.asarray(centre_crop(Image.fromarray(np.stack([x, y, y], axis=-1).astype(np.uint8)), target)).astype(
        float
    )
    assert cropped.shape == (*target, 3)
    for axis, side in ((0, target[1]), (1, target[0])):  # a cut may be off by a pixel of the result
        assert cropped[..., axis].mean() == pytest.approx(127.5, abs=255 / side)


def test_an_image_of_the_right_size_is_untouched(tmp_path: Path) -> None:
    image = photo(32, 32)
    image.save(tmp_path / "a.png")
    assert np.array_equal(load_pixels(tmp_path / "a.png", (32, 32), 3), np.asarray(image).transpose(2, 0, 1))

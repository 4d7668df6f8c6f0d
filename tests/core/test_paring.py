"""Damaged metadata costs nothing of a picture with sound pixels; sound metadata that changes its looks is kept."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from seriatim.core.images import BadImage, read_image

HEADER = 33  # bytes of a PNG before its first chunk of metadata


def chunk(kind: bytes, data: bytes, *, sound: bool = True) -> bytes:
    digest = zlib.crc32(kind + data) ^ (not sound)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", digest)


def segment(marker: int, data: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def sideways() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif.tobytes()[6:]


def picture(kind: str, **options: object) -> bytes:
    image = Image.new("RGB", (24, 16), (10, 200, 30))
    image.paste((220, 20, 90), (0, 0, 12, 16))
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def in_png(*chunks: bytes) -> bytes:
    raw = picture("PNG")
    return raw[:HEADER] + b"".join(chunks) + raw[HEADER:]


def in_jpeg(*segments: bytes) -> bytes:
    raw = picture("JPEG", quality=100)
    return raw[:2] + b"".join(segments) + raw[2:]


def webp_with_damaged_exif() -> bytes:
    raw = picture("WEBP", exif=sideways(), lossless=True)
    at = raw.index(b"EXIF") + 4
    return raw[:at] + b"\xff\xff\xff\x7f" + raw[at + 4 :]


DAMAGED = {
    "an EXIF block with a wrong checksum": in_png(chunk(b"eXIf", sideways(), sound=False)),
    "a colour of no length that is transparent": in_png(chunk(b"tRNS", b"")),
    "half a colour that is transparent": in_png(chunk(b"tRNS", b"\0\1\0")),
    "a transparent colour with a wrong checksum": in_png(chunk(b"tRNS", bytes(6), sound=False)),
    "a profile that is cut": in_png(chunk(b"iCCP", b"x")),
    "a text with a wrong checksum": in_png(chunk(b"tEXt", b"a\0b", sound=False)),
    "a text of 80 megabytes": in_png(chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(80 << 20)))),
    "a profile without a number": in_jpeg(segment(0xE2, b"ICC_PROFILE\0")),
    "a cut Adobe segment": in_jpeg(segment(0xEE, b"Adobe")),
    "a cut JFIF segment": in_jpeg(segment(0xE0, b"JFIF\0")),
    "a space before a cut segment": in_jpeg(b"\xff\xff" + segment(0xE0, b"JFIF\0")),
    "an EXIF block that is longer than its file": webp_with_damaged_exif(),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_metadata_costs_nothing_of_the_picture(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(DAMAGED[name])
    for source in (DAMAGED[name], tmp_path / "file"):
        pixels = np.asarray(read_image(source, 3)).astype(int)
        assert pixels.shape == (16, 24, 3)
        assert np.abs(pixels[8, 3] - (220, 20, 90)).max() <= 4 and np.abs(pixels[8, 20] - (10, 200, 30)).max() <= 4


def test_sound_metadata_beside_it_still_counts() -> None:
    """The picture is turned, its transparent colour becomes white, and its profile is applied."""
    long_text, cut_jfif = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(80 << 20))), segment(0xE0, b"JFIF\0")
    assert read_image(in_png(chunk(b"eXIf", sideways()), long_text), 3).size == (16, 24)
    assert read_image(in_jpeg(segment(0xE1, b"Exif\0\0" + sideways()), cut_jfif), 3).size == (16, 24)
    clear = np.asarray(read_image(in_png(chunk(b"tRNS", bytes((0, 10, 0, 200, 0, 30))), long_text), 3))
    assert clear[8, 20].tolist() == [255, 255, 255] and clear[8, 3].tolist() == [220, 20, 90]
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = (
        profile.replace(b"rXYZ", b"?XYZ").replace(b"gXYZ", b"rXYZ").replace(b"?XYZ", b"gXYZ")
    )  # red and green change
    for with_profile in (
        in_png(chunk(b"iCCP", b"p\0\0" + zlib.compress(swapped)), long_text),
        in_jpeg(segment(0xE2, b"ICC_PROFILE\0\1\1" + swapped), cut_jfif),
    ):
        red, green, _ = np.asarray(read_image(with_profile, 3))[8, 20].tolist()
        assert red > green + 100, "the profile, which swaps red and green, was applied"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_pixels_that_are_missing_are_not_made_up(kind: str) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((40, 40), 80).save(buffer, kind)
    raw = buffer.getvalue()
    for length in range(0, len(raw) * 3 // 4, 7):
        with pytest.raises(BadImage):
            read_image(raw[:length], 3)

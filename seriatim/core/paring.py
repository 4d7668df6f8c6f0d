"""Copies of damaged image files without their damaged metadata, for files whose pixels are sound.

Pillow refuses such a file as a whole, for instance a PNG with a long text or a wrong checksum of its EXIF block, or a
JPEG with a cut APP segment. Other programs show these pictures.
"""

from __future__ import annotations

import io
import mmap
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

Raw = bytes | mmap.mmap

MOST_BYTES = 1 << 28  # no larger file is copied
PNG = b"\x89PNG\r\n\x1a\n"
PNG_PIXELS = {b"IHDR", b"PLTE", b"IDAT", b"IEND"}
PNG_LOOKS = {b"tRNS", b"eXIf", b"iCCP"}  # metadata that changes how the picture looks
TRANSPARENT = {0: {2}, 2: {6}, 3: set(range(1, 257))}  # the colour type of a PNG -> the allowed lengths of its tRNS
WEBP_PIXELS = {b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"}
WEBP_LOOKS = {b"EXIF", b"ICCP"}
JPEG_LOOKS = {  # marker -> how the content begins, and its least length
    0xE1: (b"Exif\0\0", 6),
    0xE2: (b"ICC_PROFILE\0", 14),
    0xEE: (b"Adobe", 12),
}
START_OF_SCAN, COMMENT = 0xDA, 0xFE


def pared(source: Path | str | bytes) -> Iterator[io.BytesIO]:
    """Smaller copies of a PNG, JPEG, WebP or AVIF file; none for other formats.

    The first copy keeps sound metadata that changes how the picture looks, the second one keeps no metadata at all.
    """
    if isinstance(source, bytes):
        yield from copies(source)
    elif 0 < Path(source).stat().st_size <= MOST_BYTES:
        with open(source, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
            yield from copies(raw)


def copies(raw: Raw) -> Iterator[io.BytesIO]:
    begin = raw[:12]
    if begin[4:11] == b"ftypavi":  # an AVIF stores its orientation outside of its EXIF block
        yield io.BytesIO(re.sub(rb"(infe[\0-\xff]{8})Exif", rb"\1none", raw[:]))
        return
    of_format = {PNG: png_parts, b"\xff\xd8\xff": jpeg_parts, b"RIFF": webp_parts}
    parts = next((function for mark, function in of_format.items() if begin.startswith(mark)), None)
    if parts is not None:
        for looks in (True, False):
            yield io.BytesIO(b"".join(parts(raw, looks)))


def png_parts(raw: Raw, looks: bool) -> Iterator[bytes]:
    yield PNG
    place, colour = len(PNG), raw[25:26]
    while place + 12 <= len(raw):
        length, kind = int.from_bytes(raw[place : place + 4], "big"), raw[place + 4 : place + 8]
        after = place + 12 + length
        if kind in PNG_PIXELS:
            yield raw[place:after]
        elif looks and kind in PNG_LOOKS and after <= len(raw):
            whole = zlib.crc32(raw[place + 4 : after - 4]) == int.from_bytes(raw[after - 4 : after], "big")
            if whole and (kind != b"tRNS" or length in TRANSPARENT.get(colour[0], ())):
                yield raw[place:after]
        place = after


def jpeg_parts(raw: Raw, looks: bool) -> Iterator[bytes]:
    yield raw[:2]
    place = 2
    while place + 4 <= len(raw) and raw[place] == 0xFF and raw[place + 1] != START_OF_SCAN:
        marker, length = raw[place + 1], int.from_bytes(raw[place + 2 : place + 4], "big")
        if marker == 0xFF:  # a byte that fills the space before a marker
            place += 1
            continue
        after = place + 2 + max(2, length)
        if 0xE0 <= marker <= 0xEF:
            begin, least = JPEG_LOOKS.get(marker, (b"", 0))
            if looks and least and length - 2 >= least and raw[place + 4 : after].startswith(begin):
                yield raw[place:after]
        elif marker != COMMENT:
            yield raw[place:after]
        place = after
    yield raw[place:]


def webp_parts(raw: Raw, looks: bool) -> Iterator[bytes]:
    kept, place = [b"WEBP"], 12
    while place + 8 <= len(raw):
        length, kind = int.from_bytes(raw[place + 4 : place + 8], "little"), raw[place : place + 4]
        after = place + 8 + length + length % 2
        if kind in WEBP_PIXELS or (looks and kind in WEBP_LOOKS and after <= len(raw)):
            kept.append(raw[place:after])
        place = after
    body = b"".join(kept)
    yield b"RIFF" + len(body).to_bytes(4, "little") + body

"""Pictures of every mode in every container look as computed here by hand; nothing but the pixels decides that."""

from __future__ import annotations

import colorsys
import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin, TiffImagePlugin

from seriatim.core.errors import UsageError
from seriatim.core.flatten import BLACK, WHITE, Colour, as_colour, flatten
from seriatim.core.images import BadImage, as_seen, load_pixels, read_image

PINK: Colour = (250, 120, 180)
SIDE = 32  # four blocks of 16 x 16 pixels: flat, so that codecs with losses keep them
COLOURS = np.array([(200, 30, 60), (0, 0, 0), (255, 255, 255), (20, 140, 220)], dtype=float)
ALPHAS = np.array([255, 0, 64, 128], dtype=float)
GREYS = np.array([0, 70, 130, 255], dtype=float)


def blocks(values: Any, dtype: Any = np.uint8) -> Any:
    """Four values, or rows of values, as a picture of four blocks: (SIDE, SIDE) or (SIDE, SIDE, n)."""
    square = np.asarray(values).round().astype(dtype).reshape(2, 2, -1).repeat(SIDE // 2, 0).repeat(SIDE // 2, 1)
    return np.ascontiguousarray(square[..., 0] if square.shape[-1] == 1 else square)


def over(colours: Any, alphas: Any, background: Colour) -> Any:
    share = np.asarray(alphas, dtype=float)[:, None] / 255
    return share * np.asarray(colours) + (1 - share) * np.array(background, dtype=float)


def grey(values: Any) -> Any:
    return np.asarray(values, dtype=float)[:, None].repeat(3, axis=1)


def palette_picture() -> Image.Image:
    picture = Image.new("P", (SIDE, SIDE))
    picture.putpalette(COLOURS.astype(np.uint8).tobytes())
    picture.putdata(blocks(range(4)).ravel().tolist())
    return picture


def raw(mode: str, values: Any, dtype: Any = np.uint8) -> Image.Image:
    return Image.frombytes(mode, (SIDE, SIDE), blocks(values, dtype).tobytes())


def cmyk() -> tuple[Any, Any]:
    inks = np.array([(0, 255, 128, 0), (10, 20, 30, 255), (0, 0, 0, 0), (200, 100, 50, 40)], dtype=float)
    return inks, (255 - inks[:, :3]) * (255 - inks[:, 3:]) / 255


def ycbcr() -> Any:
    r, g, b = COLOURS.T
    y = 0.299 * r + 0.587 * g + 0.114 * b
    return np.stack([y, 128 + 0.564 * (b - y), 128 + 0.713 * (r - y)], axis=-1)


def hsv() -> Any:
    return np.array([colorsys.rgb_to_hsv(*colour) for colour in COLOURS / 255]) * 255


LOSSLESS, LOSSY = 2.0, 7.0  # levels: rounding; what a codec at its best quality loses on flat blocks
CONTAINERS: dict[str, tuple[float, dict[str, Any]]] = {
    "PNG": (LOSSLESS, {}),
    "TIFF": (LOSSLESS, {}),
    "TIFF LZW": (LOSSLESS, {"compression": "tiff_lzw"}),
    "WEBP": (LOSSLESS, {"lossless": True, "exact": True}),
    "GIF": (LOSSLESS, {}),
    "BMP": (LOSSLESS, {}),
    "DIB": (LOSSLESS, {}),
    "PPM": (LOSSLESS, {}),
    "AVIF": (LOSSY, {"quality": 100, "subsampling": "4:4:4"}),
    "JPEG": (LOSSY, {"quality": 100, "subsampling": 0}),
    "MPO": (LOSSY, {"quality": 100, "subsampling": 0}),
}
DEEP = ("PNG", "TIFF", "TIFF LZW")
ALPHA = ("PNG", "TIFF", "TIFF LZW", "WEBP", "AVIF")
ALL = tuple(CONTAINERS)
# mode -> how to make the picture, what a person sees over a background, the containers that hold that mode
LOOKS: dict[str, tuple[Callable[[], Image.Image], Callable[[Colour], Any], tuple[str, ...]]] = {
    "1": (lambda: raw("L", [0, 255, 255, 0]).convert("1"), lambda _: grey([0, 255, 255, 0]), ALL),
    "L": (lambda: raw("L", GREYS), lambda _: grey(GREYS), ALL),
    "RGB": (lambda: raw("RGB", COLOURS), lambda _: COLOURS, ALL),
    "P": (palette_picture, lambda _: COLOURS, ("PNG", "TIFF", "TIFF LZW", "GIF", "BMP", "WEBP")),
    "RGBX": (lambda: raw("RGB", COLOURS).convert("RGBX"), lambda _: COLOURS, ("TIFF", "JPEG", "WEBP")),
    "CMYK": (lambda: raw("CMYK", cmyk()[0]), lambda _: cmyk()[1], ("TIFF", "JPEG", "MPO")),
    "YCbCr": (lambda: raw("YCbCr", ycbcr()), lambda _: COLOURS, ("JPEG", "MPO")),
    "HSV": (lambda: raw("HSV", hsv()), lambda _: COLOURS, ("WEBP",)),
    "LAB": (lambda: raw("LAB", [(255, 0, 0), (0, 0, 0), (128, 0, 0), (255, 0, 0)]),
            lambda _: grey([255, 0, 119, 255]), ("TIFF",)),
    "RGBA": (lambda: raw("RGBA", np.c_[COLOURS, ALPHAS]), lambda b: over(COLOURS, ALPHAS, b), ALPHA),
    "LA": (lambda: raw("LA", np.c_[GREYS, ALPHAS]), lambda b: over(grey(GREYS), ALPHAS, b), ALPHA),
    "PA": (lambda: with_alpha(palette_picture()), lambda b: over(COLOURS, ALPHAS, b), ("TIFF", "WEBP", "AVIF")),
    "RGBa": (lambda: raw("RGBa", np.c_[COLOURS * ALPHAS[:, None] / 255, ALPHAS]),
             lambda b: over(COLOURS, ALPHAS, b), ("WEBP", "AVIF")),
    "I;16": (lambda: raw("I;16", GREYS * 257, "<u2"), lambda _: grey(GREYS), (*DEEP, "PPM")),
    "I;16B": (lambda: raw("I;16B", GREYS * 257, ">u2"), lambda _: grey(GREYS), ("PNG", "TIFF")),
    "I": (lambda: raw("I", GREYS * 257, "<i4"), lambda _: grey(GREYS), ("TIFF", "TIFF LZW", "PPM")),
    "F": (lambda: Image.fromarray(blocks(range(4), int).choose(GREYS / 255).astype(np.float32)),
          lambda _: grey(GREYS), ("TIFF", "PPM")),
    "F to 255": (lambda: raw("F", GREYS, "<f4"), lambda _: grey(GREYS), ("TIFF", "PPM")),
}  # fmt: skip


def with_alpha(picture: Image.Image) -> Image.Image:
    picture = picture.convert("PA")
    picture.putalpha(raw("L", ALPHAS))
    return picture


def encoded(picture: Image.Image, container: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=container.split()[0], **(CONTAINERS[container][1] | options))
    return buffer.getvalue()


def centres(picture: Image.Image) -> Any:
    """The colours in the middle of the four blocks: (4, 3) or (4,)."""
    array = np.asarray(picture).astype(float)
    return array[SIDE // 4 :: SIDE // 2, SIDE // 4 :: SIDE // 2].reshape(4, *array.shape[2:])


def look(data: bytes, background: Colour = WHITE, channels: int = 3) -> Any:
    return centres(read_image(data, channels, background))


CORPUS = [(mode, container) for mode, (_, _, held) in LOOKS.items() for container in held]


@pytest.mark.parametrize(("mode", "container"), CORPUS, ids=[f"{m}-{c}" for m, c in CORPUS])
def test_every_mode_in_every_container_looks_right(mode: str, container: str) -> None:
    make, seen, _ = LOOKS[mode]
    data = encoded(make(), container)
    for background in (WHITE, PINK):
        expected = seen(background)
        assert np.abs(look(data, background) - expected).max() <= CONTAINERS[container][0]
        luma = expected @ [0.299, 0.587, 0.114]
        assert np.abs(look(data, background, 1) - luma).max() <= CONTAINERS[container][0] + 1


@pytest.mark.parametrize("mode", [*LOOKS, "La"])
def test_a_picture_in_memory_looks_as_its_file_does(mode: str) -> None:
    def la() -> Image.Image:
        return raw("La", np.c_[GREYS * ALPHAS / 255, ALPHAS])

    make, seen, _ = LOOKS.get(mode, (la, lambda b: over(grey(GREYS), ALPHAS, b), ()))
    for background in (WHITE, PINK):
        picture = as_seen(make(), 3, background)
        assert picture.mode == "RGB" and np.abs(centres(picture) - seen(background)).max() <= 2
        assert as_seen(picture, 3, BLACK).tobytes() == picture.tobytes(), "what is flat stays as it is"


def test_strips_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    for make, _, _ in LOOKS.values():
        whole = flatten(make(), "RGB", PINK).tobytes()
        with monkeypatch.context() as patch:
            patch.setattr("seriatim.core.flatten.STRIP", 5 * SIDE)  # of 5 rows, the last of 2
            assert flatten(make(), "RGB", PINK).tobytes() == whole


# --- transparency without an alpha channel ------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(bits: int, kind: int, rows: list[bytes], width: int, *chunks: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, len(rows), bits, kind, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_one_grey_is_transparent(bits: int) -> None:
    """The row holds the levels 0, 1 (or the highest but one) and the highest; any of them can be the clear one."""
    top = (1 << bits) - 1
    levels = [0, top] if bits == 1 else [0, 1, top - 1, top]
    for clear in levels:
        packed = "".join(f"{level:0{bits}b}" for level in levels * 8)
        row = int(packed, 2).to_bytes(len(packed) // 8, "big")
        data = png(bits, 0, [row] * 8, 8 * len(levels), chunk(b"tRNS", struct.pack(">H", clear)))
        seen = np.asarray(read_image(data, 3, PINK))[4, : len(levels)]
        for level, colour in zip(levels, seen.tolist(), strict=True):
            assert colour == (list(PINK) if level == clear else [round(level * 255 / top)] * 3), (bits, clear, level)


@pytest.mark.parametrize("bits", [8, 16])
def test_one_colour_is_transparent(bits: int) -> None:
    colours = [(1, 2, 3), (1, 2, 4), (3, 2, 1), (0, 0, 0)]
    levels = [tuple(level * 256 + 7 if bits == 16 else level for level in colour) for colour in colours]
    code = ">" + ("H" if bits == 16 else "B") * 3
    row = b"".join(struct.pack(code, *colour) for colour in levels)
    for i, clear in enumerate(levels):
        data = png(bits, 2, [row] * 4, 4, chunk(b"tRNS", struct.pack(">HHH", *clear)))
        seen = np.asarray(read_image(data, 3, PINK))[0].tolist()
        assert seen == [list(PINK) if i == j else list(colour) for j, colour in enumerate(colours)]


@pytest.mark.parametrize("container", ["PNG", "GIF"])
def test_palettes_with_clear_colours(container: str) -> None:
    data = encoded(palette_picture(), container, transparency=2)
    assert (look(data, PINK) == [*COLOURS[:2], PINK, COLOURS[3]]).all()
    if container == "PNG":  # of every colour an alpha of its own
        data = encoded(palette_picture(), container, transparency=bytes(ALPHAS.astype(np.uint8)))
        assert np.abs(look(data, PINK) - over(COLOURS, ALPHAS, PINK)).max() <= 1


def test_sixteen_bits_of_colour_and_alpha() -> None:
    """RGBA and grey with alpha of 16 bits, as PNG and TIFF, of which alpha may be multiplied in already."""
    for kind, colours in ((6, COLOURS), (4, GREYS[:, None])):
        values = (np.c_[colours, ALPHAS] * 257).astype(">u2")
        row = values.tobytes()
        seen = np.asarray(read_image(png(16, kind, [row] * 4, 4), 3, PINK))[0]
        assert np.abs(seen - over(colours.repeat(3 // colours.shape[1], 1), ALPHAS, PINK)).max() <= 1.5
    data = encoded(raw("RGBA", np.c_[COLOURS * ALPHAS[:, None] / 255, ALPHAS]), "TIFF")
    tag = struct.pack("<HHI", 338, 3, 1)  # ExtraSamples: 2 is alpha beside the colours, 1 alpha multiplied in
    assert tag + b"\2\0" in data
    data = data.replace(tag + b"\2\0", tag + b"\1\0")
    assert np.abs(look(data, PINK) - over(COLOURS, ALPHAS, PINK)).max() <= 2


def test_the_first_frame_of_many() -> None:
    first, second = raw("RGB", COLOURS), Image.new("RGB", (SIDE, SIDE), PINK)
    for container in ("GIF", "PNG", "WEBP", "TIFF", "AVIF", "MPO"):
        data = encoded(first, container, save_all=True, append_images=[second] * 3)
        assert np.abs(look(data) - COLOURS).max() <= CONTAINERS[container][0], container


def test_colours_of_the_background() -> None:
    assert as_colour("white") == as_colour("#ffffff") == as_colour([255, 255, 255]) == WHITE
    assert as_colour("#102030") == (16, 32, 48)
    for value in ("whit", "#12345", [1, 2], [0, 0, 256], [0.5, 0, 0], [True, 0, 0], "#11223344", 7, None, "red\n"):
        with pytest.raises(UsageError, match=r"^background: .*give \[red, green, blue\]"):
            as_colour(value)  # type: ignore[arg-type]


# --- what is said beside the pixels costs nothing of them ---------------------------------------------------------


def exif_block(entries: list[bytes], extra: bytes = b"") -> bytes:
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + b"\0\0\0\0" + extra


SIDEWAYS = struct.pack("<HHIHH", 0x112, 3, 1, 6, 0)
DAMAGED = {
    "garbage": b"XX*\0garbage",
    "empty": b"",
    "cut off": b"II*\0\x08\0\0\0\x05\0" + SIDEWAYS[:6],
    "orientation as text": exif_block([struct.pack("<HHI4s", 0x112, 2, 2, b"6\0\0\0")]),
    "orientation 99": exif_block([struct.pack("<HHIHH", 0x112, 3, 1, 99, 0)]),
    "no entries": exif_block([]),
}
READABLE = {
    "rational n/0": exif_block([SIDEWAYS, struct.pack("<HHII", 0x11A, 5, 1, 38)], struct.pack("<II", 72, 0)),
    "offset outside": exif_block([SIDEWAYS, struct.pack("<HHII", 0x11A, 5, 1, 0x7FFFFFFF)]),
    "number that is text": exif_block([SIDEWAYS, struct.pack("<HHI4s", 0x128, 2, 4, b"xyz\0")]),
    "GPS outside": exif_block([SIDEWAYS, struct.pack("<HHII", 0x8825, 4, 1, 0xFFFFFFF0)]),
    "sound": exif_block([SIDEWAYS]),
}


def jpeg_with(segment: bytes, marker: bytes = b"\xff\xe1") -> bytes:
    data = encoded(raw("RGB", COLOURS), "JPEG")
    return data[:2] + marker + struct.pack(">H", len(segment) + 2) + segment + data[2:]


def containers_with(exif: bytes) -> Iterator[tuple[str, bytes]]:
    yield "JPEG", jpeg_with(b"Exif\0\0" + exif)
    yield "WEBP", encoded(raw("RGB", COLOURS), "WEBP", exif=b"Exif\0\0" + exif)
    data = encoded(raw("RGB", COLOURS), "PNG")
    yield "PNG", data[:33] + chunk(b"eXIf", exif) + data[33:]
    yield "PNG, after the pixels", data[:-12] + chunk(b"eXIf", exif) + data[-12:]
    made = Image.Exif()
    made[0x10F] = "somebody"
    if b"XX" in exif:
        yield "AVIF", encoded(raw("RGB", COLOURS), "AVIF", exif=made).replace(b"MM\0*", b"XX\0*")


@pytest.mark.parametrize("name", [*DAMAGED, *READABLE])
def test_a_damaged_exif_block_costs_nothing(name: str) -> None:
    turned = COLOURS[[2, 0, 3, 1]]  # by a quarter, clockwise
    for container, data in containers_with((DAMAGED | READABLE)[name]):
        expected = turned if name in READABLE else COLOURS
        assert np.abs(look(data) - expected).max() <= LOSSY, container


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_made_upright(orientation: int) -> None:
    array = COLOURS.reshape(2, 2, 3)
    turn: dict[int, Callable[[Any], Any]] = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2), 8: lambda a: np.rot90(a),
    }  # fmt: skip

    def exif() -> Image.Exif:  # a new one each time: saving as AVIF takes the orientation out
        made = Image.Exif()
        made[0x112] = orientation
        return made

    expected = turn[orientation](array).reshape(4, 3)
    for container in ("JPEG", "PNG", "WEBP", "TIFF", "TIFF LZW", "AVIF", "MPO"):
        picture = raw("RGB", COLOURS)
        assert np.abs(look(encoded(picture, container, exif=exif())) - expected).max() <= LOSSY, container
    with Image.open(io.BytesIO(encoded(raw("RGB", COLOURS), "PNG", exif=exif()))) as opened:
        once = as_seen(opened, 3)
        assert np.abs(centres(once) - expected).max() <= 1 and as_seen(once, 3).tobytes() == once.tobytes()


def test_long_texts_and_damaged_remarks_of_a_png_cost_nothing(tmp_path: Path) -> None:
    data = encoded(raw("RGBA", np.c_[COLOURS, ALPHAS]), "PNG")
    long = zlib.compress(b"x" * (3 << 20))
    broken = bytearray(chunk(b"tEXt", b"a\0b"))
    broken[-1] ^= 1  # its checksum
    remarks = {
        "long zTXt": chunk(b"zTXt", b"a\0\0" + long),
        "long iTXt": chunk(b"iTXt", b"a\0\1\0\0\0" + long),
        "long iCCP": chunk(b"iCCP", b"a\0\0" + long),
        "70 MB of texts": chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 1000_000)) * 70,
        "text cut off": chunk(b"zTXt", b"a\0\0" + long[:20]),
        "checksum": bytes(broken),
        "iCCP that is none": chunk(b"iCCP", b"a\0\0" + zlib.compress(b"no profile")),
        "gAMA too short": chunk(b"gAMA", b"\0"),
        "pHYs too short": chunk(b"pHYs", b"\0"),
        "acTL without frames": chunk(b"acTL", struct.pack(">II", 0, 0)),
    }
    for name, remark in remarks.items():
        for place in (33, len(data) - 12):
            if name.startswith(("iCCP", "gAMA", "pHYs", "acTL", "70")) and place > 33:
                continue
            (tmp_path / "a.png").write_bytes(data[:place] + remark + data[place:])
            for source in (tmp_path / "a.png", (tmp_path / "a.png").read_bytes())[: 1 if "70" in name else 2]:
                seen = centres(read_image(source, 3, PINK))
                assert np.abs(seen - over(COLOURS, ALPHAS, PINK)).max() <= 1, (name, place)


def test_a_png_with_a_long_text_stays_upright() -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * (2 << 20), zip=True)
    data = encoded(raw("RGB", COLOURS), "PNG", exif=exif, pnginfo=text)
    assert np.abs(look(data) - COLOURS[[2, 0, 3, 1]]).max() <= 1


def test_what_is_damaged_in_a_png_is_still_bad() -> None:
    data = encoded(raw("RGB", COLOURS), "PNG")
    for broken in (data[: len(data) // 2], data[:40] + b"\xff" * 4 + data[44:], data.replace(b"IDAT", b"IDAX")):
        with pytest.raises(BadImage):
            read_image(broken, 3)


def profile(gamma: float, swap: bool = False) -> bytes:
    """An ICC profile of display colours, made by hand: sRGB's primaries (green and red exchanged), one exponent."""

    def number(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    red, green, blue = (0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410)
    columns = (green, red, blue) if swap else (red, green, blue)
    tags = {b"wtpt": b"XYZ \0\0\0\0" + b"".join(map(number, (0.9642, 1.0, 0.82491)))}
    for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True):
        tags[name] = b"XYZ \0\0\0\0" + b"".join(map(number, column))
    for name in (b"rTRC", b"gTRC", b"bTRC"):
        tags[name] = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"mine\0" + b"\0" * 79
    tags[b"cprt"] = b"text\0\0\0\0none\0\0\0\0"
    table, body, place = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        data += b"\0" * (-len(data) % 4)
        table += name + struct.pack(">II", place + len(body), len(data))
        body += data
    size = place + len(body)
    head = struct.pack(">I4sI4s4s4s", size, b"\0\0\0\0", 0x02400000, b"mntr", b"RGB ", b"XYZ ") + b"\0" * 12 + b"acsp"
    head = head.ljust(68, b"\0") + b"".join(map(number, (0.9642, 1.0, 0.82491)))
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def to_srgb_levels(linear: Any) -> Any:
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("container", ["PNG", "TIFF", "JPEG", "WEBP", "AVIF"])
def test_colour_profiles_are_applied(container: str) -> None:
    linear = profile(1.0)
    expected = to_srgb_levels(COLOURS / 255)
    tolerance = 2.5 if CONTAINERS[container][0] == LOSSLESS else 30  # a level near black is many after the curve
    assert np.abs(look(encoded(raw("RGB", COLOURS), container, icc_profile=linear)) - expected).max() <= tolerance
    swapped = look(encoded(raw("RGB", COLOURS), container, icc_profile=profile(2.2, swap=True)))
    assert np.abs(swapped - COLOURS[:, [1, 0, 2]]).max() <= 12, "2.2 is nearly the curve of sRGB"


def test_colour_profiles_and_transparency_go_together() -> None:
    data = encoded(raw("RGBA", np.c_[COLOURS, ALPHAS]), "PNG", icc_profile=profile(1.0))
    assert np.abs(look(data, PINK) - over(to_srgb_levels(COLOURS / 255), ALPHAS, PINK)).max() <= 2.5
    data = encoded(palette_picture(), "PNG", icc_profile=profile(1.0))
    assert np.abs(look(data) - to_srgb_levels(COLOURS / 255)).max() <= 2.5


def test_profiles_that_change_nothing_or_are_none_leave_every_level() -> None:
    usual = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for given in (usual, b"no profile", b"\0" * 200_000, usual[:100], profile(1.0)[:150]):
        for container in ("PNG", "TIFF", "WEBP"):
            assert (look(encoded(raw("RGB", COLOURS), container, icc_profile=given)) == COLOURS).all()
    assert np.abs(look(encoded(raw("CMYK", cmyk()[0]), "TIFF", icc_profile=usual)) - cmyk()[1]).max() <= 1
    assert (look(encoded(raw("L", GREYS), "PNG", icc_profile=usual)) == grey(GREYS)).all(), "of another kind of colour"


def test_a_tiff_with_odd_tags_is_read() -> None:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[270] = "x" * 100_000
    info[65000] = b"\xff" * 1000
    info.tagtype[65000] = 7
    assert (look(encoded(raw("RGB", COLOURS), "TIFF", tiffinfo=info)) == COLOURS).all()


def negative_tiff(levels: Any, bits: int) -> bytes:
    """A TIFF whose level 0 is white, written by hand, because Pillow inverts some modes when it writes them."""
    height, width = levels.shape
    stored = np.packbits(levels.astype(bool), axis=1) if bits == 1 else levels.astype(f"<u{bits // 8}")
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 0, 273: 8, 277: 1, 278: height, 279: stored.nbytes}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    listing = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    return struct.pack("<2sHI", b"II", 42, 8 + stored.nbytes) + stored.tobytes() + listing


@pytest.mark.parametrize("bits", [1, 8, 16])
def test_a_tiff_whose_zero_is_white_is_no_negative(bits: int) -> None:
    highest = 2**bits - 1
    data = negative_tiff(blocks(np.array([0, 1, 0, 1] if bits == 1 else GREYS / 255) * highest, int), bits)
    expected = grey([255, 0, 255, 0] if bits == 1 else 255 - GREYS)
    assert np.abs(look(data) - expected).max() <= 1
    assert np.abs(centres(as_seen(Image.open(io.BytesIO(data)), 3)) - expected).max() <= 1


@pytest.mark.parametrize("container", ["TIFF", "TIFF LZW"])
def test_deep_tiffs_whose_zero_is_white(container: str) -> None:
    for mode, levels, dtype in (("I;16", GREYS * 257, "<u2"), ("F", GREYS / 255, "<f4"), ("F", GREYS, "<f4")):
        picture = Image.frombytes(mode, (SIDE, SIDE), blocks(range(4), int).choose(levels).astype(dtype).tobytes())
        data = encoded(picture, container, tiffinfo={262: 0})
        assert np.abs(look(data) - (255 - grey(GREYS))).max() <= 1
        assert np.abs(look(encoded(picture, container)) - grey(GREYS)).max() <= 1, "the usual 0 is black"


def test_odd_metadata_is_silent_and_filters_are_as_before() -> None:
    """From many threads at once: catch_warnings by each would leave the filters of another."""
    from concurrent.futures import ThreadPoolExecutor

    odd = jpeg_with(b"Exif\0\0" + READABLE["offset outside"])
    text = encoded(palette_picture(), "PNG", transparency=bytes(ALPHAS.astype(np.uint8)))
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as heard, ThreadPoolExecutor(8) as pool:
        warnings.simplefilter("always")
        inside = list(warnings.filters)
        list(pool.map(lambda data: load_pixels(data, (8, 8), 3), [odd, text] * 40))
        assert list(warnings.filters) == inside
    assert not heard and list(warnings.filters) == before

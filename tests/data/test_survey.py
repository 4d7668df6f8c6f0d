"""What is found in a folder of pictures: counts, sizes, colours, transparency, what can't be read; in bounded time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from seriatim.core.errors import DataError
from seriatim.core.images import BadImage, read_header
from seriatim.data import survey as surveys
from seriatim.data.survey import survey


def photo(path: Path, width: int = 40, height: int = 30, seed: int = 0, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def test_counts_sizes_and_classes(tmp_path: Path) -> None:
    for i in range(5):
        photo(tmp_path / "cats" / f"{i}.png", 60, 30, i)
    for i in range(3):
        photo(tmp_path / "dogs" / f"{i}.png", 64, 64, i)
    (tmp_path / "empty").mkdir()
    (tmp_path / "cats" / "notes.txt").write_text("x")
    found = survey(tmp_path, 10)
    assert (found.count, found.names, found.each, found.classes) == (8, ["cats", "dogs"], [3, 5], True)
    assert (found.short_side, found.cropped, found.grey, found.clear, found.pale) == (30, 0.5, False, 0.0, False)
    assert found.looked_at == 8 and found.pixels.shape == (8, 3, 32, 32) and not found.bad
    assert sorted(found.labels) == [0] * 5 + [1] * 3
    assert all(found.files[k].startswith("dogs" if found.labels[k] else "cats") for k in range(8))
    assert set(found.listing.passed_over) == {"cats/notes.txt", "empty"}


def test_what_cannot_be_read_is_counted(tmp_path: Path) -> None:
    photo(tmp_path / "good.png")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff" + b"x" * 100)
    (tmp_path / "none.png").write_bytes(b"")
    found = survey(tmp_path, 10)
    assert (found.count, found.looked_at, set(found.bad)) == (3, 3, {"broken.jpg", "none.png"})
    (tmp_path / "good.png").unlink()
    with pytest.raises(DataError, match=r"none of 2 pictures in .* can be read"):
        survey(tmp_path, 10)


def test_a_folder_without_pictures(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("x")
    with pytest.raises(DataError, match=r"holds no pictures .*not used: 1 x the suffix \.txt is not read"):
        survey(tmp_path, 10)


def test_grey_and_colour(tmp_path: Path) -> None:
    for i in range(3):
        photo(tmp_path / f"{i}.png", seed=i, mode="L")
    assert survey(tmp_path, 10).grey
    photo(tmp_path / "colour.png")
    assert not survey(tmp_path, 10).grey, "one in colour is enough"


@pytest.mark.parametrize(("level", "pale"), [(250, True), (60, False)])
def test_transparency_and_what_white_would_hide(tmp_path: Path, level: int, pale: bool) -> None:
    for i in range(3):
        image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
        image.paste((level, level, level, 255), (4, 4, 20 + i, 24))
        image.save(tmp_path / f"{i}.png")
    photo(tmp_path / "opaque.png").rename(tmp_path / "x.png")
    found = survey(tmp_path, 10)
    assert found.clear == 0.75 and found.pale is pale
    Image.new("RGBA", (32, 32), (9, 9, 9, 255)).save(tmp_path / "channel-without-use.png")
    assert survey(tmp_path, 10).clear == 0.6


def test_turned_photographs_have_upright_sizes(tmp_path: Path) -> None:
    for orientation, size in ((1, (40, 30)), (6, (30, 40)), (5, (30, 40)), (3, (40, 30))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (40, 30)).save(tmp_path / "x.jpg", exif=exif)
        assert read_header(tmp_path / "x.jpg")[:2] == size
    with pytest.raises(BadImage):
        read_header(tmp_path / "nowhere.jpg")
    with pytest.raises(BadImage, match="megapixels"):
        read_header(tmp_path / "x.jpg", max_pixels=100)


def test_looking_ends_with_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(100):
        photo(tmp_path / f"{i:03d}.png", 8, 8, i)
    found = survey(tmp_path, 0.0)
    assert found.count == 100 and found.looked_at == surveys.FEWEST
    spread = sorted(found.index)
    assert spread != list(range(surveys.FEWEST)) and spread[-1] > 60, "from all over the folder"
    assert survey(tmp_path, 0.0).index == found.index, "the same each time"
    monkeypatch.setattr(surveys, "MOST", 50)
    assert survey(tmp_path, 60.0).looked_at == 50


def test_metadata_gives_classes_where_there_are_some(tmp_path: Path) -> None:
    rows = []
    for i in range(12):
        photo(tmp_path / "images" / f"{i}.png", seed=i)
        rows.append({"file_name": f"images/{i}.png", "text": f"picture {i}", "category": "ab"[i % 2]})
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = survey(tmp_path, 10)
    assert (found.classes, found.names, found.each) == ("category", ["a", "b"], [6, 6])
    assert survey(tmp_path, 10, classes=False).names == [] and survey(tmp_path, 10, classes=True).names == ["images"]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "images/1.png", "text": "one"}\n')
    assert survey(tmp_path, 10).classes is False, "captions sort nothing"


def test_pixels_are_those_of_the_picture(tmp_path: Path) -> None:
    Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint32).reshape(32, 32, 3).astype(np.uint8)).save(
        tmp_path / "x.png"
    )
    expected = torch.from_numpy(np.asarray(Image.open(tmp_path / "x.png")).copy()).permute(2, 0, 1)
    assert torch.equal(survey(tmp_path, 10).pixels[0], expected)

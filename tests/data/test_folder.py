"""Folders of images: classes, order, what is left out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from seriatim.core.errors import DataError
from seriatim.data.folder import Folder
from seriatim.data.loader import Batches, Loader


def make(folder: Path, names: list[str], size: int = 8, seed: int = 0) -> None:
    chance = np.random.default_rng(seed)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(chance.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    make(tmp_path / "pets", [f"{name}/{i}.png" for name in ("dog", "cat", "a b") for i in range(4)])
    (tmp_path / "pets" / ".cache").mkdir()
    (tmp_path / "pets" / "cat" / "notes.txt").write_text("x")
    return tmp_path / "pets"


def test_class_folders(pets: Path) -> None:
    data = Folder(str(pets), 8)
    assert data.class_names == ["a b", "cat", "dog"] and data.count == 12
    labels = data.labels(torch.arange(12))
    assert labels is not None and labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    images = data.images(torch.tensor([4, 0]))
    assert images.shape == (2, 3, 8, 8) and images.dtype == torch.uint8
    assert np.array_equal(images[0].permute(1, 2, 0), np.asarray(Image.open(pets / "cat" / "0.png").convert("RGB")))
    assert data.name(4) == "cat/0.png" and data.fingerprint() == Folder(str(pets), 8).fingerprint()


def test_a_flat_folder_has_no_classes(tmp_path: Path) -> None:
    make(tmp_path, ["b.png", "a.png"])
    data = Folder(str(tmp_path), 4, 1)
    assert data.class_names == [] and data.labels(torch.tensor([0])) is None
    assert [data.name(i) for i in range(2)] == ["a.png", "b.png"] and data.images(torch.tensor([1])).shape == (
        1,
        1,
        4,
        4,
    )


def test_bad_files_are_listed_and_dropped(pets: Path) -> None:
    (pets / "cat" / "1.png").write_bytes(b"text")
    (pets / "dog" / "zero.jpg").write_bytes(b"")
    data = Folder(str(pets), 8, max_bad=0.2)
    assert data.count == 11 and set(data.bad) == {"cat/1.png", "dog/zero.jpg"}
    assert data.bad["dog/zero.jpg"] == "empty file"
    again = Folder(str(pets), 8, max_bad=0.2)
    assert [e.path for e in again.entries] == [e.path for e in data.entries]
    with pytest.raises(DataError) as caught:
        Folder(str(pets), 8)
    text = str(caught.value)
    assert (
        "2 of 13 files can't be used" in text and "1 x empty file" in text and "cat/1.png" in text and "\n" not in text
    )


def test_a_changed_file_changes_the_fingerprint(pets: Path) -> None:
    before = Folder(str(pets), 8).fingerprint()
    make(pets, ["cat/2.png"], size=9, seed=5)
    assert Folder(str(pets), 8).fingerprint() != before


@pytest.mark.parametrize("what", ["missing", "none", "all bad"])
def test_folders_without_images_are_named(tmp_path: Path, what: str) -> None:
    if what != "missing":
        (tmp_path / "x").mkdir()
    if what == "all bad":
        (tmp_path / "x" / "a.jpg").write_bytes(b"no")
    with pytest.raises(DataError, match=r"data\.path: "):
        Folder(str(tmp_path / "x"), max_bad=1.0)


def test_a_file_that_breaks_later_is_named(pets: Path) -> None:
    data = Folder(str(pets), 8)
    (pets / "dog" / "0.png").write_bytes(b"gone")
    with pytest.raises(DataError, match=r"dog/0\.png: not a JPEG"):
        data.images(torch.tensor([8]))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_with_any_number_of_workers(pets: Path, workers: int) -> None:
    data = Folder(str(pets), 8)
    expected = [Batches(data, 3, 0, 40, 7)[n] for n in range(6)]
    loader = Loader(Batches(data, 3, 0, 40, 7), workers)
    batches = list(loader)
    assert [len(b) for b in batches] == [7] * 5 + [5] and [b.first for b in batches] == [0, 7, 14, 21, 28, 35]
    for ours, theirs in zip(batches, expected, strict=True):
        assert torch.equal(ours.images, theirs.images) and torch.equal(ours.index, theirs.index)
    resumed = list(Loader(Batches(data, 3, 14, 40, 7), workers))
    assert torch.equal(resumed[0].images, batches[2].images), "mid-epoch, a resumed run sees what it would have seen"


def test_about_half_is_mirrored_and_each_number_alike(pets: Path) -> None:
    data = Folder(str(pets), 8)
    batches = Batches(data, 0, 0, 400, 100)
    mirrored = 0
    for n in range(4):
        batch = batches[n]
        plain = data.images(batch.index)
        same = (batch.images == plain).flatten(1).all(dim=1)
        assert torch.equal(batch.images[~same], plain[~same].flip(-1))
        mirrored += int((~same).sum())
    assert 150 < mirrored < 250
    one = Batches(data, 0, 0, 400, 1)
    assert torch.equal(torch.cat([one[i].images for i in range(100)]), batches[0].images), "whatever the batch size"
    data.flips = False
    assert torch.equal(batches[0].images, data.images(batches[0].index))
    json.dumps(data.bad)

"""What a folder of pictures means, and what of it is not used: each is said."""

from __future__ import annotations

import os
import shutil
import subprocess
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from seriatim.core.errors import DataError, UsageError
from seriatim.data.folder import Folder


def put(*paths: Path, level: int = 9, size: int = 8) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (size, size), (level, level, level)).save(path, format=None if path.suffix else "PNG")


def classes(data: Folder) -> dict[str, int]:
    return dict(Counter(data.class_names[entry.label] for entry in data.entries))


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    root = tmp_path / "pets"
    put(*(root / name / f"{i}.png" for name in ("cat", "dog") for i in range(3)))
    return root


@pytest.mark.parametrize("given", [".", "./", "../pets", "../pets/", "link"])
def test_names_and_order_do_not_depend_on_how_the_folder_is_named(
    given: str, pets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures come folder by folder: those of `a` before those of `a b` and `a-b`, whose names compare as less."""
    put(*(pets / "cat" / name for name in ("a/z.png", "a-b/y.png", "a b/x.png", "a.png", "a!.png")))
    (pets.parent / "link").symlink_to(pets)
    monkeypatch.chdir(pets.parent if given == "link" else pets)
    data = Folder(given, 8)
    names = ["0.png", "1.png", "2.png", "a/z.png", "a b/x.png", "a!.png", "a-b/y.png", "a.png"]
    assert [entry.path for entry in data.entries] == [f"cat/{name}" for name in names] + [
        f"dog/{i}.png" for i in range(3)
    ]
    assert data.fingerprint() == Folder(str(pets), 8).fingerprint()


def test_files_of_the_system_are_passed_over_wherever_they_lie(pets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = Folder(str(pets), 8)
    assert plain.passed_over == {} and capsys.readouterr().err == ""
    for place in (pets, pets / "cat", pets / "cat" / "more"):
        for name in ("._0.png", ".DS_Store", "Thumbs.db", "desktop.ini", "DESKTOP.INI"):
            place.mkdir(exist_ok=True)
            (place / name).write_bytes(b"\0\5\x16\7")
        for name in ("__MACOSX", "@eaDir", ".thumbnails"):
            put(place / name / "cat" / "0.png")
    data = Folder(str(pets), 8)
    assert data.fingerprint() == plain.fingerprint() and data.bad == {}
    assert len(data.passed_over) == 24 and set(data.passed_over.values()) == {"hidden or of the system"}
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "24 passed over (24 x hidden or of the system; such as " in said
    flat = Folder(str(pets / "cat"), 8, empty="ignore")
    assert flat.class_names == [] and flat.count == 3


def test_the_usual_suffixes_are_read_and_others_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read = (
        "a.png b.PNG c.jpg d.jpeg e.jfif f.jpe g.webp h.gif i.bmp j.tif k.tiff l.avif m.ppm n.pgm o.mpo p.apng".split()
    )
    for name in read:
        picture, kind = Image.new("L" if name == "n.pgm" else "RGB", (8, 8)), {"jfif": "JPEG", "jpe": "JPEG"}
        picture.save(tmp_path / name, format=kind.get(name[2:]))
    others = {
        "x.heic": "the suffix .heic is not read",
        "x.txt": "the suffix .txt is not read",
        "README": "has no suffix",
    }
    for name in others:
        (tmp_path / name).write_bytes(b"?")
    os.mkfifo(tmp_path / "pipe.png")
    data = Folder(str(tmp_path), 8)
    assert [entry.path for entry in data.entries] == sorted(read)
    assert data.passed_over == others | {"pipe.png": "not a regular file"}
    said = capsys.readouterr().err
    assert said.startswith(f"not used of {tmp_path}: 4 passed over (") and "1 x the suffix .heic is not read" in said


def test_pictures_beside_class_folders(pets: Path) -> None:
    put(pets / "loose.png", pets / "other.jpg")
    with pytest.raises(
        DataError, match=r"holds 2 pictures beside class folders \(loose\.png beside cat/\).*loose=ignore"
    ):
        Folder(str(pets), 8)
    data = Folder(str(pets), 8, loose="ignore")
    assert classes(data) == {"cat": 3, "dog": 3}
    assert data.passed_over == {"loose.png": "beside class folders", "other.jpg": "beside class folders"}


@pytest.mark.parametrize(
    "names",
    [
        ("train", "val"),
        ("Training", "test"),
        ("valid",),
        ("train2017", "val2017", "extra"),
        ("test_set", "training_set"),
    ],
)
def test_the_parent_of_train_and_val(tmp_path: Path, names: tuple[str, ...]) -> None:
    put(*(tmp_path / split / name / "0.png" for split in names for name in ("cat", "dog")))
    first = next((name for name in names if "train" in name.lower()), names[0])
    with pytest.raises(
        DataError, match=rf"parts of a data set and not classes; name one of them: data\.path=.*/{first}$"
    ):
        Folder(str(tmp_path), 8)
    assert Folder(str(tmp_path / first), 8).class_names == ["cat", "dog"]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    put(*(tmp_path / name / "0.png" for name in ("bus", "train", "tram")))
    assert Folder(str(tmp_path), 8).class_names == ["bus", "train", "tram"]


def test_class_folders_without_pictures(pets: Path) -> None:
    (pets / "fish" / "deep").mkdir(parents=True)
    for i in range(2):
        (pets / "fish" / f"{i}.heic").write_bytes(b"?")
    (pets / "ants").mkdir()
    with pytest.raises(DataError, match=r"ants/, fish/ would be a class without pictures; .*data\.empty=ignore"):
        Folder(str(pets), 8)
    (pets / "ants").rmdir()
    with pytest.raises(
        DataError, match=r"fish/ would be a class without pictures \(2 x the suffix \.heic is not read\)"
    ):
        Folder(str(pets), 8)
    data = Folder(str(pets), 8, empty="ignore")
    assert data.class_names == ["cat", "dog"] and data.passed_over["fish"] == "a folder without pictures"
    shutil.rmtree(pets / "fish")
    for path in (pets / "cat").iterdir():
        path.write_bytes(b"broken")
    with pytest.raises(DataError, match=r"cat/ would be a class without pictures \(3 x not a JPEG"):
        Folder(str(pets), 8, empty="refuse", max_bad=1.0)
    data = Folder(str(pets), 8, empty="ignore", max_bad=1.0)
    labels = data.labels(torch.arange(data.count))
    assert data.class_names == ["dog"] and labels is not None and labels.tolist() == [0, 0, 0]


def test_a_folder_without_pictures_beside_pictures(tmp_path: Path) -> None:
    """Without class folders it is a folder like any other file, unless it holds pictures of an unread kind."""
    put(tmp_path / "a.png", tmp_path / "b.png")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "x.txt").write_text("x")
    data = Folder(str(tmp_path), 8)
    assert data.class_names == [] and data.count == 2
    assert data.passed_over == {"notes/x.txt": "the suffix .txt is not read", "notes": "a folder without pictures"}
    (tmp_path / "notes" / "x.heic").write_bytes(b"?")
    with pytest.raises(DataError, match="notes/ would be a class without pictures"):
        Folder(str(tmp_path), 8)


def test_nothing_that_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(
        DataError, match=r"holds no images .*not used: 1 x the suffix \.txt is not read\); name a folder"
    ):
        Folder(str(tmp_path), 8)


def test_links(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, root = tmp_path / "store", tmp_path / "links"
    put(*(store / "a" / f"{i}.png" for i in range(3)), *(store / "more" / f"m{i}.png" for i in range(3)))
    put(*(root / name / "own.png" for name in "cdef"))
    (root / "a").symlink_to(store / "a")  # a class that is a link
    (root / "b").mkdir()
    for i in range(3):
        (root / "b" / f"{i}.png").symlink_to(store / "a" / f"{i}.png")
    (root / "c" / "more").symlink_to(store / "more")  # a folder inside a class, twice, and with a way back
    (root / "c" / "same").symlink_to(store / "more")
    (store / "more" / "back").symlink_to(root / "c")
    (store / "more" / "up").symlink_to(store)
    (root / "d" / "gone.png").symlink_to(store / "nowhere.png")
    (root / "d" / "self.png").symlink_to(root / "d" / "self.png")
    (root / "d" / "loop").symlink_to(root)
    (root / "e" / "one").mkdir()
    (root / "e" / "one" / "two").symlink_to(root / "e")
    (root / "round").symlink_to(root)
    (root / "away").symlink_to(store / "nowhere")
    data = Folder(str(root), 8)
    assert classes(data) == {"a": 3, "b": 3, "c": 4, "d": 1, "e": 1, "f": 1}
    assert Counter(data.passed_over.values()) == {
        "a link that leads nowhere": 3, "a link back to where it is": 5, "a folder that was read already": 1,
    }  # fmt: skip
    assert data.passed_over["d/self.png"] == data.passed_over["away"] == "a link that leads nowhere"
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "again").symlink_to(root)
    assert Folder(str(tmp_path / "again"), 8).fingerprint() == data.fingerprint()


def test_a_folder_deeper_than_python_recurses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "a" / "0.png", tmp_path / "b" / "0.png")
    monkeypatch.chdir(tmp_path / "a")
    for _ in range(1200):
        os.mkdir("d")
        os.chdir("d")
    os.chdir(tmp_path)
    data = Folder(str(tmp_path), 8)
    assert data.count == 2
    subprocess.run(["rm", "-rf", str(tmp_path / "a")], check=True)  # as Python's own can't


# --- names --------------------------------------------------------------------------------------------------------


def test_names_in_any_normal_form(tmp_path: Path) -> None:
    put(*(tmp_path / "x" / unicodedata.normalize("NFD", name) / "0.png" for name in ("café", "zoo")))
    put(*(tmp_path / "y" / unicodedata.normalize("NFC", name) / "0.png" for name in ("café", "zoo")))
    assert Folder(str(tmp_path / "x"), 8).class_names == Folder(str(tmp_path / "y"), 8).class_names == ["café", "zoo"]
    for i, (first, second) in enumerate(
        [("é", "e\u0301"), ("\u212b", "\u00c5"), ("\ufb01sh", "fish"), ("2", "\uff12")]
    ):
        put(tmp_path / str(i) / first / "0.png", tmp_path / str(i) / second / "0.png")
        with pytest.raises(DataError, match="differ only in how Unicode spells them; rename one of them"):
            Folder(str(tmp_path / str(i)), 8)


def test_names_that_are_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(
        *(tmp_path / os.fsdecode(b"caf\xe9") / os.fsdecode(b"th\xe9%d.png" % i) for i in range(2)),
        tmp_path / "b" / "0.png",
    )
    (tmp_path / "b" / os.fsdecode(b"br\xf6ken\n\x1b[2J.png")).write_bytes(b"x")
    (tmp_path / "b" / os.fsdecode(b"\xfc.txt")).write_bytes(b"x")
    data = Folder(str(tmp_path), 8, max_bad=0.5)
    assert data.class_names == ["b", "caf\\xe9"] and data.count == 3
    assert data.name(1) == "caf\udce9/th\udce90.png"
    assert data.images(torch.tensor([1])).shape == (1, 3, 8, 8)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "b/br\\xf6ken\\n\\x1b[2J.png" in said and said.encode()


# --- settings -----------------------------------------------------------------------------------------------------


def test_a_background_and_a_cap_on_pixels(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "a.png")
    Image.new("L", (30, 30), 7).save(tmp_path / "b.png")
    white, pink = Folder(str(tmp_path), 8), Folder(str(tmp_path), 8, background="#ff80c0")
    assert white.background == (255, 255, 255) and pink.background == (255, 128, 192)
    index = torch.tensor([0])
    assert (white.images(index) == 255).all() and pink.images(index)[0, :, 3, 3].tolist() == [255, 128, 192]
    assert white.fingerprint() != pink.fingerprint()
    assert (Folder(str(tmp_path), 8, 1, background=[10, 10, 10]).images(index) == 10).all()
    small = Folder(str(tmp_path), 8, max_pixels=800, max_bad=0.5)
    assert small.count == 1 and "30x30 pixels, more than" in small.bad["b.png"]
    with pytest.raises(UsageError, match="max_pixels: -1 is not allowed"):
        Folder(str(tmp_path), 8, max_pixels=-1)
    with pytest.raises(UsageError, match="background: 'whit' is not a colour"):
        Folder(str(tmp_path), 8, background="whit")


def test_the_order_is_that_of_names_folder_by_folder(tmp_path: Path) -> None:
    names = ["a.png", "a/b.png", "a b.png", "a/a.png", "B.png", "a-1/c.png"]
    put(*(tmp_path / "x" / name for name in names))
    data = Folder(str(tmp_path), 8)
    expected = sorted((tmp_path / "x").rglob("*.png"))
    assert [tmp_path / entry.path for entry in data.entries] == expected
    assert np.stack([entry.stamp for entry in data.entries]).shape == (6, 2)

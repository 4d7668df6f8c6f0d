"""Files are known by their contents, which are hashed and decoded once and kept between starts."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from seriatim.core.cache_folder import cache_folder
from seriatim.core.errors import ConfigError, DataError
from seriatim.core.images import NoMemory
from seriatim.core.stopping import claimed
from seriatim.data import folder as folder_module
from seriatim.data.folder import Folder
from seriatim.data.labelled import InMemory
from seriatim.data.sources import build_data


def put(path: Path, seed: int = 0, size: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    chance = np.random.default_rng(seed)
    Image.fromarray(chance.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for n, name in enumerate(("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png", "dog/2.png")):
        put(tmp_path / "photos" / name, n)
    (tmp_path / "photos" / "cat" / "x.png").write_bytes(b"no picture")
    return tmp_path / "photos"


def opened(root: Path, **settings: Any) -> Folder:
    return Folder(str(root), 8, max_bad=0.5, **settings)


def record() -> Path:
    """The one file of the cache folder."""
    (found,) = (cache_folder() / "known").glob("*.json")
    return found


def forbid(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def refuse(*_: object, **__: object) -> Any:
        raise AssertionError("a file was read again")

    for name in names:
        monkeypatch.setattr(folder_module, name, refuse)


def earlier(data: Folder) -> str:
    """The fingerprint that release 0.2 would have written."""
    listing = [[e.path, e.label, *e.stamp] for e in data.entries]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


# --- what makes data the same -------------------------------------------------------------------------------------


def plain_copy(photos: Path, to: Path) -> None:
    shutil.copytree(photos, to, copy_function=shutil.copyfile)


def renamed_folder(photos: Path, to: Path) -> None:
    photos.rename(to)


def archive(photos: Path, to: Path) -> None:
    with tarfile.open(to.with_suffix(".tar"), "w") as tar:
        tar.add(photos, arcname=to.name, filter=lambda info: info.replace(mtime=int(info.mtime) - 7, deep=False))
    with tarfile.open(to.with_suffix(".tar")) as tar:
        tar.extractall(to.parent, filter="data")


def links(photos: Path, to: Path) -> None:
    for path in photos.glob("*/*"):
        (to / path.parent.name).mkdir(parents=True, exist_ok=True)
        (to / path.parent.name / path.name).symlink_to(path)


def touched(photos: Path, to: Path) -> None:
    plain_copy(photos, to)
    for path in to.glob("*/*"):
        os.utime(path, (1, 1))


@pytest.mark.parametrize("move", [plain_copy, renamed_folder, archive, links, touched])
@pytest.mark.parametrize("check", [True, False])
def test_a_copy_is_the_same_data(photos: Path, move: Callable[[Path, Path], None], check: bool) -> None:
    (photos / "cat" / "x.png").unlink()
    before = opened(photos, check=check)
    fingerprint, traits = before.fingerprint(), before.traits()
    move(photos, photos.parent / "elsewhere")
    after = opened(photos.parent / "elsewhere", check=check)
    assert (after.fingerprint(), after.traits()) == (fingerprint, traits)


@pytest.mark.parametrize("change", ["content", "name", "class", "one more", "one less", "background"])
def test_other_data_are_not(photos: Path, change: str) -> None:
    before = opened(photos).fingerprint()
    plain_copy(photos, photos.parent / "other")
    root, settings = photos.parent / "other", {}
    if change == "content":
        raw = bytearray((root / "dog" / "1.png").read_bytes())
        raw[-5] ^= 1
        (root / "dog" / "1.png").write_bytes(raw)
    elif change == "name":
        (root / "dog" / "1.png").rename(root / "dog" / "3.png")
    elif change == "class":
        (root / "dog" / "1.png").rename(root / "cat" / "2.png")
    elif change == "one more":
        put(root / "dog" / "9.png")
    elif change == "one less":
        (root / "dog" / "1.png").unlink()
    else:
        settings = {"background": "black"}
    assert opened(root, **settings).fingerprint() != before


def test_held_out_images_are_known_by_both_fingerprints(photos: Path) -> None:
    import torch

    data = opened(photos)
    part = InMemory(data, torch.arange(3), quiet=True)
    assert part.fingerprints() == (data.fingerprint() + " without 2", earlier(data) + " without 2")
    assert data.fingerprints() == (data.fingerprint(), earlier(data)) and part.fingerprint() == part.fingerprints()[0]


# --- what is kept -------------------------------------------------------------------------------------------------


def test_the_second_start_reads_nothing(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(photos)
    assert first.bad == {"cat/x.png": first.bad["cat/x.png"]} and first.count == 5
    forbid(monkeypatch, "load_pixels", "sha256")
    again = opened(photos)
    assert (again.bad, again.entries, again.fingerprint()) == (first.bad, first.entries, first.fingerprint())
    assert opened(photos, check=False).traits()["sizes"]  # it lists the bad file too, whose hash is known
    (photos.parent / "link").symlink_to(photos)
    assert opened(photos.parent / "link").fingerprint() == first.fingerprint(), "the folder with links resolved"
    with pytest.raises(AssertionError):
        opened(photos, check="full")


@pytest.mark.parametrize("change", ["size", "time"])
def test_a_file_that_changed_is_read_again(photos: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    before = opened(photos)
    path = photos / "dog" / "1.png"
    raw, stat = path.read_bytes(), path.stat()
    path.write_bytes(raw + b"more" if change == "size" else raw[::-1])
    os.utime(path, ns=(0, stat.st_mtime_ns + (change == "time")))
    read: list[str] = []
    real = folder_module.load_pixels

    def noted(path: Path, *rest: Any) -> Any:
        read.append(path.name)
        return real(path, *rest)

    monkeypatch.setattr(folder_module, "load_pixels", noted)
    after = opened(photos)
    assert read == ["1.png"] and after.fingerprint() != before.fingerprint()
    assert ("dog/1.png" in after.bad) == (change == "time")


def test_a_file_swapped_behind_the_back_is_found_by_a_full_check(photos: Path) -> None:
    before = opened(photos)
    path = photos / "dog" / "1.png"
    stat = path.stat()
    path.write_bytes(b"\0" * stat.st_size)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert opened(photos).fingerprint() == before.fingerprint(), "the documented limit"
    full = opened(photos, check="full")
    assert "dog/1.png" in full.bad and full.fingerprint() != before.fingerprint()
    assert opened(photos).fingerprint() == full.fingerprint(), "what a full check found is kept"


def test_another_decoder_decodes_again_but_does_not_hash(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = opened(photos)
    forbid(monkeypatch, "sha256")
    with pytest.raises(DataError, match="none usable"):
        Folder(str(photos), 8, max_pixels=9, max_bad=1)
    monkeypatch.setattr(folder_module, "__version__", "99")
    assert opened(photos).fingerprint() == before.fingerprint()


@pytest.mark.parametrize(
    "fault", [NoMemory("out of memory while decoding"), OSError(errno.EIO, "Input/output error"), OSError("odd")]
)
def test_a_passing_fault_is_not_kept(photos: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception) -> None:
    real = folder_module.load_pixels

    def fail_once(path: Path, *rest: Any) -> Any:
        if path.name == "2.png":
            raise fault
        return real(path, *rest)

    monkeypatch.setattr(folder_module, "load_pixels", fail_once)
    assert "dog/2.png" in opened(photos).bad
    monkeypatch.setattr(folder_module, "load_pixels", real)
    assert set(opened(photos).bad) == {"cat/x.png"}


def test_an_unreadable_file_without_a_check_is_named(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    data = opened(photos, check=False)
    monkeypatch.setattr(folder_module, "sha256", deny)
    with pytest.raises(DataError, match=r"^data: \w+/\w\.png of .*photos can't be read \(Permission denied\)"):
        data.fingerprint()


# --- the cache folder ---------------------------------------------------------------------------------------------


def flipped(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def resealed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    body = json.loads(path.read_bytes().split(b"\n")[1])
    change(body)
    text = json.dumps(body).encode()
    path.write_bytes(json.dumps({"format": 1, "sha256": hashlib.sha256(text).hexdigest()}).encode() + b"\n" + text)


def another_folders(path: Path) -> None:
    resealed(path, lambda body: body.update(source="/elsewhere"))


def other_shape(path: Path) -> None:
    resealed(path, lambda body: body.update(files={name: [1] for name in body["files"]}))


def of_the_future(path: Path) -> None:
    head, body = path.read_bytes().split(b"\n")
    path.write_bytes(head.replace(b'"format": 1', b'"format": 2') + b"\n" + body)


@pytest.mark.parametrize(
    "damage",
    [
        flipped,
        another_folders,
        other_shape,
        of_the_future,
        lambda path: path.write_bytes(path.read_bytes()[:-9]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"[" * 100_000),
        lambda path: path.write_bytes(b"\xff\xfe\n{}"),
    ],
)
def test_a_damaged_record_is_made_anew(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], damage: Callable[[Path], object]
) -> None:
    before = opened(photos)
    whole = record().read_bytes()
    capfd.readouterr()
    damage(record())
    after = opened(photos)
    assert (after.bad, after.fingerprint()) == (before.bad, before.fingerprint())
    assert record().read_bytes() == whole and capfd.readouterr().err.count("\n") == 1, "only the bad picture is named"
    forbid(monkeypatch, "load_pixels", "sha256")
    opened(photos)


def test_a_cache_that_can_not_be_written(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("SERIATIM_CACHE", str(tmp_path / "file" / "inside"))
    assert opened(photos).count == 5
    said = capfd.readouterr().err.splitlines()
    assert said[0].startswith("what was found out about the images is not kept (cannot write ") and len(said) == 2
    assert said[0].endswith("; set SERIATIM_CACHE to a folder for it")


def test_nothing_is_written_into_the_users_folder(photos: Path) -> None:
    before = sorted(photos.rglob("*"))
    opened(photos)
    assert sorted(photos.rglob("*")) == before and [p.name for p in (cache_folder() / "known").iterdir()] == [
        record().name
    ]


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("SERIATIM_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.setenv("SERIATIM_CACHE", "")
    assert cache_folder() == tmp_path / "xdg" / "seriatim"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / "home" / ".cache" / "seriatim"


def test_a_killed_check_keeps_what_it_found(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = folder_module.load_pixels

    def stop(path: Path, *rest: Any) -> Any:
        if path.parts[-2:] == ("dog", "2.png"):
            raise KeyboardInterrupt
        return real(path, *rest)

    monkeypatch.setattr(folder_module, "load_pixels", stop)
    with pytest.raises(KeyboardInterrupt):
        opened(photos)
    read: list[str] = []

    def noted(path: Path, *rest: Any) -> Any:
        read.append(path.name)
        return real(path, *rest)

    monkeypatch.setattr(folder_module, "load_pixels", noted)
    opened(photos)
    assert read == ["2.png"]


def test_a_second_process_waits_for_the_first(photos: Path, capfd: pytest.CaptureFixture[str]) -> None:
    opened(photos)
    place = record()
    place.unlink()
    found: list[Folder] = []
    with claimed(place.with_suffix(".lock")) as mine:
        assert mine
        thread = threading.Thread(target=lambda: found.append(opened(photos)))
        thread.start()
        while "another process is checking these images; waiting for it" not in capfd.readouterr().err:
            assert thread.is_alive() and not place.exists()
    thread.join()
    assert found[0].count == 5 and place.exists()


# --- what earlier versions wrote ----------------------------------------------------------------------------------


def test_a_latent_cache_begun_by_an_earlier_version_goes_on(photos: Path, tmp_path: Path) -> None:
    from seriatim.data.caching import write_cache
    from seriatim.data.latents import CACHE, read_sealed, write_sealed
    from seriatim.tokenizers.pixels import Pixels

    data, tokenizer = opened(photos), Pixels(8, patch=2, channels=3)

    def make(data: Folder, name: str) -> Any:
        return write_cache(data, tokenizer, tmp_path / name, shard_images=16, quiet=True)

    make(data, "now")
    values = read_sealed(tmp_path / "now" / CACHE)
    (tmp_path / "then").mkdir()
    write_sealed(tmp_path / "then" / CACHE, {**values, "data_fingerprint": earlier(data)})
    assert make(data, "then").encoded == 5 and make(data, "then").encoded == 0
    latents = build_data({"kind": "latents", "path": str(tmp_path / "then")})
    assert latents.images_fingerprint() == earlier(data) in data.fingerprints()
    plain_copy(photos, tmp_path / "copy")
    assert make(opened(tmp_path / "copy"), "now").encoded == 0, "a copy goes on with a cache of this version"
    os.utime(photos / "dog" / "0.png", (1, 1))
    with pytest.raises(ConfigError, match=r"^data \(its images\): .* was begun with others"):
        make(opened(photos), "then")


def test_an_evaluation_knows_both_fingerprints(photos: Path, tmp_path: Path) -> None:
    from seriatim.core.errors import UsageError
    from seriatim.evaluation.identity import same_settings
    from seriatim.evaluation.reference import whole

    part = whole(opened(photos), 0, ())
    assert len(set(part.fingerprints())) == 2
    for sha in part.fingerprints():
        path = tmp_path / f"{sha[:8]}.json"
        path.write_text(json.dumps({"real": {"images": 5, "sha256": sha}}))
        same_settings(path, {"real": {"images": 5, "sha256": part.fingerprint()}}, {"real": part, "reference": None})
        with pytest.raises(UsageError, match=r"^real\.images: "):
            same_settings(path, {"real": {"images": 6, "sha256": part.fingerprint()}}, {"real": part})
    (tmp_path / "other.json").write_text(json.dumps({"real": {"sha256": "00"}}))
    with pytest.raises(UsageError, match=r"^real\.sha256: "):
        same_settings(tmp_path / "other.json", {"real": {"sha256": part.fingerprint()}}, {"real": part})

"""Files are whole or absent, and what is read is what was written."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from seriatim.core import files
from seriatim.core.errors import CheckpointError, ResourceError, UsageError


def litter(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


def test_atomic_write_replaces_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    files.write_text(path, "one")
    files.write_text(path, "two")
    assert path.read_text() == "two"
    assert litter(path.parent) == []
    beside = tmp_path / "beside.txt"
    beside.write_text("as the system makes a file")
    assert path.stat().st_mode == beside.stat().st_mode


def test_the_umask_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It belongs to the whole process: another thread may be making a file just then."""
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patched:
            patched.delattr(os, "umask")
            files.write_text(tmp_path / "a.txt", "x")
            with files.atomic_folder(tmp_path / "folder") as folder:
                (folder / "b.txt").write_text("x")
    finally:
        assert os.umask(before) == 0o027
    modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "a.txt", tmp_path / "folder")]
    assert modes == [0o640, 0o750]


def test_what_a_temporary_name_stands_for(tmp_path: Path) -> None:
    for name, mode, target in (
        (".a.~0123abcd.txt", 0o644, "a.txt"),
        (".v1.2.~0123abcd", 0o644, "v1.2"),
        (".a.x7k2_9qq.txt", 0o644, "a.txt"),
        (".a.original.txt", 0o600, "a.txt"),
        (".a.original.txt", 0o644, None),
        (".a.previous", 0o600, None),
        (".a.previous", 0o700, None),
        ("a.~0123abcd.txt", 0o600, None),
        (".a.~0123abc.txt", 0o600, None),
        (".a.txt", 0o600, None),
    ):
        path = tmp_path / name
        path.write_text("x")
        path.chmod(mode)
        assert files.target_of(path) == target, (name, oct(mode))
        path.unlink()


def test_atomic_write_that_fails_keeps_the_old_file(tmp_path: Path) -> None:
    path = files.write_text(tmp_path / "a.txt", "old")

    def fail(file: Path) -> None:
        file.write_text("half of the ne")
        raise RuntimeError("the program fails")

    with pytest.raises(RuntimeError):
        files.atomic_write(path, fail)
    assert path.read_text() == "old"
    assert litter(tmp_path) == []


def test_atomic_write_syncs_before_it_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Power loss: the data must be on the disk before the name points to it, the name after."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(handle: int) -> None:
        calls.append("sync folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "sync file")
        fsync(handle)

    def record_replace(a: Path, b: Path) -> None:
        calls.append("rename")
        replace(a, b)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    files.write_text(tmp_path / "a.txt", "x")
    assert calls == ["sync file", "rename", "sync folder"]
    calls.clear()
    with files.atomic_folder(tmp_path / "f") as folder:
        (folder / "a").write_text("x")
        (folder / "b").write_text("y")
    assert calls == ["sync file", "sync file", "sync folder", "rename", "sync folder"]


@pytest.mark.parametrize("function", ["replace", "fsync"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_atomic_write_on_a_failing_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, number: int
) -> None:
    path = files.write_text(tmp_path / "a.txt", "old")

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(ResourceError) as caught:
        files.write_text(path, "new")
    monkeypatch.undo()
    message = str(caught.value)
    assert str(path) in message and os.strerror(number) in message and "\n" not in message
    assert path.read_text() == "old"
    assert litter(tmp_path) == []


WRITER = """
import sys
from pathlib import Path
from seriatim.core.files import atomic_folder, write_text, write_manifest
out = Path(sys.argv[1])
n = 0
while True:
    n += 1
    write_text(out / "file.txt", str(n) * 20000)
    with atomic_folder(out / "folder") as f:
        (f / "a").write_text(str(n) * 20000)
        (f / "b").write_text(str(n) * 20000)
        write_manifest(f, ("a", "b"))
    print(n, flush=True)
"""


def test_atomic_files_and_folders_survive_kill_nine(tmp_path: Path) -> None:
    """Killed at random moments while it writes all the time: what is there is always whole."""
    chance = random.Random(0)
    for _ in range(12):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        writer.stdout.readline()  # it has written once
        time.sleep(chance.random() * 0.03)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        text = (tmp_path / "file.txt").read_text()
        assert len(set(text[i : i + len(text) // 20000] for i in range(0, len(text), len(text) // 20000))) == 1
        files.put_back(tmp_path / "folder")  # killed between the two renames: the old one lies beside it, whole
        folder = tmp_path / "folder"
        files.verify_manifest(folder, ("a", "b"))
        assert (folder / "a").read_text() == (folder / "b").read_text()


def test_atomic_folder_that_fails_keeps_the_old_one(tmp_path: Path) -> None:
    with files.atomic_folder(tmp_path / "f") as folder:
        (folder / "a").write_text("old")
    with pytest.raises(RuntimeError), files.atomic_folder(tmp_path / "f") as folder:
        (folder / "a").write_text("new")
        raise RuntimeError("the program fails")
    assert (tmp_path / "f" / "a").read_text() == "old"
    assert litter(tmp_path) == []


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    (tmp_path / "a").write_bytes(bytes(range(200)))
    (tmp_path / "b").write_bytes(b"hello")
    files.write_manifest(tmp_path, ("a", "b"))
    return tmp_path


def test_manifest_of_a_whole_folder(listed: Path) -> None:
    assert set(files.verify_manifest(listed, ("a", "b"))) == {"a", "b"}


def test_manifest_detects_every_flipped_bit(listed: Path) -> None:
    """No bit of any file, the manifest included, can change unseen."""
    chance = random.Random(1)
    for name in ("a", "b", files.MANIFEST):
        path = listed / name
        whole = path.read_bytes()
        for _ in range(60):
            position, bit = chance.randrange(len(whole)), chance.randrange(8)
            broken = bytearray(whole)
            broken[position] ^= 1 << bit
            path.write_bytes(broken)
            with pytest.raises(CheckpointError) as caught:
                files.verify_manifest(listed, ("a", "b"))
            assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        path.write_bytes(whole)


@pytest.mark.parametrize("name", ["a", "b", files.MANIFEST])
def test_manifest_detects_truncation_and_absence(listed: Path, name: str) -> None:
    path = listed / name
    whole = path.read_bytes()
    for keep in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(CheckpointError, match=name):
            files.verify_manifest(listed)
    path.unlink()
    with pytest.raises(CheckpointError, match=name):
        files.verify_manifest(listed)


def test_manifest_lists_no_paths(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "secret").write_text("x")
    files.write_manifest(tmp_path / "inside", ("../secret",))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        files.verify_manifest(tmp_path / "inside")


def test_writable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        files.writable_folder(tmp_path / "file")
    with pytest.raises(ResourceError, match="cannot write"):
        files.writable_folder("/proc/nowhere/out")
    assert files.writable_folder(tmp_path / "new" / "folder").is_dir()


def test_names_that_are_not_utf8_survive_json_and_libraries(tmp_path: Path) -> None:
    """Bytes of a name come back from JSON as they were; what needs valid UTF-8 gets a name that is."""
    name = os.fsdecode(b"caf\xe9")
    value = {name: [name, "é日本\n"]}
    assert json.loads(files.write_json(tmp_path / "a.json", value).read_bytes()) == value
    assert "é日本" in (tmp_path / "a.json").read_text(encoding="utf-8"), "what can be read stays readable"
    files.write_json(tmp_path / name / "b.json", value)
    with files.utf8_path(tmp_path / name / "b.json") as readable:
        assert readable.encode() and json.loads(Path(readable).read_bytes()) == value
    with files.utf8_path(tmp_path / "a.json") as readable:
        assert readable == str(tmp_path / "a.json")

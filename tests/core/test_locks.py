"""A lock file is created and deleted; what somebody else keeps under its name is neither written nor deleted."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import command

from seriatim.core.errors import UsageError
from seriatim.core.stopping import claimed


def link(path: Path) -> None:
    (path.parent / "notes").write_text("")
    path.symlink_to("notes")


OTHERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_text("mine"),
    "link": link,
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("wait", [False, True])
def test_what_is_no_lock_is_refused_and_left_alone(kind: str, wait: bool, tmp_path: Path) -> None:
    path = tmp_path / ".work.lock"
    OTHERS[kind](path)
    before = path.lstat()
    with pytest.raises(UsageError, match="is not a file of Seriatim"), claimed(path, wait=wait):
        pass
    after = path.lstat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)


def test_a_lock_that_a_dead_process_left_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / ".work.lock"
    path.touch()
    with claimed(path) as mine:
        assert mine
        with claimed(path) as again:
            assert not again
    assert not path.exists()


def test_sampling_beside_a_file_of_the_name_of_its_lock(model_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "out" / ".000000.lock"
    other.parent.mkdir()
    other.write_text("mine")
    code, lines = command("sample", str(model_folder), "--out", str(other.parent), "--num-images-per-label", "1")
    assert code == 2 and str(other) in lines[-1] and other.read_text() == "mine"
    assert [path.name for path in other.parent.iterdir()] == [other.name]

"""Folders and files that can't be used: links in a circle, failing disks, no permission (rows 25 and 31)."""

from __future__ import annotations

import errno
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import TRAIN, VERBS, begin, command, content, inside, litter

from seriatim.cli.main import run
from seriatim.core.files import verify_manifest

for heavy in ("cli.app", "training.loop", "training.log"):
    importlib.import_module(f"seriatim.{heavy}")  # here, once, and not in each child
for heavy in ("matplotlib.figure", "sklearn.datasets"):
    importlib.import_module(heavy)

OUT = {name: words for name, words in VERBS.items() if name not in ("sweep", "classifier")}
_broken: Path | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _broken is not None and event == "open" and isinstance(arguments[0], (str, os.PathLike)):
        if Path(os.path.abspath(arguments[0])).is_relative_to(_broken):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(arguments[0]))


sys.addaudithook(_hook)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    begin(folder)
    return folder


@pytest.fixture
def work(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "work"))


@pytest.mark.parametrize("where", ["out", "parent"])
@pytest.mark.parametrize("verb", OUT)
def test_links_in_a_circle(verb: str, where: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the place to write to, itself or above it."""
    name = OUT[verb][-1]
    loop = work / "out" if where == "parent" else work / name
    loop.parent.mkdir(exist_ok=True)
    loop.symlink_to(loop.name)
    with inside(work):
        code, lines = command(OUT[verb], capsys)
    assert code in (2, 6) and len(lines) == 1 and "Traceback" not in lines[0], lines
    assert "a bug" not in lines[0] and loop.is_symlink(), lines


def test_links_in_a_circle_among_pictures(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are no reason to go round for ever; what else is there is read."""
    (work / "pets" / "cat" / "again").symlink_to("../../pets")
    (work / "pets" / "cat" / "self.png").symlink_to("self.png")
    with inside(work):
        code, lines = command([*OUT["cache"], "--json"], capsys)
    assert code in (0, 3) and "Traceback" not in "".join(lines), lines


def test_links_in_a_circle_to_read_from(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loop = work / "loop"
    loop.symlink_to("loop")
    for words in (
        ["sample", "loop", "--out", "o"],
        ["train", "loop", "--out", "o"],
        ["train", "mar-cifar10-tiny", "data.path=loop", "--out", "o"],
        ["train", "mar-digits", *TRAIN, "training.init_from=loop", "--out", "o"],
        ["convert", "mar", "loop", "o"],
        ["edit", "model", "loop", "--mask", "loop", "--out", "o"],
    ):
        with inside(work):
            code, lines = command(words, capsys)
        assert code in (2, 3, 4, 6) and len(lines) == 1 and "a bug" not in lines[0], (words, code, lines)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ("model", ["sample", "model", "--out", "o"]),
        ("pets", ["train", "mar-cifar10-tiny", "data.path=pets", "data.size=8", "--out", "o"]),
        ("image.png", ["edit", "model", "image.png", "--mask", "mask.png", "--out", "o"]),
        ("recipe.yaml", ["train", "recipe.yaml", "--out", "o"]),
        ("weights.pth", ["convert", "mar", "weights.pth", "o"]),
    ],
)
def test_a_disk_that_fails_while_it_is_read(
    broken: str, words: list[str], work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """EIO, as of a network disk that went away: one line."""
    global _broken
    for name in ("recipe.yaml", "weights.pth"):
        (work / name).write_text("x")
    before = content(work)
    _broken = work / broken
    try:
        with inside(work):
            code, lines = command(words, capsys)
    finally:
        _broken = None
    assert code in (2, 3, 4, 6) and len(lines) == 1 and "a bug" not in lines[0], lines
    assert {k: v for k, v in content(work).items() if k in before} == before


def readable_by_all(path: Path) -> bool:
    return all(part.stat().st_mode & 0o005 == 0o005 for part in path.resolve().parents)


@pytest.mark.fresh_process
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may write nowhere")
@pytest.mark.skipif(not readable_by_all(Path(np.__file__)), reason="nobody may not read what Python has installed")
def test_a_folder_that_may_not_be_written_to(work: Path) -> None:
    """The folder is there and belongs to somebody else; each verb is run in a child that is nobody."""
    for path in (work, *work.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    for path in work.parents:
        if path.is_relative_to(tempfile.gettempdir()) and path != Path(tempfile.gettempdir()):
            path.chmod(path.stat().st_mode | 0o055)
    for verb, words in OUT.items():
        with inside(work):
            assert run(words) == 0, "so that all modules are imported: nobody may not read them everywhere"
        shutil.rmtree(work / "out")
        code, lines = ended(words, work, nobody=True)
        assert code == 6 and len(lines) == 1 and "Permission denied" in lines[0], (verb, code, lines)
        assert "choose a folder that you may write to" in lines[0] and not (work / "out").exists(), verb


def begun(words: list[str], work: Path, log: Path, nobody: bool = False) -> int:
    """The process number of a child that runs a command line in `work`; what it says goes to `log`."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.chdir(work)
            os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
            sys.stderr = open(2, "w", buffering=1, closefd=False)
            if nobody:
                os.setgid(65534)
                os.setuid(65534)
            code = run(words)
        finally:
            os._exit(code)
    return child


def ended(words: list[str], work: Path, nobody: bool = False) -> tuple[int, list[str]]:
    """The exit code of a command line that is run in a child, and its lines of error."""
    code = os.waitstatus_to_exitcode(os.waitpid(begun(words, work, work / "stderr", nobody), 0)[1])
    return code, [line for line in (work / "stderr").read_text().splitlines() if line.startswith("error")]


# --- row 25: two at once ----------------------------------------------------------------------------------------------


@pytest.mark.fresh_process
def test_of_trainers_in_one_folder_one_trains(work: Path) -> None:
    """Four begin at the same moment: one trains, the others exit with code 2, and change nothing of its run."""
    children = [begun(OUT["train"], work, work / f"log-{i}") for i in range(4)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert sorted(codes) == [0, 2, 2, 2]
    for i, code in enumerate(codes):
        said = [line for line in (work / f"log-{i}").read_text().splitlines() if line.startswith("error")]
        assert len(said) == (code != 0) and "a bug" not in "".join(said), said
    verify_manifest(work / "out" / "run" / "model")
    assert not litter(work / "out")


@pytest.mark.fresh_process
def test_the_lock_of_a_killed_trainer_holds_nobody_up(work: Path) -> None:
    """While it trains a second is refused and told who trains; when it was killed the next one goes on with the run."""
    words = [*OUT["train"][:-2], "training.images=96000", "training.save_images=960", *OUT["train"][-2:]]
    first = begun(words, work, work / "log")
    end = time.monotonic() + 120
    try:
        while not list((work / "out" / "run" / "checkpoints").glob("[0-9]*")):
            assert time.monotonic() < end and os.waitpid(first, os.WNOHANG) == (0, 0), (work / "log").read_text()
            time.sleep(0.01)
        for more in (["--resume"], ["--overwrite"]):
            code, lines = ended([*words, *more], work)
            assert code == 2 and len(lines) == 1 and f"process {first} " in lines[0], (more, lines)
    finally:
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
    seen = max(int(path.name) for path in (work / "out" / "run" / "checkpoints").glob("[0-9]*"))
    shorter = [word.replace("96000", str(seen + 16)) for word in words]
    code, lines = ended([*shorter, "--resume"], work)
    assert code == 0 and (work / "out" / "run" / "model").is_dir(), lines

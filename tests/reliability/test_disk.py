"""A disk that is cut off, full or read-only: what each verb leaves, and what it says (rows 2 and 3 of the page)."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import faults
import pytest
import torch
from faults import VERBS, Call, begin, command, content, inside, litter, watched

from seriatim.checkpoints.native import load_bundle, save_bundle
from seriatim.checkpoints.unfinished import newest_whole
from seriatim.cli.main import run
from seriatim.core.errors import ResourceError
from seriatim.core.files import MANIFEST, verify_manifest

QUICK = ("train", "sample", "edit", "cache", "evaluate", "export")
APPENDED = ("metrics.jsonl",)  # one line at a time: a run that is killed keeps what it has measured
NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the verbs begin with."""
    folder = tmp_path_factory.mktemp("source")
    begin(folder)
    return folder


@pytest.fixture
def work(source: Path, tmp_path: Path) -> Path:
    shutil.copytree(source, tmp_path / "work")
    return tmp_path / "work"


def again(verb: str) -> list[str]:
    """The command line that goes on with what is there, or replaces it; a run that has no recipe yet begins again."""
    runs = {"train": Path("out/run"), "classifier": Path("out/classifier")}
    more = {name: ["--resume"] for name, folder in runs.items() if (folder / "recipe.yaml").exists()}
    more |= {name: ["--overwrite"] for name in ("sample", "edit", "export", "export .pth")}
    return [*VERBS[verb], *more.get(verb, [])]


# --- row 2: power loss ------------------------------------------------------------------------------------------------


def check_order(calls: list[Call], root: Path) -> None:
    """Nothing gets its name before its data is on the disk, and each new name is brought to the disk as well."""
    hidden = {call.path for call in calls if call.kind in ("create", "folder") and call.path.name.startswith(".")}

    def aside(path: Path) -> bool:
        return any(part in hidden for part in (path, *path.parents))

    changed: dict[Path, int] = {}  # when a file's data was last written
    synced: dict[Path, int] = {}
    final: set[Path] = set()
    for place, call in enumerate(calls):
        if call.kind in ("create", "write"):
            changed[call.path] = place
        elif call.kind == "sync":
            synced[call.path] = place
        elif call.kind == "rename":
            assert call.other is not None
            for path in [p for p in changed if p == call.path or call.path in p.parents]:
                moved = call.other / path.relative_to(call.path) if path != call.path else call.other
                changed[moved], when = changed.pop(path), synced.pop(path, -1)
                synced[moved] = when
                if not aside(call.other):
                    assert when > changed[moved], f"{moved} was renamed before its data was synced"
                    final.add(moved)
            if not aside(call.other) and not call.other.name.startswith("."):  # such a name is on its way out
                after = [c for c in calls[place + 1 :] if c.kind == "sync" and c.path == call.other.parent]
                assert after, f"the rename to {call.other} was never synced"
    for path in root.rglob("*"):
        if path.is_file() and path.name not in APPENDED and not path.name.endswith(".lock"):
            assert path in final, f"{path} was not written aside and renamed"


@pytest.mark.parametrize("verb", VERBS)
def test_data_is_synced_before_its_name(verb: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything that a verb leaves was written aside, synced, renamed, and the folder of the name synced."""
    with inside(work), watched(work / "out") as disk:
        code, lines = command(VERBS[verb], capsys)
    assert code == 0, lines
    check_order(disk.calls, work / "out")


@pytest.mark.parametrize("skipped", ["file", "folder"])
def test_the_check_of_the_order_can_fail(
    skipped: str, work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"seriatim.core.files.sync_{skipped}", lambda _: None)
    with inside(work), watched(work / "out") as disk:
        assert command(VERBS["sample"], capsys)[0] == 0
    with pytest.raises(AssertionError, match="synced"):
        check_order(disk.calls, work / "out")


# --- row 3: a full disk -----------------------------------------------------------------------------------------------


def check_whole(folder: Path) -> None:
    """Every folder with a manifest is whole, every checkpoint too, and nothing half-written lies about."""
    assert not litter(folder), "nothing half-written is left"
    for manifest in folder.rglob(MANIFEST):
        verify_manifest(manifest.parent)
    for checkpoints in folder.rglob("checkpoints"):
        assert not newest_whole(checkpoints)[1]
    for path in folder.rglob("*.png"):
        with faults.Image.open(path) as image:
            image.load()


def refuse(verb: str, work: Path, place: int, number: int, capsys: pytest.CaptureFixture[str]) -> None:
    """From call number `place` on the disk refuses; then it is mended, and the same command ends as if nothing was."""
    shutil.rmtree(work / "out", ignore_errors=True)
    with inside(work), watched(work / "out", fails=place, number=number):
        code, lines = command(VERBS[verb], capsys)
    assert code == 6 and len(lines) == 1, (place, code, lines)
    assert os.strerror(number) in lines[0] and "Traceback" not in lines[0], lines
    check_whole(work / "out")
    with inside(work):
        code, lines = command(again(verb), capsys)
        if code == 2:  # the disk refused before there was a run to go on with
            code, lines = command(VERBS[verb], capsys)
    assert code == 0, (place, lines)
    check_whole(work / "out")


def calls_of(verb: str, work: Path, capsys: pytest.CaptureFixture[str]) -> int:
    with inside(work), watched(work / "out") as disk:
        code, lines = command(VERBS[verb], capsys)
    assert code == 0, lines
    return len(disk.calls)


@pytest.mark.parametrize("verb", QUICK)
def test_a_full_disk_is_one_line_and_loses_nothing(verb: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused at three places from the first call to the last, each time with another of the system's reasons."""
    count = calls_of(verb, work, capsys)
    places = sorted({round(part * (count - 1)) for part in (0.0, 0.5, 1.0)})
    for i, place in enumerate(places):
        refuse(verb, work, place, NUMBERS[i % len(NUMBERS)], capsys)


@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS, ids=errno.errorcode.get)
@pytest.mark.parametrize("verb", VERBS)
def test_a_full_disk_at_every_call(verb: str, number: int, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place in range(calls_of(verb, work, capsys)):
        refuse(verb, work, place, number, capsys)


def test_a_full_disk_keeps_what_was_there(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second run over finished results changes none of them when it can't write."""
    with inside(work):
        for verb in ("sample", "export", "export .pth"):
            assert command(VERBS[verb], capsys)[0] == 0
            before = content(work / "out")
            with watched(work / "out") as disk:
                assert command(again(verb), capsys)[0] == 0
            for place in range(0, len(disk.calls), 3):
                with watched(work / "out", fails=place):
                    code, lines = command(again(verb), capsys)
                assert code == 6 and len(lines) == 1, lines
                now = content(work / "out")
                assert before.keys() <= now.keys() and not litter(work / "out")
                assert all(now[name] == before[name] for name in before), "whole, and the same images"


@pytest.mark.parametrize(
    ("verb", "size"), [("train", 3000), ("sample", 100), ("cache", 2000), ("export", 9000), ("export .pth", 9000)]
)
@pytest.mark.fresh_process
def test_no_file_may_grow(verb: str, size: int, work: Path) -> None:
    """The system itself refuses, in the middle of a file, in a process of its own."""
    child = os.fork()
    if child == 0:
        os.chdir(work)
        os.dup2(os.open("stderr", os.O_CREAT | os.O_WRONLY), 2)
        sys.stderr = open(2, "w", buffering=1, closefd=False)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        os._exit(run(VERBS[verb]))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = (work / "stderr").read_text()
    errors = [line for line in said.splitlines() if line.startswith("error")]
    assert code == 6 and len(errors) == 1 and "Traceback" not in said, said
    assert "File too large" in errors[0], errors
    check_whole(work / "out")


def test_a_model_is_replaced_whole_or_not_at_all(work: Path) -> None:
    """Wherever its writing stops, the folder holds the old model or the new one."""
    bundle = load_bundle(work / "model")
    old = content(work / "model")
    with torch.no_grad():
        bundle.model.get_parameter("conditioner.no_class").add_(1.0)
    save_bundle(bundle, work / "other")
    new, stopped = content(work / "other"), 0
    with watched(work) as disk:
        save_bundle(load_bundle(work / "model"), work / "model")
    for place in range(len(disk.calls)):
        with watched(work, fails=place, once=True):
            try:
                save_bundle(bundle, work / "model")
            except ResourceError as error:
                stopped += 1
                assert "No space left" in str(error)
        assert content(work / "model") in (old, new), disk.calls[place]
        assert set(litter(work)) <= {".model.previous"}, "the old one, whole, where its deletion was not reached"
        save_bundle(load_bundle(work / "model"), work / "model")
    assert stopped > 20

"""An evaluation that is killed ends with the very same figures (row 50 of the page)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from faults import FEW, begin, command, content, inside, litter

from seriatim.cli.main import run

WORDS = ["evaluate", "model", "--data", "digits", "--real-data", "{kind: digits, held_out: true}", "--num", "300"]
WORDS += ["--features", "pixels", *FEW, "--batch-size", "64", "--out", "out"]


def figures(folder: Path) -> Any:
    found = json.loads((folder / "out" / "results.json").read_text())
    return {key: value for key, value in found.items() if key not in ("seconds", "when", "environment")}


def blocks(folder: Path) -> int:
    return len(list((folder / "out").rglob("[0-9]*.safetensors")))


@pytest.mark.fresh_process
def test_a_killed_evaluation_ends_with_the_same_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`kill -9` when a share of the blocks of features is there, 40 % of them too; then the same command again."""
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    begin(undisturbed)
    with inside(undisturbed):
        assert run(WORDS) == 0
    for share in (0.2, 0.4, 0.9):
        work = tmp_path / str(share)
        shutil.copytree(undisturbed, work, ignore=shutil.ignore_patterns("out"))
        killed_at(share, work, undisturbed, capsys)


def killed_at(share: float, work: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = max(1, round(share * blocks(undisturbed)))
    child = os.fork()
    if child == 0:
        os.chdir(work)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os._exit(run(WORDS))
    end = time.monotonic() + 120
    while blocks(work) < wanted:
        assert time.monotonic() < end, "it never got there"
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended before it was killed"
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert not (work / "out" / "results.json").exists()
    kept = content(work / "out")
    with inside(work):
        code, lines = command(WORDS, capsys)
    assert code == 0, lines
    now = content(work / "out")
    assert all(now[name] == kept[name] for name in kept if name.endswith(".safetensors") and "/." not in name)
    assert figures(work) == figures(undisturbed)
    assert {k: v for k, v in now.items() if k.endswith(".safetensors") and not Path(k).name.startswith(".")} == {
        k: v for k, v in content(undisturbed / "out").items() if k.endswith(".safetensors")
    }
    assert len(litter(work / "out")) <= 1, "at most what was half written when it was killed"

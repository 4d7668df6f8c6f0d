"""The examples of heads run, each in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from forked import in_fork, script

LINES = {
    "own_head": "nats of each feature",
    "own_backbone": "means of class 0 and 1",
    "tokenbridge": "at full size: 482,802,752",
}
LONGEST = {"own_head": 60, "own_backbone": 120}


@pytest.mark.parametrize("name", LONGEST)
def test_a_part_of_ones_own_is_short(name: str) -> None:
    path = Path(__file__).resolve().parent.parent / "examples" / f"{name}.py"
    assert len(path.read_text().splitlines()) <= LONGEST[name]


@pytest.mark.parametrize("name", LINES)
def test_it_runs(name: str, tmp_path: Path) -> None:
    path = Path(__file__).resolve().parent.parent / "examples" / f"{name}.py"
    done = in_fork(script, [str(path), "--steps", "2"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert LINES[name] in done.stdout

"""The examples of heads run, each in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from forked import command_line, in_fork, script

LINES = {
    "own_head": "nats of each feature",
    "own_backbone": "means of class 0 and 1",
    "tokenbridge": "at full size: 482,802,752",
}
LONGEST = {"own_head": 60, "own_backbone": 120, "own_plugin": 60}


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


def test_the_plugin_trains_and_samples(tmp_path: Path) -> None:
    path = str(Path(__file__).resolve().parent.parent / "examples" / "own_plugin.py")
    small = (
        "model.width=32",
        "model.depth=1",
        "training.images=32",
        "training.batch_size=32",
        "training.sample_images=0",
    )
    lines = [
        ["train", "mar-digits", "model.head={kind: laplace}", *small, "--out", "run"],
        ["sample", "run", "--label", "3", "--sharpness", "2", "--order", "columns", "--num-inference-steps", "2"],
    ]
    for words in lines:
        done = in_fork(command_line, ["--plugin", path, *words], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "samples" / "0000-3.png").is_file()

"""The benchmark of random numbers runs at toy size."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import random_numbers


def test_every_draw_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    random_numbers.main(["--images", "3", "--repetitions", "2"])
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["keys", "generators", "times"] and len(rows) == 7
    assert all(float(value) > 0 for row in rows for value in row.split()[-3:-1])

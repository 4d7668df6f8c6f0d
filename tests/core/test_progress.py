"""Progress: quiet when short, plain lines without a terminal, an ETA."""

from __future__ import annotations

import pytest

from seriatim.core import progress
from seriatim.core.progress import Progress, duration, track


def test_duration() -> None:
    assert [duration(s) for s in (0, 9.4, 95, 3725)] == ["0:00", "0:09", "1:35", "1:02:05"]


def test_nothing_is_printed_for_what_is_fast(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(range(5), 5, "counting")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err == ""


def test_lines_with_rate_and_eta(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with Progress(100, "training", "images") as bar:
        for _ in range(4):
            now += 10.0
            bar.advance(20, "loss 0.5")
        assert bar.rate == pytest.approx(2.0) and bar.eta == pytest.approx(10.0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "training: 40 of 100 images, 2 images/s, 0:30 left, loss 0.5"
    assert lines[-1] == "training: 80 images in 0:40, loss 0.5"


def test_a_resumed_run_measures_its_own_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with Progress(100, "training", done=60, quiet=True) as bar:
        now += 10.0
        bar.advance(20)
        assert bar.rate == pytest.approx(2.0) and bar.eta == pytest.approx(10.0)


def test_what_was_there_already_says_nothing_about_the_rate() -> None:
    with Progress(10, "encoding", "images") as bar:
        bar.skip(4)
        assert (bar.done, bar.rate, bar.eta) == (4, 0.0, float("inf"))
        bar.advance(2)
        assert bar.done == 6 and bar.rate > 0

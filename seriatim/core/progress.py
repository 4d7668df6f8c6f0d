"""Progress with an ETA: a bar on a terminal, plain lines elsewhere, and nothing for work of under two seconds."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, TypeVar

from seriatim.core.terminal import is_terminal, say

T = TypeVar("T")

QUIET_SECONDS = 2.0  # shorter work shows no bar
LINE_SECONDS = 15.0  # seconds between two lines where there is no terminal


def duration(seconds: float) -> str:
    """Seconds as text: `95` becomes `1:35`, and an hour or more becomes `h:mm:ss`."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def minutes_of(count: float) -> str:
    """A number of minutes as text, such as `1 minute` or `2.5 minutes`."""
    return f"{count:g} minute{'s' * (count != 1)}"


def passes_over(images: int, count: int) -> str:
    """How often `count` pictures are seen in `images` images, as text."""
    passes = images / count
    number = f"{passes:,.0f}" if passes >= 100 else f"{passes:.3g}"
    return f"{number} pass{'es' * (number != '1')} over {count:,} picture{'s' * (count != 1)}"


class Progress(AbstractContextManager["Progress"]):
    """Progress on stderr: `with Progress(total, "training", "images") as bar: bar.advance(32, "loss 0.31")`."""

    def __init__(self, total: int, what: str, unit: str = "steps", *, done: int = 0, quiet: bool = False) -> None:
        self.total, self.what, self.unit, self.quiet = total, what, unit, quiet
        self.done = self.first = done
        self.note = ""
        self._bar: Any = None
        self._task: Any = None
        self.started = self._line = time.monotonic()

    @property
    def rate(self) -> float:
        """Units per second since the start."""
        return (self.done - self.first) / max(1e-9, time.monotonic() - self.started)

    @property
    def eta(self) -> float:
        """The seconds left at the mean rate so far; infinite before the first unit is done."""
        return (self.total - self.done) / self.rate if self.done > self.first else float("inf")

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count
        self.note = note or self.note
        now = time.monotonic()
        if self.quiet or now - self.started < QUIET_SECONDS:
            return
        if is_terminal():
            self._draw()
        elif now - self._line >= LINE_SECONDS:
            self._line = now
            say(self.line())

    def skip(self, count: int) -> None:
        """Count units that were done in an earlier run, which must not count towards the rate."""
        self.first += count
        self.advance(count)

    def line(self) -> str:
        """One line of text such as `training: 1,024 of 4,096 images, 310 images/s, 0:10 left, loss 0.31`."""
        left = f", {duration(self.eta)} left" if self.done < self.total and self.done > self.first else ""
        note = f", {self.note}" if self.note else ""
        return f"{self.what}: {self.done:,} of {self.total:,} {self.unit}, {self.rate:.3g} {self.unit}/s{left}{note}"

    def _draw(self) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self.what, total=self.total, text="")
        text = self.line().split(": ", 1)[1]
        self._bar.update(self._task, completed=self.done, text=text)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError, ValueError):  # the terminal may have been closed meanwhile
                self._bar.stop()
        took = time.monotonic() - self.started
        if not self.quiet and kind is None and took >= QUIET_SECONDS:
            done = f"{self.what}: {self.done:,} {self.unit} in {duration(took)}"
            say(done + (f", {self.note}" if self.note else ""))


def track(items: Iterable[T], total: int, what: str, unit: str = "steps", quiet: bool = False) -> Iterator[T]:
    """Iterate over `items` and show a progress bar."""
    with Progress(total, what, unit, quiet=quiet) as bar:
        for item in items:
            yield item
            bar.advance()

"""A program that embeds the package can have its lines and warnings from the logger `seriatim`."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator

import pytest

from seriatim.cli.main import run
from seriatim.core import terminal


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelname, record.getMessage()))


@pytest.fixture
def own() -> Iterator[Kept]:
    """A handler that the program gave the logger, which takes everything."""
    handler, logger = Kept(), logging.getLogger("seriatim")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(before)


def test_lines_go_to_standard_error_and_copies_to_the_root(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="seriatim"):
        terminal.say("100 % done")
    assert capsys.readouterr().err == "100 % done\n"
    assert caplog.record_tuples == [("seriatim", logging.INFO, "100 % done")]


def test_a_handler_of_the_programs_takes_lines_off_standard_error(
    own: Kept, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal.say("downloaded it")
    assert own.lines == [("INFO", "downloaded it")] and capsys.readouterr().err == ""


def test_only_the_first_process_tells(own: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "speaks", lambda: False)
    terminal.say("one of many")
    terminal.say("out of memory here", everyone=True)
    assert own.lines == [("INFO", "out of memory here")]


def test_a_warning_is_a_python_warning_and_in_the_log(own: Kept) -> None:
    with pytest.warns(UserWarning, match="too many steps") as caught:
        terminal.warn("too many steps")
    assert own.lines == [("WARNING", "too many steps")]
    assert caught[0].filename == __file__, "it points to the caller"


def test_without_handlers_nothing_is_printed_twice(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The NullHandler keeps Python's handler of last resort from printing warnings beside `warnings` itself."""
    monkeypatch.setattr(logging.getLogger("seriatim"), "propagate", False)  # pytest's own handlers are on the root
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        terminal.warn("too many steps")
    assert capsys.readouterr().err == ""


def test_the_command_line_shows_a_warning_once(
    own: Kept, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def app(*_: object, **__: object) -> int:
        terminal.warn("too many steps")
        return 0

    monkeypatch.setattr("seriatim.cli.app.app", app)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert run([]) == 0
    assert capsys.readouterr().err == "warning: too many steps\n" and own.lines == [("WARNING", "too many steps")]

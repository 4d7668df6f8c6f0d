"""Standard streams that are closed, gone or know only ASCII lose their text, and nothing else."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from seriatim.cli import main
from seriatim.core import progress
from seriatim.core.progress import Progress
from seriatim.core.stopping import StopRequest
from seriatim.core.terminal import is_terminal, say


class Gone(io.StringIO):
    """A terminal that was closed under a program that writes to it."""

    encoding = "ascii"

    def write(self, _: str) -> int:
        raise OSError(5, "Input/output error")

    def isatty(self) -> bool:
        raise ValueError("I/O operation on closed file")


@pytest.fixture(params=["none", "gone", "closed"])
def no_stderr(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    stream: Any = {"none": None, "gone": Gone(), "closed": io.StringIO()}[request.param]
    if request.param == "closed":
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)


@pytest.mark.usefixtures("no_stderr")
def test_lines_and_bars_without_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "QUIET_SECONDS", -1.0)
    monkeypatch.setattr(progress, "LINE_SECONDS", -1.0)
    say("a line")
    assert not is_terminal()
    with Progress(3, "work") as bar:
        for _ in range(3):
            bar.advance()
    with StopRequest() as stop:
        stop._note(15, None)
    assert bar.done == 3 and stop.requested == "SIGTERM"
    assert main.run(["no-such-verb"]) == 2


def test_a_stop_writes_to_no_other_file(tmp_path: Path) -> None:
    """With standard error closed its number is another file's: nothing may be written there."""
    code = f"""
import os, signal, sys
os.close(2)
sys.stderr = None
with open({str(tmp_path / "mine")!r}, "wb") as file:
    assert file.fileno() == 2
    from seriatim.core.stopping import StopRequest
    with StopRequest():
        os.kill(os.getpid(), signal.SIGTERM)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert (tmp_path / "mine").read_bytes() == b""


def shell(line: str, **env: str) -> subprocess.CompletedProcess[bytes]:
    line = line.replace("seriatim", f"'{sys.executable}' -m seriatim", 1)
    return subprocess.run(["sh", "-c", line], capture_output=True, env={**os.environ, **env})


def test_closed_streams_change_no_exit_code() -> None:
    assert shell("seriatim recipes list 2>&-").stdout.startswith(b"recipe ")
    assert shell("seriatim recipes list >&- 2>&- <&-").returncode == 0
    assert shell("seriatim recipes show nothing 2>&-").returncode == 2
    assert shell("seriatim recipes show nothing >&-").stderr.startswith(b"error: ")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_what_an_encoding_lacks_is_written_in_what_it_has(encoding: str) -> None:
    code = """
import sys
from seriatim.cli import main, output
def run(_):
    output.print_table(("figure",), [("1.0 \\u00b1 0.2 \\u2026 caf\\u00e9 \\u6c34 \\udcff",)], title="\\u00d7")
    output.print_json({"name": "\\u6c34"})
    raise main.Interrupted(2)
main.run = run
main.main()
"""
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-X", "utf8=0", "-c", code], capture_output=True, env=env)
    table, _, says = done.stdout.partition(b"{")
    assert done.returncode == 130, done.stderr
    assert b"\\u6c34 \\xff" in table
    assert json.loads("{" + says.decode("utf-8")) == {"name": "\u6c34"}
    assert (b"1.0 +/- 0.2 ... caf\\xe9" in table) == (encoding == "ascii")


@pytest.mark.parametrize("verb", [[], ["train"], ["sample"], ["evaluate"]])
def test_help_in_ascii(verb: list[str]) -> None:
    done = shell(" ".join(["seriatim", *verb, "--help"]), PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0 and done.stdout.isascii() and b"Usage" in done.stdout


@pytest.mark.parametrize("verb", [["models"], ["--help"], ["recipes", "list"], ["recipes", "show", "mar-digits"]])
def test_a_reader_that_goes_away_at_once_is_no_failure(verb: list[str]) -> None:
    """Such as `seriatim models | true`: nothing is said, and the exit code does not tell of a fault."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as out:
        done = subprocess.run(
            [sys.executable, "-m", "seriatim", *verb], stdout=out, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (0, "")

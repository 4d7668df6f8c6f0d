"""Runs work in forks of one clean process that has imported what tests need, which spares each of them the imports.

That process, the fork server of the standard library, runs no test, so it has no threads whose locks a fork would find
held. A fork has the signals, standard streams, environment, folder and exit code of a new interpreter.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path

IMPORTED = [
    "matplotlib.pyplot",
    "pytest",
    "sklearn.datasets",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.nn.parallel",
    *(f"seriatim.cli.{name}" for name in ("evaluate", "sample", "train")),
]


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """The environment is exactly `values` inside."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def in_fork(
    work: Callable[[Sequence[str]], object], words: Sequence[str], *, cwd: Path, env: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Call `work(words)` in a fork in the folder `cwd` with the environment `env`, and wait until it ends.

    `work` is a function of a module. SystemExit sets the exit code. Raises TimeoutExpired once the fork is killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with environment({**os.environ, "OMP_NUM_THREADS": "1"}):
        forkserver.ensure_running()
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("stdout", "stderr")]
        process = context.Process(target=begin, args=(work, list(words), cwd, dict(env), streams))
        process.start()
        process.join(timeout)
        code = process.exitcode
        if code is None:
            process.kill()
            process.join()
        process.close()
        said = [stream.read_text(errors="replace") if stream.exists() else "" for stream in streams]
    if code is None:
        raise subprocess.TimeoutExpired(list(words), timeout, *said)
    return subprocess.CompletedProcess(list(words), code, *said)


def begin(
    work: Callable[[Sequence[str]], object], words: list[str], cwd: Path, env: dict[str, str], streams: list[Path]
) -> None:
    """The beginning of a fork, until it resembles a new interpreter."""
    for number, stream in enumerate(streams, start=1):
        file = os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    work(words)
    sys.stdout.flush()


def run_tests(words: Sequence[str]) -> None:
    """`python -m pytest` with these arguments."""
    import pytest

    sys.exit(pytest.main(list(words)))


def command_line(words: Sequence[str]) -> None:
    """`python -m seriatim` with these arguments."""
    from seriatim.cli.main import main

    sys.argv[1:] = words
    main()

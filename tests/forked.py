"""Runs work in forks of one clean process that has imported what tests need, which spares each of them the imports.

That process, the fork server of the standard library, runs no test, so it has no threads whose locks a fork would find
held. A fork has the signals, standard streams, environment, folder and exit code of a new interpreter.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path

FRESH = "SERIATIM_TEST_IN_A_FRESH_PROCESS"  # set in a process that conftest.py made for one test

IMPORTED = [
    "matplotlib.pyplot",
    "pytest",
    "rich.progress",
    "rich.table",
    "sklearn.cluster",
    "sklearn.datasets",
    "sklearn.model_selection",
    "torch._dynamo",  # which optimisers import, and which takes two seconds
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.nn.parallel",
    "diffusers.models.autoencoders.autoencoder_kl",
    "seriatim.bench.race",
    "seriatim.cli.app",
    "seriatim.evaluation.run",
    "seriatim.pipeline.loading",
    "seriatim.training.classifier",
    "seriatim.training.loop",
    "seriatim.training.tokenizer_task",
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


class Fork:
    """A fork that calls `work(words)` in the folder `cwd`, with the environment `env` or this process's own.

    It is used as `subprocess.Popen` is, and killed at the end of a `with` block. SystemExit in `work` sets the exit
    code. `work` is a function of a module in `tests` itself: a fork can't import the modules of tests by their names.
    """

    def __init__(
        self,
        work: Callable[[Sequence[str]], object],
        words: Sequence[str],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        with environment({**os.environ, "OMP_NUM_THREADS": "1"}), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a tracker of resources that some test has ended is started again
            forkserver.ensure_running()
        self.words = list(words)
        self.folder = tempfile.TemporaryDirectory()
        self.streams = [Path(self.folder.name) / name for name in ("stdout", "stderr")]
        own = {"OMP_NUM_THREADS": "1", **(os.environ if env is None else env)}
        arguments = (work, self.words, Path.cwd() if cwd is None else cwd, own, self.streams)
        self.process = context.Process(target=begin, args=arguments)
        self.process.start()

    def __enter__(self) -> Fork:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        self.folder.cleanup()

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self, timeout: float) -> subprocess.CompletedProcess[str]:
        """What a fork that has ended by itself leaves; raises TimeoutExpired."""
        self.process.join(timeout)
        said = [stream.read_text(errors="replace") if stream.exists() else "" for stream in self.streams]
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.words, timeout, *said)
        return subprocess.CompletedProcess(self.words, self.process.exitcode, *said)


def in_fork(
    work: Callable[[Sequence[str]], object],
    words: Sequence[str],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Call `work(words)` in a `Fork` and wait until it ends, as `subprocess.run` does."""
    with Fork(work, words, cwd=cwd, env=env) as fork:
        return fork.wait(timeout)


def begin(
    work: Callable[[Sequence[str]], object], words: list[str], cwd: Path, env: dict[str, str], streams: list[Path]
) -> None:
    """The beginning of a fork, until it resembles a new interpreter."""
    gc.freeze()  # what was imported before the fork is no garbage: the collector need not go through it
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


def script(words: Sequence[str]) -> None:
    """`python` with these arguments."""
    sys.argv[:] = words
    runpy.run_path(words[0], run_name="__main__")


def command_line(words: Sequence[str]) -> None:
    """`python -m seriatim` with these arguments."""
    from seriatim.cli.main import main

    sys.argv[1:] = words
    main()

"""Shared by all tests: no network, one thread, a tiny model folder."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import itertools
import os
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from forked import FRESH, command_line, in_fork, run_tests

if TYPE_CHECKING:
    from seriatim.checkpoints.native import Bundle

ROOT = Path(__file__).resolve().parent.parent

# Threads that wait for each other give way, since there are more of them than cores: spinning takes minutes of tests
# that take seconds. OpenMP reads this when torch is imported, here and in every process that a test starts.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

with contextlib.suppress(ImportError):  # the architecture test reads sources alone, also where torch is not installed
    import torch

    torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it gives


if hasattr(signal, "SIGHUP"):  # under nohup it is ignored, which children inherit and tests of signals would notice
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Accept the options of pytest-xdist where it is not installed: tests then run one after another."""
    if importlib.util.find_spec("xdist") is None:
        group = parser.getgroup("xdist")
        for name in ("-n", "--maxprocesses", "--dist"):
            # addoption() refuses lowercase letters; other plugins take an option called `dist` for xdist at work.
            group._addoption(name, dest=f"without_xdist_{name.strip('-')}")


class TellFailures:
    """Say what failed when it fails, so that a suite that is stopped before its report has still told it."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal is not None:
            terminal.write_line(f"\nFAILED {report.nodeid} in {report.when} after {report.duration:.0f} s")
            terminal.write_line(report.longreprtext[-4000:])


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # with pytest-xdist the process that gathers the reports tells
        config.pluginmanager.register(TellFailures(config), "tell-failures")
        if hasattr(config.option, "loadscopereorder"):
            config.option.loadscopereorder = False  # the order below is better


LONG = (  # these files take half a minute and more
    "test_distributed.py", "test_torchrun.py", "test_resume.py", "test_tokenizer_training.py", "test_readme.py",
    "test_documents.py", "test_scripts.py", "test_combinations.py", "test_shared_work.py", "test_together.py",
    "test_bench.py", "test_run_folder.py", "test_signals.py",
)  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long files first, and then those with many tests: no process shall be left alone with a long one at the end.

    pytest-xdist itself looks at the number of tests alone, and so keeps four tests that take a minute each for the end.
    """
    if hasattr(config, "workerinput"):
        tests = Counter(item.path for item in items)
        items.sort(key=lambda item: (item.path.name not in LONG, -tests[item.path], item.path))


# A test in a process of its own needs no plugin: to find and import them takes pytest longer than most tests take.
ALONE = ["-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that forks in a process of its own.

    A child that is forked while other threads exist may wait for ever for a lock that one of them held (OpenMP's above
    all), and earlier tests of a long session leave such threads behind.
    """
    if pyfuncitem.get_closest_marker("fresh_process") is None or os.environ.get(FRESH):
        return None
    done = in_fork(
        run_tests,
        [*ALONE, pyfuncitem.nodeid],
        cwd=pyfuncitem.config.rootpath,
        env={**os.environ, FRESH: "1", "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    return True


def pytest_collectstart(collector: pytest.Collector) -> None:
    """No property has a deadline, since a busy machine is no fault."""
    if isinstance(collector, pytest.Session) and not os.environ.get(FRESH):
        with contextlib.suppress(ImportError):
            from hypothesis import settings

            settings.register_profile("no deadline", deadline=None)
            settings.load_profile("no deadline")


def pytest_collection_finish() -> None:
    """Keep modules out of the garbage collector's way: a full collection would look at a million objects each time."""
    gc.collect()
    gc.freeze()


# Each of these has a MonkeyPatch of its own, because a test may undo what it patched itself.


@pytest.fixture(scope="session", autouse=True)
def no_curves() -> Iterator[dict[type, Any]]:
    """Draw no picture of the loss, which takes longer than a tiny training; yields what draws them."""
    with pytest.MonkeyPatch.context() as patch:
        drawing: dict[type, Any] = {}
        if "torch" in globals():
            from seriatim.training.classifier import ClassifierTask
            from seriatim.training.loop import GeneratorTask
            from seriatim.training.tokenizer_task import TokenizerTask

            for task in (ClassifierTask, GeneratorTask, TokenizerTask):
                drawing[task] = task.curves
                patch.setattr(task, "curves", lambda *_: None)
        yield drawing


@pytest.fixture(autouse=True)
def curves(request: pytest.FixtureRequest, no_curves: dict[type, Any]) -> Iterator[None]:
    """Draw them in tests that are marked `curves`."""
    with pytest.MonkeyPatch.context() as patch:
        for task, draw in no_curves.items() if request.node.get_closest_marker("curves") else ():
            patch.setattr(task, "curves", draw)
        yield


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Names of folders that are not there yet. `mktemp` would read the names of all folders of the session."""
    base = tmp_path_factory.mktemp("caches")
    return (base / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def own_cache(caches: Iterator[Path]) -> Iterator[None]:
    """What is known about files is kept for one test, and not in the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SERIATIM_CACHE", str(next(caches)))
        yield


CONNECT = socket.socket.connect


def guarded(self: socket.socket, address: object) -> None:
    if self.family != socket.AF_UNIX and not str(address).startswith(("('127.", "('localhost", "('::1")):
        raise OSError(f"tests are offline: {address}")
    CONNECT(self, address)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def offline() -> Iterator[None]:
    """A test that opens a connection to anywhere but this machine fails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture
def bundle() -> Bundle:
    from helpers import make_bundle

    return make_bundle()


@pytest.fixture
def model_folder(tmp_path: Path, bundle: Bundle) -> Path:
    from seriatim.checkpoints.native import save_bundle

    return save_bundle(bundle, tmp_path / "model")


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def seriatim(tmp_path: Path) -> Run:
    """Run the command line in a process of its own, in `tmp_path`."""

    def run(
        *arguments: str, timeout: float = 300, cwd: Path = tmp_path, **env: str
    ) -> subprocess.CompletedProcess[str]:
        own = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "OMP_NUM_THREADS": "1", **env}
        return in_fork(command_line, arguments, cwd=cwd, env=own, timeout=timeout)

    return run

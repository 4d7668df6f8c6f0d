"""Several processes that work together, for tests: forks of this one, connected as torchrun connects its own."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot  # noqa: F401  # what all processes import is imported once, before they are forked
import sklearn.datasets  # noqa: F401
import torch._dynamo
import torch.distributed.fsdp
import torch.distributed.tensor
import torch.nn.parallel
from forked import FRESH

from seriatim.cli.main import run
from seriatim.training.distributed import joined


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun tells process `rank` of `size` on one machine."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    return {
        "MASTER_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        **{name: str(value) for name, value in told.items()},
    }


def command(*words: str) -> tuple[int, list[str]]:
    """The exit code of a command line that runs in this process, and the lines that it prints for people."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = run(words)
    return code, said.getvalue().splitlines()


def add_up_ranks(_: Sequence[str]) -> None:
    """Join the processes of one start and print the sum of what they are; the first one comes late."""
    if os.environ["RANK"] == "0":
        time.sleep(1)
    with joined("cpu") as world:
        print(float(world.total(torch.tensor(world.rank + 1.0))))


def together(size: int, work: Callable[[], Any], folder: Path) -> list[Any]:
    """What `work` returns, or the exception that it raises, in each of `size` processes.

    The test that calls it is marked `fresh_process`, since a fork of a process that has had threads may wait for ever.

    It is None for a process that dies.
    """
    assert os.environ.get(FRESH), "mark the test fresh_process"
    port, children = free_port(), []
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(size):
        child = os.fork()
        if child == 0:
            os.environ.update(environment(rank, size, port))
            try:
                try:
                    found = work()
                except Exception as error:
                    traceback.print_exc()
                    found = error
                (folder / f"{rank}.pickle").write_bytes(pickle.dumps(found))
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    results = [folder / f"{rank}.pickle" for rank in range(size)]
    return [pickle.loads(result.read_bytes()) if result.exists() else None for result in results]

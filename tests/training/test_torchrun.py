"""What torchrun does with a training of several processes: a killed one is restarted, a signal stops all of them.

One test starts torchrun, whose processes import everything anew. The others start the two processes themselves, as
forks that are told what torchrun tells its own, and do to them what torchrun does.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from forked import Fork, command_line
from helpers import TINY_RUN
from PIL import Image
from processes import environment, free_port

from seriatim import load
from seriatim.checkpoints.unfinished import all_checkpoints
from seriatim.training.config import read_recipe
from seriatim.training.loop import train

TRAIN = [
    "train", "mar-digits", "model.width=16", "model.depth=1", "model.heads=2", "model.head.width=16",
    "model.head.depth=1", "training.batch_size=8", "training.log_images=80", "training.save_images=80",
    "training.threads=1", "training.dtype=float32", "--out", "run",
]  # fmt: skip
FOR_EVER = "training.images=1000000"


def wait_for(condition: Callable[[], object], alive: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert alive() and time.monotonic() < end
        time.sleep(0.05)


# --- under torchrun ---------------------------------------------------------------------------------------------------


@contextmanager
def launched(folder: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """Two processes of one training under torchrun, which starts them once more if one fails."""
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1",
         "--monitor-interval", "0.2", "-m", "seriatim", *TRAIN, *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def workers(launcher: subprocess.Popen[str]) -> list[int]:
    found = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [int(pid) for pid in found if "seriatim" in Path(f"/proc/{pid}/cmdline").read_text()]


def test_a_killed_process_is_restarted_and_the_run_completes(tmp_path: Path) -> None:
    """A folder of images, since the digits of scikit-learn take each process longer to import than the training."""
    for label in ("cat", "dog"):
        (tmp_path / "pets" / label).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (8, 8), (i * 9, i, 99 if label == "cat" else 20)).save(
                tmp_path / "pets" / label / f"{i}.png"
            )
    with launched(tmp_path, "data={kind: folder, path: pets, size: 8}", "training.images=1200") as it:
        wait_for(lambda: all_checkpoints(tmp_path / "run" / "checkpoints"), lambda: it.poll() is None)
        first = workers(it)
        assert len(first) == 2
        os.kill(max(first), signal.SIGKILL)
        said = it.communicate(timeout=240)[1]
        assert it.returncode == 0, said
    assert not any(Path(f"/proc/{pid}").exists() for pid in first), said
    assert "resuming after" in said
    assert load(tmp_path / "run").model.tokens == 16
    images = [json.loads(line)["images"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert images == list(range(80, 1201, 80))


# --- the same without it ----------------------------------------------------------------------------------------------


@contextmanager
def started(folder: Path, *words: str, **told: str) -> Iterator[tuple[Fork, Fork]]:
    """Two processes of one training."""
    port = free_port()
    with ExitStack() as stack:
        first, second = (
            stack.enter_context(
                Fork(
                    command_line, [*TRAIN, *words], cwd=folder, env={**os.environ, **environment(rank, 2, port), **told}
                )
            )
            for rank in range(2)
        )
        yield first, second


def test_a_killed_process_ends_the_others(tmp_path: Path) -> None:
    with started(tmp_path, FOR_EVER) as (first, second):
        wait_for(
            lambda: all_checkpoints(tmp_path / "run" / "checkpoints"), lambda: first.poll() is second.poll() is None
        )
        second.send_signal(signal.SIGKILL)
        done = first.wait(30)
    assert done.returncode == 6, done
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "Traceback" not in done.stderr, done.stderr


def test_a_signal_to_all_saves_one_checkpoint(tmp_path: Path) -> None:
    """torchrun hands a signal on to its processes, which get it one after the other."""
    log = tmp_path / "run" / "metrics.jsonl"
    with started(tmp_path, FOR_EVER, "training.save_images=0") as both:
        wait_for(lambda: log.exists() and log.read_text(), lambda: all(each.poll() is None for each in both))
        for each in both:
            each.send_signal(signal.SIGTERM)
        done = [each.wait(60) for each in both]
    assert [each.returncode for each in done] == [143, 143], done
    assert len(all_checkpoints(tmp_path / "run" / "checkpoints")) == 1
    assert [each.stderr.count("go on with --resume") for each in done] == [1, 0]


def test_a_restart_does_not_go_on_with_a_run_that_the_command_refused_to_replace(tmp_path: Path) -> None:
    """The first start ends with one line, since the folder holds a run; so does the second."""
    recipe = read_recipe("mar-digits", [*TINY_RUN, "training.images=16"])
    train(recipe, tmp_path / "run", quiet=True)
    made = (tmp_path / "run" / "model" / "manifest.json").read_bytes()
    for restarts in ("0", "1"):
        told = {"TORCHELASTIC_RUN_ID": "this start", "TORCHELASTIC_RESTART_COUNT": restarts}
        with started(tmp_path, "training.images=48", **told) as both:
            done = [each.wait(120) for each in both]
        assert [each.returncode for each in done] == [2, 2], done
        assert "holds a run already" in done[0].stderr and not any("resuming" in each.stderr for each in done)
    assert (tmp_path / "run" / "model" / "manifest.json").read_bytes() == made

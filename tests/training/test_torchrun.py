"""What torchrun does with a training of several processes: a killed one is restarted, a signal stops all of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from helpers import TINY_RUN

from seriatim import load
from seriatim.checkpoints.unfinished import all_checkpoints
from seriatim.training.config import read_recipe
from seriatim.training.loop import train

TRAIN = [
    "-m", "seriatim", "train", "mar-digits", "model.width=16", "model.depth=1", "model.heads=2", "model.head.width=16",
    "model.head.depth=1", "training.batch_size=8", "training.log_images=80", "training.save_images=80",
    "training.threads=1", "training.dtype=float32", "--out", "run",
]  # fmt: skip


@contextmanager
def launched(folder: Path, *words: str, options: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    """Two processes of one training under torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    process = subprocess.Popen(
        [*launcher, *TRAIN, *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def workers(launcher: subprocess.Popen[str]) -> list[int]:
    found = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [int(pid) for pid in found if "seriatim" in Path(f"/proc/{pid}/cmdline").read_text()]


def wait_for_checkpoint(folder: Path, process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not all_checkpoints(folder / "run" / "checkpoints"):
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.1)


def test_a_killed_process_is_restarted_and_the_run_completes(tmp_path: Path) -> None:
    with launched(tmp_path, "training.images=1200", options=("--max-restarts", "1", "--monitor-interval", "1")) as it:
        wait_for_checkpoint(tmp_path, it)
        second = max(workers(it))
        os.kill(second, signal.SIGKILL)
        said = it.communicate(timeout=240)[1]
        assert it.returncode == 0, said
    assert "resuming after" in said
    assert load(tmp_path / "run").model.tokens == 16
    images = [json.loads(line)["images"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert images == list(range(80, 1201, 80))


def test_a_killed_process_ends_the_others(tmp_path: Path) -> None:
    with launched(tmp_path, "training.images=1000000", options=("--monitor-interval", "1")) as it:
        wait_for_checkpoint(tmp_path, it)
        pids = workers(it)
        assert len(pids) == 2
        os.kill(max(pids), signal.SIGKILL)
        began = time.monotonic()
        said = it.communicate(timeout=60)[1]
        assert it.returncode != 0 and time.monotonic() - began < 30
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids), said


def test_a_signal_to_the_launcher_saves_one_checkpoint(tmp_path: Path) -> None:
    with launched(tmp_path, "training.images=1000000", "training.save_images=0") as it:
        end = time.monotonic() + 120
        log = tmp_path / "run" / "metrics.jsonl"
        while not log.exists() or not log.read_text():
            assert it.poll() is None and time.monotonic() < end, it.communicate()
            time.sleep(0.1)
        it.send_signal(signal.SIGTERM)
        said = it.communicate(timeout=60)[1]
    assert len(all_checkpoints(tmp_path / "run" / "checkpoints")) == 1, said
    assert said.count("go on with --resume") == 1, said


def test_a_restart_does_not_go_on_with_a_run_that_the_command_refused_to_replace(tmp_path: Path) -> None:
    """The first start ends with one line, since the folder holds a run; so does the second."""
    recipe = read_recipe("mar-digits", [*TINY_RUN, "training.images=16"])
    train(recipe, tmp_path / "run", quiet=True)
    made = (tmp_path / "run" / "model" / "manifest.json").read_bytes()
    with launched(tmp_path, "training.images=48", options=("--max-restarts", "1", "--monitor-interval", "1")) as it:
        said = it.communicate(timeout=240)[1]
    assert it.returncode != 0 and "holds a run already" in said and "resuming" not in said
    assert (tmp_path / "run" / "model" / "manifest.json").read_bytes() == made

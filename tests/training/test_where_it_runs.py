"""Training is the same whatever surrounds it: torch's defaults, a data process that is killed, a launcher of many."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_run

from seriatim.checkpoints.unfinished import all_checkpoints
from seriatim.core.errors import ResourceError
from seriatim.data import loader
from seriatim.training.loop import train

tiny = partial(tiny_run, "training.images=160", "training.save_images=16")


def model(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


# --- a process that reads images is killed ------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_is_named_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """The out-of-memory killer's SIGKILL, in the middle of an update: the run is saved after it, and goes on."""
    train(tiny(), tmp_path / "whole", quiet=True)
    mine, true, calls = os.getpid(), torch.nn.utils.clip_grad_norm_, [0]

    def clip(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            for child in Path(f"/proc/{mine}/task/{mine}/children").read_text().split():
                os.kill(int(child), signal.SIGKILL)
            time.sleep(0.05)
        return true(*arguments)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    heard = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(ResourceError, match=r"training\.workers: .* killed, .* memory .*workers=0.*; saved .*--resume"):
        train(tiny(f"training.workers={workers}", "training.save_images=0"), tmp_path / "run", quiet=True)
    assert signal.getsignal(signal.SIGCHLD) is not signal.SIG_DFL or heard is signal.SIG_DFL
    assert len(all_checkpoints(tmp_path / "run" / "checkpoints")) == 1
    train(tiny("training.workers=0", "training.save_images=0"), tmp_path / "run", resume=True, quiet=True)
    assert model(tmp_path / "whole") == model(tmp_path / "run")


def test_other_errors_of_a_worker_are_not_taken_for_its_death() -> None:
    assert loader.lost_worker(RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"))
    assert loader.lost_worker(ConnectionResetError(104, "Connection reset by peer"))
    assert not loader.lost_worker(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not loader.lost_worker(FileNotFoundError(2, "No such file or directory"))


# --- where training is called -------------------------------------------------------------------------------------


AROUND: dict[str, Any] = {
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("around", [*AROUND, "float64", "bfloat16"])
def test_training_does_not_depend_on_what_torch_was_told(tmp_path: Path, around: str) -> None:
    train(tiny("training.images=48"), tmp_path / "plain", quiet=True)
    with AROUND.get(around, contextlib.nullcontext)():
        try:
            if around not in AROUND:
                torch.set_default_dtype(getattr(torch, around))
            train(tiny("training.images=48"), tmp_path / "run", quiet=True)
        finally:
            torch.set_default_dtype(torch.float32)
    assert model(tmp_path / "plain") == model(tmp_path / "run")

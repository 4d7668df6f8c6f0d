"""What a run does between two steps: a stop leaves it to the resumed run, and nothing of it waits for the device."""

from __future__ import annotations

import contextlib
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from helpers import untimed_metrics
from pretend_cuda import pretend_cuda
from processes import command, together
from training.test_resume import stop_after, weights

from seriatim.checkpoints.unfinished import all_checkpoints
from seriatim.core.errors import Stopped
from seriatim.core.processes import Place
from seriatim.training import engine, judge
from seriatim.training.config import Recipe, read_recipe
from seriatim.training.distributed import World
from seriatim.training.loop import train

TINY = [
    "model.width=16", "model.depth=1", "model.heads=1", "model.head.width=16", "model.head.depth=1",
    "training.batch_size=16", "training.log_images=48", "training.dtype=float32", "training.threads=1",
    "training.images=128", "training.save_images=64", "training.keep=9", "training.validate_images=32",
    "data.validation=0.1", "sampling.num_inference_steps=2", "sampling.num_diffusion_steps=2",
]  # fmt: skip
SAMPLES = ["training.evaluate_images=70", "training.evaluate_features=pixels"]


class Killed(BaseException):
    """Ends a process at once, as a kill does."""


def tiny(*overrides: str) -> Recipe:
    return read_recipe("mar-digits", [*TINY, *overrides])


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    train(tiny(*SAMPLES), folder, quiet=True)
    assert [(row["images"], "validation_loss" in row, "FD[pixels]" in row) for row in untimed_metrics(folder)] == [
        (32, True, False), (64, True, True), (96, True, False), (128, True, True),
    ]  # fmt: skip
    return folder


def same(one: Path, other: Path) -> None:
    assert untimed_metrics(one) == untimed_metrics(other) and weights(one) == weights(other)
    states = [
        [(path.name, (path / "state.json").read_bytes()) for path in all_checkpoints(run / "checkpoints")]
        for run in (one, other)
    ]
    ours = dict(states[1])
    assert all(ours[name] == state for name, state in states[0]), "the run after a stop is in the same state"


@pytest.mark.parametrize("steps", [2, 3, 4, 8])
def test_a_signal_in_a_step_where_something_is_due(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """A validation, nothing, a validation with samples and a checkpoint, and the end of the run."""
    undo = stop_after(monkeypatch, steps)
    with pytest.raises(Stopped, match=f"stopped after {16 * steps} images"):
        train(tiny(*SAMPLES), tmp_path, quiet=True)
    undo()
    assert [row["images"] for row in untimed_metrics(tmp_path)] == [n for n in (32, 64, 96) if n < 16 * steps]
    train(tiny(*SAMPLES), tmp_path, resume=True, quiet=True)
    same(unbroken, tmp_path)


@pytest.mark.parametrize("call", [1, 3])
def test_a_signal_while_figures_are_computed(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """And a second one when the resumed run computes them: they come after the third start."""
    true, calls = judge.validation_loss, [0]

    def interrupted(*arguments: Any) -> float | None:
        calls[0] += 1
        if calls[0] in (call, call + 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return true(*arguments)

    monkeypatch.setattr(judge, "validation_loss", interrupted)
    for resume in (False, True):
        with pytest.raises(Stopped, match=f"SIGTERM: stopped after {32 * call} images"):
            train(tiny(*SAMPLES), tmp_path, resume=resume, quiet=True)
    train(tiny(*SAMPLES), tmp_path, resume=True, quiet=True)
    same(unbroken, tmp_path)


def test_a_kill_after_the_resumed_line_does_not_repeat_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line that a resumed run owes is written before its next checkpoint, so a kill between must not double it."""
    train(tiny("training.images=96"), tmp_path / "whole", quiet=True)
    run = tmp_path / "run"
    undo = stop_after(monkeypatch, 2)
    with pytest.raises(Stopped):
        train(tiny("training.images=96"), run, quiet=True)
    undo()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(engine, "gradients", Mock(side_effect=Killed))
        train(tiny("training.images=96"), run, resume=True, quiet=True)
    assert [row["images"] for row in untimed_metrics(run)] == [32]
    train(tiny("training.images=96"), run, resume=True, quiet=True)
    assert untimed_metrics(run) == untimed_metrics(tmp_path / "whole")


@pytest.mark.fresh_process
def test_one_of_two_processes_gets_a_signal_while_figures_are_computed(tmp_path: Path) -> None:
    """All give up, in whichever process it was and in whichever figure, and one that resumes computes them."""
    words = ["train", "mar-digits", *TINY, *SAMPLES, "training.images=64"]

    def work(out: Path, rank: int, name: str) -> tuple[int, list[str]]:
        owner: Any = judge.SampleDistance if name == "samples" else judge
        true = getattr(owner, name)

        def interrupted(*arguments: Any) -> Any:
            if os.environ["RANK"] == str(rank):
                os.kill(os.getpid(), signal.SIGTERM)
            return true(*arguments)

        setattr(owner, name, interrupted)  # this process ends soon
        return command(*words, "--out", str(out))

    for rank, name, seen in ((0, "validation_loss", 32), (1, "validation_loss", 32), (1, "samples", 64)):
        run = tmp_path / f"{name}{rank}"
        found = together(2, partial(work, run, rank, name), tmp_path / "found" / run.name)
        assert [code for code, _ in found] == [143, 143], found
        assert sum(f"stopped after {seen} images" in line for _, said in found for line in said) == 1
        assert [row["images"] for row in untimed_metrics(run)] == [n for n in (32,) if n < seen]
        assert command(*words, "--out", str(run), "--resume")[0] == 0
        assert [(row["images"], "FD[pixels]" in row) for row in untimed_metrics(run)] == [(32, False), (64, True)]
        assert all("validation_loss" in row and "loss" in row for row in untimed_metrics(run))


# --- the device -------------------------------------------------------------------------------------------------------


def test_a_step_between_two_lines_waits_for_the_device_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole run on a pretended device, of three lengths: each further step costs one read, however many terms."""
    forked: list[Any] = []
    true = torch.random.fork_rng

    def fork(devices: Any) -> Any:
        forked.append(list(devices))
        return true(devices=[])

    def reads(steps: int) -> int:
        never = ["data.validation=null", "training.validate_images=0", "training.save_images=0"]
        recipe = tiny(*never, "training.log_images=9999", f"training.images={16 * steps}", "training.accumulate=2")
        with pretend_cuda() as device:
            where = torch.device("cuda", 0)
            monkeypatch.setattr(engine, "joined", lambda _: contextlib.nullcontext(World(Place(0, 1, 0, 1), where)))
            train(recipe, tmp_path / str(steps), device="cuda", quiet=True)
            return sum(device.reads.values())

    monkeypatch.setattr(torch.random, "fork_rng", fork)
    counts = [reads(steps) for steps in (2, 3, 6)]
    assert counts[1] - counts[0] == 1 and counts[2] - counts[1] == 3, counts
    assert forked and all(devices == [torch.device("cuda", 0)] for devices in forked), "no other device is touched"

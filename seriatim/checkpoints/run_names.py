"""Names of models: a folder, a run, one of a run's checkpoints, or a model that comes with the package.

    RUN               the model of a finished run, or the averaged weights of the newest whole checkpoint
    NAME              the packaged model of that name, unless there is something called NAME here
    RUN@latest        the averaged weights of the newest whole checkpoint
    RUN@best          those of the whole checkpoint with the lowest loss
    RUN@250000        those after so many images, with or without leading zeros
    RUN@latest:raw    the weights themselves, not their average; `:raw` may follow each of these three

A folder that is really called `RUN@latest` comes before a checkpoint of that name.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from seriatim.checkpoints.packaged import packaged
from seriatim.checkpoints.unfinished import (
    AVERAGE,
    CHECKPOINTS,
    CONFIG,
    MODEL,
    RECIPE,
    all_checkpoints,
    best_of,
    checkpoint_of,
    is_checkpoint,
    is_number,
    newest_whole,
    usable,
    why_not_whole,
)
from seriatim.core.errors import CheckpointError, shown
from seriatim.core.files import MANIFEST, expanded, present_or_previous
from seriatim.core.hub import SCHEME
from seriatim.core.terminal import say

LATEST, BEST, RAW = "latest", "best", "raw"
MOST_SHOWN = 20  # how many checkpoints an error message lists


class Found(NamedTuple):
    """The folder that a name stands for, and the file in it with the model's weights."""

    folder: Path
    weights: str


def run_and_checkpoint(name: Path | str) -> tuple[Path, str] | None:
    """The run's folder and what follows the last `@` of `name`; None if that is no name of a checkpoint."""
    if os.fspath(name).startswith(SCHEME):
        return None
    path = expanded(name)
    run, at, which = str(path).rpartition("@")
    if not at or "/" in which or os.path.exists(present_or_previous(path)):
        return None
    folder = present_or_previous(Path(run))
    return (folder, which) if run and os.path.isdir(folder) else None


def is_local(name: Path | str) -> bool:
    """Whether `name` is a folder here, a checkpoint of a run here (which may not exist), or a packaged model."""
    if packaged(name) is not None:
        return True
    return os.path.isdir(present_or_previous(expanded(name))) or run_and_checkpoint(name) is not None


def find(name: Path | str, *, quiet: bool = False) -> Found:
    """The folder and the file of the weights that a name of a model stands for.

    A folder that holds `model/` (a run, a demo) stands for that; where a crash interrupted its replacement, for the
    previous one, which lies beside it under a hidden name. Standard error is told which checkpoint was
    chosen, unless `quiet`.
    """
    chosen = run_and_checkpoint(name)
    if chosen is not None:
        return checkpoint_named(*chosen, quiet=quiet)
    folder = packaged(name) or present_or_previous(expanded(name))
    inner = present_or_previous(folder / "model")
    if not (folder / CONFIG).exists():
        is_run = (folder / RECIPE).is_file() or (folder / CHECKPOINTS).is_dir()
        if inner.is_dir():
            folder = inner
        elif is_checkpoint(folder):
            usable(folder)
        elif is_run and not (folder / MANIFEST).exists():
            folder = checkpoint_of(folder, quiet=quiet)
    return Found(folder, AVERAGE if is_checkpoint(folder) else MODEL)


def checkpoint_named(run: Path, which: str, *, quiet: bool = False) -> Found:
    """The checkpoint `which` of a run; raises CheckpointError, which lists the checkpoints, if there is none."""
    folder, (number, colon, kind) = run / CHECKPOINTS, which.partition(":")
    if colon and kind != RAW:
        raise CheckpointError(f"{shown(f'{run}@{which}')}: {shown(kind)} is not known; write :{RAW} or leave it out")
    if number == LATEST:
        path, passed_over = newest_whole(folder)
        for damage in passed_over if not quiet else ():
            say(f"stepping back: {damage}")
    elif number == BEST:
        path = best_of(folder)
    else:
        path = next((path for path in all_checkpoints(folder) if same_number(path.name, number)), None)
        reason = None if path is None else why_not_whole(path)
        if reason is not None:
            raise CheckpointError(f"{reason}; {what_there_is(run)}")
    every = all_checkpoints(folder)
    if path is None and number == BEST and newest_whole(folder)[0] is not None:
        raise CheckpointError(
            f"{run}@{which}: no whole checkpoint has a loss to go by, so none is the best; write "
            f"{run}@{LATEST}{colon}{kind}"
        )
    if path is None and every and number in (LATEST, BEST):
        raise CheckpointError(
            f"{run}@{which}: none of the {len(every)} checkpoints is whole; {why_not_whole(every[-1])}"
        )
    if path is None:
        raise CheckpointError(f"there is no {shown(f'{run}@{which}')}: {what_there_is(run)}")
    if number in (LATEST, BEST) and not quiet:
        say(f"{run}@{which} is its checkpoint {path.name}")
    return Found(usable(path), MODEL if colon else AVERAGE)


def same_number(name: str, number: str) -> bool:
    return is_number(number) and name.lstrip("0") == number.lstrip("0")


def what_there_is(run: Path) -> str:
    """The end of a message that says by which names checkpoints of a run can be used."""
    names = [path.name for path in all_checkpoints(run / CHECKPOINTS)]
    if not names:
        hint = f"; name {run} itself for its model" if (run / "model").is_dir() or (run / CONFIG).is_file() else ""
        return f"{run} holds no checkpoints{hint}"
    listed = ", ".join(names[-MOST_SHOWN:])
    earlier = f"{len(names) - MOST_SHOWN} earlier ones and " if len(names) > MOST_SHOWN else ""
    return f"write @{LATEST}, @{BEST} or the images seen, of which there are {earlier}{listed}"

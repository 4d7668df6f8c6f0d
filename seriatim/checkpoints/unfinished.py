"""A run that has no model yet: its newest whole checkpoint stands in for one, with the averaged weights.

RUN/recipe.yaml
RUN/checkpoints/000000123456/     one for each save, named by the images seen; `training/state.py` writes it
RUN/model/                        written when the last image was seen
"""

from __future__ import annotations

import functools
import shlex
from pathlib import Path

from seriatim.checkpoints.shared_tokenizer import REFERENCE, tokenizer_in
from seriatim.core.errors import CheckpointError, one_line
from seriatim.core.files import verify_manifest
from seriatim.core.ownership import json_of
from seriatim.core.terminal import say

CHECKPOINTS, RECIPE = "checkpoints", "recipe.yaml"
MODEL, AVERAGE, STATE, CONFIG = "model.safetensors", "average.safetensors", "state.json", "config.json"
# Release 0.1 wrote no config.json: what it wrote can be resumed, but says too little of the model to be used alone.
FILES = (MODEL, AVERAGE, "optimiser.safetensors", REFERENCE, STATE)


def all_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints, oldest first; what a crash left half-written has another kind of name."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and is_number(path.name))


def is_number(name: str) -> bool:
    """Whether a folder is named by the images seen; `isdigit` alone also takes signs that are no number."""
    return name.isascii() and name.isdigit()


def verify_checkpoint(path: Path) -> None:
    """Raise CheckpointError unless every file of a checkpoint matches its sha256; a shared tokenizer is not read."""
    verify_manifest(path, (tokenizer_in(path) if name == REFERENCE else name for name in FILES))


def why_not_whole(path: Path) -> str | None:
    """Why a checkpoint can't be used; None where every file matches its sha256.

    What was found is remembered as long as no file changes, so that pruning does not read everything every time.
    """
    try:
        stats = [(file.name, file.stat()) for file in sorted(path.iterdir())]
    except OSError as error:  # a process that goes on may delete it just now
        return one_line(error)
    return _why_not_whole(path, tuple((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats))


@functools.lru_cache(maxsize=64)
def _why_not_whole(path: Path, _stamps: tuple[tuple[str, int, int, int], ...]) -> str | None:
    try:
        verify_checkpoint(path)
    except (CheckpointError, OSError) as error:
        return one_line(error)
    return None


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose every file matches its sha256, and why each newer one was passed over."""
    passed_over: list[str] = []
    for path in reversed(all_checkpoints(folder)):
        reason = why_not_whole(path)
        if reason is None:
            return path, passed_over
        passed_over.append(reason)
    return None, passed_over


def best_of(folder: Path) -> Path | None:
    """The whole checkpoint with the lowest validation loss, or training loss where none has a validation loss."""
    trained, validated = [], []
    for path in all_checkpoints(folder):
        state = json_of(path / STATE)
        if isinstance(state.get("loss"), float):
            trained.append((state["loss"], path))
        if isinstance(state.get("validation_loss"), float) and state.get("validated") == int(path.name):
            validated.append((state["validation_loss"], path))
    known = sorted(validated) + sorted(trained)
    return next((path for _, path in known if why_not_whole(path) is None), None)


def is_checkpoint(folder: Path) -> bool:
    return (folder / STATE).is_file() and is_number(folder.name)


def checkpoint_of(run: Path, *, quiet: bool = False) -> Path:
    """The checkpoint to use of a run that has no model, which is told unless `quiet`. Raises CheckpointError."""
    path, passed_over = newest_whole(run / CHECKPOINTS)
    for reason in passed_over if not quiet else ():
        say(f"stepping back: {reason}")
    if path is None:
        raise CheckpointError(
            f"{run} is a run that is not finished and has no whole checkpoint: there is no model to use yet; go on "
            f"with `{resume(run)}`"
        )
    usable(path)
    if not quiet:
        say(f"{run} is not finished: taking the averaged weights of its checkpoint {path.name}")
    return path


def usable(checkpoint: Path) -> Path:
    """The checkpoint itself, unless it lacks what it takes to be used without its run."""
    if not (checkpoint / CONFIG).is_file():
        run = checkpoint.parent.parent
        raise CheckpointError(
            f"{checkpoint} says too little of its model to be used alone (release 0.1 wrote it, or it is no "
            f"generator's), and its run is not finished; go on with `{resume(run)}`, which writes {run / 'model'}; to "
            f"end it where it stands, add training.images={int(checkpoint.name)}"
        )
    return checkpoint


def resume(run: Path) -> str:
    """The command that goes on with a run."""
    return f"seriatim train {shlex.quote(str(run / RECIPE))} --out {shlex.quote(str(run))} --resume"

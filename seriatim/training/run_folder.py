"""The folder of a run: check that it is one, hold it for one process, clean up after a crash, and replace it.

RUN/                  a run, as `train` and `train_classifier` describe it
.RUN.previous/        a run that is being replaced; it is deleted when the new one is finished
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from seriatim.checkpoints.native import CLASSIFIER, CONFIG, PARTS, replaceable
from seriatim.checkpoints.shared_tokenizer import SHARED, TOKENIZER
from seriatim.checkpoints.unfinished import FILES, RECIPE
from seriatim.core.errors import DataError, UsageError, shown
from seriatim.core.files import (
    MANIFEST,
    asides,
    explained,
    present_or_previous,
    put_back,
    set_aside,
    sweep,
    target_of,
    writable_folder,
)
from seriatim.core.ownership import DROPPINGS, first_file, json_of, owned
from seriatim.core.stopping import only_trainer
from seriatim.core.terminal import say
from seriatim.training.config import read_any
from seriatim.training.state import CHECKPOINT

Resume = bool | Literal["auto"]

GRID = re.compile(r"samples/([0-9]+\.(png|npy)|timeline\.png|guidance\.png)")
DATA = "data.json"
DEMO = ".demo"  # this file marks a folder that `seriatim demo` made
LOCK, ENVIRONMENT = ".lock", "environment.json"
PLAN, TOKENIZER_PICTURE = "plan.txt", "tokenizer.png"  # of a run whose recipe was planned for a folder of pictures
WRITTEN = {
    LOCK,
    DEMO,
    DATA,
    ENVIRONMENT,
    RECIPE,
    PLAN,
    TOKENIZER_PICTURE,
    "metrics.jsonl",
    "training.png",
    "accuracy.png",
    "psnr.png",
    "results.json",
    "grid.png",
    "report.json",
    "index.html",
}
FOLDERS = {"model", "checkpoints", "samples", "tensorboard", "trackers"}
OURS = re.compile(  # the path of every file that a run may hold
    "|".join(
        (
            "|".join(map(re.escape, sorted(WRITTEN))),
            rf"(model|\.model\.previous)/({'|'.join(map(re.escape, (*PARTS, CLASSIFIER)))})",
            rf"checkpoints/{CHECKPOINT.pattern}/({'|'.join(map(re.escape, (*FILES, TOKENIZER, CONFIG, MANIFEST)))})",
            rf"checkpoints/{SHARED.pattern}",
            GRID.pattern,
            r"packaged-[a-z0-9-]+\.png",  # of a demo
            r"tensorboard/events\.out\.tfevents\..*",
            r"trackers/.*",
        )
    )
)


def is_run(folder: Path) -> bool:
    """Whether the folder holds a run, which has a readable recipe and the fingerprint of its images."""
    if not (folder / RECIPE).is_file() or "fingerprint" not in json_of(folder / DATA):
        return False
    try:
        read_any(str(folder / RECIPE))
    except (UsageError, ValueError, RecursionError):
        return False
    return True


def begun(folder: Path) -> set[str]:
    """The files that an interrupted start of a run left in a folder before it wrote the recipe."""
    proofs = {DATA: "fingerprint", ENVIRONMENT: "seriatim", DEMO: "training_images"}
    found = {name for name, key in proofs.items() if key in json_of(folder / name)}
    lock = folder / LOCK
    with contextlib.suppress(OSError):
        if lock.is_file() and (not lock.stat().st_size or lock.read_bytes()[:64].startswith(b"process ")):
            found.add(LOCK)
    return found


def check_out(out: Path, *, resume: Resume, overwrite: bool) -> bool:
    """Check that a folder can be trained into or resumed, and return whether its run is to be resumed.

    With "auto", a run is resumed if there is one, and begun otherwise. Only an interrupted renaming of a run is
    repaired. Raises UsageError if the folder holds something else, holds a run already, or holds no run that can be
    resumed.
    """
    if resume not in (True, False, "auto"):
        raise UsageError(f"resume: {shown(resume)} is not allowed; give True, False or 'auto'")
    if resume and overwrite:
        raise UsageError("overwrite: can't go with resume, which continues the existing run; leave one of them out")
    previous = present_or_previous(out)
    if previous != out and is_run(previous):
        put_back(out)
    if resume == "auto":
        resume = os.path.lexists(out / RECIPE)  # what is wrong with that run is said below
        if not resume:
            say(f"there is no run in {out} yet; beginning one")
    if resume:
        check_resumable(out)
        return True
    if owned(out, "run", is_run, begun=begun(out)) and not overwrite:
        raise UsageError(
            f"out: {out} holds a run already; go on with --resume, or choose another folder, or replace it with "
            "--overwrite"
        )
    return False


def check_resumable(out: Path) -> None:
    """Raise UsageError, which names what is missing, if the folder holds no run that can be resumed."""
    advice = "check the path, or leave out --resume to begin a run there"
    if not os.path.lexists(out):
        raise UsageError(f"out: there is no folder {out}, so there is no run to resume; {advice}")
    if not out.is_dir():
        raise UsageError(f"out: {out} is a file; name a folder")
    with explained(out, "out"):
        if first_file(out) is None:
            raise UsageError(f"out: {out} is empty, so there is no run to resume; {advice}")
    missing = [name for name in (RECIPE, DATA) if not (out / name).is_file()]
    if missing:
        kept = asides(out.resolve())
        hint = f"; the run that was to be replaced is {kept[max(kept)]}" if kept else ""
        raise UsageError(
            f"out: {out} has no {' and no '.join(missing)}, without which a run can't be resumed; name a run's folder, "
            f"or put the file back; nothing was touched{hint}"
        )
    read_any(str(out / RECIPE))
    if "fingerprint" not in json_of(out / DATA):
        raise DataError(
            f"data: {out / DATA} is damaged or not of a run: it has no fingerprint; put the run's file back"
        )


@contextlib.contextmanager
def occupied(out: Path, parts: tuple[str, ...] = PARTS, what: str = "a model", *, overwrite: bool) -> Iterator[None]:
    """A context that holds a run's folder, which `check_out` has checked, for this process.

    The folder is created, half-written files in it are removed, and a run that is to be replaced is set aside. If the
    block ends well, the replaced run is deleted; otherwise it is kept under its other name.
    """
    if overwrite and is_run(out):
        make_room(out)
    writable_folder(out)
    with only_trainer(out):
        sweep(out, lambda name: name in WRITTEN or name in FOLDERS or name == "probe")
        sweep(out / "samples", lambda name: GRID.fullmatch(f"samples/{name}") is not None)
        replaceable(out / "model", parts, what)
        try:
            yield
        except BaseException:
            kept = asides(out.resolve())
            if kept:
                say(f"the run that was to be replaced is kept as {kept[max(kept)]}")
            raise
        for aside in asides(out.resolve()).values():
            shutil.rmtree(aside, ignore_errors=True)


def make_room(out: Path, what: str = "run") -> None:
    """Rename the folder of a run that is to be replaced, so that its name becomes free."""
    with only_trainer(out):
        refuse_foreign(out)
        say(f"replacing the {what} in {out}, which is kept until the new one is whole")
        set_aside(out)


def refuse_foreign(out: Path) -> None:
    """Raise UsageError if a run's folder also holds other files, which would be lost, or can't be renamed."""
    for path in sorted(out.rglob("*")):
        inner = path.relative_to(out)
        if (path.is_dir() and not path.is_symlink()) or OURS.fullmatch(inner.as_posix()) or path.name in DROPPINGS:
            continue
        if not any(target_of(out / part) for part in (*inner.parents, inner)):  # half-written files of ours are allowed
            raise UsageError(
                f"out: {path.parent} holds {path.name!r}, which is not part of a run and would be lost; move it away"
            )
    if Path.cwd().is_relative_to(out.resolve()):
        raise UsageError(f"out: {out} is the current folder or holds it and can't be replaced; go to another first")

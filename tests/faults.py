"""Faults for the tests of reliability: every verb at toy size, what it does to the disk, and a disk that refuses."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import seriatim.checkpoints.native as native
from seriatim.cli.main import run

TRAIN = ["model.width=16", "model.depth=1", "model.heads=2", "model.head.width=16", "model.head.depth=1"]
TRAIN += ["training.images=48", "training.save_images=16", "training.log_images=16", "training.batch_size=16"]
TRAIN += ["training.dtype=float32", "training.threads=1", "training.schedule=constant", "training.warmup_images=16"]
TRAIN += ["sampling.num_inference_steps=2", "sampling.num_diffusion_steps=2"]
FEW = ["--num-inference-steps", "2", "--num-diffusion-steps", "2"]
CLASSIFIER = ["data.path=pets", "data.test_path=pets", "data.size=8", "model.widths=[4]", "model.depth=[0]"]
CLASSIFIER += ["training.images=16", "training.save_images=8", "training.log_images=8", "training.batch_size=8"]
CLASSIFIER += ["training.test_images=8", "training.dtype=float32", "training.threads=1", "training.warmup_images=8"]
CACHE = ["data.size=8", "training.threads=1", "tokenizer={kind: pixels, patch: 2}"]
SWEEP = ["guidance_scale=1,2", "num_inference_steps=2", "num_diffusion_steps=2"]
EVALUATE = ["--data", "digits", "--real-data", "{kind: digits, held_out: true}", "--num", "70", "--features", "pixels"]


def pets(folder: Path, count: int = 6) -> Path:
    """Two class folders of pictures of 8x8."""
    chance = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(chance.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


# Each verb that writes, in the folder that holds `model` and `pets`: what it writes is under `out`.
VERBS: dict[str, list[str]] = {
    "train": ["train", "mar-digits", *TRAIN, "--out", "out/run"],
    "sample": ["sample", "model", "--label", "1", "--seed", "1", *FEW, "--out", "out/samples"],
    "edit": ["edit", "model", "image.png", "--mask", "mask.png", *FEW, "--seed", "1", "--out", "out/edited"],
    "cache": ["cache", "mar-cifar10-tiny", "data.path=pets", *CACHE, "--out", "out/cache"],
    "evaluate": ["evaluate", "model", *EVALUATE, *FEW, "--out", "out/evaluation"],
    "sweep": ["sweep", "model", *SWEEP, *EVALUATE, "--out", "out/sweep"],
    "classifier": ["train", "classifier-cifar10-tiny", *CLASSIFIER, "--out", "out/classifier"],
    "export .pth": ["export", "mar", "model", "out/exported.pth"],
    "export": ["export", "mar", "model", "out/exported.safetensors"],
}


def begin(folder: Path) -> None:
    """`model`, `pets` and what `edit` needs, in `folder`."""
    from helpers import make_bundle

    bundle = make_bundle(classes=10)
    bundle.class_names[:] = [str(digit) for digit in range(10)]
    native.save_bundle(bundle, folder / "model")
    pets(folder / "pets")
    Image.new("L", (8, 8), 90).save(folder / "image.png")
    mask = Image.new("L", (8, 8), 0)
    mask.paste(255, (4, 0, 8, 8))
    mask.save(folder / "mask.png")


def content(folder: Path) -> dict[str, str]:
    """Every file below `folder` with the sha256 of what is in it."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def litter(folder: Path) -> list[str]:
    """What a write leaves half done: names that begin with a dot, but for the lock files of a run or cache."""
    names = [str(path.relative_to(folder)) for path in folder.rglob(".*")]
    return sorted(name for name in names if not name.endswith(".lock"))


# --- what a process does to the disk ------------------------------------------------------------------------------


@dataclass
class Call:
    """One call that changes the disk: `kind` is create, write, sync, rename, or folder."""

    kind: str
    path: Path
    other: Path | None = None  # of a rename: where to


@dataclass
class Disk:
    """Below `root`, records the calls that change files, and refuses those from number `fails` on.

    Calls of Python are seen by an audit hook, which sees libraries too; those of safetensors and of `os.fsync` are
    wrapped, because no hook is told of them.
    """

    root: Path
    fails: int | None = None
    number: int = errno.ENOSPC
    once: bool = False  # only call number `fails` is refused
    calls: list[Call] = field(default_factory=list)

    def note(self, kind: str, path: Any, other: Any = None) -> None:
        if not isinstance(path, (str, os.PathLike)):
            return
        whole = Path(os.path.abspath(path))
        if not whole.is_relative_to(self.root):
            return
        self.calls.append(Call(kind, whole, None if other is None else Path(os.path.abspath(other))))
        refused = len(self.calls) - 1
        if self.fails is not None and (refused == self.fails or (refused > self.fails and not self.once)):
            raise OSError(self.number, os.strerror(self.number), str(path))


_running: list[Disk] = []
_hooked = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _running:
        return
    disk = _running[-1]
    if event == "open":
        path, _, flags = arguments
        if flags & (os.O_WRONLY | os.O_RDWR):
            disk.note("create" if flags & os.O_CREAT else "write", path)
    elif event == "os.rename":
        disk.note("rename", arguments[0], arguments[1])
    elif event == "os.mkdir":
        disk.note("folder", arguments[0])


@contextlib.contextmanager
def watched(root: Path, fails: int | None = None, number: int = errno.ENOSPC, once: bool = False) -> Iterator[Disk]:
    """Record what is done to files below `root`; from call `fails` on, refuse it with this errno."""
    global _hooked
    if not _hooked:
        sys.addaudithook(_hook)  # it stays for the life of the process, and does nothing outside
        _hooked = True
    disk = Disk(Path(os.path.abspath(root)), fails, number, once)
    fsync, save_file = os.fsync, native.save_file

    def sync(handle: int) -> None:
        disk.note("sync", os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def save(tensors: Any, path: Any, *more: Any, **others: Any) -> None:
        disk.note("write", path)
        save_file(tensors, path, *more, **others)

    os.fsync, native.save_file = sync, save  # type: ignore[assignment]
    _running.append(disk)
    try:
        yield disk
    finally:
        _running.pop()
        os.fsync, native.save_file = fsync, save_file


def command(words: list[str], capsys: Any) -> tuple[int, list[str]]:
    """The exit code of a command line, and the lines of stderr that are no progress."""
    capsys.readouterr()
    code = run(words)
    lines = capsys.readouterr().err.splitlines()
    return code, [line for line in lines if line.startswith(("error", "warning")) or "Traceback" in line]


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)

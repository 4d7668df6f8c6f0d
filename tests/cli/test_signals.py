"""Row 24 of the fault table: a signal at any moment of any verb ends it with its code and one line.

Nothing half-written is left, and the same command goes on, or begins again, as if it had never been stopped. The
process is a fork of this one, so that torch is not imported for each.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import make_bundle
from PIL import Image

from seriatim.checkpoints.native import save_bundle
from seriatim.checkpoints.unfinished import newest_whole
from seriatim.cli import main

for heavy in ("cli.app", "pipeline", "evaluation.run", "evaluation.grid", "data.caching", "training.loop"):
    importlib.import_module(f"seriatim.{heavy}")  # here, once, and not in each child

pytestmark = pytest.mark.fresh_process  # every test forks

CODES = {signal.SIGINT: {130, 143}, signal.SIGTERM: {143}, signal.SIGHUP: {143}}
SAVES = {**CODES, signal.SIGUSR1: {143}}  # of training, which batch systems warn so before they end it
FEW = ["--num-inference-steps", "2", "--num-diffusion-steps", "2", "--seed", "1", "--threads", "1"]
TRAIN = [
    "model.width=16", "model.depth=1", "model.heads=1", "model.head.width=16", "model.head.depth=1",
    "training.batch_size=16", "training.dtype=float32", "training.threads=1", "training.images=640",
    "training.save_images=160",
]  # fmt: skip


def begin(words: list[str], log: Path) -> int:
    """The command line `words` in a process of its own; what it prints goes to `log`."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            sys.stdout = sys.stderr = file
            sys.argv = ["seriatim", *words]
            try:
                main.main()
            except SystemExit as end:
                code = int(end.code or 0)
            file.flush()
    finally:
        os._exit(code)


def end(child: int) -> int:
    """Its exit code, as a shell gives it; it has a minute."""
    for _ in range(6000):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status) % 256
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    raise AssertionError("it did not stop")


Mark = tuple[Path, str]  # a folder, and what the names of files in it look like
SOON = 0.1  # seconds after a mark, within which a signal comes


def litter(folder: Path) -> list[str]:
    """Files and folders under a name that is only for what is being written."""
    return sorted(p.name for p in folder.rglob(".*") if p.name not in (".lock", ".demo")) if folder.exists() else []


def disturb(words: list[str], marks: Mark, number: signal.Signals, delay: float, times: int = 1) -> int:
    """Run a command, send it a signal `delay` seconds after it has written a file that `marks` names.

    What it says is looked at, and its exit code returned: 0 where it had ended already.
    """
    folder, pattern = marks
    log, before = folder.parent / "log", set(folder.glob(pattern))
    child = begin(words, log)
    for _ in range(60_000):
        if set(folder.glob(pattern)) != before or os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(0.001)
    time.sleep(delay)
    for _ in range(times):
        os.kill(child, number)
        time.sleep(0.01)
    code, said = end(child), log.read_text()
    assert code in SAVES[number] | {0, 256 - number} and "Traceback" not in said and "bug" not in said, (code, said)
    if code in SAVES[number] and times == 1:
        assert said.strip().splitlines()[-1].startswith((f"{number.name}: ", "stopped")), said
    return code


def undisturbed(words: list[str], tmp_path: Path) -> float:
    """Seconds that the command takes by itself."""
    start = time.monotonic()
    assert end(begin(words, tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    return time.monotonic() - start


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_bundle(make_bundle(), tmp_path / "model")


def pictures(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as image:
            found[path.name] = image.tobytes()  # which raises where the file is cut off
    return found


def test_sampling(tmp_path: Path, model: Path) -> None:
    words = ["sample", str(model), "--num-images-per-label", "4", "--batch-size", "2", *FEW, "--json", "--out"]
    undisturbed([*words, str(tmp_path / "whole")], tmp_path)
    chance = random.Random(0)
    whole, stops = pictures(tmp_path / "whole"), 0
    for number in CODES:
        out = tmp_path / "cut"
        for path in out.glob("*.png"):
            path.unlink()
        stops += disturb([*words, str(out)], (out, "*.png"), number, chance.random() * SOON) != 0
        assert not litter(tmp_path)
        assert all(whole[name] == pixels for name, pixels in pictures(out).items()), "each picture is whole"
    assert stops >= 1
    undisturbed([*words, str(out), "--overwrite"], tmp_path)
    assert pictures(out) == whole


@pytest.mark.slow
def test_evaluating(tmp_path: Path, model: Path) -> None:
    bundle = make_bundle(classes=10)
    bundle.class_names = [str(digit) for digit in range(10)]
    save_bundle(bundle, model)
    words = ["evaluate", str(model), "--data", "digits", "--real-data", "{kind: digits, held_out: true}", "--json"]
    words += ["--num", "90", "--features", "pixels", "--figures", "frechet", *FEW[:4]]
    words += ["--batch-size", "8", "--threads", "1", "--out"]
    undisturbed([*words, str(tmp_path / "whole")], tmp_path)
    chance = random.Random(1)
    out, stops = tmp_path / "cut", 0
    for number in CODES:
        stops += disturb([*words, str(out)], (out, "**/*.safetensors"), number, chance.random() * SOON) != 0
        assert not litter(tmp_path)
    assert stops >= 1
    undisturbed([*words, str(out)], tmp_path)
    one, two = (json.loads((folder / "results.json").read_text())["figures"] for folder in (tmp_path / "whole", out))
    assert one == two


def test_caching(tmp_path: Path) -> None:
    chance, images = random.Random(2), np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(20):
            pixels = images.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pets" / name / f"{i}.png")
    words = ["cache", "mar-cifar10-tiny", f"data.path={tmp_path / 'pets'}", "data.size=8", "--shard-images", "4"]
    words += ["--batch-size", "2", "--json", "--out"]
    undisturbed([*words, str(tmp_path / "whole")], tmp_path)
    out, stops = tmp_path / "cut", 0
    for number in CODES:
        stops += disturb([*words, str(out)], (out, "shard-*.json"), number, chance.random() * SOON / 10) != 0
        assert not litter(tmp_path)
    assert stops >= 1
    undisturbed([*words, str(out)], tmp_path)
    one, two = ({p.name: p.read_bytes() for p in folder.glob("shard*")} for folder in (tmp_path / "whole", out))
    assert one == two and len(one) == 2 * 10


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_training(tmp_path: Path, workers: int) -> None:
    words = ["train", "mar-digits", *TRAIN, f"training.workers={workers}", "--json", "--out"]
    undisturbed([*words, str(tmp_path / "whole")], tmp_path)
    out, stops, chance = tmp_path / "cut", 0, random.Random(3)
    for number in SAVES:
        resume = ["--resume"] if (out / "recipe.yaml").exists() else []
        mark = (out, "checkpoints/*/manifest.json")
        stops += disturb([*words, str(out), *resume], mark, number, chance.random() * SOON / 10) != 0
        assert not litter(tmp_path) and not newest_whole(out / "checkpoints")[1]
    assert stops >= 1
    undisturbed([*words, str(out), *(["--resume"] if (out / "recipe.yaml").exists() else [])], tmp_path)
    one, two = ((folder / "model" / "model.safetensors").read_bytes() for folder in (tmp_path / "whole", out))
    assert one == two


@pytest.mark.parametrize("verb", ["sample", "train"])
def test_a_second_signal_ends_it_at_once(tmp_path: Path, model: Path, verb: str) -> None:
    sample = ["sample", str(model), "--num-images-per-label", "64", "--batch-size", "1", *FEW, "--out"]
    train = ["train", "mar-digits", *TRAIN, "training.images=100000000", "--out"]
    words = sample if verb == "sample" else train
    pattern = "*.png" if verb == "sample" else "checkpoints/*/manifest.json"
    for number in CODES:
        out = tmp_path / number.name
        assert disturb([*words, str(out)], (out, pattern), number, SOON, times=2) in CODES[number]
    if verb == "train":
        assert not newest_whole(tmp_path / "SIGTERM" / "checkpoints")[1], "what was saved is whole"


@pytest.mark.parametrize("number", CODES)
def test_a_second_signal_ends_what_no_exception_ends(number: signal.Signals) -> None:
    """The process cleans up in a way that goes on after any exception."""
    child = os.fork()
    if child == 0:
        main.heed_signals()
        for _ in range(2):
            with contextlib.suppress(BaseException):
                signal.raise_signal(number)
        os._exit(99)
    assert end(child) in CODES[number]


def test_a_hangup_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """`nohup seriatim train ...` goes on when its terminal is closed."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        child = begin(["train", "mar-digits", *TRAIN, "--json", "--out", str(tmp_path / "run")], tmp_path / "log")
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            time.sleep(0.01)
        os.kill(child, signal.SIGHUP)
        assert end(child) == 0
    finally:
        signal.signal(signal.SIGHUP, before)

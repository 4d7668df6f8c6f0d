"""Resuming is bitwise; stopping, killing, a full disk and flipped bits lose nothing."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import Fork, command_line
from helpers import die_at_call, signal_in_step, untimed_metrics
from PIL import Image

from seriatim.checkpoints.shared_tokenizer import tokenizer_file
from seriatim.checkpoints.unfinished import all_checkpoints, newest_whole
from seriatim.core.errors import ConfigError, DataError, ResourceError, Stopped, UsageError
from seriatim.data import loader
from seriatim.training import engine, loop, setup, state
from seriatim.training.config import Recipe, read_recipe
from seriatim.training.loop import train
from seriatim.training.optim import adamw, averaged
from seriatim.training.state import RunState, Trainables, prune

TINY = [
    "model.width=32", "model.depth=1", "model.heads=2", "model.dropout=0.1",
    "model.head.width=32", "model.head.depth=1", "training.batch_size=16",
    "training.log_images=48", "training.dtype=float32", "training.threads=1",
    "training.warmup_images=64", "training.images=160", "training.save_images=64",
]  # fmt: skip


def tiny(*overrides: str) -> Recipe:
    return read_recipe("mar-digits", [*TINY, *overrides])


SMALL = [  # of mar-cifar10-tiny
    "model.width=32", "model.depth=1", "model.head.width=32", "training.dtype=float32", "training.threads=1",
]  # fmt: skip


def eight_pixels(folder: Path) -> list[str]:
    """Settings of mar-cifar10-tiny for a folder of 8x8 pictures."""
    return [f"data.path={folder}", "data.size=8", "sampling.num_inference_steps=4", *SMALL]


def weights(run: Path) -> dict[str, bytes]:
    """Every file of the last checkpoint, and of the model, as bytes."""
    newest = all_checkpoints(run / "checkpoints")[-1]
    names = ("model.safetensors", "average.safetensors", "optimiser.safetensors", "tokenizer.json")
    found = {name: (newest / name).read_bytes() for name in names}
    return {
        **found,
        "tokenizer": tokenizer_file(newest).read_bytes(),
        "final": (run / "model" / "model.safetensors").read_bytes(),
    }


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> Callable[[], None]:
    signal_in_step(monkeypatch, steps)
    return monkeypatch.undo


CASES = {
    "plain": [], "workers": ["training.workers=2"], "accumulate": ["training.accumulate=3"],
    "threads": ["training.threads=2", "model.width=128", "training.images=144"],
    "codes": ["tokenizer={kind: kmeans, patch: 2, levels: 17, vocab: 32}", "model.head={kind: categorical}"],
    "causal": ["model={kind: causal, order: random, width: 32, depth: 1, heads: 2, dropout: 0.1, "
               "head: {kind: diffusion, width: 32, depth: 1}}"],
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(tiny(), out, quiet=True)
    return out


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step."""
    out = tmp_path_factory.mktemp("short") / "run"
    train(tiny("training.images=16"), out, quiet=True)
    return out


@pytest.mark.parametrize("case", CASES)
def test_ten_steps_are_the_same_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path, case: str
) -> None:
    """Bitwise, 4 + 3 + 3 steps: weights, averages, moments, metrics; mid-epoch, with workers and threads."""
    recipe, seen = tiny(*CASES[case]), 0
    if case != "plain":
        whole = tmp_path / "whole"
        train(recipe, whole, quiet=True)
    for steps in (4, 3):
        undo = stop_after(monkeypatch, steps)
        seen += 16 * steps
        says = rf"SIGTERM: stopped after {seen} images, saved .*{seen:012d}; go on with --resume"
        with pytest.raises(Stopped, match=says):
            train(recipe, tmp_path / "parts", resume=seen > 16 * steps, quiet=True)
        undo()
        assert not (tmp_path / "parts" / "model").exists()
    train(recipe, tmp_path / "parts", resume=True, quiet=True)
    assert weights(whole) == weights(tmp_path / "parts")
    assert untimed_metrics(whole) == untimed_metrics(tmp_path / "parts")


@pytest.mark.parametrize("lost", ["noise", "data", "optimiser", "average"])
def test_the_comparison_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path, lost: str) -> None:
    """Negative control: whatever resuming forgets shows in the comparison above."""
    undo = stop_after(monkeypatch, 4)
    with pytest.raises(Stopped):
        train(tiny(), tmp_path / "parts", quiet=True)
    undo()
    if lost in ("noise", "data"):
        module = loop if lost == "noise" else loader
        true = module.derive_seed
        monkeypatch.setattr(module, "derive_seed", lambda *parts: true(*parts, "forgotten"))
    else:
        true_load = engine.checkpoints.load

        def forgetful(path: Path, parts: Any) -> Any:
            kept = {k: v.clone() for k, v in parts.average.module.state_dict().items()}
            state = true_load(path, parts)
            if lost == "optimiser":
                parts.optimiser.state.clear()
            else:
                parts.average.module.load_state_dict(kept)
            return state

        monkeypatch.setattr(engine.checkpoints, "load", forgetful)
    train(tiny(), tmp_path / "parts", resume=True, quiet=True)
    assert weights(whole) != weights(tmp_path / "parts")


def test_a_finished_run_may_be_made_longer(tmp_path: Path) -> None:
    train(tiny("training.schedule=constant"), tmp_path / "whole", quiet=True)
    train(tiny("training.schedule=constant", "training.images=80"), tmp_path / "parts", quiet=True)
    train(tiny("training.schedule=constant"), tmp_path / "parts", resume=True, quiet=True)
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")
    result = train(tiny("training.schedule=constant"), tmp_path / "parts", resume=True, quiet=True)
    assert result.images == 160, "nothing is left to do"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.weight_decay=0.5"], "training.weight_decay: 0.02 in "),
        (["model.width=64"], "model.width: 32 in "),
        (["seed=4"], "seed: 0 in "),
        (["model.head.draws=3"], "model.head.draws: 2 in "),
    ],
)
def test_other_settings_are_not_resumed(short: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        train(tiny(*overrides), short, resume=True, quiet=True)
    assert words in str(caught.value) and "a resumed run keeps its settings" in str(caught.value)


def flip(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all its checkpoints."""
    out = tmp_path_factory.mktemp("kept") / "run"
    train(tiny("training.keep=3"), out, quiet=True)
    return out


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_checkpoint_is_passed_over_and_said_so(
    tmp_path: Path, kept: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, chance = tiny("training.keep=3"), random.Random(0)
    run = Path(shutil.copytree(kept, tmp_path / "run"))
    final = weights(run)
    *_, older, newest = all_checkpoints(run / "checkpoints")
    for file in sorted(newest.iterdir()):
        whole = file.read_bytes()
        sizes = (0, 7, 8, 100, len(whole) // 2, len(whole) - 1)
        for size in sizes if damage == "truncate" else range(5 if damage == "flip" else 1):
            if damage == "flip":
                flip(file, chance)
            elif damage == "truncate":
                file.write_bytes(whole[: min(size, len(whole) - 1)])
            else:
                file.unlink()
            path, passed_over = newest_whole(run / "checkpoints")
            assert path == older and len(passed_over) == 1 and str(newest) in passed_over[0]
            file.write_bytes(whole)
    flip(newest / "model.safetensors", chance)
    capsys.readouterr()
    train(recipe, run, resume=True, quiet=True)
    err = capsys.readouterr().err
    assert "stepping back: " in err and "model.safetensors is damaged" in err and f"from {older}" in err
    assert weights(run) == final, "from the older one, the run ends where it ended"


def test_all_checkpoints_damaged_begins_anew(tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    for path in all_checkpoints(run / "checkpoints"):
        (path / "manifest.json").unlink()
    with pytest.raises(UsageError, match="finished run without a whole checkpoint"):
        train(tiny(), run, resume=True, quiet=True)
    shutil.rmtree(run / "model")
    train(tiny(), run, resume=True, quiet=True)
    assert "no whole checkpoint" in capsys.readouterr().err and weights(run) == weights(whole)


def test_one_trainer_to_a_folder(tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from seriatim.core.stopping import only_trainer
with only_trainer(Path({str(tmp_path)!r})):
    print("held", flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(UsageError, match=f"is being trained into by process {holder.pid} on "):
        train(tiny(), tmp_path, quiet=True)
    holder.kill()
    holder.wait()
    holder.stdout.close()
    train(tiny("training.images=16"), tmp_path, quiet=True)


def test_a_full_disk_keeps_what_there_was(tmp_path: Path) -> None:
    """No file may grow beyond 20 kB: the next checkpoint fails, with code 6, and the one before is whole."""
    train(tiny("training.images=80"), tmp_path, quiet=True)
    before = newest_whole(tmp_path / "checkpoints")[0]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(ResourceError, match=r"no space is left|File too large"):
            train(tiny(), tmp_path, resume=True, quiet=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert newest_whole(tmp_path / "checkpoints") == (before, [])
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith(".")], "no litter"
    train(tiny(), tmp_path, resume=True, quiet=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    chance = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(20):
            Image.fromarray(chance.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(
                tmp_path / "pets" / name / f"{i}.png"
            )
    return tmp_path / "pets"


def command(folder: Path, out: Path, *more: str) -> list[str]:
    settings = [
        f"data.path={folder}",
        "data.size=8",
        "training.images=100000",
        "training.save_images=320",
        "training.threads=1",
    ]
    settings += ["training.dtype=float32", "training.sample_images=0", "training.log_images=320", "model.width=32"]
    return ["train", "mar-cifar10-tiny", *settings, *more, "--out", str(out)]


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


@pytest.mark.parametrize("rounds", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_kill_nine_at_random_moments_loses_no_checkpoint(tmp_path: Path, folder: Path, rounds: int) -> None:
    """Killed while it trains and saves all the time: what is there is whole, and the next run goes on from it."""
    chance, out, seen = random.Random(0), tmp_path / "run", 0
    for round_ in range(rounds):
        words = command(folder, out, *["--resume"] * (round_ > 0))

        def went_on(seen: int = seen) -> bool:
            newest = newest_whole(out / "checkpoints")[0]
            return newest is not None and int(newest.name) > seen

        with Fork(command_line, words):
            wait_for(went_on)
            time.sleep(chance.random() * 0.5)
        path, passed_over = newest_whole(out / "checkpoints")
        assert path is not None and not passed_over, (round_, passed_over)
        assert int(path.name) > seen
        seen = int(path.name)


@pytest.mark.fresh_process
def test_kill_nine_at_each_write_loses_no_checkpoint(tmp_path: Path) -> None:
    """A child saves a checkpoint and prunes the one before, killed at its n-th sync, rename or deletion: every n."""
    recipe = tiny("training.images=16", "training.save_images=0")
    _, tokenizer, model = setup.build(recipe)
    parts = Trainables(model, averaged(model, 0.9), adamw(model, 1e-3, (0.9, 0.95), 0.0), tokenizer)
    model(torch.randn(2, 16, 4), torch.tensor([0, 1])).mean.backward()
    parts.optimiser.step()
    folder, calls = tmp_path / "checkpoints", 0
    state.save(folder, parts, RunState(seen=1))
    whole = True
    while whole:
        child = os.fork()
        if child == 0:  # the child: dies at call number `calls`, or gets to the end
            die_at_call(calls, "os.fsync", "os.replace", "shutil.rmtree")
            state.save(folder, parts, RunState(seen=2 + calls))
            prune(folder, keep=1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        path, passed_over = newest_whole(folder)
        assert path is not None and not passed_over, (calls, passed_over)
        assert state.load(path, parts).seen == int(path.name)
        whole = os.WIFSIGNALED(status)
        calls += 1
    assert calls > 12, "each of six files is synced, the folder renamed, the old one deleted"
    assert path is not None and int(path.name) == 1 + calls
    state.sweep(folder)
    assert not [p for p in folder.iterdir() if p.name.startswith(".")], "what the dead left is swept"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits(tmp_path: Path, folder: Path, number: signal.Signals) -> None:
    out = tmp_path / "run"
    more = ["training.workers=1", "training.save_images=0", "training.log_images=64"]
    with Fork(command_line, command(folder, out, *more)) as trainer:
        wait_for(lambda: (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size > 0)
        trainer.send_signal(number)
        done = trainer.wait(60)
    assert done.returncode == 143
    said = done.stderr
    assert f"{number.name}: finishing this step" in said and "go on with --resume" in said and "Traceback" not in said
    assert newest_whole(out / "checkpoints")[0] is not None


def test_a_second_signal_stops_at_once() -> None:
    code = """
import os, signal, time
from seriatim.core.stopping import StopRequest
with StopRequest() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    print(stop.requested, flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("still here", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (143, "SIGTERM\n")


def test_other_images_are_not_resumed(tmp_path: Path, folder: Path) -> None:
    recipe = read_recipe("mar-cifar10-tiny", [*eight_pixels(folder), "training.images=64"])
    train(recipe, tmp_path / "run", quiet=True)
    (folder / "cat" / "3.png").unlink()
    with pytest.raises(DataError, match=r"its images are not those that .* began with"):
        train(recipe, tmp_path / "run", resume=True, quiet=True)


@pytest.mark.parametrize("change", ["copied", "renamed", "edited", "release 0.1"])
def test_what_differs_about_the_images_is_said(tmp_path: Path, folder: Path, change: str) -> None:
    settings = [*eight_pixels(folder), "training.images=16"]
    train(read_recipe("mar-cifar10-tiny", settings), tmp_path / "run", quiet=True)
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    one = tmp_path / "copy" / "cat" / "3.png"
    if change in ("renamed", "release 0.1"):
        one.rename(one.with_name("x.png"))
    if change == "edited":
        with open(one, "ab") as file:
            file.write(b"more")
    if change == "release 0.1":  # which did not write what the fingerprint is made of
        says = json.loads((tmp_path / "run" / "data.json").read_text())
        del says["traits"]
        (tmp_path / "run" / "data.json").write_text(json.dumps(says))
    moved = read_recipe("mar-cifar10-tiny", [*settings, f"data.path={tmp_path / 'copy'}"])
    if change == "copied":
        assert train(moved, tmp_path / "run", resume=True, quiet=True).images == 16
        return
    with pytest.raises(DataError) as caught:
        train(moved, tmp_path / "run", resume=True, quiet=True)
    wanted = {
        "renamed": "40 then, 40 now, the names",
        "edited": "40 then, 40 now, the sizes and contents of files differ; restore them",
        "release 0.1": "40 then, 40 now, or files changed; restore them",
    }
    assert wanted[change] in str(caught.value)


def test_a_run_of_an_earlier_version_is_resumed_and_may_be_copied_from_then_on(tmp_path: Path, folder: Path) -> None:
    """Release 0.2 knew files by their times of change."""
    settings = [*eight_pixels(folder), "training.images=16"]
    train(read_recipe("mar-cifar10-tiny", settings), tmp_path / "run", quiet=True)
    now = json.loads((tmp_path / "run" / "data.json").read_text())
    files = [(path, path.stat()) for path in sorted(folder.glob("*/*"))]
    listing = [
        [path.relative_to(folder).as_posix(), now["classes"].index(path.parent.name), stat.st_size, stat.st_mtime_ns]
        for path, stat in files
    ]
    times = hashlib.sha256(json.dumps([stat.st_mtime_ns for _, stat in files]).encode()).hexdigest()[:16]
    traits = {**{name: now["traits"][name] for name in ("names", "sizes")}, "times of change": times}
    then = {**now, "fingerprint": hashlib.sha256(json.dumps(listing).encode()).hexdigest(), "traits": traits}
    (tmp_path / "run" / "data.json").write_text(json.dumps(then))
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    moved = read_recipe("mar-cifar10-tiny", [*settings, f"data.path={tmp_path / 'copy'}", "training.images=32"])
    with pytest.raises(DataError, match=r"knew files by their times of change, .*; copy the files with times \(cp -p"):
        train(moved, tmp_path / "run", resume=True, quiet=True)
    assert train(read_recipe("mar-cifar10-tiny", settings), tmp_path / "run", resume=True, quiet=True).images == 16
    assert json.loads((tmp_path / "run" / "data.json").read_text()) == now
    assert train(moved, tmp_path / "run", resume=True, quiet=True).images == 32


def test_another_models_weights_with_other_classes(tmp_path: Path, folder: Path) -> None:
    import seriatim

    recipe = read_recipe("mar-cifar10-tiny", [*eight_pixels(folder), "training.images=64"])
    train(recipe, tmp_path / "first", quiet=True)
    (folder / "cat").rename(folder / "zebra")
    more = [*eight_pixels(folder), "training.images=1", "training.learning_rate=1.0e-12"]
    source = tmp_path / "first" / "model"
    train(read_recipe("mar-cifar10-tiny", [*more, f"training.init_from={source}"]), tmp_path / "second", quiet=True)
    one, two = (seriatim.load(tmp_path / name, device="cpu") for name in ("first", "second"))
    assert two.class_names == ["dog", "zebra"]
    old, new = (pipe.model.state_dict()["conditioner.class_embedding"] for pipe in (one, two))
    assert torch.allclose(new[0], old[1], atol=1e-6), "a class of the same name keeps its vector"
    assert torch.allclose(new[1], old.mean(dim=0), atol=1e-6), "a new one begins at the mean"
    assert torch.allclose(one.model.backbone.mask_token, two.model.backbone.mask_token, atol=1e-6)
    means = [pipe.tokenizer.state_dict()["mean"] for pipe in (one, two)]
    assert torch.equal(means[0], means[1]), "weights belong to their token statistics"
    with pytest.raises(ConfigError, match=r"model\.heads \(\[2,2\] there, \[4,4\] in the recipe\); set model"):
        train(
            read_recipe("mar-cifar10-tiny", [*more, "model.heads=4", f"training.init_from={source}"]),
            tmp_path / "third",
            quiet=True,
        )
    with pytest.raises(ConfigError, match=r"training\.init_from"):
        train(
            read_recipe("mar-cifar10-tiny", [*more, "model.width=64", f"training.init_from={source}"]),
            tmp_path / "fourth",
            quiet=True,
        )


def test_another_models_weights_on_another_grid(tmp_path: Path, folder: Path) -> None:
    """Fine-tuning at twice the size: positions are interpolated, the rest is taken as it is."""
    import seriatim

    common = [f"data.path={folder}", "sampling.num_inference_steps=4", *SMALL, "training.batch_size=8"]
    train(
        read_recipe("mar-cifar10-tiny", [*common, "data.size=16", "training.images=64"]), tmp_path / "small", quiet=True
    )
    larger = [*common, "data.size=32", f"training.init_from={tmp_path / 'small'}"]
    still = ["training.images=1", "training.learning_rate=1.0e-12"]
    train(read_recipe("mar-cifar10-tiny", [*larger, *still]), tmp_path / "large", quiet=True)
    one, two = (seriatim.load(tmp_path / name, device="cpu").model.backbone for name in ("small", "large"))
    assert (one.tokens, two.tokens) == (16, 64)
    assert torch.allclose(one.mask_token, two.mask_token, atol=1e-6)
    buffer = one.buffer
    assert torch.allclose(one.encoder_positions[:buffer], two.encoder_positions[:buffer], atol=1e-6)
    near = one.output_positions.view(4, 4, -1).mean(dim=(0, 1)), two.output_positions.view(8, 8, -1).mean(dim=(0, 1))
    assert torch.allclose(*near, atol=0.01) and two.output_positions.std() > 0.5 * one.output_positions.std()
    with pytest.raises(ConfigError, match=r"tokenizer\.patch \(4 there, 8 in the recipe\); set tokenizer\.patch=4$"):
        train(read_recipe("mar-cifar10-tiny", [*larger, "tokenizer.patch=8"]), tmp_path / "other", quiet=True)

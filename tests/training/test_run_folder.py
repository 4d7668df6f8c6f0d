"""The folder of a run: replaced only when the new run is whole, put back after a crash, swept of litter; checkpoints
that are damaged count for nothing and are kept."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import die_at_call, make_bundle, signal_in_step

import seriatim
from seriatim.checkpoints.native import load_bundle, save_bundle
from seriatim.checkpoints.tokenizer import load_tokenizer
from seriatim.checkpoints.unfinished import best_of, newest_whole, why_not_whole
from seriatim.cli.main import run as command_line
from seriatim.core import files
from seriatim.core.errors import CheckpointError, ConfigError, DataError, Stopped, UsageError
from seriatim.core.stopping import StopRequest
from seriatim.pipeline.pipeline import Pipeline
from seriatim.training import setup, state
from seriatim.training.config import Recipe, read_recipe
from seriatim.training.loop import train
from seriatim.training.run_folder import check_out
from seriatim.training.state import all_checkpoints, prune

RELEASE = Path(__file__).resolve().parent.parent / "fixtures" / "release-0.1"
TINY = [
    "model.width=16", "model.depth=1", "model.heads=2", "model.head.width=16", "model.head.depth=1",
    "training.batch_size=16", "training.log_images=16", "training.dtype=float32", "training.threads=1",
    "training.images=64", "training.save_images=16", "training.keep=2",
]  # fmt: skip


def tiny(*overrides: str) -> Recipe:
    return read_recipe("mar-digits", [*TINY, *overrides])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def damage(checkpoint: Path) -> bytes:
    """Flip a bit of a checkpoint's weights; returns all that the file now holds."""
    file = checkpoint / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    return bytes(data)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is done: checkpoints after 48 and 64 images, and a model."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train(tiny(), out, device="cpu", quiet=True)
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


# --- damaged checkpoints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("damaged", [1, 2])
def test_damaged_checkpoints_are_kept_aside_and_count_for_nothing(
    run: Path, keep: int, damaged: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The newest are damaged, the run goes on from an older one or anew and is stopped at once: nothing is lost."""
    shutil.rmtree(run / "model")  # the run is not finished
    before = {path.name: damage(path) for path in all_checkpoints(run / "checkpoints")[-damaged:]}
    older = [path.name for path in all_checkpoints(run / "checkpoints")[:-damaged]]
    signal_in_step(monkeypatch, 1)
    with pytest.raises(Stopped, match=r"saved .*; go on with --resume") as caught:
        train(tiny("training.images=6400", f"training.keep={keep}"), run, resume=True, quiet=True)
    err = capsys.readouterr().err
    folder = run / "checkpoints"
    saved = Path(str(caught.value).split("saved ")[1].split(";")[0])
    whole = [path for path in all_checkpoints(folder) if why_not_whole(path) is None]
    assert saved in whole, "what the message says was saved is there"
    assert len(whole) == len(all_checkpoints(folder))
    assert len(whole) >= min(keep, len(older) + 1), "a damaged one takes nobody's place"
    for name, data in before.items():
        assert (folder / f"{name}.damaged" / "model.safetensors").read_bytes() == data, "set aside, not deleted"
        assert f"stepping back: {folder / name / 'model.safetensors'} is damaged" in err
        assert f"is kept as {name}.damaged" in err


def test_a_second_damaged_checkpoint_of_a_number_gets_another_name(run: Path) -> None:
    newest = all_checkpoints(run / "checkpoints")[-1]
    damage(newest)
    for name in ("000000000064.damaged", "000000000064.damaged-2"):
        assert len(state.set_damaged_aside(run / "checkpoints")) == 1
        assert (run / "checkpoints" / name).is_dir()
        shutil.copytree(run / "checkpoints" / name, newest)


def test_pruning_looks_whether_what_it_keeps_is_whole(run: Path) -> None:
    """Damage that comes while a run goes on: the whole one behind it is kept, as is the best."""
    folder = run / "checkpoints"
    newest = all_checkpoints(folder)[-1]
    for number in (80, 96, 112):
        shutil.copytree(newest, folder / f"{number:012d}")
    damage(folder / f"{96:012d}")
    prune(folder, keep=2, saved=folder / f"{112:012d}")
    names = {path.name for path in folder.iterdir()}
    assert {f"{112:012d}", f"{80:012d}", f"{96:012d}.damaged"} <= names
    assert {path.name for path in all_checkpoints(folder)} <= names - {f"{64:012d}"} | {best(folder)}


def best(folder: Path) -> str:
    found = best_of(folder)
    assert found is not None
    return found.name


def test_the_newest_and_the_best_are_kept(run: Path, tmp_path: Path) -> None:
    pattern = all_checkpoints(run / "checkpoints")[-1]
    for seen, loss in [(1, 0.5), (2, 0.1), (3, 0.4), (4, 0.3), (5, 0.2)]:
        folder = shutil.copytree(pattern, tmp_path / "kept" / f"{seen:012d}")
        says = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps({**says, "loss": loss}))
        files.write_manifest(folder, state.FILES)
        prune(tmp_path / "kept", keep=2)
        assert folder.exists(), "the new one is never deleted"
    assert [int(path.name) for path in all_checkpoints(tmp_path / "kept")] == [2, 4, 5]
    damage(tmp_path / "kept" / f"{2:012d}")
    assert best(tmp_path / "kept") == f"{5:012d}", "a damaged one is not the best"


def test_a_checkpoint_whose_replacement_was_interrupted_is_put_back(run: Path) -> None:
    folder = run / "checkpoints"
    newest = all_checkpoints(folder)[-1]
    newest.rename(folder / f".{newest.name}.previous")
    (folder / f".{newest.name}.~0123abcd").mkdir()
    (folder / ".notes").mkdir()
    state.sweep(folder)
    assert newest_whole(folder) == (newest, [])
    assert {path.name for path in folder.iterdir() if path.name.startswith(".")} == {".notes"}


# --- after a crash --------------------------------------------------------------------------------------------------


def test_a_model_whose_replacement_was_interrupted_is_found(run: Path) -> None:
    """Killed between two renames, the model lies beside its place; everything that reads one finds it."""
    whole = contents(run / "model")
    (run / "model").rename(run / ".model.previous")
    for name in (run, run / "model"):
        assert seriatim.load(name, device="cpu").bundle.sha256 == load_bundle(name).sha256
        assert load_tokenizer(name).size == (8, 8)
    assert not (run / "model").exists(), "who only reads renames nothing: another process may be at it"
    train(tiny(), run, resume=True, quiet=True)
    assert contents(run / "model").keys() == whole.keys() and not (run / ".model.previous").exists()


def test_a_model_folder_is_put_back_before_it_is_looked_at(tmp_path: Path) -> None:
    """What seems to be a free name is none: the model is put back, and a command line refuses to replace it."""
    save_bundle(make_bundle(), tmp_path / "m")
    (tmp_path / "m").rename(tmp_path / ".m.previous")
    before = contents(tmp_path / ".m.previous")
    assert command_line(["convert", "kl16", str(tmp_path / "any.ckpt"), str(tmp_path / "m")]) == 2
    assert contents(tmp_path / "m") == before and not (tmp_path / ".m.previous").exists()


def test_what_somebody_keeps_beside_a_folder_is_neither_deleted_nor_put_back(run: Path, tmp_path: Path) -> None:
    """It has the name that an interrupted replacement would have given, but is no run, model or checkpoint."""
    theirs = {run.with_name(f".{run.name}.previous"), tmp_path / ".m.previous", run / ".model.previous"}
    theirs |= {run / "checkpoints" / ".000000000064.previous"}
    for folder in theirs:
        folder.mkdir()
        (folder / "thesis.txt").write_text("mine")
        (folder / "manifest.json").write_text('{"name": "a manifest of something else"}')
    train(tiny("training.images=96"), run, resume=True, quiet=True)
    for _ in range(2):
        save_bundle(make_bundle(), tmp_path / "m")
    assert all((folder / "thesis.txt").read_text() == "mine" for folder in theirs)
    shutil.rmtree(tmp_path / "m")
    with pytest.raises(CheckpointError):
        load_bundle(tmp_path / "m")
    assert not list(tmp_path.glob(".m.previous-*"))


@pytest.mark.parametrize("resume", [True, False])
def test_a_run_that_was_about_to_be_replaced_is_put_back(run: Path, resume: bool) -> None:
    """Killed after the old run was renamed and before there was a folder for the new one."""
    run.rename(run.with_name(".run.previous"))
    before = contents(run.with_name(".run.previous"))
    assert load_bundle(run).sha256 and seriatim.load(run, device="cpu").bundle.sha256
    if resume:
        assert train(tiny(), run, resume=True, quiet=True).images == 64
    else:
        with pytest.raises(UsageError, match="holds a run already"):
            train(tiny(), run, quiet=True)
        assert contents(run) == before
    assert not run.with_name(".run.previous").exists()


LITTER = [
    ".training.ab3_d9xz.png", ".recipe.k3jd92la.yaml", ".metrics.abcdefg1.jsonl", ".data.~0123abcd.json",
    ".accuracy.~ffffffff.png", ".probe.a1b2c3d4", ".model.~0123abcd/config.json", ".model.xy12xy12/model.safetensors",
    "samples/.000000000064.~0123abcd.png", "checkpoints/.000000000064.~0123abcd/state.json",
]  # fmt: skip
THEIRS = [
    ".training.original.png", ".training.mine.png", ".recipe.old.yaml", ".thesis.ab12cd34.txt", "notes.txt", ".notes",
    "samples/.me.~0123abcd.png", "samples/favourite.png", "checkpoints/.diary.ab12cd34", ".training.png",
]  # fmt: skip


def test_litter_is_swept_and_nothing_else(run: Path) -> None:
    for name in (*LITTER, *THEIRS):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("x")
    train(tiny(), run, resume=True, quiet=True)
    assert [name for name in LITTER if (run / name).exists()] == []
    assert [name for name in THEIRS if not (run / name).exists()] == []
    private = files.atomic_write(run / "a.txt", lambda file: file.write_text("x")).rename(
        run / ".training.original.png"
    )
    private.chmod(0o600)  # as `tempfile` made them
    train(tiny(), run, resume=True, quiet=True)
    assert not private.exists()


def test_a_run_of_release_0_1_is_known(tmp_path: Path) -> None:
    """It has no mark: its recipe and the fingerprint of its images prove it."""
    old = Path(shutil.copytree(RELEASE / "run", tmp_path / "old"))
    with pytest.raises(UsageError, match="holds a run already; go on with --resume"):
        check_out(old, resume=False, overwrite=False)
    check_out(old, resume=True, overwrite=False)
    train(tiny(), old, overwrite=True, quiet=True)
    assert (old / "model").is_dir() and not (tmp_path / ".old.previous").exists()
    save_bundle(make_bundle(), shutil.copytree(RELEASE / "model", tmp_path / "model"))


@pytest.mark.parametrize("missing", ["recipe.yaml", "data.json"])
def test_what_is_missing_is_named(run: Path, missing: str) -> None:
    (run / missing).unlink()
    before = contents(run)
    with pytest.raises(UsageError, match=f"out: .* has no {missing}, without which a run can't be resumed"):
        train(tiny(), run, resume=True, quiet=True)
    with pytest.raises(UsageError, match=r"is no run that Seriatim wrote"):
        train(tiny(), run, quiet=True)
    with pytest.raises(UsageError, match=r"is no run that Seriatim wrote"):
        train(tiny(), run, overwrite=True, quiet=True)
    assert contents(run) == before


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [("recipe.yaml", "cake: flour", ConfigError), ("recipe.yaml", "[", ConfigError), ("data.json", "{}", DataError)],
)
def test_files_of_somebody_else_under_our_names_are_not_resumed(
    run: Path, name: str, text: str, error: type[Exception]
) -> None:
    (run / name).write_text(text)
    before = contents(run)
    with pytest.raises(error, match=name):
        train(tiny(), run, resume=True, quiet=True)
    assert contents(run) == before


# --- replacing a run ------------------------------------------------------------------------------------------------


def test_overwrite_keeps_the_old_run_until_the_new_one_is_whole(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, previous = contents(run), run.with_name(".run.previous")
    with monkeypatch.context() as patched:
        signal_in_step(patched, 2)
        with pytest.raises(Stopped):
            train(tiny("seed=5"), run, overwrite=True, quiet=True)
    err = capsys.readouterr().err
    assert f"replacing the run in {run}, which is kept until the new one is whole" in err
    assert f"the run that was to be replaced is kept as {previous}" in err
    assert contents(previous) == before and not (run / "model").exists()
    with monkeypatch.context() as patched:  # replaced again, before it was whole: both are kept
        signal_in_step(patched, 3)
        with pytest.raises(Stopped):
            train(tiny("seed=6"), run, overwrite=True, quiet=True)
    assert contents(previous) == before and run.with_name(".run.previous-2").is_dir()
    train(tiny("seed=6"), run, resume=True, quiet=True)
    assert [path.name for path in run.parent.iterdir()] == ["run"], "the new run is whole, the old ones are gone"
    assert (run / "model" / "model.safetensors").read_bytes() != before["model/model.safetensors"]


@pytest.mark.parametrize("name", ["notes.txt", "model/thesis.txt", "checkpoints/000000000064/x", "samples/best.png"])
def test_overwrite_refuses_a_run_in_which_somebody_keeps_a_file(run: Path, name: str) -> None:
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text("mine")
    before = contents(run)
    with pytest.raises(UsageError, match=rf"holds '{Path(name).name}', which is not part of a run and would be lost"):
        train(tiny(), run, overwrite=True, quiet=True)
    assert contents(run) == before and [path.name for path in run.parent.iterdir()] == ["run"]


def test_overwrite_refuses_the_current_folder_and_resume(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(run)
    monkeypatch.chdir(run)
    with pytest.raises(UsageError, match=r"out: \. is the current folder or holds it"):
        train(tiny(), ".", overwrite=True, quiet=True)
    with pytest.raises(UsageError, match=r"overwrite: can't go with resume"):
        train(tiny(), ".", overwrite=True, resume=True, quiet=True)
    assert contents(run) == before


def test_overwrite_from_the_command_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "mar-digits", *TINY, "seed=7", "--out", str(run)]
    before = (run / "model" / "model.safetensors").read_bytes()
    assert command_line(words) == 2
    assert "replace it with --overwrite" in capsys.readouterr().err
    assert command_line([*words, "--overwrite"]) == 0
    assert "replacing the run in" in capsys.readouterr().err
    assert (run / "model" / "model.safetensors").read_bytes() != before


@pytest.mark.fresh_process
def test_kill_nine_at_each_rename_of_a_replacement_loses_no_run(finished: Path, tmp_path: Path) -> None:
    """A child replaces a run, killed at its n-th rename, deletion or new folder: the old or the new model is whole."""
    recipe = tiny("training.images=16", "training.save_images=0", "seed=8")
    old = load_bundle(finished).sha256
    seen, killed, calls = set(), True, 0
    while killed:
        out = Path(shutil.copytree(finished, tmp_path / str(calls) / "run"))
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            die_at_call(calls, "os.replace", "shutil.rmtree", "os.mkdir")
            train(recipe, out, overwrite=True, quiet=True)
            os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        kept = [
            path for path in (*files.asides(out).values(), out) if files.present_or_previous(path / "model").is_dir()
        ]
        found = {load_bundle(path).sha256 for path in kept if path.exists()}
        assert found and (old in found or not killed or calls > 3), calls
        seen |= {old in found and len(found) == 1, old not in found}
        check_out(out, resume=False, overwrite=True)  # the same command goes on
        shutil.rmtree(tmp_path / str(calls))
        calls += 1
    assert calls > 8 and seen == {True, False}


# --- signals --------------------------------------------------------------------------------------------------------


def test_a_signal_does_not_wait_for_the_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes while the grid is drawn, at the first of its eight steps: no other step is made."""
    true, calls = Pipeline._steps, [0]

    def signalling(self: Any, *arguments: Any) -> Any:
        for step in true(self, *arguments):
            calls[0] += 1
            signal.raise_signal(signal.SIGTERM)  # `os.kill` may reach another thread, and be late
            yield step

    monkeypatch.setattr(Pipeline, "_steps", signalling)
    recipe = tiny("training.sample_images=32", "sampling.num_inference_steps=8", "sampling.num_diffusion_steps=2")
    with pytest.raises(Stopped, match="SIGTERM: stopped after 32 images, saved"):
        train(recipe, tmp_path / "run", quiet=True)
    assert calls == [1] and not (tmp_path / "run" / "samples").exists()
    monkeypatch.undo()
    train(recipe, tmp_path / "run", resume=True, quiet=True)
    train(tiny(), tmp_path / "whole", quiet=True)
    assert load_bundle(tmp_path / "run").sha256 == load_bundle(tmp_path / "whole").sha256


def test_a_signal_while_tokens_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true, calls = setup.look_over, [0]

    def signalling(*arguments: Any, **options: Any) -> Any:
        for batch in true(*arguments, **options):
            calls[0] += 1
            os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(setup, "look_over", signalling)
    with pytest.raises(Stopped, match="SIGTERM: stopped before the first step; begin it again with --resume"):
        train(tiny(), tmp_path / "run", quiet=True)
    assert calls == [1]
    monkeypatch.undo()
    assert train(tiny(), tmp_path / "run", resume=True, quiet=True).images == 64


def test_a_terminal_that_is_closed_saves(tmp_path: Path) -> None:
    """SIGHUP comes and standard error is gone: the checkpoint is saved all the same."""
    master, slave = pty.openpty()
    words = [sys.executable, "-m", "seriatim", "train", "mar-digits", *TINY, "training.images=1000000"]
    more = ["training.save_images=0", "--out", str(tmp_path / "run")]

    def own_terminal() -> None:
        os.setsid()
        os.close(os.open(os.ttyname(slave), os.O_RDWR))  # the first one that is opened becomes the terminal

    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}  # as users have it
    trainer = subprocess.Popen(
        [*words, *more], stdin=slave, stdout=slave, stderr=slave, env=buffered, preexec_fn=own_terminal
    )
    os.close(slave)
    metrics = tmp_path / "run" / "metrics.jsonl"
    end = time.monotonic() + 60
    try:
        while not (metrics.exists() and metrics.stat().st_size):
            assert time.monotonic() < end and trainer.poll() is None
            time.sleep(0.05)
        os.close(master)
        assert trainer.wait(60) == 143
    finally:
        trainer.kill()
    assert newest_whole(tmp_path / "run" / "checkpoints")[0] is not None


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    """As `nohup` starts a process."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested is None and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.requested == "SIGHUP"
    assert signal.getsignal(signal.SIGHUP) == before

"""The tokenizer of a run is written once; damage to it is one line; pruning and kill -9 leave what is needed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY_RUN, die_at_call, tiny_run
from torch import nn

import seriatim
from seriatim.checkpoints.shared_tokenizer import REFERENCE, SHARED, TOKENIZER, drop_unused, share, tokenizer_file
from seriatim.checkpoints.unfinished import all_checkpoints, newest_whole, why_not_whole
from seriatim.cli.main import run as command
from seriatim.core.errors import CheckpointError
from seriatim.core.files import read_manifest, sha256, write_manifest
from seriatim.training import state
from seriatim.training.loop import train
from seriatim.training.optim import adamw, averaged
from seriatim.training.run_folder import OURS
from seriatim.training.state import RunState, Trainables

OWN = ["training.images=96", "training.save_images=32", "training.keep=2"]
tiny = partial(tiny_run, *OWN)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after 96 images."""
    out = tmp_path_factory.mktemp("trained") / "run"
    train(tiny(), out, device="cpu", quiet=True)
    (out / "model").rename(out.parent / "model")
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


class Buffers(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((3,), value))


def parts(value: float = 0.0) -> Trainables:
    model = nn.Linear(2, 2)
    made = Trainables(model, averaged(model, 0.9), adamw(model, 1e-3, (0.9, 0.95), 0.0), Buffers(value))
    model(torch.ones(1, 2)).sum().backward()
    made.optimiser.step()
    return made


def shared(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if SHARED.fullmatch(path.name))


def test_it_is_written_once_for_a_run(trained: Path) -> None:
    folder = trained / "checkpoints"
    checkpoints = all_checkpoints(folder)
    assert len(checkpoints) >= 2 and len(shared(folder)) == 1
    digest = sha256(folder / shared(folder)[0])
    assert shared(folder) == [f"tokenizer-{digest[:16]}.safetensors"]
    for path in checkpoints:
        assert not (path / TOKENIZER).exists()
        assert json.loads((path / REFERENCE).read_text()) == {
            "file": shared(folder)[0],
            "bytes": (folder / shared(folder)[0]).stat().st_size,
            "sha256": digest,
        }
        assert tokenizer_file(path) == folder / shared(folder)[0]
    model = trained.parent / "model"
    assert (model / TOKENIZER).read_bytes() == (folder / shared(folder)[0]).read_bytes(), "a model has its own"
    assert OURS.fullmatch(f"checkpoints/{shared(folder)[0]}")


def test_a_run_that_shares_one_is_replaced(run: Path) -> None:
    """`--overwrite` refuses files that are not a run's; the shared tokenizer is one of a run's."""
    train(tiny("training.images=16"), run, overwrite=True, quiet=True)
    assert (run / "model").is_dir() and not list(run.parent.glob(".run.previous*"))


def test_saving_again_writes_it_only_where_it_is_missing(tmp_path: Path) -> None:
    first = share(tmp_path, parts(1.0).tokenizer.state_dict())
    written = (tmp_path / first["file"]).stat()
    assert share(tmp_path, parts(1.0).tokenizer.state_dict()) == first
    assert (tmp_path / first["file"]).stat().st_ino == written.st_ino, "the same file"
    (tmp_path / first["file"]).write_bytes(b"half")
    assert share(tmp_path, parts(1.0).tokenizer.state_dict()) == first
    assert sha256(tmp_path / first["file"]) == first["sha256"], "a truncated one is written again"


def test_pruning_deletes_one_that_no_checkpoint_needs(tmp_path: Path) -> None:
    for seen, value in ((1, 1.0), (2, 2.0), (3, 3.0), (4, 3.0), (5, 3.0)):
        path = state.save(tmp_path, parts(value), RunState(seen=seen))
        if seen == 1:
            state.as_damaged(path)  # people may want to look at it
    assert len(shared(tmp_path)) == 3
    state.prune(tmp_path, keep=3)
    kept = {tokenizer_file(path).name for path in all_checkpoints(tmp_path)}
    assert len(all_checkpoints(tmp_path)) == 3 and len(kept) == 1
    assert tokenizer_file(tmp_path / "000000000001.damaged").name in shared(tmp_path)
    assert len(shared(tmp_path)) == 2, "that of the deleted one is gone"
    (tmp_path / "000000000001.damaged" / REFERENCE).write_text("{")
    drop_unused(tmp_path)
    assert len(shared(tmp_path)) == 2, "what can't be read may need any of them"


# --- damage ---------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_link(path: Path) -> None:
    path.rename(path.parents[2] / "x")
    path.symlink_to("../../x")


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped": (flip, "is damaged: its sha256 is not the one in"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-4]), "bytes,"),
    "missing": (Path.unlink, "is missing though"),
    "a folder": (as_folder, "is missing though"),
    "a link": (as_link, "outside of its folder"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_line_and_loses_nothing(run: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Resuming does not take the checkpoints for damaged, and does not begin anew."""
    damage, words = DAMAGE[kind]
    folder = run / "checkpoints"
    file = folder / shared(folder)[0]
    damage(file)
    before = sorted(path.name for path in folder.iterdir())
    for words_of in (["train", "mar-digits", *TINY_RUN, *OWN, "--out", str(run), "--resume"], ["sample", str(run)]):
        assert command(words_of) == 4
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error: ") and str(file) in line and words in line
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize(
    "values",
    [
        {"file": "../../secret.safetensors"}, {"file": "/etc/passwd"}, {"file": 3}, {"file": None}, {"bytes": "5"},
        {"bytes": True}, {"sha256": 7}, {"file": "tokenizer-0123456789abcdef.safetensors\n"},
    ],
)  # fmt: skip
def test_a_hostile_reference_is_one_line(run: Path, values: dict[str, Any]) -> None:
    path = all_checkpoints(run / "checkpoints")[-1]
    says = json.loads((path / REFERENCE).read_text())
    (path / REFERENCE).write_text(json.dumps(says | values))
    write_manifest(path, read_manifest(path))
    with pytest.raises(CheckpointError, match="does not give the name, bytes and sha256 of a tokenizer") as caught:
        seriatim.load(path)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_was_copied_alone_says_what_it_lacks(run: Path, tmp_path: Path) -> None:
    newest = all_checkpoints(run / "checkpoints")[-1]
    copy = Path(shutil.copytree(newest, tmp_path / "elsewhere" / newest.name))
    with pytest.raises(CheckpointError, match=r"elsewhere/tokenizer-.* is missing though .*; copy it from the folder"):
        seriatim.load(copy)
    shutil.copy(tokenizer_file(newest), copy.parent)
    assert seriatim.load(copy, device="cpu").bundle.provenance["images"] == 96


# --- checkpoints with a tokenizer of their own ----------------------------------------------------------------------


def as_before(path: Path) -> None:
    """Rewrite a checkpoint as earlier versions wrote it."""
    shutil.copy(tokenizer_file(path), path / TOKENIZER)
    (path / REFERENCE).unlink()
    write_manifest(path, {*read_manifest(path), TOKENIZER} - {REFERENCE})


def test_checkpoints_of_earlier_versions_are_read_and_resumed(run: Path, trained: Path) -> None:
    folder = run / "checkpoints"
    for path in all_checkpoints(folder):
        as_before(path)
        assert why_not_whole(path) is None
    (folder / shared(folder)[0]).unlink()
    assert seriatim.load(run, device="cpu").bundle.sha256 == seriatim.load(trained, device="cpu").bundle.sha256
    train(tiny("training.images=128"), run, resume=True, quiet=True)
    train(tiny("training.images=128"), trained.parent / "same", quiet=True)
    for name in ("model.safetensors", TOKENIZER):
        assert (run / "model" / name).read_bytes() == (trained.parent / "same" / "model" / name).read_bytes()
    assert len(shared(folder)) == 1
    flip(all_checkpoints(folder)[0] / TOKENIZER)
    assert TOKENIZER in str(why_not_whole(all_checkpoints(folder)[0])), "it is a part of such a checkpoint"


# --- kill -9 --------------------------------------------------------------------------------------------------------


@pytest.mark.fresh_process
def test_kill_nine_at_each_write_leaves_what_checkpoints_need(tmp_path: Path) -> None:
    """A child saves with another tokenizer than before and prunes, killed at its n-th sync, rename or deletion."""
    folder, calls, killed = tmp_path / "checkpoints", 0, True
    state.save(folder, parts(0.0), RunState(seen=1))
    while killed:
        value = 1.0 + calls
        child = os.fork()
        if child == 0:
            die_at_call(calls, "os.fsync", "os.replace", "os.unlink", "shutil.rmtree")
            state.save(folder, parts(value), RunState(seen=2 + calls))
            state.prune(folder, keep=1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status)
        path, passed_over = newest_whole(folder)
        assert path is not None and not passed_over, calls
        found = parts()
        assert state.load(path, found).seen == int(path.name)
        assert found.tokenizer.state_dict()["mean"][0] == (0.0 if int(path.name) == 1 else int(path.name) - 1.0)
        calls += 1
    state.sweep(folder)
    state.prune(folder, keep=1)
    state.drop_unused(folder)
    assert len(shared(folder)) == 1 and not [p for p in folder.iterdir() if p.name.startswith(".")]

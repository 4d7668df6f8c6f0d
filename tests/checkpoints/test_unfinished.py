"""A run that is not finished can be used: the averaged weights of its newest whole checkpoint stand in for a model."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
from helpers import tiny_run
from PIL import Image

import seriatim
from seriatim.checkpoints import native
from seriatim.checkpoints.native import Bundle
from seriatim.checkpoints.tokenizer import load_tokenizer
from seriatim.checkpoints.unfinished import all_checkpoints
from seriatim.cli.main import run
from seriatim.core.errors import CheckpointError, UsageError
from seriatim.core.files import sha256
from seriatim.training.loop import train

RELEASE = Path(__file__).resolve().parent.parent / "fixtures" / "release-0.1"
FEW = ["--num-inference-steps", "2", "--num-diffusion-steps", "2", "--seed", "1"]
tiny = partial(tiny_run, "training.images=160", "training.save_images=32")


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A run that was stopped after 64 of 160 images."""
    train(tiny("training.images=64"), tmp_path / "run", quiet=True)
    shutil.rmtree(tmp_path / "run" / "model")
    return tmp_path / "run"


def test_a_run_that_is_not_finished_is_sampled(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = stopped.parent
    assert run(["sample", str(stopped), "--label", "3", *FEW, "--out", str(out / "a"), "--json"]) == 0
    told = capsys.readouterr()
    assert f"{stopped} is not finished: taking the averaged weights of its checkpoint 000000000064" in told.err
    newest = all_checkpoints(stopped / "checkpoints")[-1]
    assert run(["sample", str(newest), "--label", "3", *FEW, "--out", str(out / "b"), "--json"]) == 0
    train(tiny("training.images=64"), stopped, resume=True, quiet=True)  # nothing to do but to write the model
    capsys.readouterr()
    assert run(["sample", str(stopped), "--label", "3", *FEW, "--out", str(out / "c"), "--json"]) == 0
    assert "not finished" not in capsys.readouterr().err
    assert json.loads(told.out)["model_sha256"] == sha256(stopped / "model" / "model.safetensors")
    assert len({(out / name / "0000-3.png").read_bytes() for name in "abc"}) == 1, "the same weights, the same picture"


def test_every_use_of_a_model_takes_a_run_that_is_not_finished(stopped: Path) -> None:
    pipe = seriatim.load(stopped, device="cpu")
    assert pipe.bundle.provenance["images"] == 64 and pipe.bundle.provenance["data"]["count"] == 1437
    assert pipe.class_names == [str(digit) for digit in range(10)] and pipe.defaults["guidance_scale"] == 2.0
    assert load_tokenizer(stopped).fingerprint() == pipe.tokenizer.fingerprint()
    picture, mask = stopped.parent / "three.png", stopped.parent / "mask.png"
    Image.new("L", (8, 8), 90).save(picture)
    half = Image.new("L", (8, 8))
    half.paste(255, (0, 0, 4, 4))
    half.save(mask)
    out = ["--out", str(stopped.parent / "edited")]
    assert run(["edit", str(stopped), str(picture), "--mask", str(mask), *FEW, *out]) == 0
    told = tiny("training.images=16", f"tokenizer={{from: {stopped}}}")
    train(told, stopped.parent / "new", quiet=True)


def test_the_newest_whole_checkpoint_is_taken(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    *_, older, newest = all_checkpoints(stopped / "checkpoints")
    with open(newest / "average.safetensors", "r+b") as file:
        file.truncate(100)
    assert seriatim.load(stopped, device="cpu").bundle.provenance["images"] == int(older.name)
    assert f"stepping back: {newest / 'average.safetensors'}" in capsys.readouterr().err


def test_a_checkpoint_that_is_deleted_while_it_is_read(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on deletes old checkpoints: the reader looks again."""
    true, calls = native.read_bundle, [0]
    *_, older, newest = all_checkpoints(stopped / "checkpoints")

    def read(folder: Path, weights: str) -> Bundle:
        calls[0] += 1
        if calls[0] == 1:
            assert folder == newest
            shutil.rmtree(newest)
        return true(folder, weights)

    monkeypatch.setattr(native, "read_bundle", read)
    assert native.load_bundle(stopped).provenance["images"] == int(older.name) and calls[0] == 2
    with pytest.raises(CheckpointError, match="no such folder"):
        native.load_bundle(stopped / "nothing")


def test_a_run_without_a_checkpoint_says_how_to_go_on(stopped: Path) -> None:
    shutil.rmtree(stopped / "checkpoints")
    command = f"seriatim train {stopped}/recipe.yaml --out {stopped} --resume"
    with pytest.raises(CheckpointError, match=f"no whole checkpoint: .* go on with `{command}`"):
        seriatim.load(stopped)


@pytest.mark.parametrize("what", [".", "checkpoints/000000000064"])
def test_what_release_0_1_left_unfinished_says_how_to_end_it(tmp_path: Path, what: str) -> None:
    """The command that the line names is run: it ends the run where it stands, and then that can be used."""
    old = tmp_path / "old"
    shutil.copytree(RELEASE / "run", old)
    with pytest.raises(CheckpointError) as caught:
        seriatim.load(old / what)
    command, more = re.findall(r"`seriatim (.*?)`.*add (\S+)$", str(caught.value))[0]
    assert run([*command.split(), more, "--json"]) == 0
    assert seriatim.load(old, device="cpu").bundle.provenance["images"] == 64


def test_fewer_images_than_were_seen(stopped: Path) -> None:
    before = (stopped / "recipe.yaml").read_text()
    with pytest.raises(UsageError) as caught:
        train(tiny("training.images=48"), stopped, resume=True, quiet=True)
    assert "training.images: 48 is less than the 64 images" in str(caught.value)
    assert (stopped / "recipe.yaml").read_text() == before and not (stopped / "model").exists()
    end = re.findall(r"set (training\.images=\d+)$", str(caught.value))[0]
    assert train(tiny(end), stopped, resume=True, quiet=True).images == 64
    assert (stopped / "model").is_dir()

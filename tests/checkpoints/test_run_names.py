"""A run is a model at any time: `RUN@latest`, `RUN@best`, `RUN@250000` and `:raw`, for whatever takes a model."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import tiny_run
from PIL import Image
from safetensors.torch import load_file

import seriatim
from seriatim.bench.race import sizes, subject
from seriatim.checkpoints import native
from seriatim.checkpoints.half_precision import half_copy
from seriatim.checkpoints.native import Bundle, load_bundle
from seriatim.checkpoints.run_names import MOST_SHOWN, find
from seriatim.checkpoints.tokenizer import load_tokenizer
from seriatim.checkpoints.unfinished import all_checkpoints
from seriatim.cli.evaluate import is_tokenizer
from seriatim.cli.main import run as command
from seriatim.core.errors import CheckpointError, ConfigError, UsageError
from seriatim.core.files import sha256, write_manifest
from seriatim.training import state
from seriatim.training.loop import train

FEW = ["--num-inference-steps", "2", "--num-diffusion-steps", "2", "--seed", "1"]
tiny = partial(tiny_run, "training.images=128", "training.save_images=32", "training.keep=9")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints after 32, 64, 96 and 128 images, of which that after 64 has the lowest loss."""
    out = tmp_path_factory.mktemp("trained") / "my@run"
    train(tiny(), out, device="cpu", quiet=True)
    for path in all_checkpoints(out / "checkpoints"):
        says = json.loads((path / "state.json").read_text())
        loss = 0.25 if int(path.name) == 64 else 0.5
        (path / "state.json").write_text(json.dumps({**says, "loss": loss}))
        write_manifest(path, ("config.json", *state.FILES))
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / trained.name))


# --- what a name stands for -----------------------------------------------------------------------------------------


def test_a_checkpoint_has_no_copy_in_half_precision(trained: Path, tmp_path: Path) -> None:
    """Its weights are twice there, as they are and averaged, and it may vanish while it is read."""
    for name in (f"{trained}@latest", trained / "checkpoints" / "000000000064"):
        with pytest.raises(UsageError, match="is a checkpoint of a run; name a model folder, or a run that is"):
            half_copy(name, tmp_path / "half")
    assert not (tmp_path / "half").exists()


@pytest.mark.parametrize(
    ("which", "seen"),
    [("latest", 128), ("best", 64), ("32", 32), ("000000000032", 32), ("0096", 96), ("000000000000000128", 128)],
)
def test_a_name_stands_for_a_checkpoint(trained: Path, which: str, seen: int) -> None:
    path = trained / "checkpoints" / f"{seen:012d}"
    averaged, raw = (load_bundle(f"{trained}@{which}{end}") for end in ("", ":raw"))
    assert averaged.sha256 == sha256(path / "average.safetensors")
    assert raw.sha256 == sha256(path / "model.safetensors") != averaged.sha256
    assert averaged.provenance["images"] == raw.provenance["images"] == seen
    for bundle, file in ((averaged, "average"), (raw, "model")):
        for name, tensor in load_file(path / f"{file}.safetensors").items():
            assert torch.equal(bundle.model.state_dict()[name], tensor), name


def test_which_checkpoint_was_chosen_is_said(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for which, number in (("latest", 128), ("best:raw", 64)):
        find(f"{trained}@{which}")
        assert capsys.readouterr().err == f"{trained}@{which} is its checkpoint {number:012d}\n"
        assert not is_tokenizer(Path(f"{trained}@{which}")) and not capsys.readouterr().err, "it is said only once"
    find(f"{trained}@32")
    assert not capsys.readouterr().err, "a number says itself which it is"


def test_the_newest_whole_checkpoint_is_the_latest(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, next_latest, next_best in ((128, 96, 64), (64, 96, 32)):
        damaged = run / "checkpoints" / f"{number:012d}" / "average.safetensors"
        damaged.write_bytes(damaged.read_bytes()[:-1])
        assert find(f"{run}@latest").folder.name == f"{next_latest:012d}"
        assert find(f"{run}@best").folder.name == f"{next_best:012d}"
        with pytest.raises(CheckpointError, match=rf"{damaged} has .* bytes.*; write @latest, @best or the images"):
            load_bundle(f"{run}@{number}")
    assert "stepping back: " in capsys.readouterr().err
    for path in all_checkpoints(run / "checkpoints"):
        (path / "average.safetensors").write_bytes(b"")
    for which in ("latest", "best"):
        with pytest.raises(CheckpointError, match=rf"@{which}: none of the 4 checkpoints is whole; .* has 0 bytes"):
            find(f"{run}@{which}")


def test_nothing_is_best_without_a_loss(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in all_checkpoints(run / "checkpoints"):
        says = json.loads((path / "state.json").read_text())
        (path / "state.json").write_text(json.dumps({**says, "loss": None}))
        write_manifest(path, ("config.json", *state.FILES))
    for end in ("", ":raw"):
        assert command(["sample", f"{run}@best{end}"]) == 4
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and f"write {run}@latest{end}" in line and "None" not in line
        assert "no whole checkpoint has a loss to go by" in line


def test_a_folder_whose_name_is_no_number_is_no_checkpoint(run: Path) -> None:
    """`isdigit` also holds for signs that `int` does not take."""
    shutil.copytree(run / "checkpoints" / f"{64:012d}", run / "checkpoints" / "\u00b2")
    assert find(f"{run}@best").folder.name == f"{64:012d}"
    assert find(f"{run}@latest").folder.name == f"{128:012d}"


def test_a_folder_that_is_really_called_so_comes_first(run: Path, model_folder: Path) -> None:
    literal = Path(shutil.copytree(model_folder, f"{run}@latest"))
    assert load_bundle(literal).sha256 == sha256(model_folder / "model.safetensors")
    assert seriatim.load(f"{run}@latest", device="cpu").bundle.sha256 == load_bundle(literal).sha256
    assert load_bundle(f"{run}@0128").sha256 != load_bundle(literal).sha256
    literal.rename(literal.with_name(f".{literal.name}.previous"))  # as a crash leaves it
    assert load_bundle(literal).sha256 == sha256(model_folder / "model.safetensors")


def test_a_checkpoint_that_is_deleted_while_it_is_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = native.read_bundle

    def read(folder: Path, weights: str) -> Bundle:
        if folder.name == f"{128:012d}":
            shutil.rmtree(folder)
        return true(folder, weights)

    monkeypatch.setattr(native, "read_bundle", read)
    assert load_bundle(f"{run}@latest:raw").sha256 == sha256(run / "checkpoints" / f"{96:012d}" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"there is no '.*@128': write @latest, @best or the images seen, of whi"):
        load_bundle(f"{run}@128")


# --- whatever takes a model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["latest", "0000000064", "best:raw"])
def test_verbs_take_a_checkpoint(trained: Path, tmp_path: Path, which: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"{trained}@{which}"
    wanted = load_bundle(name).sha256
    assert command(["sample", name, "--label", "3", *FEW, "--out", str(tmp_path / "a"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model_sha256"] == wanted
    Image.new("L", (8, 8), 90).save(tmp_path / "three.png")
    half = Image.new("L", (8, 8))
    half.paste(255, (0, 0, 4, 4))
    half.save(tmp_path / "mask.png")
    edit = ["edit", name, str(tmp_path / "three.png"), "--mask", str(tmp_path / "mask.png"), *FEW]
    assert command([*edit, "--out", str(tmp_path / "edited")]) == 0
    assert command(["export", "mar", name, str(tmp_path / "official.safetensors")]) == 0
    assert subject(name).model.state_dict().keys() == load_bundle(name).model.state_dict().keys()
    assert sizes(name).model.tokens == 16
    assert load_tokenizer(name).fingerprint() == load_bundle(trained).tokenizer.fingerprint()


@pytest.mark.parametrize("which", ["32", "32:raw"])
def test_training_begins_from_a_checkpoint(trained: Path, tmp_path: Path, which: str) -> None:
    still = ["training.images=1", "training.learning_rate=1.0e-12", f"training.init_from={trained}@{which}"]
    train(tiny(*still), tmp_path / "new", quiet=True)
    file = "model.safetensors" if which.endswith("raw") else "average.safetensors"
    wanted = load_file(trained / "checkpoints" / f"{32:012d}" / file)
    for name, tensor in load_file(tmp_path / "new" / "model" / "model.safetensors").items():
        assert torch.allclose(tensor, wanted[name], atol=1e-6), name


def test_a_tokenizer_is_taken_from_a_checkpoint(trained: Path, tmp_path: Path) -> None:
    recipe = tiny("training.images=16", f"tokenizer={{from: '{trained}@latest'}}")
    train(recipe, tmp_path / "new", quiet=True)
    assert load_tokenizer(tmp_path / "new").fingerprint() == load_tokenizer(trained).fingerprint()
    with pytest.raises(CheckpointError, match=r"there is no '.*@newest': write @latest"):
        train(tiny(f"tokenizer={{from: '{trained}@newest'}}"), tmp_path / "other", quiet=True)
    with pytest.raises(ConfigError, match=r"tokenizer\.from: there is no folder .*nowhere@latest"):
        train(tiny(f"tokenizer={{from: '{tmp_path}/nowhere@latest'}}"), tmp_path / "other", quiet=True)


# --- names that are wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["newest", "33", "", "1.5", "-32", "\u0663\u0662", "LATEST", "32 ", "9" * 400])
def test_a_wrong_name_lists_what_there_is(trained: Path, which: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["sample", f"{trained}@{which}"]) == 4
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "there is no '" in line
    assert "write @latest, @best or the images seen, of which there are 000000000032, 000000000064, " in line
    with pytest.raises(CheckpointError, match=r"'averaged' is not known; write :raw or leave it out"):
        seriatim.load(f"{trained}@latest:averaged")


def test_many_checkpoints_are_not_all_listed(tmp_path: Path) -> None:
    for number in range(1, 3 + MOST_SHOWN):
        (tmp_path / "run" / "checkpoints" / f"{number:012d}").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"there are 2 earlier ones and 000000000003, .*, 000000000022$"):
        load_bundle(f"{tmp_path / 'run'}@5000")


def test_without_checkpoints_there_is_nothing_to_name(run: Path, model_folder: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    for folder in (run, model_folder):
        with pytest.raises(CheckpointError, match=rf"{folder} holds no checkpoints; name {folder} itself for its mod"):
            seriatim.load(f"{folder}@latest")
    with pytest.raises(UsageError, match="revision: only valid for a hub repository"):
        seriatim.load(f"{run}@latest", revision="main")


def test_no_name_of_the_hub_is_taken_for_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert find("hf://owner/name@latest").folder == Path("hf://owner/name@latest")
    with pytest.raises(CheckpointError, match="there is no folder 'nobody/name@latest'"):
        seriatim.load("nobody/name@latest")

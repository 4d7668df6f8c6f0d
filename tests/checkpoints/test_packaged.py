"""Models that come with the package: found by name everywhere, after one's own of that name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import make_bundle
from PIL import Image

import seriatim
from seriatim.checkpoints import packaged as module
from seriatim.checkpoints.half_precision import absolute_paths
from seriatim.checkpoints.location import located
from seriatim.checkpoints.native import load_bundle, save_bundle
from seriatim.checkpoints.packaged import packaged, packaged_kind, packaged_names
from seriatim.checkpoints.tokenizer import load_tokenizer
from seriatim.cli.main import run
from seriatim.core.errors import CheckpointError, UsageError
from seriatim.core.files import verify_manifest
from seriatim.core.ownership import json_of
from seriatim.evaluation.features import open_features
from seriatim.evaluation.residual_net import load_classifier

SHIPPED = module.WEIGHTS


@pytest.fixture(autouse=True)
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with one model, `toy`, and an empty working directory."""
    weights = tmp_path / "weights"
    bundle = make_bundle()
    bundle.provenance["summary"] = "a toy"
    save_bundle(bundle, weights / "toy")
    (weights / "notes").mkdir()
    monkeypatch.setattr(module, "WEIGHTS", weights)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return weights / "toy"


def test_found_by_its_name(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert packaged_names() == ["toy"] and packaged("toy") == shipped
    pipe = seriatim.load("toy", device="cpu")
    image = pipe(class_labels=["dog"], seed=3, num_inference_steps=2).images[0]
    assert run(["sample", "toy", "--label", "dog", "--seed", "3", "--num-inference-steps", "2", "--out", "out"]) == 0
    assert Image.open("out/0000-dog.png").tobytes() == image.tobytes()
    blank = torch.zeros(1, 16, 4)
    assert torch.equal(load_tokenizer("toy").decode(blank), pipe.tokenizer.decode(blank))
    capsys.readouterr()
    assert run(["models", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)[0]
    assert said == {"name": "toy", "packaged": True, "kind": "model", "summary": "a toy"}
    assert run(["models"]) == 0
    assert "a toy" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["toys", "notes", "../weights/toy", "TOY", "", "toy/", "a" * 300, "toy\0"])
def test_nothing_else_is(name: str) -> None:
    assert packaged(name) is None


def test_what_is_here_comes_first(shipped: Path) -> None:
    Path("toy").symlink_to("nowhere")
    assert packaged("toy") is None, "a link that leads nowhere was meant to be something"
    Path("toy").unlink()
    assert located("toy") == shipped
    mine = make_bundle()
    mine.class_names = ["ape", "bee", "cow"]
    save_bundle(mine, "runs/toy/model")
    Path("runs/toy").rename("toy")
    assert packaged("toy") is None and load_bundle("toy").class_names == ["ape", "bee", "cow"]


def test_a_name_that_is_close_is_suggested() -> None:
    with pytest.raises(CheckpointError, match="did you mean 'toy'"):
        located("toi")
    with pytest.raises(UsageError, match="revision: only valid for a hub repository"):
        located("toy", "v1")


@pytest.mark.parametrize("name", sorted(path.parent.name for path in SHIPPED.glob("*/config.json")))
def test_what_is_shipped_loads_and_is_small(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WEIGHTS", SHIPPED)
    folder = packaged(name)
    assert folder is not None
    verify_manifest(folder)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 20e6
    assert json_of(folder / "config.json")["provenance"]["summary"]
    assert not absolute_paths(json_of(folder / "config.json"))
    assert name in packaged_names(packaged_kind(name)) and packaged_kind(name) in ("model", "tokenizer", "classifier")
    if (folder / "classifier.safetensors").exists():
        with pytest.raises(UsageError, match=f"did you mean '{name}'"):
            open_features(name[:-1], size=(32, 32), channels=3)
        with pytest.raises(CheckpointError, match="holds a classifier, which draws nothing"):
            load_bundle(name)
        judge = open_features(name, size=(32, 32), channels=3)
        assert judge.class_names == tuple(load_classifier(folder).class_names)
    elif (folder / "model.safetensors").exists():
        assert load_bundle(name).sampling
    else:
        assert load_tokenizer(name).spec.count > 0
        with pytest.raises(CheckpointError, match="holds a tokenizer, which draws nothing alone; name a model folder"):
            load_bundle(name)

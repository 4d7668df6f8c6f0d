"""Copies in half precision: half the bytes, nearly the same numbers, and nothing written that can't be used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import make_bundle
from safetensors.torch import load_file

import seriatim
from seriatim.checkpoints.half_precision import SMALL, half_copy, halved
from seriatim.checkpoints.native import MODEL, load_bundle, save_bundle
from seriatim.checkpoints.tokenizer import load_tokenizer, save_tokenizer
from seriatim.cli.main import run
from seriatim.core.errors import CheckpointError, NumericsError
from seriatim.evaluation.residual_net import ResNet, TrainedClassifier, load_classifier, save_classifier
from seriatim.tokenizers.kinds import tokenizer_config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_bundle(make_bundle(width=64), tmp_path / "model", card="# A card\n")


def test_half_the_bytes_and_nearly_the_same_tokens(folder: Path, tmp_path: Path) -> None:
    assert run(["export", "half", str(folder), str(tmp_path / "half"), "--summary", "a toy"]) == 0
    made, whole = tmp_path / "half", load_bundle(folder)
    again = load_bundle(made)
    assert (made / MODEL).stat().st_size < 0.6 * (folder / MODEL).stat().st_size
    assert again.provenance == {**whole.provenance, "summary": "a toy", "precision": "half"}
    assert again.class_names == whole.class_names
    assert (made / "README.md").read_text() == "# A card\n"
    for name, tensor in load_file(made / MODEL).items():
        before = whole.model.state_dict()[name]
        assert tensor.dtype == (torch.float16 if before.numel() > SMALL else torch.float32), name
        assert again.model.state_dict()[name].dtype == torch.float32
        assert torch.allclose(tensor.float(), before, rtol=5e-4, atol=1e-7), name
    half, full = (
        seriatim.load(which)(class_labels=[0, 1], seed=1, num_inference_steps=3, output_type="tokens").tokens
        for which in (made, folder)
    )
    assert 0 < float((half - full).abs().max()) < 0.02 * float(full.abs().max())


def test_a_copy_of_a_copy_is_the_same(folder: Path, tmp_path: Path) -> None:
    once, twice = half_copy(folder, tmp_path / "once"), half_copy(tmp_path / "once", tmp_path / "twice")
    assert (once / MODEL).read_bytes() == (twice / MODEL).read_bytes()


def test_a_classifier_and_a_tokenizer(tmp_path: Path) -> None:
    net = ResNet(3, widths=[8, 40], depth=[0, 1]).eval()
    save_classifier(TrainedClassifier(net, "judge", (16, 16), ["a", "b", "c"]), tmp_path / "judge")
    save_tokenizer(make_bundle().tokenizer, tmp_path / "pixels")
    for name in ("judge", "pixels"):
        for _ in range(2):  # the second replaces the first
            assert run(["export", "half", str(tmp_path / name), str(tmp_path / "half" / name), "--overwrite"]) == 0
    again = load_classifier(tmp_path / "half" / "judge")
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    assert torch.allclose(again.net.eval()(images), net(images), atol=1e-3)
    tokenizer = load_tokenizer(tmp_path / "half" / "pixels")
    assert tokenizer_config(tokenizer) == tokenizer_config(make_bundle().tokenizer)


def test_nothing_is_lost_by_what_cannot_be_copied(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(NumericsError, match="w: has values of 7e\\+04; half precision ends at 65,504"):
        halved(torch.full((SMALL + 1,), 7e4), "w")
    whole = half_copy(folder, tmp_path / "half")
    before = (whole / MODEL).read_bytes()
    damaged = bytearray((folder / MODEL).read_bytes())
    damaged[-1] ^= 1
    (folder / MODEL).write_bytes(damaged)
    with pytest.raises(CheckpointError, match="sha256"):
        half_copy(folder, whole)
    assert (whole / MODEL).read_bytes() == before
    assert run(["export", "half", str(folder), str(whole)]) == 2, "it is there already"
    with pytest.raises(CheckpointError, match="'nosuch' is no folder, packaged model"):
        half_copy("nosuch", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_paths_of_this_machine_stay_here(tmp_path: Path) -> None:
    bundle = make_bundle()
    recipe = {"data": {"path": "/home/me/photos/cats", "also": ["C:\\Users\\me\\pictures\\dogs", "/x"]}, "rate": 0.1}
    bundle.provenance = {"recipe": recipe, "note": "1/2 of it"}
    folder = save_bundle(bundle, tmp_path / "model", card="path: /home/me/photos/cats\nand /home/me\n")
    copy = half_copy(folder, tmp_path / "half")
    made = load_bundle(copy).provenance
    data = {"path": "photos/cats", "also": ["pictures/dogs", "x"]}
    assert made == {"recipe": {"data": data, "rate": 0.1}, "note": "1/2 of it", "precision": "half"}
    assert (copy / "README.md").read_text() == "path: photos/cats\nand /home/me\n"
    assert load_bundle(folder).provenance == bundle.provenance, "the original is untouched"

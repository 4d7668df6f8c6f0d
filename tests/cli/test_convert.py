"""`seriatim convert` and `export`: official files in and out, from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_bundle, randomise

import seriatim
from seriatim.backbones.masked_transformer import Masked
from seriatim.checkpoints.kl16 import kl16_from_tokenizer
from seriatim.checkpoints.mar import mar_tensors
from seriatim.checkpoints.native import save_bundle
from seriatim.cli.main import run
from seriatim.heads.diffusion import Diffusion
from seriatim.models.build import seeded
from seriatim.models.masked_model import MaskedModel
from seriatim.tokenizers.kl import KL


def vae(size: int = 32) -> KL:
    with seeded(3):
        return KL(size, patch=2, latent_channels=2, block_out_channels=(32, 32), layers_per_block=1)


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """A folder with `mar.pth` (16 tokens of 2x2 latents with 2 channels, 5 classes) and its `vae.ckpt`."""
    with seeded(0):
        backbone = Masked(16, 8, width=32, depth=(2, 1), heads=2, buffer=3, dropout=0.0)
        model = MaskedModel(backbone, Diffusion(8, 16, 2), classes=5)
    randomise(model, scale=0.02)
    last = {k: v + 1 for k, v in mar_tensors(model).items()}
    torch.save({"model": last, "model_ema": mar_tensors(model)}, tmp_path / "mar.pth")
    torch.save({"model": kl16_from_tokenizer(vae(16))}, tmp_path / "vae.ckpt")
    return tmp_path


def convert(official: Path, out: str, *more: str) -> int:
    files = [str(official / "mar.pth"), str(official / out), "--vae", str(official / "vae.ckpt")]
    return run(["convert", "mar", *files, *more])


def test_weights_in_images_out_weights_back(official: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(official, "converted", "--heads", "2", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["weights"] == "model_ema" and found["tokens"] == 16 and found["image"] == [16, 16]
    pipe = seriatim.load(official / "converted", device="cpu")
    request: dict[str, Any] = {"seed": 0, "num_inference_steps": 4, "num_diffusion_steps": 5, "output_type": "np"}
    result = pipe(class_labels=[1, "none"], guidance_scale=1.5, **request)
    assert result.images.shape == (2, 16, 16, 3) and result.labels == ["1", None]

    out = official / "back.pth"
    assert run(["export", "mar", str(official / "converted"), str(out)]) == 0
    before = torch.load(official / "mar.pth", weights_only=True)["model_ema"]
    after = torch.load(out, weights_only=True)
    for entry in ("model", "model_ema"):
        assert after[entry].keys() == before.keys()
        assert all(torch.equal(after[entry][name], before[name]) for name in before)
    assert run(["export", "kl16", str(official / "converted"), str(official / "vae.safetensors")]) == 0
    assert run(["convert", "kl16", str(official / "vae.safetensors"), str(official / "vae"), "--size", "16"]) == 0
    again = ["convert", "mar", str(out), str(official / "again"), "--vae", str(official / "vae"), "--heads", "2"]
    assert run(again) == 2, "this tokenizer has patches of 1, the model's tokens are of 2"
    assert "makes 64 tokens (2 features) from 16x16 pixels, the model takes 16 (8 features)" in capsys.readouterr().err
    again[5] = str(official / "converted")
    assert run(again) == 0
    same = seriatim.load(official / "again", device="cpu")(class_labels=[1, "none"], guidance_scale=1.5, **request)
    assert (same.images == result.images).all()


def test_last_weights_and_class_names(official: Path) -> None:
    (official / "names.txt").write_text("cat\ndog\nhorse\n\nship\ntruck\n")
    names = ["--class-names", str(official / "names.txt")]
    assert convert(official, "raw", "--heads", "2", "--heads", "2", "--raw", *names) == 0
    pipe = seriatim.load(official / "raw", device="cpu")
    assert pipe.class_names == ["cat", "dog", "horse", "ship", "truck"]
    assert pipe.bundle.provenance["weights"] == "model"
    last = torch.load(official / "mar.pth", weights_only=True)["model"]
    assert torch.equal(pipe.model.state_dict()["conditioner.no_class"], last["fake_latent"])


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        ([], 2, "heads: "),
        (["--heads", "5"], 4, "5 does not divide"),
        (["--heads", "2", "--heads", "2", "--heads", "2"], 2, "heads: [2, 2, 2] is not allowed"),
        (["--preset", "mar-x"], 2, "preset: 'mar-x' is not one of MAR's"),
        (["--preset", "mar-b"], 4, "which is not mar-b"),
        (["--heads", "2", "--class-names", "{names}"], 2, "class_names: 2 names for a model of 5 classes"),
        (["--heads", "2", "--class-names", "{missing}"], 2, "class_names"),
    ],
)
def test_what_is_wrong_is_one_line(
    official: Path, capsys: pytest.CaptureFixture[str], more: list[str], code: int, words: str
) -> None:
    (official / "names.txt").write_text("cat\ndog\n")
    paths = {"names": official / "names.txt", "missing": official / "missing.txt"}
    capsys.readouterr()
    assert convert(official, "converted", *(word.format(**paths) for word in more)) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("reading")]
    assert len(lines) == 1 and words in lines[0], lines
    assert not (official / "converted").exists()


def test_nothing_is_overwritten(official: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (official / "notes").mkdir()
    (official / "notes" / "a.txt").write_text("mine")
    assert convert(official, "notes", "--heads", "2") == 2
    assert (official / "notes" / "a.txt").read_text() == "mine"
    folder = str(save_bundle(make_bundle(), tmp_path / "pixels"))
    (official / "taken.pth").write_text("mine")
    assert run(["export", "mar", folder, str(official / "taken.pth")]) == 2
    assert (official / "taken.pth").read_text() == "mine"
    assert run(["export", "mar", folder, str(official / "taken.pth"), "--overwrite"]) == 0
    assert run(["export", "mar", folder, str(official / "model.onnx")]) == 2
    assert "must end in .safetensors, .pth" in capsys.readouterr().err
    assert run(["export", "kl16", folder, str(official / "vae.ckpt"), "--overwrite"]) == 2
    assert convert(official, "converted", "--heads", "2") == 0
    before = (official / "converted" / "manifest.json").read_bytes()
    assert convert(official, "converted", "--heads", "2", "--raw") == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert (official / "converted" / "manifest.json").read_bytes() == before
    assert convert(official, "converted", "--heads", "2", "--raw", "--overwrite") == 0
    assert (official / "converted" / "manifest.json").read_bytes() != before


@pytest.mark.parametrize("shape", [None, (2,), (2, 0), (2, 2), (2, 0, 1, 1), (4, 4, 1, 1)])
def test_an_autoencoder_that_does_not_fit(
    official: Path, capsys: pytest.CaptureFixture[str], shape: tuple[int, ...] | None
) -> None:
    tensors = kl16_from_tokenizer(vae(16))
    if shape is None:
        (official / "vae.ckpt").unlink()
    else:
        torch.save({"model": {**tensors, "post_quant_conv.weight": torch.zeros(shape)}}, official / "vae.ckpt")
    assert convert(official, "converted", "--heads", "2") in (2, 4)
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("reading")]
    assert len(lines) == 1 and "bug" not in lines[0] and ("vae" in lines[0]), lines

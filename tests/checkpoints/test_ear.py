"""Checkpoints of EAR's code: sizes from shapes and arguments, mapped strictly, converted at the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import randomise
from torch import Tensor

import seriatim
from seriatim.backbones.bidirectional_transformer import Bidirectional
from seriatim.checkpoints import ear
from seriatim.checkpoints.kl16 import kl16_from_tokenizer
from seriatim.checkpoints.official import OfficialFile
from seriatim.cli.main import run
from seriatim.core.errors import CheckpointError, UsageError
from seriatim.heads.energy import Energy
from seriatim.models.build import model_config, seeded
from seriatim.models.masked_model import MaskedModel
from seriatim.tokenizers.kl import KL
from seriatim.zoo import PRESETS


def small() -> MaskedModel:
    """A model whose sizes all differ, so that no two can be mistaken for each other."""
    with seeded(0):
        backbone = Bidirectional(16, 8, width=32, depth=3, heads=2, buffer=5, mlp_ratio=2.0, dropout=0.0)
        model = MaskedModel(backbone, Energy(8, 40, 2, noise=6), classes=7)
    randomise(model, scale=0.05)
    return model.eval()


def official(model: MaskedModel) -> dict[str, Tensor]:
    """The weights under official names and with the official axes."""
    made = {ear.official_name(name): tensor for name, tensor in model.state_dict().items()}
    return {name: t[None] if name in ("mask_token", "decoder_pos_embed_learned") else t for name, t in made.items()}


ARGUMENTS = {"buffer_size": 5, "alpha": 1.5, "train_temperature": 0.99, "score_batch_mul": 3, "proj_dropout": 0.0}


def as_file(tensors: dict[str, Tensor], **arguments: float) -> OfficialFile:
    return OfficialFile(Path("checkpoint-last.pth"), tensors, {**ARGUMENTS, **arguments})


def test_weights_and_arguments_make_the_same_model() -> None:
    model = small()
    read = ear.model_from_ear(as_file(official(model)), heads=2)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), read.state_dict().values(), strict=True))
    config = model_config(read)
    expected = model_config(model)
    expected["head"] |= {"draws": 3, "alpha": 1.5, "tau": 0.99}
    assert config == expected and config["backbone"] == "bidirectional"


def test_what_does_not_fit_is_named() -> None:
    tensors = official(small())
    with pytest.raises(UsageError, match=r"heads: .* has 3 blocks of width 32, which is no preset's"):
        ear.model_from_ear(as_file(tensors))
    with pytest.raises(UsageError, match=r"buffer: 21 is not allowed; .* has 21 positions"):
        ear.model_from_ear(as_file(tensors, buffer_size=21), heads=2)
    with pytest.raises(CheckpointError, match=r"argument alpha is 2\.5; it must be from 0 to 2"):
        ear.model_from_ear(as_file(tensors, alpha=2.5), heads=2)
    with pytest.raises(CheckpointError, match=r"lacks tensor 'decoder_norm\.bias'"):
        ear.model_from_ear(as_file({k: v for k, v in tensors.items() if k != "decoder_norm.bias"}), heads=2)
    with pytest.raises(CheckpointError, match=r"has an unknown tensor 'encoder_norm\.bias'"):
        ear.model_from_ear(as_file(tensors | {"encoder_norm.bias": torch.zeros(3)}), heads=2)


def test_arguments_reach_the_settings_of_their_meaning() -> None:
    """All three are shares, so a mistake in the table would go unseen if two were equal."""
    told = {"proj_dropout": 0.3, "label_drop_prob": 0.2, "mask_ratio_min": 0.6}
    config = model_config(ear.model_from_ear(as_file(official(small()), **told), heads=2))
    assert (config["dropout"], config["label_dropout"], config["min_mask_ratio"]) == (0.3, 0.2, 0.6)


def test_numbers_of_the_file_and_of_the_caller_agree() -> None:
    tensors = official(small())
    assert ear.infer(as_file(tensors), 5)["tokens"] == 16
    with pytest.raises(UsageError, match=r"buffer: 6 is not allowed; .* was trained with buffer_size=5"):
        ear.infer(as_file(tensors), 6)
    for name in ("buffer_size", "score_batch_mul"):
        with pytest.raises(CheckpointError, match=rf"argument {name} is 2\.5; it must be a whole number"):
            ear.model_from_ear(as_file(tensors, **{name: 2.5}), heads=2)


def test_presets_have_the_published_sizes() -> None:
    """Blocks, width, attention heads, and the blocks and width of the head, as the official constructors have them."""
    sizes = {
        name: tuple(PRESETS[name].model[key] for key in ("depth", "width", "heads"))
        + tuple(PRESETS[name].model["head"][key] for key in ("depth", "width"))
        for name in ear.NAMES
    }
    assert sizes == {
        "ear-b": (24, 768, 12, 6, 1024),
        "ear-l": (32, 1024, 16, 8, 1280),
        "ear-h": (40, 1280, 16, 12, 1536),
    }


def test_at_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with seeded(3):
        vae = KL(16, patch=2, latent_channels=2, block_out_channels=(32, 32), layers_per_block=1)
    model = small()
    torch.save({"model_ema": official(model), "model": official(model)}, tmp_path / "checkpoint-last.pth")
    torch.save({"model": kl16_from_tokenizer(vae)}, tmp_path / "vae.ckpt")
    command = [
        "convert",
        "ear",
        str(tmp_path / "checkpoint-last.pth"),
        str(tmp_path / "out"),
        "--vae",
        str(tmp_path / "vae.ckpt"),
    ]
    assert run([*command, "--heads", "2"]) == 2, "the file has no arguments, and so not the size of the buffer"
    assert "buffer: 64 is not allowed" in capsys.readouterr().err
    assert run([*command, "--heads", "2", "--buffer", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["weights"], found["tokens"], found["classes"], found["preset"]) == ("model_ema", 16, 7, None)
    pipe = seriatim.load(tmp_path / "out", device="cpu")
    assert pipe.bundle.sampling == {"guidance_schedule": "linear", "num_inference_steps": 64, "temperature": 0.7}
    images = pipe(class_labels=[2], guidance_scale=3.0, seed=1, num_inference_steps=4).images
    assert images[0].size == (16, 16)

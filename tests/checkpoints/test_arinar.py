"""Official ARINAR files: two layouts of the same shapes, two meanings of a temperature, tables, round trips."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import seriatim
from seriatim.checkpoints.arinar import (
    arinar_tensors,
    infer,
    inner_heads_of,
    losses_by_heads,
    model_from_arinar,
    our_temperature,
)
from seriatim.checkpoints.kl16 import kl16_from_tokenizer
from seriatim.checkpoints.mar import ENTRIES
from seriatim.checkpoints.official import OfficialFile, read_official
from seriatim.cli.main import run
from seriatim.core.errors import CheckpointError, UsageError
from seriatim.core.keys import Keys
from seriatim.core.settings import Settings
from seriatim.models.base import SequenceModel
from seriatim.models.build import build_model, model_config, seeded
from seriatim.models.nested import Nested
from seriatim.tokenizers.kl import KL
from seriatim.zoo import VAR_BLOCK

HEAD: dict[str, Any] = {
    "kind": "nested",
    "split": {"kind": "features"},
    "model": {
        "kind": "causal", "width": 32, "depth": 2, "heads": 4, **VAR_BLOCK,
        "head": {"kind": "mixture", "components": 3, "depth": 0},
    },
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "kind": "masked", "tokens": 16, "dim": 8, "width": [32, 24], "depth": [2, 1], "heads": [4, 3], "buffer": 3,
    "classes": 5, "dropout": 0.0, "head": HEAD,
}  # fmt: skip


def small(seed: int = 0, **head: Any) -> SequenceModel:
    """Every weight far from zero, that of the inner attention above all: layouts must differ."""
    with seeded(seed):
        model = build_model({**CONFIG, "head": {**HEAD, **head}})
        with torch.no_grad():
            for parameter in model.head.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def official(model: SequenceModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in arinar_tensors(model).items()}


def as_file(tensors: dict[str, Tensor]) -> OfficialFile:
    return OfficialFile(Path("arinar.pth"), tensors)


def read(tensors: dict[str, Tensor], **options: Any) -> SequenceModel:
    return model_from_arinar(as_file(tensors), trunk_heads=(4, 3), **options)


def same(a: SequenceModel, b: SequenceModel) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# --- layouts ------------------------------------------------------------------------------------------------------


def test_round_trip_is_exact() -> None:
    model = small()
    tensors = official(model)
    assert "arhead.blocks.1.attn.zero_k_bias" in tensors and tensors["arhead.start_token"].shape == (1, 1, 32)
    again = read(tensors)
    assert same(model, again)
    back = arinar_tensors(again)
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in back)
    config = infer(tensors, "file")["head"]["model"]
    assert config["head"] == {"kind": "mixture", "components": 3, "depth": 0} and config["hidden"] == 128


def test_groups_of_features() -> None:
    model = small(split={"kind": "features", "group": 2})
    again = read(official(model))
    assert same(model, again) and isinstance(again.head, Nested) and again.head.parts == 4


def test_both_layouts_load_and_images_tell_them_apart() -> None:
    """Nothing but the loss shows the difference: tokens that the model draws itself are likelier under its own."""
    for heads in (4, 16):
        model = small(model={**HEAD["model"], "heads": heads})
        keys, settings = Keys.of_seeds(range(24)), Settings(num_inference_steps=1)
        tokens = model.sample(model.null(24), model.null(24), keys, settings)
        file = as_file(official(model))
        file.arguments["mask_ratio_min"] = 1.0  # so that z is that of which they were drawn
        losses = losses_by_heads(file, tokens, trunk_heads=(4, 3))
        assert losses.keys() == {4, 16} and min(losses, key=losses.__getitem__) == heads
        assert inner_heads_of(read(file.tensors)) == 4 and inner_heads_of(read(file.tensors, inner_heads=16)) == 16


def test_temperatures() -> None:
    """Ours: below 1 is sharper. The README's 1.1, of the first code, is 1/1.1."""
    assert our_temperature(1.1, "release") == pytest.approx(1 / 1.1) and our_temperature(1.1, "current") == 1.1
    assert our_temperature(1.0, "release") == our_temperature(1.0, "current") == 1.0
    with pytest.raises(UsageError, match="temperature_convention: 'releas' is not known; did you mean 'release'"):
        our_temperature(1.0, "releas")


# --- what a file may lack -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("arhead.cond_proj.bias", None), "lacks tensor 'arhead.cond_proj.bias'"),
        (("arhead.blocks.0.attn.zero_k_bias", None), "lacks tensor 'arhead.blocks.0.attn.zero_k_bias'"),
        (("arhead.blocks.0.attn.zero_k_bias", torch.ones(32)), "zero_k_bias' is not zero"),
        (("arhead.extra", torch.ones(2)), "has an unknown tensor 'arhead.extra'"),
        (
            ("arhead.pos_embedding", torch.ones(1, 7, 32)),
            r"'arhead.pos_embedding' has shape \(1, 7, 32\), not \(8, 32\)",
        ),
        (("arhead.head.bias", torch.full((9,), float("nan"))), "'arhead.head.bias' has values that are not finite"),
        (("arhead.head.weight", torch.ones(10, 32)), "gives 10 numbers, no mixture of Gaussians of 1 feature"),
        (("arhead.nf.var", torch.ones(8, 1)), r"'arhead.nf.var' is of a flow inside the head \(use_nf\)"),
        (("arhead.blocks.1.ada_lin.1.weight", None), "lacks tensor 'arhead.blocks.1.ada_lin.1.weight'"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_does_not_fit_is_named(change: tuple[str, Tensor | None], message: str) -> None:
    tensors = official(small())
    name, tensor = change
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    with pytest.raises(CheckpointError, match=message) as failure:
        read(tensors)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"split": {"kind": "features", "order": "reversed"}}, "head.split has no counterpart"),
        ({"model": {**HEAD["model"], "norm": "rms"}}, "head.model.norm has no counterpart .* 'layer'"),
        (
            {"model": {**HEAD["model"], "head": {"kind": "mixture", "components": 3, "depth": 1, "width": 16}}},
            "head.head has no counterpart",
        ),
        (
            {"model": {**HEAD["model"], "head": {"kind": "diffusion", "width": 16, "depth": 1}}},
            "its head is Nested; ARINAR's is",
        ),
    ],
)
def test_only_what_it_can_express_is_exported(head: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        arinar_tensors(small(**head))


# --- from the command line ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`arinar.pth` with averaged weights and a script's arguments, `vae.ckpt`, and a few images."""
    model = small()
    told = argparse.Namespace(model="mar_tiny", cfg=3.5, temperature=1.25, bilevel_schedule="linear")
    content = {"model": official(small(1)), "model_ema": official(model), "args": told, "epoch": 3}
    torch.save(content, tmp_path / "arinar.pth")
    with seeded(3):
        kl = KL(16, patch=2, latent_channels=2, block_out_channels=(32, 32), layers_per_block=1)
    torch.save({"model": kl16_from_tokenizer(kl)}, tmp_path / "vae.ckpt")
    (tmp_path / "images").mkdir()
    for i in range(3):
        pixels = torch.randint(256, (16, 16, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / "images" / f"{i}.png")
    return tmp_path


def convert(folder: Path, out: str, *more: str) -> int:
    files = [str(folder / "arinar.pth"), str(folder / out), "--vae", str(folder / "vae.ckpt")]
    return run(["convert", "arinar", *files, *([] if "--trunk-heads" in more else ["--trunk-heads", "4"]), *more])


def test_weights_in_images_out_weights_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = torch.load(folder / "arinar.pth", weights_only=False)["model_ema"]
    assert convert(folder, "made", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["weights"] == "model_ema" and found["inner heads"] == 4 and found["tokens"] == 16
    pipe = seriatim.load(folder / "made", device="cpu")
    assert pipe.bundle.sampling["temperature"] == 0.8, "the release divided standard deviations by 1.25"
    assert pipe.bundle.sampling["feature_schedule"] == "linear" and pipe.bundle.sampling["guidance_scale"] == 3.5
    assert model_config(pipe.model)["head"]["model"]["heads"] == 4
    settings: dict[str, Any] = {"seed": 0, "num_inference_steps": 4, "output_type": "np"}
    drawn = pipe(class_labels=[1, "none"], **settings).images
    assert drawn.shape == (2, 16, 16, 3)
    assert (drawn != pipe(class_labels=[1, "none"], feature_schedule="constant", **settings).images).any()

    assert run(["export", "arinar", str(folder / "made"), str(folder / "back.pth")]) == 0
    assert "its head has 4 attention heads" in capsys.readouterr().err
    back = read_official(folder / "back.pth", entries=ENTRIES).tensors
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in back)


def test_the_layout_of_today(folder: Path) -> None:
    assert convert(folder, "made", "--heads", "16", "--raw") == 0
    bundle = seriatim.load(folder / "made", device="cpu").bundle
    assert bundle.sampling["temperature"] == 1.25 and bundle.provenance["weights"] == "model"
    assert inner_heads_of(bundle.model) == 16
    assert convert(folder, "told", "--temperature-convention", "current") == 0
    assert seriatim.load(folder / "told", device="cpu").bundle.sampling["temperature"] == 1.25


def test_images_choose_the_layout(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(folder, "made", "--images", str(folder / "images"), "--json") == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    best = min(found["losses"], key=found["losses"].__getitem__)
    assert str(found["inner heads"]) == best and "loss of 3 images" in captured.err


def test_a_trunk_of_no_preset(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The number that is missing is asked for by its option's name: `--heads` are those inside the head."""
    files = [str(folder / "arinar.pth"), str(folder / "made"), "--vae", str(folder / "vae.ckpt")]
    assert run(["convert", "arinar", *files, "--heads", "4"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: trunk_heads: ") and "2+1 blocks of width 32, which is no preset's" in error
    assert convert(folder, "made", "--trunk-heads", "4", "--trunk-heads", "3") == 0
    config = model_config(seriatim.load(folder / "made", device="cpu").model)
    assert config["heads"] == [4, 3] and config["head"]["model"]["heads"] == 4


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--heads", "4", "--images", "images"], "images: given together with heads"),
        (["--heads", "0"], "heads: 0 is not allowed"),
        (["--images", "nowhere"], "images: nowhere is not a folder"),
        (["--temperature-convention", "old"], "temperature_convention: 'old' is not known"),
        (["--trunk-heads", "4", "--trunk-heads", "3", "--trunk-heads", "2"], "trunk_heads: [4, 3, 2] is not allowed"),
        (["--preset", "mar-b"], "preset: 'mar-b' is not one of ARINAR's"),
    ],
)
def test_what_cannot_be_asked(folder: Path, more: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(folder, "made", *more) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and words in error
    assert not (folder / "made").exists()

"""MAR's KL-16: the official module's numbers, its names, and one line for what does not fit."""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import golden
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from seriatim.checkpoints.kl16 import kl16_from_tokenizer, tokenizer_from_kl16
from seriatim.core.errors import CheckpointError, UsageError
from seriatim.core.keys import ReplayKeys
from seriatim.nn.patch import patchify
from seriatim.tokenizers.kl import KL

FOLDER = golden("mar")
CASES = sorted(FOLDER.glob("vae_*_io.safetensors"))


def weights_of(io: Path) -> dict[str, Tensor]:
    found = sorted(FOLDER.glob(io.name.replace("_io.safetensors", "_weights*.safetensors")))
    return load_file(found[0]) if found else pytest.skip(f"no weights of {io.name}")


def small(**settings: Any) -> KL:
    """A tokenizer of two levels whose every weight is random."""
    torch.manual_seed(0)
    tokenizer = KL(16, **{"latent_channels": 4, "block_out_channels": (32, 64), "layers_per_block": 1, **settings})
    for tensor in tokenizer.autoencoder.parameters():
        tensor.copy_(torch.randn_like(tensor) * 0.1)
    return tokenizer


# --- golden -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif("SERIATIM_GOLDEN" in os.environ, reason="another folder holds what it holds")
def test_there_is_a_golden_case() -> None:
    assert CASES, f"no vae_*_io.safetensors in {FOLDER}"


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
@torch.no_grad()
def test_golden(path: Path) -> None:
    """What the official encoder and decoder computed, every intermediate that the file has."""
    io, weights, scale = load_file(path), weights_of(path), 0.2325
    with safe_open(path, "pt") as file:
        said = {key: ast.literal_eval(value) for key, value in (file.metadata() or {}).items()}
    tokenizer = tokenizer_from_kl16(weights, path.name, size=io["x"].shape[-2:], scale=scale)
    config = tokenizer.config
    widths = [said["ch"] * m for m in said["ch_mult"]]
    for half, key in (("encoder", "attention"), ("decoder", "decoder_attention")):
        attends = said.get(f"attn_resolutions_{half}", ())
        assert config[key] == [i for i in range(len(widths)) if said["resolution"] // 2**i in attends]
    assert (config["block_out_channels"], config["layers_per_block"]) == (widths, said["num_res_blocks"])
    assert config["latent_channels"] == said["z_channels"]

    moments = tokenizer.moments(io["x"])
    mean, std = tokenizer.posterior(moments)
    ours: dict[str, Tensor] = {
        "encoder_h": tokenizer.autoencoder.encoder(io["x"]),
        "moments": moments,
        "mean": mean,
        "logvar": moments.chunk(2, dim=1)[1].clamp(-30, 20),
        "std": std,
    }
    if "mean" in io and "dec_of_mean" in io:
        ours["dec_of_mean"] = tokenizer.autoencoder.decode(io["mean"]).sample
        clamped = tokenizer.decode(patchify(io["mean"], 1) * scale)
        assert (clamped - io["dec_of_mean"].clamp(-1, 1)).abs().max() < 2e-5
    if "sample" in io and "noise" in io:
        noise = {f"{i}/normal": draw for i, draw in enumerate(io["noise"])}
        drawn = tokenizer.tokens(moments, ReplayKeys(noise, len(noise)))
        ours["sample"] = drawn.transpose(1, 2).reshape(io["sample"].shape) / scale
    if "x_rect" in io:
        rectangle = tokenizer_from_kl16(weights, path.name, size=io["x_rect"].shape[-2:], scale=scale)
        ours["mean_rect"] = rectangle.posterior(rectangle.moments(io["x_rect"]))[0]
        if "mean_rect" in io:
            ours["dec_rect_sub"] = rectangle.autoencoder.decode(io["mean_rect"]).sample[..., ::4, ::4]
    for key in ours.keys() & io.keys():
        assert (ours[key] - io[key]).abs().max() < 2e-5, key


@pytest.mark.skipif(not (FOLDER / "vae_full_keys.json").exists(), reason="no list of the official keys")
def test_official_names_and_shapes_of_the_full_size() -> None:
    listed = json.loads((FOLDER / "vae_full_keys.json").read_text())
    with torch.device("meta"):
        tokenizer = KL()
    ours = {name: list(tensor.shape) for name, tensor in kl16_from_tokenizer(tokenizer).items()}
    assert ours == {name: shape for name, shape, _ in listed["state_dict"]}
    assert sum(p.numel() for p in tokenizer.autoencoder.parameters()) == listed["total"]


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_official_weights_come_back_exactly(path: Path) -> None:
    weights = {name: tensor.float() for name, tensor in weights_of(path).items()}
    again = kl16_from_tokenizer(tokenizer_from_kl16({**weights, "loss.logvar": torch.ones(())}, "x", size=64))
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())


# --- our own ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"channels": 1, "layers_per_block": 2},
        {"attention": (), "block_out_channels": (32, 32, 64)},
        {"attention": (0, 1), "decoder_attention": (1,), "block_out_channels": (64, 32, 32)},
    ],
)
@torch.no_grad()
def test_every_size_is_read_off_the_tensors(settings: dict[str, Any]) -> None:
    tokenizer = small(**settings)
    official = kl16_from_tokenizer(tokenizer)
    again = tokenizer_from_kl16(official, "x", size=16)
    assert again.config == tokenizer.config
    for name, tensor in tokenizer.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    images = torch.rand(2, tokenizer.channels, 16, 16)
    assert torch.equal(again.moments(images), tokenizer.moments(images))


@torch.no_grad()
def test_weights_are_copied_frozen_and_cast() -> None:
    official = kl16_from_tokenizer(small())
    tokenizer = tokenizer_from_kl16({name: t.half() for name, t in official.items()}, "x", size=16)
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in tokenizer.parameters())
    before = tokenizer.autoencoder.quant_conv.weight.clone()
    tokenizer = tokenizer_from_kl16(official, "x", size=16)
    official["quant_conv.weight"].zero_()
    assert not torch.equal(tokenizer.autoencoder.quant_conv.weight, torch.zeros_like(before))


def poison(tensors: dict[str, Tensor]) -> None:
    tensors["decoder.mid.attn_1.q.weight"] = torch.full((64, 64, 1, 1), float("nan"))


SPOILT: dict[str, tuple[Callable[[dict[str, Tensor]], object], str, str]] = {
    "missing": (lambda t: t.pop("encoder.down.1.attn.0.k.bias"), "lacks tensor", "encoder.down.1.attn.0.k.bias"),
    "missing size": (lambda t: t.pop("decoder.conv_in.weight"), "lacks tensor", "decoder.conv_in.weight"),
    "no level": (lambda t: t.pop("encoder.down.0.block.0.conv1.weight"), "lacks tensor", "encoder.down.0.block.0"),
    "extra": (lambda t: t.update({"decoder.x": torch.ones(1)}), "unknown tensor", "decoder.x"),
    "far level": (lambda t: t.update({"encoder.down.99.x": torch.ones(1)}), "unknown tensor", "encoder.down.99.x"),
    "shape": (lambda t: t.update({"quant_conv.bias": torch.ones(5)}), "has shape (5,), not (8,)", "quant_conv.bias"),
    "sides": (lambda t: t.update({"encoder.conv_in.weight": torch.ones(3)}), "has shape (3,)", "encoder.conv_in"),
    "not finite": (poison, "not finite", "decoder.mid.attn_1.q.weight"),
    "many levels": (
        lambda t: t.update({f"encoder.down.{i}.block.0.conv1.weight": torch.ones(32, 1, 1, 1) for i in range(5000)}),
        "tokenizer.block_out_channels: 5000 given; at most 16",
        "",
    ),
    "many layers": (
        lambda t: t.update({f"encoder.down.0.block.{i}.conv1.weight": torch.ones(32, 1, 1, 1) for i in range(40)}),
        "tokenizer.layers_per_block: 40 is not allowed; it must be at most 32",
        "",
    ),
    "groups": (lambda t: t.update({"encoder.down.0.block.0.conv1.weight": torch.ones(40, 3, 3, 3)}), "[40, 64]", "32"),
}


@pytest.mark.parametrize("case", SPOILT)
@torch.no_grad()
def test_tensors_that_do_not_fit_are_named(case: str) -> None:
    spoil, *words = SPOILT[case]
    tensors = kl16_from_tokenizer(small())
    spoil(tensors)
    with pytest.raises(CheckpointError) as caught:
        tokenizer_from_kl16(tensors, "kl16.ckpt", size=16)
    message = str(caught.value)
    assert message.startswith("kl16.ckpt") and all(word in message for word in words), message
    assert "\n" not in message


@torch.no_grad()
def test_a_size_that_does_not_fit_is_the_callers() -> None:
    with pytest.raises(UsageError, match="size: 17x17 is not allowed"):
        tokenizer_from_kl16(kl16_from_tokenizer(small()), "x", size=17)

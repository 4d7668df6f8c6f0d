"""LlamaGen's VQ-16 and VQ-8: the official modules' numbers, their names, and one line for what does not fit."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import golden, official_tensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from seriatim.checkpoints.llamagen_vq import (
    CODEBOOK,
    IGNORED,
    tokenizer_from_llamagen,
)
from seriatim.checkpoints.tokenizer import load_tokenizer
from seriatim.cli.main import run
from seriatim.core.errors import CheckpointError, UsageError
from seriatim.core.keys import Keys
from seriatim.tokenizers.quantise import Quantiser
from seriatim.tokenizers.vq import VQ

FOLDER = golden("llamagen")
FILES = sorted(FOLDER.glob("vq*.safetensors"))
TOLERANCE = 1e-5
PUBLISHED = {"keys_VQ-16.json": 71_883_403, "keys_VQ-8.json": 70_109_835}
WIDTHS = {"keys_VQ-16.json": (128, 128, 256, 256, 512), "keys_VQ-8.json": (128, 256, 256, 512)}


def said(path: Path) -> dict[str, Any]:
    """What the file beside a golden one says of it."""
    beside = path.with_suffix(".json")
    return dict(json.loads(beside.read_text())) if beside.exists() else {}


def weights_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[2:]: tensor.float() for name, tensor in tensors.items() if name.startswith("w.")}


def close(ours: Tensor, theirs: Tensor, what: str) -> None:
    scale = max(1.0, float(theirs.abs().max()))
    assert (ours - theirs).abs().max() < TOLERANCE * scale, what


# --- golden -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif("SERIATIM_GOLDEN" in os.environ, reason="another folder holds what it holds")
def test_there_are_golden_cases() -> None:
    held = [load_file(path) for path in FILES]
    assert any(weights_of(tensors) for tensors in held), f"no weights of a tokenizer in {FOLDER}"
    assert any(name.endswith(".codebook") for tensors in held for name in tensors), f"no quantiser in {FOLDER}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@torch.no_grad()
def test_golden_tokenizer(path: Path) -> None:
    """What the official model computed, every intermediate that the file has."""
    io, config = load_file(path), said(path)
    weights = weights_of(io)
    if not weights:
        pytest.skip(f"{path.name} holds no weights")
    images = io.get("in.img")
    tokenizer = tokenizer_from_llamagen(
        weights, path.name, size=256 if images is None else images.shape[-2:], l2=config.get("codebook_l2_norm", True)
    )
    for key, ours in (("codebook_size", tokenizer.vocab), ("codebook_embed_dim", tokenizer.dim)):
        assert config.get(key, ours) == ours, key
    for key, name in (("z_channels", "latent_channels"), ("num_res_blocks", "layers_per_block")):
        assert config.get(key, tokenizer.config[name]) == tokenizer.config[name], key
    for key, name in (
        ("encoder_ch_mult", "block_out_channels"),
        ("decoder_ch_mult", "decoder_block_out_channels"),
    ):
        if key in config and "ch" in config:
            assert [config["ch"] * m for m in config[key]] == tokenizer.config[name]
    if images is None:
        return
    features = tokenizer.features(images)  # (B, C, h, w)
    if "out.h_prequant" in io:
        close(features, io["out.h_prequant"], "h_prequant")
    codes = tokenizer.tokens(tokenizer.moments(images))  # (B, L)
    if "out.indices" in io:
        assert torch.equal(codes.flatten(), io["out.indices"].flatten())
    embeddings = tokenizer.embeddings(codes)  # (B, L, C)
    chosen = embeddings.transpose(1, 2).reshape(features.shape)
    if "out.quant" in io:
        close(chosen, io["out.quant"], "quant")
        if "out.dec" in io:
            close(tokenizer.draw(io["out.quant"]), io["out.dec"], "dec")
            coded = tokenizer.coded(images, Keys.of_seeds(range(len(images))))
            close(tokenizer.draw(coded.latents), io["out.dec"], "coded and drawn")
            assert coded.codes is not None and torch.equal(coded.codes, codes)
    if "out.dec_from_code" in io:
        close(tokenizer.draw(chosen), io["out.dec_from_code"], "dec_from_code")
        clamped = io["out.dec_from_code"].clamp(-1, 1)
        close(tokenizer.decode(codes), clamped, "decode")
        close(tokenizer.decode_embeddings(embeddings), clamped, "decode_embeddings")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden_quantiser(path: Path) -> None:
    """Codes, values, losses and the gradient through the quantiser, each kind that the file has."""
    io, config = load_file(path), said(path)
    kinds = [name.removesuffix(".codebook") for name in io if name.endswith(".codebook")]
    if not kinds:
        pytest.skip(f"{path.name} holds no quantiser")
    for kind in kinds:
        case = {name[len(kind) + 1 :]: tensor for name, tensor in io.items() if name.startswith(f"{kind}.")}
        codebook = case["codebook"]
        quantiser = Quantiser(*codebook.shape, l2=kind.startswith("l2"))
        quantiser.entropy = True
        quantiser.codebook.data.copy_(codebook)
        z = case["z"].clone().requires_grad_(True)  # (B, C, h, w)
        found = quantiser(z.permute(0, 2, 3, 1))
        values = found.values.permute(0, 3, 1, 2)
        assert torch.equal(found.codes, quantiser.codes(z.permute(0, 2, 3, 1)))
        ours = {
            "zq": values,
            "entry": quantiser.lookup(found.codes).permute(0, 3, 1, 2),
            "vq_loss": found.losses["codebook"],
            "commit_loss": config.get("commit_loss_beta", 0.25) * found.losses["commitment"],
            "entropy_loss": config.get("entropy_loss_ratio", 0.1) * found.losses["entropy"],
        }
        if "indices" in case:
            assert torch.equal(found.codes.flatten(), case["indices"].flatten()), kind
        if "upstream" in case and "z_grad_from_ste" in case:
            ours["z_grad_from_ste"] = torch.autograd.grad((values * case["upstream"]).sum(), z)[0]
        for name in ours.keys() & case.keys():
            close(ours[name].detach(), case[name].view(ours[name].shape), f"{kind}.{name}")


@pytest.mark.parametrize("name", PUBLISHED)
def test_official_names_and_shapes_of_the_full_size(name: str) -> None:
    if not (FOLDER / name).exists():
        pytest.skip(f"no list of the official keys {name}")
    listed = {key: shape for key, (shape, _) in json.loads((FOLDER / name).read_text()).items()}
    with torch.device("meta"):
        tokenizer = VQ(block_out_channels=WIDTHS[name])
        tensors = {key: torch.empty(shape) for key, shape in listed.items()}
    ours = {official: list(tensor.shape) for official, tensor in official_tensors(tokenizer).items()}
    assert ours == {key: shape for key, shape in listed.items() if key != IGNORED}
    assert sum(p.numel() for p in tokenizer.parameters()) == PUBLISHED[name]
    assert tokenizer.vocab == 16384 and tokenizer.dim == 8 and not list(tokenizer.buffers())
    with pytest.raises(
        CheckpointError, match="only plain tensors of 16, 32 or 64-bit floats"
    ):  # all fits, but for the values
        tokenizer_from_llamagen(tensors, "x")


# --- our own ------------------------------------------------------------------------------------------------------


def small(**settings: Any) -> VQ:
    """A tokenizer of two levels whose every weight is random."""
    torch.manual_seed(0)
    defaults = {"vocab": 11, "code_dim": 3, "latent_channels": 5, "block_out_channels": (32, 64), "layers_per_block": 1}
    tokenizer = VQ(8, **{**defaults, **settings})
    for tensor in tokenizer.parameters():
        tensor.copy_(torch.randn_like(tensor) * 0.1)
    return tokenizer


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"channels": 1, "layers_per_block": 2, "l2": False},
        {"block_out_channels": (32,), "vocab": 1},
        {"block_out_channels": (64, 32, 32), "decoder_block_out_channels": (32, 64, 96)},
    ],
)
@torch.no_grad()
def test_every_size_is_read_off_the_tensors(settings: dict[str, Any]) -> None:
    tokenizer = small(**settings)
    official = {**official_tensors(tokenizer), IGNORED: torch.zeros(7)}
    again = tokenizer_from_llamagen(official, "x", size=8, l2=settings.get("l2", True))
    assert again.config == tokenizer.config
    for name, tensor in tokenizer.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert all(not p.requires_grad for p in again.parameters())
    images = torch.rand(2, tokenizer.channels, 8, 8)
    assert torch.equal(again.moments(images), tokenizer.moments(images))


def poison(tensors: dict[str, Tensor]) -> None:
    tensors["decoder.mid.1.q.weight"] = torch.full((64, 64, 1, 1), float("nan"))


SPOILT: dict[str, tuple[Callable[[dict[str, Tensor]], object], str, str]] = {
    "missing": (lambda t: t.pop("encoder.conv_blocks.1.attn.0.k.bias"), "lacks tensor", "encoder.conv_blocks.1.attn.0"),
    "missing size": (lambda t: t.pop("quant_conv.weight"), "lacks tensor", "quant_conv.weight"),
    "no codebook": (lambda t: t.pop(CODEBOOK), "lacks tensor", CODEBOOK),
    "no level": (lambda t: t.pop("encoder.conv_blocks.0.res.0.conv1.weight"), "lacks tensor", "encoder.conv_blocks.0"),
    "extra": (lambda t: t.update({"decoder.x": torch.ones(1)}), "unknown tensor", "decoder.x"),
    "shape": (lambda t: t.update({"quant_conv.bias": torch.ones(5)}), "has shape (5,), not (3,)", "quant_conv.bias"),
    "sides": (lambda t: t.update({"encoder.conv_in.weight": torch.ones(3)}), "has shape (3,)", "encoder.conv_in"),
    "codebook": (lambda t: t.update({CODEBOOK: torch.ones(11, 4)}), "a codebook of another size", "3 features"),
    "not finite": (poison, "not finite", "decoder.mid.1.q.weight"),
    "many levels": (
        lambda t: t.update({f"encoder.conv_blocks.{i}.res.0.conv1.weight": torch.ones(32, 1, 1, 1) for i in range(99)}),
        "tokenizer.block_out_channels: 99 given; at most 16",
        "",
    ),
    "many layers": (
        lambda t: t.update({f"encoder.conv_blocks.0.res.{i}.conv1.weight": torch.ones(32, 1, 1, 1) for i in range(40)}),
        "tokenizer.layers_per_block: 40 is not allowed; it must be at most 32",
        "",
    ),
    "groups": (
        lambda t: t.update({"encoder.conv_blocks.0.res.0.conv1.weight": torch.ones(40, 3, 3, 3)}),
        "[40, 64]",
        "32",
    ),
    "levels": (
        lambda t: t.update({"decoder.conv_blocks.2.res.0.conv1.weight": torch.ones(32, 3, 3, 3)}),
        "decoder_block_out_channels",
        "2 levels",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
@torch.no_grad()
def test_tensors_that_do_not_fit_are_named(case: str) -> None:
    spoil, *words = SPOILT[case]
    tensors = official_tensors(small())
    spoil(tensors)
    with pytest.raises(CheckpointError) as caught:
        tokenizer_from_llamagen(tensors, "vq.pt", size=8)
    message = str(caught.value)
    assert message.startswith("vq.pt") and all(word in message for word in words), message
    assert "\n" not in message


def test_a_size_that_does_not_fit_is_the_callers() -> None:
    with pytest.raises(UsageError, match="size: 17x17 is not allowed"):
        tokenizer_from_llamagen(official_tensors(small()), "x", size=17)


# --- the command line ---------------------------------------------------------------------------------------------


def test_convert_reads_a_training_scripts_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    averaged, last = official_tensors(small()), official_tensors(small(l2=False))
    last["quant_conv.bias"] = last["quant_conv.bias"] + 1
    args = argparse.Namespace(vq_model="VQ-16", codebook_size=11, codebook_embed_dim=3, codebook_l2_norm=False)
    whole = {"model": last, "ema": averaged, "steps": 7, "args": args, "discriminator": {"a": torch.ones(1)}}
    torch.save(whole, tmp_path / "vq.pt")
    out = tmp_path / "vq"
    assert run(["convert", "llamagen-vq", str(tmp_path / "vq.pt"), str(out), "--size", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["weights"], found["tokens"], found["codes"], found["features"]) == ("ema", 16, 11, 3)
    tokenizer = load_tokenizer(out)
    assert isinstance(tokenizer, VQ) and not tokenizer.config["l2"]
    assert torch.equal(tokenizer.get_parameter("quant_conv.bias"), averaged["quant_conv.bias"])
    words = ["convert", "llamagen-vq", str(tmp_path / "vq.pt"), str(out), "--size", "8", "--raw"]
    assert run(words) == 2, "what is there stays"
    assert run([*words, "--overwrite"]) == 0
    assert torch.equal(load_tokenizer(out).state_dict()["quant_conv.bias"], last["quant_conv.bias"])


@pytest.mark.parametrize(
    ("case", "code", "words"),
    [
        ("another codebook", 4, "a codebook of another size"),
        ("another width", 4, "a codebook of another size"),
        ("size", 2, "size: 17x17 is not allowed"),
        ("no such entry", 2, "which: "),
        ("pickle", 4, "could run any program"),
        ("no file", 2, "is no file"),
    ],
)
def test_convert_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str, code: int, words: str
) -> None:
    path, tensors, more = tmp_path / "vq.pt", official_tensors(small()), ["--size", "8"]
    if case == "another width":
        tensors[CODEBOOK] = torch.ones(11, 4)
    args = argparse.Namespace(codebook_size=16384 if case == "another codebook" else 11)
    torch.save({"model": tensors, "args": args if case != "pickle" else path}, path)
    if case == "size":
        more = ["--size", "17"]
    elif case == "no such entry":
        more += ["--ema"]
    elif case == "no file":
        path.unlink()
    assert run(["convert", "llamagen-vq", str(path), str(tmp_path / "out"), *more]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and words in lines[0], lines
    assert not (tmp_path / "out").exists()


def test_convert_reads_safetensors(tmp_path: Path) -> None:
    save_file({name: t.contiguous() for name, t in official_tensors(small()).items()}, tmp_path / "vq.safetensors")
    out = tmp_path / "vq"
    assert run(["convert", "llamagen-vq", str(tmp_path / "vq.safetensors"), str(out), "--size", "16"]) == 0
    assert load_tokenizer(out).count == 64

"""l-DeTok against the official code: every file of golden/detok that is there, with sizes taken from the files.

Made by the unmodified official modules on the CPU in float32. Tolerances are relative to the largest value: networks
5e-6, gradients 1e-5. Perceptual and adversarial losses have no golden values.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import golden, replay
from safetensors.torch import load_file
from torch import Tensor

from seriatim.checkpoints.detok_weights import TABLE as NAMES
from seriatim.checkpoints.detok_weights import detok_tensors, read_statistics, tokenizer_from_detok
from seriatim.checkpoints.mar import infer
from seriatim.checkpoints.shapes import official_name
from seriatim.tokenizers.detok import Detok, angle_table
from seriatim.tokenizers.latent import LOGVAR, kl_divergence
from seriatim.training.tokenizer_losses import kept_patches, with_interpolated_noise
from seriatim.zoo import PRESETS

FOLDER = golden("detok")
NETWORK, GRADIENT, TABLE = 5e-6, 1e-5, 1e-5
WEIGHTS = "_weights.safetensors"
OURS = {  # the official size table's names
    "encoder": "vit_enc_model_size",
    "decoder": "vit_dec_model_size",
}


# --- reading ------------------------------------------------------------------------------------------------------


def meta() -> dict[str, Any]:
    path = FOLDER / "meta.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def files(*parts: str) -> list[Path]:
    """The files of all cases whose names go on with one of the parts."""
    stems = [path.name.removesuffix(WEIGHTS) for path in sorted(FOLDER.glob(f"*{WEIGHTS}"))]
    return [path for stem in stems for part in parts for path in sorted(FOLDER.glob(f"{stem}_{part}*.safetensors"))]


def each(*parts: str) -> Any:
    return pytest.mark.parametrize("path", files(*parts), ids=lambda path: path.stem)


def case_of(path: Path) -> str:
    """The case that a file belongs to: the longest one that its name begins with."""
    stems = [weights.name.removesuffix(WEIGHTS) for weights in FOLDER.glob(f"*{WEIGHTS}")]
    return max((stem for stem in stems if path.name.startswith(f"{stem}_")), key=len)


def tokenizer_of(path: Path, **more: Any) -> Detok:
    """The official model of a case."""
    case = case_of(path)
    weights = load_file(FOLDER / f"{case}{WEIGHTS}")
    sizes = meta().get(f"{case}_weights", {}).get("sizes", {})
    heads = [sizes[name]["heads"] for name in OURS.values()] if len(sizes) == 2 else None
    tables = FOLDER / f"{case}_eval.safetensors"
    if heads is None and tables.exists():  # the width of a table of angles, cosines and sines, tells it
        io = load_file(tables)
        if {f"{half}_rope" for half in OURS} <= io.keys():
            widths = (weights[f"{half}.ln_pre.weight"].shape[0] for half in OURS)
            heads = [2 * width // io[f"{half}_rope"].shape[1] for half, width in zip(OURS, widths, strict=True)]
    images = load_file(path).get("images")
    if images is not None:
        more.setdefault("size", list(images.shape[-2:]))
    return tokenizer_from_detok(weights, case, heads=heads, **more)


def close(ours: Tensor, theirs: Tensor, what: str, tolerance: float = NETWORK) -> None:
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)} is not {tuple(theirs.shape)}"
    worst = float((ours - theirs).detach().abs().max()) / max(1e-12, float(theirs.abs().max()))
    assert worst <= tolerance, f"{what} differs by {worst:.3g} of the largest value, allowed {tolerance:.3g}"


def on_grid(tokenizer: Detok, x: Tensor) -> Tensor:
    """(B, L, D) -> (B, D, h, w)."""
    return x.transpose(1, 2).unflatten(-1, tokenizer.grid)


def kept_of(io: dict[str, Tensor], count: int) -> tuple[Tensor, Tensor]:
    """The mask (B, L) of the patches that survive, and their places (B, S) in the official order."""
    uniform = io["mask_uniform" if "mask_uniform" in io else "uniform"]
    at = uniform.argsort(dim=1)[:, :count]
    if "ids_restore" in io:
        assert torch.equal(io["ids_restore"].argsort(dim=1)[:, :count], at)
    return torch.zeros(uniform.shape, dtype=torch.bool).scatter(1, at, True), at


def placed(x: Tensor, at: Tensor, L: int) -> Tensor:
    """x (B, S, D) at the places (B, S) among zeros: (B, L, D)."""
    return torch.zeros(len(x), L, x.shape[-1]).scatter(1, at[..., None].expand_as(x), x)


def test_there_are_golden_files() -> None:
    held = FOLDER.glob("*.safetensors") if "SERIATIM_GOLDEN" in os.environ else files("eval")  # others may lack some
    assert any(held), f"no golden tensors of l-DeTok in {FOLDER}"


# --- the network --------------------------------------------------------------------------------------------------


@each("eval")
@torch.no_grad()
def test_moments_tokens_and_pictures(path: Path) -> None:
    io, tokenizer = load_file(path), tokenizer_of(path)
    moments = tokenizer.moments(io["images"])
    close(moments, on_grid(tokenizer, io["moments"]), "moments")
    mean, std = tokenizer.posterior(moments)
    logvar = moments.chunk(2, dim=1)[1].clamp(*LOGVAR)
    for name, ours in (("mean", mean), ("std", std), ("logvar", logvar)):
        if name in io:
            close(ours, on_grid(tokenizer, io[name]), name)
    if "kl" in io:
        close(torch.stack([kl_divergence(mean[b : b + 1], std[b : b + 1]) for b in range(len(mean))]), io["kl"], "kl")
    tokens = tokenizer.tokens(moments)
    for name, drawn in (("tokens_mode", tokens), ("tokens_sampled", None)):
        if name not in io:
            continue
        if drawn is None:
            drawn = tokenizer.tokens(moments, replay({"normal": on_grid(tokenizer, io["normal"])}))
        close(on_grid(tokenizer, drawn), io[name], name)
    if "decoded" in io:
        close(tokenizer.draw(io["tokens_mode"]), io["decoded"], "decoded")
    if "reconstructed" in io:
        close(tokenizer.decode(tokens) / 2 + 0.5, io["reconstructed"], "reconstructed")


@each("eval")
@torch.no_grad()
def test_every_block(path: Path) -> None:
    io, tokenizer = load_file(path), tokenizer_of(path)
    network, seen = tokenizer.autoencoder, dict[str, Tensor]()

    def watch(name: str, module: torch.nn.Module) -> None:
        module.register_forward_hook(lambda _, __, output: seen.update({name: output}))

    for half in OURS:
        trunk = network.get_submodule(half).trunk
        watch(f"{half}_ln_pre", trunk.norm_in)
        watch(f"{half}_ln_post", trunk.norm_out)
        for i, block in enumerate(trunk.blocks):
            watch(f"{half}_block{i}", block)
        seen[f"{half}_rope"] = torch.cat([*trunk.table], dim=1)
    watch("patch_embed", network.encoder.patch_embed)
    watch("decoder_embed", network.decoder.embed)
    network.decoder.conv_out.register_forward_pre_hook(lambda _, inputs: seen.update({"decoder_ffn": inputs[0]}))
    tokenizer.draw(tokenizer.posterior(tokenizer.moments(io["images"]))[0])
    seen["patch_embed"] = seen["patch_embed"].flatten(2).transpose(1, 2)
    for name in seen.keys() & io.keys():
        close(seen[name], io[name], name, TABLE if name.endswith("rope") else NETWORK)


@each("mask")
@torch.no_grad()
def test_hidden_patches(path: Path) -> None:
    """The official code shuffles what is left, which changes nothing but the order."""
    io, tokenizer = load_file(path), tokenizer_of(path)
    kept, at = kept_of(io, io["latents"].shape[1])
    shuffled = tokenizer.autoencoder.encoder(io["images"], at).chunk(2, dim=-1)[0]
    close(shuffled, io["latents"], "latents")
    silent = replay({"normal": torch.zeros(len(at), tokenizer.latent_channels, *tokenizer.grid)})
    latents = tokenizer.coded(io["images"], silent, kept).latents  # without noise, the means
    close(latents, on_grid(tokenizer, placed(io["latents"], at, kept.shape[1])), "coded")
    close(tokenizer.draw(latents, kept), io["decoded"], "decoded")


@each("noise")
@torch.no_grad()
def test_noise_at_a_level(path: Path) -> None:
    io, tokenizer, about = load_file(path), tokenizer_of(path), meta().get(path.stem, {})
    if not {"level", "gamma"} <= about.keys():
        pytest.skip("nothing says how much noise there is")
    mean, _ = tokenizer.posterior(tokenizer.moments(io["images"]))
    t, noise = about["level"], about["gamma"] * on_grid(tokenizer, io["normal"])
    latents = (1 - t) * mean + t * noise
    close(latents, on_grid(tokenizer, io["latents"]), "latents")
    close(tokenizer.draw(latents), io["decoded"], "decoded")


@each("train")
def test_a_training_step(path: Path) -> None:
    """Mask, posterior sample, noise and decoder; loss and, where the file has them, all gradients."""
    io, tokenizer, about = load_file(path), tokenizer_of(path), meta().get(path.stem, {})
    if "gamma" not in about:
        pytest.skip("nothing says how much noise there is")
    tokenizer.requires_grad_(True)
    count = io["posterior_normal"].shape[1]
    kept, at = kept_of(io, count)
    L = kept.shape[1]
    masked = kept if count < L else None
    if {"drawn_ratio", "max_mask_ratio"} <= about.keys():
        most = about["max_mask_ratio"]
        step = replay({"mask/uniform": torch.tensor([(about["drawn_ratio"] + 0.1) / (most + 0.1)])})
        ours = kept_patches(L, most, replay({"mask/permutation": io["mask_uniform"].argsort().argsort()}), step)
        assert ours is None if masked is None else ours is not None and torch.equal(ours, masked)
    normal = placed(io["posterior_normal"], at, L)
    keys = replay({"normal": on_grid(tokenizer, normal)})
    coded = tokenizer.coded(io["images"], keys, masked)
    level, noise = io["level_uniform"].flatten(), on_grid(tokenizer, placed(io["noise_normal"], at, L))
    if about.get("additive"):  # which is no choice here
        latents = coded.latents + about["gamma"] * level.view(-1, 1, 1, 1) * noise
    else:
        keys = replay({"level/uniform": level, "noise/normal": noise})
        latents = with_interpolated_noise(coded.latents, about["gamma"], keys)
    decoded = tokenizer.draw(latents, masked)
    expected = on_grid(tokenizer, placed(io["latents"], at, L))
    close(latents, expected, "latents")
    close(decoded, io["decoded"], "decoded")
    kl, l2 = coded.losses["kl"], ((decoded - io["images"]) / 2).square().mean()  # the official loss is on [0, 1]
    for name, ours in (("kl", kl), ("l2", l2), ("loss", l2 + 1e-6 * kl)):
        if name in io:
            close(ours.view(1), io[name].view(1), name)
    theirs = {name[5:]: tensor for name, tensor in io.items() if name.startswith("grad.")}
    if theirs:
        (l2 + 1e-3 * kl).backward()
        ours_by_name = {official_name(n, NAMES): p.grad for n, p in tokenizer.autoencoder.named_parameters()}
        for name, expected in theirs.items():
            gradient = ours_by_name[name]
            assert gradient is not None, name
            close(gradient.view(expected.shape), expected, name, GRADIENT)


# --- statistics ---------------------------------------------------------------------------------------------------


@each("statistics")
@torch.no_grad()
def test_statistics_are_those_of_means(path: Path) -> None:
    io, tokenizer = load_file(path), tokenizer_of(path)
    batches = [io[name] for name in sorted(io) if re.fullmatch(r"images\d*", name)]
    tokenizer.fit(batches)
    z = tokenizer.latent_channels
    close(tokenizer.mean, io["channel_mean"][:z], "mean")
    close(tokenizer.std, io["channel_std"][:z], "std")
    tokens = tokenizer.tokens(tokenizer.moments(batches[0]))
    if "tokens_normalised" in io:
        close(on_grid(tokenizer, tokens), io["tokens_normalised"], "tokens")
    if "reconstructed" in io:
        close(tokenizer.decode(tokens) / 2 + 0.5, io["reconstructed"], "reconstructed")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*_stats.pkl")), ids=lambda path: path.stem)
def test_the_official_file_of_statistics(path: Path) -> None:
    beside = path.with_name(path.name.replace("_stats.pkl", "_statistics.safetensors"))
    if not beside.exists():
        pytest.skip("no file has the same numbers")
    io = load_file(beside)
    z = len(io["channel_mean"]) // 2
    mean, std = read_statistics(path, z)
    close(torch.tensor(mean), io["channel_mean"][:z], "mean")
    close(torch.tensor(std), io["channel_std"][:z], "std")
    tokenizer = tokenizer_of(beside, statistics=(mean, std), size=list(io["images0"].shape[-2:]))
    tokens = tokenizer.tokens(tokenizer.moments(io["images0"]))
    close(on_grid(tokenizer, tokens), io["tokens_normalised"], "tokens")


# --- tables and full size -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(FOLDER.glob("rope_*.safetensors")), ids=lambda path: path.stem)
def test_tables_of_angles(path: Path) -> None:
    found = re.search(r"rope_(\d+)x(\d+)_head(\d+)", path.stem)
    if found is None:
        pytest.skip("the name does not tell the sizes")
    h, w, d = map(int, found.groups())
    close(torch.cat([*angle_table((h, w), d)], dim=1), load_file(path)["rope"], path.stem, TABLE)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("keys_detok_*.json")), ids=lambda path: path.stem)
def test_official_names_and_shapes_of_the_full_size(path: Path) -> None:
    """Without allocating any of them; those of a generator are MAR's."""
    listed = json.loads(path.read_text())
    shapes = {name: tuple(shape) for name, shape in listed["shapes"].items()}
    with torch.device("meta"):
        tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
        if "decoder.mask_token" not in tensors:
            config = infer(tensors, path.name)
            trunks = [{key: preset.model.get(key) for key in ("width", "depth")} for preset in PRESETS.values()]
            assert {key: config[key] for key in ("width", "depth")} in [
                {key: [value] * 2 if isinstance(value, int) else value for key, value in trunk.items()}
                for trunk in trunks
            ]
            return
        L, stride = shapes["encoder.positional_embedding"][1], shapes["encoder.patch_embed.0.weight"][-1]
        tokenizer = Detok(
            round(L**0.5) * stride,
            stride=stride,
            latent_channels=shapes["decoder.decoder_embed.weight"][1],
            width=[shapes[f"{half}.ln_pre.weight"][0] for half in OURS],
            depth=[len({n.split(".")[2] for n in shapes if n.startswith(f"{half}.transformer.")}) for half in OURS],
            heads=[shapes[f"{half}.ln_pre.weight"][0] // 64 for half in OURS],
        )
    ours = {name: tuple(tensor.shape) for name, tensor in detok_tensors(tokenizer).items()}
    assert ours == shapes
    assert sum(p.numel() for p in tokenizer.parameters()) == listed["parameters"]
    if "_BB_" in path.stem:
        default = Detok.__init__.__kwdefaults__ or {}
        assert all(tokenizer.config[key] == [default[key]] * 2 for key in ("width", "depth", "heads"))

"""Tokenizer folders: weights and statistics come back, alone or from a model, with other sizes or other statistics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_bundle

from seriatim.backbones.masked_transformer import Masked
from seriatim.checkpoints.native import CONFIG, TOKENIZER, Bundle, load_bundle, save_bundle
from seriatim.checkpoints.tokenizer import load_tokenizer, read_provenance, save_tokenizer
from seriatim.core.errors import CheckpointError, ConfigError, UsageError
from seriatim.core.files import MANIFEST, write_manifest
from seriatim.heads.diffusion import Diffusion
from seriatim.models.masked_model import MaskedModel
from seriatim.pipeline.loading import load
from seriatim.pipeline.pipeline import Pipeline
from seriatim.tokenizers.base import Tokenizer
from seriatim.tokenizers.kl import KL
from seriatim.tokenizers.latent import Latent
from seriatim.tokenizers.pretrained import Pretrained


def tiny_kl(**settings: Any) -> KL:
    torch.manual_seed(0)
    defaults = {"channels": 1, "block_out_channels": (32, 32), "layers_per_block": 1, "latent_channels": 2}
    return KL(8, **{**defaults, **settings})


def tiny_pretrained(folder: Path) -> Pretrained:
    from diffusers.models import AutoencoderTiny

    torch.manual_seed(0)
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(folder)
    return Pretrained(8, 2, path=str(folder), statistics="channel")


def same(one: Tokenizer, two: Tokenizer) -> bool:
    ours, theirs = one.state_dict(), two.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_round_trip_is_exact(tmp_path: Path) -> None:
    for tokenizer in (tiny_kl(statistics="scale"), tiny_pretrained(tmp_path / "vae")):
        tokenizer.fit([torch.rand(4, tokenizer.channels, 8, 8)])
        folder = save_tokenizer(tokenizer, tmp_path / "t", {"from": "a test"})
        assert {p.name for p in folder.iterdir()} == {CONFIG, TOKENIZER, MANIFEST}
        state = torch.get_rng_state()
        again = load_tokenizer(folder)
        assert torch.equal(state, torch.get_rng_state()), "loading draws no random numbers"
        assert same(again, tokenizer) and again.config == tokenizer.config
        assert again.fingerprint() == tokenizer.fingerprint()
        assert not any(p.requires_grad for p in again.parameters())
        assert read_provenance(folder) == {"from": "a test"}
        again.fit([torch.rand(4, tokenizer.channels, 8, 8)])
        assert same(again, tokenizer), "what was measured is not measured again"


@pytest.mark.parametrize("kind", ["kl", "pretrained"])
def test_a_model_takes_its_tokenizer_along(tmp_path: Path, kind: str) -> None:
    tokenizer: Latent = tiny_kl(statistics="channel") if kind == "kl" else tiny_pretrained(tmp_path / "vae")
    tokenizer.fit([torch.rand(4, tokenizer.channels, 8, 8)])
    backbone = Masked(tokenizer.count, tokenizer.dim, width=32, depth=1, heads=2, buffer=1)
    model = MaskedModel(backbone, Diffusion(tokenizer.dim, 16, 1), classes=2)
    sampling = {"num_inference_steps": 3, "num_diffusion_steps": 4}
    pipe = Pipeline(Bundle(model, tokenizer, sampling=sampling))
    folder = pipe.save(tmp_path / "run" / "model")
    if kind == "pretrained":
        (tmp_path / "vae").rename(tmp_path / "elsewhere")
    again = load(folder, device="cpu")
    assert same(again.tokenizer, tokenizer)
    one, two = (p([0, 1], seed=5, output_type="np").images for p in (pipe, again))
    assert one.shape == (2, 8, 8, tokenizer.channels) and (one == two).all()
    assert same(load_tokenizer(tmp_path / "run"), tokenizer), "a run folder stands in for a tokenizer's"


def test_overrides(tmp_path: Path) -> None:
    tokenizer = tiny_kl(statistics="channel")
    tokenizer.fit([torch.rand(4, 1, 8, 8)])
    folder = save_tokenizer(tokenizer, tmp_path / "t")
    bigger = load_tokenizer(folder, size=[16, 32], patch=2)
    assert isinstance(bigger, Latent) and (bigger.grid, bigger.dim) == ((4, 8), 8)
    assert same(bigger, tokenizer), "statistics are those of channels"
    assert same(load_tokenizer(folder, statistics="channel", kind="kl"), tokenizer), "nothing has changed"
    fixed = load_tokenizer(folder, scale=0.5)
    assert isinstance(fixed, Latent) and fixed.std.tolist() == [2.0, 2.0]
    fixed.fit([torch.rand(4, 1, 8, 8)])
    assert fixed.std.tolist() == [2.0, 2.0], "a scale that was given is not measured"
    anew = load_tokenizer(folder, statistics="scale")
    assert isinstance(anew, Latent) and not anew.measured
    assert load_tokenizer(save_tokenizer(fixed, tmp_path / "f")).config["statistics"] == "fixed"


def test_pixels_come_back_too(model_folder: Path) -> None:
    assert same(load_tokenizer(model_folder), load_bundle(model_folder).tokenizer)
    with pytest.raises(ConfigError, match=r"tokenizer\.patch: does not go with the weights in"):
        load_tokenizer(model_folder, patch=1)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"pach": 2}, "did you mean 'patch'"),
        ({"patch": 3}, "tokenizer.size: 8x8 is not allowed"),
        ({"latent_channels": 4}, "tokenizer.latent_channels: does not go with the weights"),
        ({"kind": "nosuch"}, "tokenizer.kind: 'nosuch'"),
    ],
)
def test_an_override_that_does_not_fit_is_named(tmp_path: Path, overrides: dict[str, Any], words: str) -> None:
    folder = save_tokenizer(tiny_kl(), tmp_path / "t")
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(folder, **overrides)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_damage_is_named(tmp_path: Path) -> None:
    folder = save_tokenizer(tiny_kl(), tmp_path / "t")
    whole = (folder / TOKENIZER).read_bytes()
    (folder / TOKENIZER).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=TOKENIZER):
        load_tokenizer(folder)
    (folder / TOKENIZER).write_bytes(whole)
    for change, words in (({"format": 9}, "format 9"), ({"tokenizer": {"kind": "x"}}, "tokenizer.kind"), ({}, "")):
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, **change} if change else {"format": 1}))
        write_manifest(folder, (CONFIG, TOKENIZER))
        with pytest.raises(CheckpointError, match=CONFIG) as caught:
            load_tokenizer(folder)
        assert words in str(caught.value)
        (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no such folder"):
        load_tokenizer(tmp_path / "nothing")


def test_a_model_is_not_replaced_by_a_tokenizer(tmp_path: Path) -> None:
    folder = save_bundle(make_bundle(), tmp_path / "m")
    with pytest.raises(UsageError, match="holds a model"):
        save_tokenizer(tiny_kl(), folder)
    load_bundle(folder)
    save_tokenizer(tiny_kl(), tmp_path / "t")
    save_tokenizer(tiny_kl(), tmp_path / "t")

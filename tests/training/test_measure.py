"""Latents in recipes: a tokenizer folder to begin with, statistics measured once, resumed runs that keep them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from seriatim.checkpoints.native import load_bundle
from seriatim.checkpoints.tokenizer import load_tokenizer, read_provenance, save_tokenizer
from seriatim.cli.main import run
from seriatim.core.errors import ConfigError, UsageError
from seriatim.core.files import sha256
from seriatim.data.base import Digits
from seriatim.tokenizers.kl import KL
from seriatim.tokenizers.latent import Latent
from seriatim.training.config import Recipe, read_recipe
from seriatim.training.loop import train
from seriatim.training.measure import look_over, measure_latents
from seriatim.training.setup import build_inputs

TINY = [
    "model.width=32", "model.depth=1", "model.heads=2", "model.head.width=32", "model.head.depth=1",
    "training.images=256", "training.dtype=float32", "training.threads=1", "training.warmup_images=64",
    "sampling.num_inference_steps=4",
]  # fmt: skip


def recipe(tokenizer: dict[str, Any], *overrides: str) -> Recipe:
    return read_recipe("mar-digits", [*TINY, f"tokenizer={json.dumps(tokenizer)}", *overrides])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer folder: random weights, a fixed scale."""
    torch.manual_seed(0)
    tokenizer = KL(16, channels=1, block_out_channels=(32, 32), layers_per_block=1, latent_channels=2)
    return save_tokenizer(tokenizer, tmp_path / "kl", {"source": "a test"})


def test_measured_statistics_travel(tmp_path: Path, folder: Path) -> None:
    """From a folder into a recipe, a run, its model; nobody measures them again."""
    result = measure_latents(recipe({"from": str(folder)}), tmp_path / "m", images=200, device="cpu", quiet=True)
    assert result is not None
    assert result.measured.images == len(range(0, 1437, 1437 // 200))
    tokenizer = load_tokenizer(tmp_path / "m")
    assert isinstance(tokenizer, Latent) and tokenizer.measured
    assert torch.equal(tokenizer.mean, result.measured.mean) and tokenizer.size == (8, 8)
    provenance = read_provenance(tmp_path / "m")
    assert provenance["from"]["source"] == "a test"
    said = provenance["statistics"]
    assert said["data"]["fingerprint"] == Digits().fingerprint() and said["images"] == result.measured.images
    assert said["sha256"] == result.sha256 and said["kind"] == "channel"

    train(recipe({"from": str(tmp_path / "m"), "patch": 2}), tmp_path / "run", device="cpu", quiet=True)
    trained = load_bundle(tmp_path / "run").tokenizer
    assert isinstance(trained, Latent) and trained.patch == 2 and trained.count == 4
    assert torch.equal(trained.mean, tokenizer.mean) and torch.equal(trained.std, tokenizer.std)

    other = recipe({"from": str(tmp_path / "m"), "patch": 2}, f"training.init_from={tmp_path / 'run'}")
    train(other, tmp_path / "again", device="cpu", quiet=True)
    assert torch.equal(load_bundle(tmp_path / "again").tokenizer.get_buffer("std"), tokenizer.std)


def test_a_resumed_run_keeps_what_it_measured(tmp_path: Path, folder: Path) -> None:
    given = {"from": str(folder), "statistics": "channel"}
    for name, stops in (("whole", [256]), ("parts", [128, 256])):
        for number, images in enumerate(stops):
            settings = recipe(
                given, f"training.images={images}", "training.save_images=128", "training.schedule=constant"
            )
            train(settings, tmp_path / name, device="cpu", quiet=True, resume=number > 0)
    whole, parts = (load_bundle(tmp_path / name) for name in ("whole", "parts"))
    assert isinstance(parts.tokenizer, Latent) and parts.tokenizer.measured
    assert parts.tokenizer.fingerprint() == whole.tokenizer.fingerprint()
    for name in ("model.safetensors", "tokenizer.safetensors"):
        assert sha256(tmp_path / "whole" / "model" / name) == sha256(tmp_path / "parts" / "model" / name)


def test_every_image_is_looked_at_once() -> None:
    assert sum(len(images) for images in look_over(Digits(), 10_000, 512, quiet=True)) == 1437


def test_recipes_that_cannot_work_are_one_line(tmp_path: Path, folder: Path) -> None:
    for tokenizer, words in (
        ({"kind": "kl", "block_out_channels": [32], "latent_channels": 2}, "random weights"),
        ({"from": 3}, "tokenizer.from: 3"),
        ({"from": str(folder), "pach": 2}, "did you mean 'patch'"),
        ({"from": str(folder), "size": 16}, "the data has 1 x 8 x 8"),
    ):
        with pytest.raises(ConfigError) as caught:
            build_inputs(recipe(tokenizer))
        assert words in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"tokenizer\.from: there is no folder .*; make one with"):
        build_inputs(recipe({"from": str(tmp_path / "nothing")}))
    with pytest.raises(ConfigError, match="'pixels' has no latents"):
        measure_latents(recipe({"kind": "pixels", "patch": 2}), tmp_path / "m", device="cpu")
    with pytest.raises(UsageError, match="num: 0"):
        measure_latents(recipe({"from": str(folder)}), tmp_path / "m", images=0, device="cpu")
    assert not (tmp_path / "m").exists()


def test_command_line(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["measure-latents", "mar-digits", f"tokenizer={{from: {folder}}}", "--num", "100", "--device", "cpu"]
    assert run([*arguments, "--out", str(tmp_path / "a"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert len(said["mean"]) == len(said["std"]) == 2 and said["statistics"] == "channel"
    assert run([*arguments, "--out", str(tmp_path / "b"), "--statistics", "scale"]) == 0
    captured = capsys.readouterr()
    assert f"{said['scale']:.5g}" in captured.out and "tokenizer.from=" in captured.err
    tokenizer = load_tokenizer(tmp_path / "b")
    assert isinstance(tokenizer, Latent) and not tokenizer.mean.any()
    assert tokenizer.std.tolist() == pytest.approx([1 / said["scale"]] * 2)
    assert run([*arguments, "--out", str(tmp_path / "c"), "--statistics", "chanel"]) == 2
    assert "did you mean 'channel'" in capsys.readouterr().err

"""The whole road of an autoencoder's latents: official file, tokenizer folder, statistics, cache, training, images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import seriatim
from seriatim.checkpoints.kl16 import kl16_from_tokenizer
from seriatim.checkpoints.tokenizer import load_tokenizer
from seriatim.cli.main import run
from seriatim.models.build import seeded
from seriatim.tokenizers.kl import KL

SMALL = [
    "data.size=16", "model.width=32", "model.depth=1", "model.heads=2", "model.buffer=2",
    "model.head={kind: diffusion, width: 16, depth: 1, draws: 1}",
    "training.images=12", "training.batch_size=4", "training.accumulate=1", "training.workers=0",
    "training.log_images=4", "training.save_images=0", "training.sample_images=0", "training.warmup_images=0",
    "training.threads=1", "training.dtype=float32",
    "sampling.num_inference_steps=4", "sampling.num_diffusion_steps=5",
]  # fmt: skip


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """photos/{cat,dog}, and an official autoencoder file whose latents are far from unit variance."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for i in range(10):
        path = tmp_path / "photos" / ("cat" if i % 2 else "dog") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (20, 18, 3), dtype=np.uint8)).save(path)
    with seeded(0):
        autoencoder = KL(16, latent_channels=2, block_out_channels=(32, 32), layers_per_block=1)
    tensors = kl16_from_tokenizer(autoencoder)
    tensors["quant_conv.bias"] = tensors["quant_conv.bias"] + torch.tensor([5.0, -3.0, 0.0, 0.0])
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "vae.safetensors")
    return tmp_path


def test_from_an_official_file_to_images(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = ["mar-imagenet256", "data.path=photos", *SMALL]
    latents = ["mar-imagenet256", "data={kind: latents, path: latents}", *SMALL[1:]]
    assert run(["convert", "kl16", "vae.safetensors", "vae", "--size", "16"]) == 0
    assert run(["measure-latents", *images, "tokenizer.from=vae", "--out", "kl"]) == 0
    tokenizer = load_tokenizer(work / "kl", size=16)
    assert isinstance(tokenizer, KL) and tokenizer.mean[0] > 2 > -1 > tokenizer.mean[1]
    pictures = [
        np.asarray(Image.open(p).convert("RGB").resize((16, 16))) for p in sorted((work / "photos").rglob("*.png"))
    ]
    batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    tokens = tokenizer.tokens(tokenizer.moments(batch))
    assert tokens.mean().abs() < 0.3 and 0.05 < tokens.std() < 1.5, "normalised, as far as the mode of a posterior is"

    assert run(["cache", *images, "tokenizer.from=kl", "--out", "latents", "--shard-images", "4"]) == 0
    assert run(["train", *latents, "tokenizer.from=kl", "--out", "cached"]) == 0
    assert run(["train", *images, "tokenizer.from=kl", "--out", "direct"]) == 0
    one, two = (seriatim.load(work / name, device="cpu") for name in ("cached", "direct"))
    assert one.class_names == ["cat", "dog"]
    for name, tensor in one.model.state_dict().items():
        assert torch.allclose(tensor, two.model.state_dict()[name], atol=1e-5), name
    assert torch.equal(one.tokenizer.state_dict()["mean"], tokenizer.state_dict()["mean"]), (
        "statistics travel with the model"
    )
    result = one(class_labels=["cat"], seed=0, guidance_scale=1.0, output_type="np")
    assert result.images.shape == (1, 16, 16, 3)

    # Moments don't know of patches: the same cache serves them. They do know of weights.
    assert run(["train", *latents, "tokenizer.from=kl", "tokenizer.patch=2", "--out", "patches"]) == 0
    assert seriatim.load(work / "patches", device="cpu").model.backbone.dim == 8
    with seeded(1):
        other = KL(16, latent_channels=2, block_out_channels=(32, 32), layers_per_block=1)
    save_file({k: v.contiguous() for k, v in kl16_from_tokenizer(other).items()}, work / "other.safetensors")
    assert run(["convert", "kl16", "other.safetensors", "other", "--size", "16"]) == 0
    capsys.readouterr()
    assert run(["train", *latents, "tokenizer.from=other", "--out", "refused"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "was made with other weights" in lines[0], lines
    assert run(["train", *latents, "tokenizer.from=kl", "tokenizer.size=32", "--out", "refused"]) == 2
    assert "size" in capsys.readouterr().err
    assert not (work / "refused").exists()

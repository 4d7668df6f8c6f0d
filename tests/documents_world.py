"""A folder in which the commands of the documents run: everything that they name is there, at toy size."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers import official_tensors, randomise
from PIL import Image

from seriatim.checkpoints.arinar import arinar_tensors
from seriatim.checkpoints.detok_weights import detok_tensors
from seriatim.checkpoints.ear import official_name as ear_name
from seriatim.checkpoints.kl16 import kl16_from_tokenizer, tokenizer_from_kl16
from seriatim.checkpoints.llamagen import llamagen_tensors
from seriatim.checkpoints.mar import mar_tensors
from seriatim.checkpoints.native import Bundle, save_bundle
from seriatim.checkpoints.tokenizer import save_tokenizer
from seriatim.evaluation.residual_net import ResNet, TrainedClassifier, save_classifier
from seriatim.models.base import SequenceModel
from seriatim.models.build import build_model, seeded
from seriatim.tokenizers.detok import Detok
from seriatim.tokenizers.kl import KL
from seriatim.tokenizers.pixels import Pixels
from seriatim.tokenizers.vq import VQ
from seriatim.zoo import VAR_BLOCK

SMALL: dict[str, Any] = {"width": 32, "depth": 1, "heads": 2}
MASKED: dict[str, Any] = {"kind": "masked", "tokens": 16, "dim": 16, **SMALL, "buffer": 4, "classes": 1000}
DIFFUSION: dict[str, Any] = {"kind": "diffusion", "width": 32, "depth": 1}
EAR: dict[str, Any] = {**MASKED, "backbone": "bidirectional", "head": {"kind": "energy", "width": 32, "depth": 1}}
NESTED: dict[str, Any] = {
    "kind": "nested",
    "split": {"kind": "features"},
    "model": {
        "kind": "causal", "width": 32, "depth": 1, "heads": 4, **VAR_BLOCK,
        "head": {"kind": "mixture", "components": 2, "depth": 0},
    },
}  # fmt: skip
CODES: dict[str, Any] = {"kind": "causal", "tokens": 16, "vocab": 40, **SMALL, "width": 64, "rotate_prefix": False,
                         "classes": 1000, "head": {"kind": "categorical", "bias": False}}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "mar-b": {**MASKED, "head": DIFFUSION},
    "arinar-b": {**MASKED, "head": NESTED},
    "llamagen-b": CODES,
}
SAMPLING = {"num_inference_steps": 3, "guidance_scale": 2.0}
PRESETS_DRAW: dict[str, dict[str, Any]] = {
    "mar-b": {**SAMPLING, "num_diffusion_steps": 4},
    "arinar-b": SAMPLING,
    "llamagen-b": {"guidance_scale": 2.0, "guidance_schedule": "constant"},
}
PHOTOGRAPHED = ["airplane", "automobile", "dog", "horse", "ship", "truck"]
JOBS = """{"label": "3", "num_images_per_label": 2, "name": "threes"}
{"class_labels": ["4", 5], "seeds": [11, 12], "guidance_scale": 3.0}
"""
SIDE = 8  # of the images of both autoencoders: 4 x 4 tokens
RECIPE = """
name: toy
seed: 0
data: {kind: folder, path: photos, size: 8}
tokenizer: {from: kl16}
model: {kind: masked, width: 32, depth: 1, heads: 2, buffer: 4, head: {kind: diffusion, width: 32, depth: 1}}
training: {images: 8, batch_size: 4, log_images: 4, sample_images: 0, save_images: 0}
sampling: {num_inference_steps: 2, num_diffusion_steps: 5}
"""


def network(config: dict[str, Any], seed: int = 0) -> SequenceModel:
    with seeded(0):
        model = build_model(config)
    randomise(model, seed, scale=0.05)
    return model.eval()


def pictures(folder: Path, side: int, each: int, classes: list[str]) -> None:
    random = np.random.default_rng(len(folder.as_posix()) + len(folder.name))  # none is in two folders
    for label in classes:
        (folder / label).mkdir(parents=True)
        for i in range(each):
            pixels = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{i}.png")


def of_pixels(
    folder: Path, tokenizer: Pixels, names: list[str], head: dict[str, Any], *, seed: int = 0, **sampling: int
) -> None:
    """A model of pixels, as a run holds it."""
    config = {**MASKED, "tokens": tokenizer.count, "dim": tokenizer.dim, "classes": len(names), "head": head}
    save_bundle(Bundle(network(config, seed), tokenizer, names, {**SAMPLING, **sampling}), folder)


def make(root: Path) -> Path:
    """Everything that the documents name without telling how it is made, at toy size."""
    digits = [str(i) for i in range(10)]
    of_pixels(root / "demo" / "model", Pixels(8, 2, 1), digits, DIFFUSION, num_diffusion_steps=4)
    for seed, name in enumerate(("base-0", "base-1", "new-0", "new-1")):
        of_pixels(root / "runs" / name / "model", Pixels(8, 2, 1), digits, DIFFUSION, seed=seed, num_diffusion_steps=4)
    colour = Pixels(32, 8, 3)
    of_pixels(root / "runs" / "cifar10" / "model", colour, PHOTOGRAPHED, DIFFUSION, num_diffusion_steps=4)
    of_pixels(
        root / "runs" / "arinar" / "model", Pixels(8, 2, 3), PHOTOGRAPHED, NESTED
    )  # few features: they are drawn one by one
    with seeded(0):
        net = ResNet(len(PHOTOGRAPHED), widths=[4], depth=[0]).eval()
    trained = TrainedClassifier(net, "toy", (32, 32), PHOTOGRAPHED, {}, {})
    save_classifier(trained, root / "runs" / "classifier" / "model")
    for folder, classes in (("cifar10/train", PHOTOGRAPHED), ("cifar10/test", PHOTOGRAPHED), ("photos", ["a", "b"])):
        pictures(root / folder, 32, 6 if folder != "photos" else 24, classes)
    pictures(root / "other-photos", 32, 24, ["a", "b"])
    pictures(root, 32, 8, ["cars"])
    shutil.copy(root / "photos" / "a" / "0.png", root / "horse.png")
    Image.fromarray(np.repeat([[0, 255]], 16, axis=1).repeat(32, axis=0).astype(np.uint8)).save(root / "mask.png")

    with seeded(0):
        kl = KL(SIDE, block_out_channels=(32, 32), layers_per_block=1)
        vq = VQ(SIDE, vocab=40, code_dim=4, latent_channels=32, block_out_channels=(32, 32), layers_per_block=1)
        detok = Detok(SIDE, stride=2, width=512, depth=1, heads=8)
    torch.save({"model_ema": detok_tensors(detok)}, root / "detok-BB-gamm3.0-m0.7.pth")
    numbers = (torch.zeros(32), torch.ones(32))
    (root / "stats.pkl").write_bytes(pickle.dumps({"detok-BB-gamm3.0-m0.7": {"channel": numbers}}))
    tensors = kl16_from_tokenizer(kl)
    torch.save({"model": tensors}, root / "kl16.ckpt")
    kl = tokenizer_from_kl16(tensors, "kl16.ckpt", size=SIDE)
    save_tokenizer(kl, root / "kl16")
    torch.save({"model": official_tensors(vq)}, root / "vq_ds16_c2i.pt")
    mar = network(PRESETS["mar-b"])
    torch.save({"model": mar_tensors(mar), "model_ema": mar_tensors(mar)}, root / "checkpoint-last.pth")
    save_bundle(Bundle(mar, kl, [], {**SAMPLING, "num_diffusion_steps": 4}), root / "mar-b.model")
    arinar = arinar_tensors(network(PRESETS["arinar-b"]))
    torch.save({"model": arinar, "model_ema": arinar}, root / "arinar-last.pth")
    ear = network(EAR)
    tensors = {ear_name(name): tensor for name, tensor in ear.state_dict().items()}
    tensors |= {name: tensors[name][None] for name in ("mask_token", "decoder_pos_embed_learned")}
    torch.save({"model": tensors, "model_ema": tensors}, root / "ear-last.pth")
    codes = network(CODES)
    torch.save({"model": llamagen_tensors(codes)}, root / "c2i_B_256.pt")
    save_bundle(Bundle(codes, vq, [], {"guidance_scale": 2.0}), root / "llamagen-b.model")
    (root / "my.yaml").write_text(RECIPE)
    (root / "jobs.jsonl").write_text(JOBS)
    bench, ignored = Path(__file__).parent / "bench", shutil.ignore_patterns("__pycache__")
    for double, place in (("checkout", "path/to/mar"), ("arinar", "path/to/Arinar"), ("llamagen", "LlamaGen")):
        shutil.copytree(bench / double, root / place, ignore=ignored)
    return root

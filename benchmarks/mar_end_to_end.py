"""Full-size MAR-B and KL-16 with random weights on real images, through every command: seconds and peak memory.

    python benchmarks/mar_end_to_end.py photos/ --images 100

Random weights in the official layouts -> convert -> cache -> three training steps -> convert -> one image. The weights
mean nothing, so neither does the image: this shows that every part takes the full size, and what it costs. `--toy` does
the same with a model of a few thousand weights in the same layouts, to see that the commands still fit together.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# At toy size: an autoencoder of one halving, and a model of 4 x 4 of its latents.
TOY_AUTOENCODER: dict[str, Any] = {"size": 8, "block_out_channels": (32, 32), "layers_per_block": 1}
TOY_MODEL: dict[str, Any] = {"width": 32, "depth": 1, "heads": 2, "buffer": 4}
TOY_HEAD: dict[str, Any] = {"kind": "diffusion", "width": 32, "depth": 1}


def random_weights(folder: Path, toy: bool) -> None:
    """`kl16.ckpt` and `checkpoint-last.pth` as the authors lay them out."""
    import torch

    from seriatim.checkpoints.kl16 import kl16_from_tokenizer
    from seriatim.checkpoints.mar import mar_tensors
    from seriatim.models.build import build_model, seeded
    from seriatim.tokenizers.kl import KL
    from seriatim.zoo import PRESETS

    with seeded(0):
        autoencoder = KL(**TOY_AUTOENCODER) if toy else KL()
        torch.save({"model": kl16_from_tokenizer(autoencoder)}, folder / "kl16.ckpt")
        config = PRESETS["mar-b"].model
        if toy:
            config = {**config, **TOY_MODEL, "tokens": 16, "head": TOY_HEAD}
        tensors = mar_tensors(build_model(config))
    arguments = argparse.Namespace(model="mar_base", diffusion_batch_mul=4)
    torch.save({"model": tensors, "model_ema": tensors, "epoch": 0, "args": arguments}, folder / "checkpoint-last.pth")


def measured(what: str, command: list[str], folder: Path) -> None:
    """Run a command; print its seconds and the most memory that it or a child of it held."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)}\n{errors}")
    peak = usage.ru_maxrss
    print(f"| {what} | {time.perf_counter() - begin:.1f} s | {peak / 2**20:.2f} GiB |", flush=True)  # noqa: T201


def main(command: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="a folder of images, flat or in class folders")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--steps", type=int, default=64, help="steps over the image")
    parser.add_argument("--toy", action="store_true", help="a model of a few thousand weights")
    arguments = parser.parse_args(command)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_weights(folder, arguments.toy)
        photos = folder / "photos"
        photos.mkdir()
        files = sorted(
            p for p in arguments.photos.resolve().rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png")
        )
        for i, path in enumerate(files[:: max(1, len(files) // arguments.images)][: arguments.images]):
            (photos / f"{i:04d}{path.suffix}").symlink_to(path)
        seriatim = [sys.executable, "-m", "seriatim"]
        cached = ["data={kind: latents, path: latents}", "tokenizer.from=kl16"]
        small = ["training.images=24", "training.batch_size=8", "training.accumulate=1", "training.workers=0"]
        small += ["training.save_images=0", "training.sample_images=0", "training.log_images=8", "model.classes=0"]
        vae, heads, images = ["--size", "256"], [], ["data.path=photos"]
        if arguments.toy:
            vae, heads, images = (
                ["--size", "8"],
                ["--heads", "2"],
                ["data.path=photos", "data.size=8", "training.workers=0"],
            )
            small += ["sampling.num_inference_steps=16", *(f"model.{key}={value}" for key, value in TOY_MODEL.items())]
            small += [f"model.head.{key}={value}" for key, value in TOY_HEAD.items()]
        steps = {
            "convert kl16": ["convert", "kl16", "kl16.ckpt", "kl16", *vae],
            f"cache, {arguments.images} images, both flips": [
                "cache", "mar-imagenet256", *images, "tokenizer.from=kl16", "--out", "latents",
            ],
            "train, 3 steps of 8": ["train", "mar-imagenet256", *cached, *small, "--out", "run"],
            "convert mar": ["convert", "mar", "checkpoint-last.pth", "mar-b.model", "--vae", "kl16", *heads],
            f"sample, one image, {arguments.steps} steps of 100, guidance 2.9": [
                "sample", "mar-b.model", "--label", "207", "--out", "out",
                "--num-inference-steps", f"{arguments.steps}",
            ],
        }  # fmt: skip
        print("| what | time | peak memory |\n|---|---|---|")  # noqa: T201
        for what, words in steps.items():
            measured(what, [*seriatim, *words], folder)


if __name__ == "__main__":
    main()

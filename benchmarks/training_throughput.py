"""How much of the model's own speed a training run keeps: images/s of `seriatim train` over those of a bare loop.

    python benchmarks/training_throughput.py mar-cifar10 data.path=cifar10/train --images 4096

The bare loop runs the same model, batch, dtype and threads on random tokens: loss, backward, clip, step, average. It
reads no image, logs nothing and saves nothing. Both run in turn, several times, in one process; the median of the
ratios is printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from seriatim.core.device import DTYPES
from seriatim.core.random import Noise
from seriatim.training.config import Recipe, read_recipe
from seriatim.training.loop import train
from seriatim.training.optim import adamw, averaged
from seriatim.training.precision import threads
from seriatim.training.setup import build


def bare(recipe: Recipe, images: int) -> float:
    """Images/s of the model alone."""
    settings = recipe.training
    _, tokenizer, model = build(recipe)
    optimiser = adamw(model.train(), settings.learning_rate, settings.betas, settings.weight_decay)
    average = averaged(model, settings.ema)
    size, dtype = settings.batch_size, DTYPES[settings.dtype]
    tokens = torch.randn(size, tokenizer.count, tokenizer.dim)
    labels = torch.zeros(size, dtype=torch.long) if model.classes else None
    with threads(int(settings.threads)):
        begin = time.perf_counter()
        for step in range(images // size):
            with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                loss = model.loss(tokens, labels, Noise.shared(step, size)).mean
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            average.update_parameters(model)
        return images // size * size / (time.perf_counter() - begin)


def main(command: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args(command)
    for dtype in arguments.dtypes:
        fixed = [
            f"training.dtype={dtype}",
            f"training.threads={arguments.threads}",
            f"training.images={arguments.images}",
        ]
        fixed += ["training.save_images=0", "training.sample_images=0"]
        recipe = read_recipe(arguments.recipe, [*arguments.overrides, *fixed])
        pairs = []
        for _ in range(arguments.repetitions):
            with tempfile.TemporaryDirectory() as folder:
                ours = train(recipe, Path(folder) / "run", device="cpu", quiet=True).images_per_second
                rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
            pairs.append((ours, bare(recipe, arguments.images), statistics.mean(row["loader_share"] for row in rows)))
        ratio = statistics.median(ours / alone for ours, alone, _ in pairs)
        ours, alone, waiting = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(  # noqa: T201
            f"{dtype}, {arguments.threads} threads: {ours:.1f} images/s, bare loop {alone:.1f}, ratio {ratio:.3f} "
            f"(median of {arguments.repetitions}), waiting for images {waiting:.1%} of the time"
        )


if __name__ == "__main__":
    main()

"""What a model did not know when it drew, as a picture: samples, and below each the entropy of its tokens.

    python benchmarks/entropy_pictures.py runs/arinar entropy.png --classes airplane automobile ship truck

For models whose head has a density feature by feature. A token's number is the mean over its features, in nats.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch

from seriatim.core.files import atomic_write
from seriatim.pipeline import load

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(command: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--classes", nargs="*", default=[], help="which, of the model's; default: the first four")
    parser.add_argument("--per-class", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args(command)
    torch.set_num_threads(1)
    pipe = load(a.model, device="cpu")
    names = a.classes or pipe.class_names[:4]
    request = {"class_labels": names, "num_images_per_label": a.per_class, "seed": a.seed, "guidance_scale": 1.0}
    entropy = torch.zeros(0)
    for step in pipe.stream(**request, batch_size=len(names) * a.per_class):  # all in each step
        drawn = step.entropy().mean(dim=-1)  # (B, L)
        if step.index == 0:
            entropy = torch.full_like(drawn, torch.nan)
        entropy = torch.where(drawn.isnan(), entropy, drawn)
    maps = entropy.unflatten(1, pipe.tokenizer.grid).numpy()  # (B, h, w)
    pictures = step.preview()
    figure, panels = plt.subplots(
        2, len(pictures), figsize=(1.2 * len(pictures) + 1, 2.6), layout="constrained", squeeze=False
    )
    low, high = np.quantile(maps, (0.02, 0.98))
    for (above, below), picture, seen in zip(panels.T, pictures, maps, strict=True):
        above.imshow(picture, cmap="gray" if picture.mode == "L" else None)
        shown = below.imshow(seen, cmap="viridis", vmin=low, vmax=high)
        above.axis("off")
        below.axis("off")
    figure.colorbar(shown, ax=panels, label="nats a feature", shrink=0.8)
    atomic_write(a.out, lambda file: figure.savefig(file, dpi=110, format="png"))
    print(f"{len(pictures)} images; mean {entropy.mean():.2f} nats a feature")  # noqa: T201


if __name__ == "__main__":
    main()

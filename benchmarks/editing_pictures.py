"""What editing does, as a picture: original, mask, then repainted as its own class and as another.

    python benchmarks/editing_pictures.py demo/model digits editing-digits.png
    python benchmarks/editing_pictures.py runs/cifar10 cifar10/test editing-cifar10.png

Pictures are real ones that the model was not trained on: held-out digits, or files of class folders.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from seriatim.core.random import generator
from seriatim.evaluation.grid import grid, save_png
from seriatim.pipeline import load
from seriatim.sampling.result import as_pil
from seriatim.tokenizers.base import to_uint8
from seriatim.training.data import Digits, ImageData
from seriatim.training.folder import Folder
from seriatim.training.loader import to_float


def masks(H: int, W: int) -> list[Image.Image]:
    """A square in the middle, the right half, all but the middle (outpainting)."""
    rows, columns = np.mgrid[:H, :W]
    inside = (abs(rows - (H - 1) / 2) < H / 4) & (abs(columns - (W - 1) / 2) < W / 4)
    shapes = (inside, columns >= W // 2, ~inside)
    return [Image.fromarray(np.where(shape, 255, 0).astype(np.uint8)) for shape in shapes]


def main(command: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("pictures", help="digits, or a folder of class folders")
    parser.add_argument("out", type=Path)
    parser.add_argument("--classes", nargs="*", default=[], help="which, of the model's; default: the first three")
    arguments = parser.parse_args(command)
    torch.set_num_threads(1)
    pipe = load(arguments.model, device="cpu")
    size, channels = pipe.tokenizer.size, pipe.tokenizer.channels
    data: ImageData = Digits(held_out=True) if arguments.pictures == "digits" else Folder(
        arguments.pictures, size, channels, check=False
    )  # fmt: skip
    labels = data.labels(torch.arange(data.count))
    assert labels is not None
    names = arguments.classes or data.class_names[:3]
    rows: list[Image.Image] = []
    for number, (name, mask) in enumerate(zip(names, masks(*size), strict=False)):
        mine = (labels == data.class_names.index(name)).nonzero()[:, 0]
        pick = mine[torch.randint(len(mine), (1,), generator=generator(number))]
        picture = as_pil(to_uint8(to_float(data.images(pick))))[0]
        other = data.class_names[(data.class_names.index(name) + 1) % len(data.class_names)]
        rows += [picture, mask.convert(picture.mode)]
        for label in (name, other):
            rows += pipe.edit(picture, mask=mask, class_labels=[label], num_images_per_label=4, seed=number).images
        print(f"row {number + 1}: {name}, then four as {name}, four as {other}")  # noqa: T201
    save_png(grid(rows, columns=10, side=64), arguments.out)


if __name__ == "__main__":
    main()

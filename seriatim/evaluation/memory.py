"""Were training images copied? The samples nearest to one, beside it, for people to judge.

n samples, m training images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from seriatim.evaluation.blocks import Vectors, eight_bits
from seriatim.evaluation.grid import grid, save_png
from seriatim.evaluation.neighbours import neighbours
from seriatim.evaluation.reference import Part
from seriatim.pipeline.result import as_pil
from seriatim.tokenizers.base import to_uint8

COLUMNS = 7  # training images beside a sample
SIDE = 64


def nearest_picture(
    path: Path,
    samples: Vectors,
    train: Part,
    of_train: Vectors,
    draw: Callable[[Sequence[int]], Tensor],  # numbers of samples -> images (B, c, H, W) in [-1, 1]
    rows: int,
) -> list[dict[str, Any]]:
    """Write a picture: a row for each of the `rows` samples nearest to a training image, the nearest first.

    On the left the sample, then its nearest training images. Returns what each row shows.
    """
    columns = min(COLUMNS, len(of_train))
    ways, which = neighbours(samples.features, of_train.features, columns)  # (n, columns)
    chosen = np.argsort(ways[:, 0], kind="stable")[:rows]
    drawn = as_pil(to_uint8(draw([int(i) for i in chosen])))
    pictures, says = [], []
    for i, sample in zip(chosen, drawn, strict=True):
        index = train.index[which[i].tolist()]
        pictures += [sample, *as_pil(to_uint8(eight_bits(train.data.images(index))))]
        says.append({"sample": int(i), "distance": float(ways[i, 0]), "train": index.tolist()})
    save_png(grid(pictures, columns + 1, side=SIDE), path)
    return says

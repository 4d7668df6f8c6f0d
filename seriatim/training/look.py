"""Show how a run learns: samples at fixed seeds, and a picture of their progress over time."""

from __future__ import annotations

import contextlib
from pathlib import Path

from PIL import Image

from seriatim.checkpoints.native import Bundle
from seriatim.core.images import BadImage, read_png
from seriatim.core.stopping import StopRequest
from seriatim.evaluation.grid import grid, save_png
from seriatim.pipeline.labels import label_of
from seriatim.pipeline.pipeline import Pipeline
from seriatim.pipeline.result import save_array

IMAGES, COLUMNS = 32, 8
SIDE = 32  # small images are enlarged to about this side in a grid


class Interrupted(Exception):
    """The process was asked to stop while samples were generated."""


def draw_samples(bundle: Bundle, folder: Path, seen: int, seed: int, stop: StopRequest | None = None) -> Path | None:
    """Write samples to `folder/<images seen>.png`, with the same seeds and classes every time, and the timeline.

    Returns the path of the samples. If the model does not generate pictures, they go to `folder/<images seen>.npy`. If
    `stop` is requested meanwhile, nothing is written and None is returned.
    """

    def look(*_: object) -> None:
        if stop is not None and stop.requested:
            raise Interrupted

    pipe = Pipeline(bundle)  # on the device of the averaged weights
    classes = pipe.model.classes
    labels = [label_of(i % classes, pipe.class_names) if classes else None for i in range(IMAGES)]
    try:
        result = pipe(labels, seed=seed, progress=False, callback_on_step_end=look)
    except Interrupted:
        return None
    if not pipe.tokenizer.pictures:
        return save_array(result.images, folder / f"{seen:012d}.npy")
    path = save_png(grid(result.images, COLUMNS, side=SIDE), folder / f"{seen:012d}.png")
    timeline(folder)
    return path


def timeline(folder: Path, most: int = 12, rows: int = 1) -> Path:
    """Write `timeline.png`: the first `rows` of at most `most` grids, evenly chosen, the oldest on top."""
    files = sorted(path for path in folder.glob("*.png") if path.stem.isdigit())
    if len(files) > most:
        files = [files[round(i * (len(files) - 1) / (most - 1))] for i in range(most)]
    found = []
    for file in files:
        with contextlib.suppress(BadImage):  # a damaged grid of an earlier time must not stop the training
            sheet = read_png(file)
            height = min(rows * (sheet.height // -(-IMAGES // COLUMNS)), sheet.height)
            found.append(sheet.crop((0, 0, sheet.width, height)))
    picture = Image.new(found[0].mode, (found[0].width, sum(row.height for row in found)))
    top = 0
    for row in found:
        picture.paste(row, (0, top))
        top += row.height
    return save_png(picture, folder / "timeline.png")

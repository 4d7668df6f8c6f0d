"""Show how a run learns: samples at fixed seeds with the names of their classes, and how they change over time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from seriatim.checkpoints.native import Bundle
from seriatim.core.errors import NumericsError
from seriatim.core.images import BadImage, read_png
from seriatim.core.schedules import crossed
from seriatim.core.stopping import StopRequest
from seriatim.evaluation.grid import save_png
from seriatim.evaluation.sheet import Places, Row, legible, places_of, save_sheet, sheet
from seriatim.pipeline.arguments import SettingsArgs
from seriatim.pipeline.labels import label_of, name_of
from seriatim.pipeline.pipeline import Pipeline
from seriatim.pipeline.result import Result, save_array
from seriatim.training.config import Batched

PREVIEWS = 8  # how often a run is looked at, if its recipe leaves that open
FEWEST_UPDATES = 100  # a run of fewer updates is too short for that, and is not looked at
TIMED = (4, 20)  # samples by which the time of a preview is estimated
COLUMNS = 8  # images of a row where there are no classes
WITHOUT_CLASSES = 8  # how many times `sample_each` images are shown where there are no classes
FACTORS = (0.0, 0.5, 1.0, 1.5)  # guidance scales of the last preview, as factors of the recipe's own
SCALES = (1.0, 2.0, 4.0)  # guidance scales of the last preview where the recipe has none
SHEET = 0.3  # seconds to put together and write a sheet and the timeline
MOST_TIMES = 12  # rows of the timeline
GUIDANCE, TIMELINE = "guidance.png", "timeline.png"


class Interrupted(Exception):
    """The process was asked to stop while samples were generated."""


def is_due(settings: Batched, before: int, seen: int, *, last: bool) -> bool:
    """Whether a preview is due since `before` images were seen; the end of a run that has previews is one."""
    every = interval(settings)
    return bool(every) and (last or crossed(before, seen, every))


def interval(settings: Batched) -> int:
    """The number of images between two previews; 0 means that there are none."""
    if settings.sample_images != "auto":
        return int(settings.sample_images)
    if settings.images < FEWEST_UPDATES * settings.batch_size:
        return 0
    return -(-settings.images // PREVIEWS)


@dataclass(frozen=True)
class Preview:
    """Which images a preview shows: `each` images of at most `rows` classes."""

    rows: int
    each: int

    def classes(self, count: int) -> list[int]:
        """The classes that are shown, spread evenly over all `count`."""
        shown = min(count, self.rows)
        return [i * count // shown for i in range(shown)]

    def labels(self, count: int, names: Sequence[str]) -> list[int | str | None]:
        """The label of each image, row by row."""
        if not count:
            return [None] * (WITHOUT_CLASSES * self.each)
        return [label_of(number, names) for number in self.classes(count) for _ in range(self.each)]

    def rows_of(self, images: Sequence[Image.Image], count: int, names: Sequence[str]) -> list[Row]:
        """The images with the name of the class at the left of each row."""
        if not count:
            return [Row("", images[i : i + COLUMNS]) for i in range(0, len(images), COLUMNS)]
        return [
            Row(readable(name_of(number, names), number), images[i * self.each : (i + 1) * self.each])
            for i, number in enumerate(self.classes(count))
        ]


def readable(name: str, number: int) -> str:
    """The name of a class, or its number if the font of the sheets lacks letters of the name."""
    return name if legible(name) else f"class {number}"


def draw_samples(
    bundle: Bundle,
    folder: Path,
    seen: int,
    seed: int,
    stop: StopRequest | None = None,
    *,
    shown: Preview,
    last: bool = False,
) -> Path | None:
    """Write samples to `folder/<images seen>.png`, with the same seeds and classes every time, and the timeline.

    The `last` preview of a model with classes also writes `guidance.png`: the same images at several guidance scales.
    Returns the path of the samples. If the model does not generate pictures, they go to `folder/<images seen>.npy`. If
    `stop` is requested meanwhile, no more is written and None is returned.
    """

    def look(*_: object) -> None:
        if stop is not None and stop.requested:
            raise Interrupted

    pipe = Pipeline(bundle)  # on the device of the averaged weights
    classes, names = pipe.model.classes, pipe.class_names
    labels = shown.labels(classes, names)

    def drawn(scale: float | None = None) -> Result:
        changed: SettingsArgs = {"seed": seed}
        if scale is not None:
            changed["guidance_scale"] = scale
        return pipe(labels, progress=False, callback_on_step_end=look, **changed)

    try:
        result = drawn()
        if not pipe.tokenizer.pictures:
            return save_array(result.images, folder / f"{seen:012d}.npy")
        rows = shown.rows_of(result.images, classes, names)
        path = save_sheet(*sheet(rows), folder / f"{seen:012d}.png")
        timeline(folder)
        if last and classes and pipe.model.label_dropout:
            own = result.request.guidance_scale
            at = {own: rows}
            for scale in guidance_scales(own):
                if scale not in at:
                    at[scale] = shown.rows_of(drawn(scale).images, classes, names)
            save_png(beside(at), folder / GUIDANCE)
    except Interrupted:
        return None
    return path


def seconds_of_samples(bundle: Bundle, most: float) -> tuple[float, float]:
    """The seconds that drawing samples takes in any case, and for each image. Measuring takes about `most` seconds."""
    few, many = (seconds_of_some(bundle, count, most / 2) for count in TIMED)
    each = max(0.0, (many - few) / (TIMED[1] - TIMED[0]))
    return max(0.0, few - TIMED[0] * each), each


def seconds_of_some(bundle: Bundle, count: int, most: float) -> float:
    """The seconds that `count` images of a preview take. After `most` seconds the rest of the steps is estimated."""
    pipe = Pipeline(bundle)
    classes, names = pipe.model.classes, pipe.class_names
    labels = [label_of(i % classes, names) if classes else None for i in range(count)]
    done = [0, 1]

    def look(_: object, index: int, total: int, __: object) -> None:
        done[:] = [index + 1, total]
        if time.perf_counter() - begin > most:
            raise Interrupted

    begin = time.perf_counter()
    try:
        pipe(labels, seed=0, progress=False, callback_on_step_end=look)
    except Interrupted:
        return (time.perf_counter() - begin) * done[1] / done[0]
    except NumericsError:  # the weights are not trained yet; what was drawn tells the time all the same
        pass
    return time.perf_counter() - begin


def guidance_scales(own: float) -> list[float]:
    """The guidance scales of the last preview: that of the recipe, weaker and stronger ones, and none (1)."""
    if own <= 1:
        return list(SCALES)
    return sorted({max(1.0, round(factor * own, 2)) for factor in FACTORS})


def beside(at: dict[float, list[Row]]) -> Image.Image:
    """Rows of the same classes at several guidance scales, beside each other under the scales."""
    scales = sorted(at)
    joined = [
        Row(row.words, [image for scale in scales for image in at[scale][i].images])
        for i, row in enumerate(at[scales[0]])
    ]
    return sheet(joined, [(f"guidance {scale:g}", len(at[scale][0].images)) for scale in scales])[0]


def timeline(folder: Path, *, pairs: bool = False) -> Path | None:
    """Write `timeline.png`: how images change from sheet to sheet, the oldest on top, in at most MOST_TIMES rows.

    A row shows the first images of each class of a sheet, or the first row of a sheet without classes. With `pairs` the
    rows of sheets are originals and reconstructions in turn; the originals are then shown once. Returns None if there
    is no whole sheet.
    """
    files = sorted(path for path in folder.glob("*.png") if path.stem.isdigit())
    if len(files) > MOST_TIMES:
        files = [files[round(i * (len(files) - 1) / (MOST_TIMES - 1))] for i in range(MOST_TIMES)]
    rows: list[Row] = []
    headings: list[tuple[str, int]] = []
    for file in files:
        with contextlib.suppress(BadImage):  # a damaged sheet of an earlier time must not stop the training
            picture = read_png(file)
            places = places_of(picture)
            if places is None:
                continue
            every, headings = cells(places, pairs=pairs)
            if pairs and not rows:
                rows.append(Row(places.words[0], [picture.crop(places.box(0, i)) for _, i in every]))
            rows.append(Row(f"{int(file.stem):,} images", [picture.crop(places.box(*cell)) for cell in every]))
    if not rows:
        return None
    return save_png(sheet(rows, headings)[0], folder / TIMELINE)


def cells(places: Places, *, pairs: bool) -> tuple[list[tuple[int, int]], list[tuple[str, int]]]:
    """The (row, column) of each image of a sheet that the timeline shows, and the headings above them."""
    rows, columns = len(places.tops), len(places.lefts)
    if pairs or not places.words[0]:
        return [(min(rows - 1, int(pairs)), i) for i in range(columns)], []
    each = max(1, min(columns, COLUMNS // rows))
    return [(row, i) for row in range(rows) for i in range(each)], [(words, each) for words in places.words]

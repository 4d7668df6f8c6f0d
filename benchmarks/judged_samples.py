"""Samples of generators, judged by a classifier beside as many real images, drawn as a picture, and timed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from known_density_tables import student

from seriatim.data.folder import Folder
from seriatim.evaluation.base import FeatureExtractor
from seriatim.evaluation.features import open_features
from seriatim.evaluation.figures import class_map
from seriatim.evaluation.grid import grid, save_png
from seriatim.evaluation.run import evaluate
from seriatim.pipeline.labels import label_of
from seriatim.pipeline.pipeline import Pipeline

GROUPS = 10  # of images, from which the errors of figures come
SHOWN = 10  # samples of each class in a picture, or all where there are no classes
ENLARGED = 2  # how many pixels of the picture are the side of one
BATCH = 50  # images that are sampled at once

Figures = dict[str, tuple[float, float]]  # name -> the value and its standard error


@dataclass(frozen=True)
class Judge:
    """What all contestants of a benchmark are judged by."""

    data: Path  # class folders of training images, which are the reference
    real: Path  # class folders of other images
    classifier: str  # the run of a classifier
    size: int
    samples: int
    cache: Path  # for features of real images

    @cached_property
    def sides(self) -> tuple[Folder, Folder]:
        data, real = (Folder(str(path), self.size, check=False) for path in (self.data, self.real))
        return data, real

    @cached_property
    def features(self) -> FeatureExtractor:
        return open_features(str(self.classifier), size=(self.size, self.size), channels=3)

    def figures(self, pipe: Pipeline) -> tuple[str, ...]:
        """The figures that can be had: an accuracy only of classes that the classifier knows."""
        known = class_map(self.features, pipe.model.classes, pipe.class_names) is not None
        return ("frechet", *(["accuracy"] if known else []), "manifold")

    def __call__(self, pipe: Pipeline, out: Path, seed: int, **settings: Any) -> dict[str, Figures]:
        """The figures of samples, and those of as many real images; `out` keeps what is done."""
        data, real = self.sides
        made = evaluate(
            pipe,
            data,
            out,
            num=self.samples,
            features=self.features,
            real=real,
            figures=self.figures(pipe),
            seed=seed,
            batch_size=BATCH,
            cache=self.cache,
            **settings,
        )
        assert made.figures is not None and made.real is not None, "this process has all shares"
        return {
            side: {name.partition("[")[0]: (each.value, each.error) for name, each in figures.items()}
            for side, figures in (("figures", made.figures), ("real", made.real))
        }


def draw(pipe: Pipeline, file: Path, seed: int, settings: Mapping[str, Any]) -> float:
    """Draw SHOWN samples of each class, a class in each row; returns the seconds of a thread for one sample."""
    begin = time.process_time()
    names = [label_of(number, pipe.class_names) for number in range(pipe.model.classes)]
    pictures = pipe(names or [None] * SHOWN, num_images_per_label=SHOWN, seed=seed, batch_size=BATCH, **settings).images
    seconds = (time.process_time() - begin) / len(pictures)
    save_png(grid(pictures, SHOWN, side=max(pipe.tokenizer.size) * ENLARGED), file)
    return seconds


def cell(figure: list[float] | tuple[float, float], digits: int = 2) -> str:
    """A figure with its 95 % interval, from the standard error over GROUPS groups."""
    value, error = figure
    return f"{value:.{digits}f} ± {student(GROUPS - 1) * error:.{digits}f}"

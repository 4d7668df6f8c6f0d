"""Write what people read about a run: metrics.jsonl, the curves, the environment, the model card."""

from __future__ import annotations

import json
import math
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from seriatim import __version__
from seriatim.core.files import atomic_write, write_json, write_text
from seriatim.core.markdown import block, inline
from seriatim.core.plugins import loaded_plugins
from seriatim.core.processes import launch
from seriatim.core.reading import Unreadable, parse_json
from seriatim.core.terminal import say, warn
from seriatim.data.base import ImageData
from seriatim.training.config import AnyRecipe, ClassifierRecipe, Recipe, TokenizerRecipe, dump
from seriatim.training.precision import Choice
from seriatim.training.trackers import RunConfig, Tracker, Tracking


class MetricsLog:
    """A log with one JSON object per line, each written at once so that a killed run keeps its measurements."""

    def __init__(self, path: Path, seen: int = 0) -> None:
        """Continue the log after `seen` images; later lines, which a killed run may have written, are dropped."""
        self.path, self.seen = path, seen
        found = read_rows(path) if path.exists() else []
        self.logged = max((row["images"] for row in found), default=0)  # by an earlier process, perhaps after `seen`
        self.rows = [row for row in found if row["images"] <= seen]
        write_text(path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self._tracking = Tracking()

    def track(self, trackers: Mapping[str, Tracker], recipe: AnyRecipe) -> None:
        """Send all further lines to these trackers too."""
        values = recipe.model_dump(mode="json")
        self._tracking.start(trackers, RunConfig(recipe.name, self.path.parent, values, self.seen, self.logged))

    def write(self, **values: Any) -> None:
        self.rows.append(values)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        self._tracking.log(values["images"], {name: value for name, value in values.items() if name != "images"})

    def close(self) -> None:
        self._tracking.close()


class NoLog(MetricsLog):
    """The log of a process that writes no files."""

    def __init__(self) -> None:
        self.rows = []

    def write(self, **values: Any) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a log. If some are damaged, they are left out and a copy of the old file is kept."""
    rows: list[dict[str, Any]] = []
    raw = path.read_bytes()
    damaged = 0
    for line in raw.splitlines(keepends=True):
        try:
            row = parse_json(line.decode("utf-8"), dict)
            if type(row.get("images")) is not int or not all(type(value) in (int, float) for value in row.values()):
                raise Unreadable("is not a line of metrics")
        except (Unreadable, UnicodeDecodeError):
            damaged += line.endswith(b"\n")  # the last line of a killed run may be half a line
            continue
        rows.append(row)
    if damaged:
        kept = path.with_name(f"{path.stem}.damaged{path.suffix}")
        atomic_write(kept, lambda file: file.write_bytes(raw))
        warn(f"{path}: {damaged} damaged lines are left out; the file as it was is {kept}")
    return rows


def loss_curve(rows: Sequence[dict[str, Any]], path: Path, title: str = "") -> Path:
    """Draw the losses, and distances of samples on an axis of their own, over images seen as a PNG; return its path."""
    figure, axes = empty_figure()
    names = dict.fromkeys(key for row in rows for key in row)
    terms = [key for key in names if key in ("loss", "validation_loss") or key.startswith("loss_")]
    distances = [key for key in names if key.startswith(("FD[", "FID"))]
    least = math.inf
    for key in terms:
        points = [(row["images"], row[key]) for row in rows if key in row]
        least = min(least, *(value for _, value in points))
        label = "validation" if key == "validation_loss" else key.replace("loss_", "")
        axes.plot(*zip(*points, strict=True), label=label, linewidth=1 if key.startswith("loss_") else 2)
    axes.set(xlabel="images seen", ylabel="loss, mean since the last point")
    axes.set_title(title, parse_math=False)  # a name may contain a dollar sign
    if terms and least > 0:
        axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    for key in distances:
        points = [(row["images"], row[key]) for row in rows if key in row]
        right = axes.twinx()
        right.plot(*zip(*points, strict=True), "k.--", label=key, linewidth=1)
        right.set_ylabel(key, parse_math=False)
    if terms:
        axes.legend(loc="upper right")  # "best" takes seconds for a long run, and warns
    return atomic_write(path, lambda file: figure.savefig(file, format="png"))


def accuracy_curve(rows: Sequence[dict[str, Any]], path: Path, title: str = "") -> Path:
    """Draw the accuracy on training and test images over images seen as a PNG, and return its path."""
    shares = [{key: 100 * value if key != "images" else value for key, value in row.items()} for row in rows]
    lines = {"accuracy": ("training, augmented", "-"), "test_accuracy": ("test", "o-")}
    return curves(shares, path, lines, "recognised, %", title)


def psnr_curve(rows: Sequence[dict[str, Any]], path: Path, title: str = "") -> Path:
    """Draw the PSNR of training and held-out images over images seen as a PNG, and return its path."""
    lines = {
        "psnr": ("training, as the decoder sees them", "-"),
        "validation_psnr": ("held out, averaged weights", "o-"),
    }
    return curves(rows, path, lines, "PSNR, dB", title)


def curves(
    rows: Sequence[dict[str, Any]], path: Path, lines: Mapping[str, tuple[str, str]], ylabel: str, title: str
) -> Path:
    """Draw the figures named by the keys of `lines`, each with a label and a style."""
    figure, axes = empty_figure()
    for key, (label, style) in lines.items():
        points = [(row["images"], row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(xlabel="images seen", ylabel=ylabel)
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(loc="lower right")
    return atomic_write(path, lambda file: figure.savefig(file, format="png"))


def empty_figure() -> tuple[Any, Any]:
    """A figure and its axes, made without a window and without matplotlib's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def environment() -> dict[str, Any]:
    """The versions and the machine, for environment.json of a run folder."""
    return {
        "seriatim": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "command": sys.argv,
        "plugins": loaded_plugins(),
        **({} if launch() is None else {"launch": launch()}),
    }


def record_choice(folder: Path, choice: Choice, budget: Mapping[str, Any] | None = None) -> None:
    """Report the measurements by which dtype and threads were chosen, and write them to environment.json.

    What was measured for a `budget` of minutes is written beside them.
    """
    found: dict[str, Any] = {}
    if choice.seconds:
        say(f"training in {choice}")
        measured = {"dtype": choice.dtype, "threads": choice.threads, "seconds": choice.seconds}
        found["measured"] = measured | {"passes": choice.passes}
    if budget is not None:
        found["budget"] = dict(budget)
    if found:
        write_json(folder / "environment.json", environment() | found)


def model_card(recipe: Recipe, seen: int, parameters: int, rows: Sequence[dict[str, Any]], data: ImageData) -> str:
    """The text of README.md for a model folder: what the model is, what it was trained on, how to sample from it."""
    kind = "unconditional-image-generation" if data.pictures else "other"
    classes = first_names(data)
    plain = next((name for name in data.class_names if name.isprintable()), None)
    example = repr(plain) if plain is not None else "0" if data.class_names else "None"
    count = f"{data.count:,}" if data.count else "a stream"
    H, W = data.size
    tags = "autoregressive, image-generation" if data.pictures else "autoregressive"
    trained = f"images: {count}, {H}x{W} pixels, channels: {data.channels}; left out: {len(data.bad)}"
    first = '.images[0].save("image.png")'
    if not data.pictures:
        trained = f"sequences: {count}, {W} tokens, numbers of a token: {data.channels}"
        first = ".images  # an array"
    label = f" --label={shlex.quote(plain)}" if plain is not None else ""
    python = f"""import seriatim

seriatim.load("path/to/this/folder")(class_labels=[{example}], seed=0){first}"""
    about = inline(recipe.description) or "An autoregressive image model."
    shell = f"seriatim sample path/to/this/folder{label} --out samples"
    loss = f"{rows[-1]['loss']:.4f}" if rows and "loss" in rows[-1] else "not logged"
    return f"""---
library_name: seriatim
pipeline_tag: {kind}
tags: [{tags}]
---

# {inline(recipe.name)}

{about} {parameters:,} parameters, trained with Seriatim {__version__}.

- {trained}
- classes: {classes or "none"}
- seen in training: {seen:,} images; last loss {loss}

{block(python, "python")}

{block(shell, "sh")}

## Recipe

{block(dump(recipe), "yaml")}
"""


def first_names(data: ImageData, most: int = 20) -> str:
    names = ", ".join(inline(name) for name in data.class_names[:most])
    return names + (", ..." if len(data.class_names) > most else "")


def classifier_card(
    recipe: ClassifierRecipe, seen: int, parameters: int, data: ImageData, tested: int, accuracy: Mapping[str, float]
) -> str:
    """The text of README.md for a classifier folder: what the classifier is, what it recognises, how to use it."""
    mirrored = accuracy["test_with_mirror_images"]
    return f"""---
library_name: seriatim
pipeline_tag: image-classification
---

# {inline(recipe.name)}

{inline(recipe.description) or "An image classifier."} {parameters:,} parameters, trained with Seriatim {__version__}.

- images: {data.count:,}, {data.size[0]}x{data.size[1]} pixels, channels: {data.channels}
- classes: {first_names(data)}
- seen in training: {seen:,} images
- recognised of {tested:,} test images: {accuracy["test"]:.2%}; with their mirror images {mirrored:.2%}

It judges samples: `seriatim evaluate MODEL --features path/to/this/folder`.

## Recipe

{block(dump(recipe), "yaml")}
"""


def tokenizer_card(
    recipe: TokenizerRecipe, seen: int, parameters: int, data: ImageData, rows: Sequence[Mapping[str, Any]]
) -> str:
    """The text of README.md for a tokenizer folder: what it is, what it was trained on, how to use it."""
    found = [(key, row[key]) for row in rows for key in ("psnr", "validation_psnr") if key in row]
    H, W = data.size
    psnr = "not logged"
    if found:
        which = "held-out images" if found[-1][0] == "validation_psnr" else "training images"
        psnr = f"{found[-1][1]:.2f} dB on {which}"
    return f"""---
library_name: seriatim
tags: [image-tokenizer, autoencoder]
---

# {inline(recipe.name)}

{inline(recipe.description) or "An image tokenizer."} {parameters:,} parameters, trained with Seriatim {__version__}.

- images: {f"{data.count:,}" if data.count else "a stream"}, {H}x{W} pixels, channels: {data.channels}
- seen in training: {seen:,} images
- PSNR: {psnr}

A generator takes it as `tokenizer: {{from: path/to/this/folder}}`. What it loses:

    seriatim evaluate path/to/this/folder --data photos --num 1000 --out tokenizer-evaluation

## Recipe

{block(dump(recipe), "yaml")}
"""

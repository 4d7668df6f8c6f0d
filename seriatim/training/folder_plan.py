"""Plan a training on a folder of pictures: look at them, choose what fits the time, and make a recipe of it.

`plan_table.py` has what research has decided, `plan_words.py` the words.

Shapes: n images, c channels, S x S pixels.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seriatim.core.device import pick_device, plain_torch
from seriatim.core.errors import ConfigError, UsageError
from seriatim.core.files import expanded, write_text
from seriatim.core.flatten import as_colour
from seriatim.core.images import load_pixels
from seriatim.core.ownership import first_file
from seriatim.core.processes import place
from seriatim.core.progress import duration, minutes_of, passes_over
from seriatim.core.terminal import say
from seriatim.core.validation import parse
from seriatim.data.folder import square
from seriatim.data.loader import to_float
from seriatim.data.mirroring import may_mirror
from seriatim.data.near_duplicates import near_duplicates
from seriatim.data.survey import Survey, survey
from seriatim.evaluation.sheet import Row, save_sheet, sheet
from seriatim.pipeline.result import as_pil
from seriatim.tokenizers.base import Tokenizer, to_uint8
from seriatim.tokenizers.kinds import build_tokenizer
from seriatim.training import plan_table as table
from seriatim.training import plan_words as words
from seriatim.training.config import LONGEST_NAME, AnyRecipe, Recipe, override
from seriatim.training.option_choice import Sized, batch_for, choose
from seriatim.training.plan_table import Option
from seriatim.training.run_folder import PLAN, TOKENIZER_PICTURE, is_run
from seriatim.training.tokenizer_losses import psnr_of

LOOKING, LEAST, MOST = 0.1, 3.0, 30.0  # the share of the time for looking at pictures, and its bounds in seconds
MEASURED = 512  # pictures by which the tokenizer's loss is measured
HELD_OUT = 0.2  # the share of them that it is measured on
SHOWN, COLUMNS = 16, 8  # pictures beside their reconstructions
TRAINED = 0.8  # the share of the time that is left for steps, about


@dataclass(frozen=True)
class FolderPlan:
    """A recipe for a folder, and the words that explain it."""

    recipe: Recipe
    lines: list[str]
    reconstructions: list[Row]  # originals and what the tokenizer gives back

    def say(self) -> None:
        for line in self.lines:
            say(line)

    def write(self, _: AnyRecipe, out: Path) -> None:
        """Write plan.txt and tokenizer.png into the folder of a run that has begun."""
        write_text(out / PLAN, "".join(line + "\n" for line in self.lines))
        if self.reconstructions:
            save_sheet(*sheet(self.reconstructions), out / TOKENIZER_PICTURE)


@plain_torch(grad=True)
def plan_folder(
    path: Path | str,
    *,
    minutes: float | None = None,
    settings: Sequence[str] = (),
    out: Path | None = None,
    device: str = "auto",
    quiet: bool = False,
) -> FolderPlan:
    """Look at the pictures in a folder, and plan a training of so many minutes, or of `training.images` in `settings`.

    `settings` change the recipe like those of `read_recipe`. Raises UsageError or DataError if there is nothing to
    train on.
    """
    begin = time.monotonic()
    root = expanded(str(path))
    check_folder(root)
    given = override({}, settings, Recipe.model_fields)
    data, training = section(given, "data"), section(given, "training")
    images = training.get("images")
    if images is not None and not (type(images) is int and images >= 1):
        raise ConfigError(f"training.images: {images!r} is not allowed; it must be a whole number, 1 or more")
    seconds = 60 * (table.MINUTES if minutes is None else minutes)
    if "channels" in data:
        square(table.OPTIONS[0].size, data["channels"])  # refuses what is not allowed before the pictures are looked at
    loose, time_to_look = str(data.get("loose", "refuse")), min(MOST, max(LEAST, LOOKING * seconds))
    looked = survey(root, time_to_look, classes=data.get("classes"), loose=loose, quiet=quiet)
    mirroring = may_mirror(looked.pixels, looked.labels, looked.names, looked.files)
    duplicates = int(near_duplicates(looked.pixels).sum())
    channels = data.get("channels", 1 if looked.grey else 3)
    background = data.get("background", "black" if looked.pale else "white")
    where = pick_device(device)

    reading = looked.seconds * looked.count / (os.cpu_count() or 1)
    left = TRAINED * max(seconds - (time.monotonic() - begin) - reading, seconds / 2)
    sizes = [(option, size_of(option, looked, data.get("size"))) for option in table.OPTIONS]
    options = [sized(option, size) for option, size in sizes if size is not None]
    chosen = choose(options, left, images, channels, len(looked.names), where)
    option, seen = chosen.option, chosen.images
    tokenizer, psnr, rows = fitted_tokenizer(looked, option, channels, background)

    raw = {
        "name": name_of(root),
        "description": f"{looked.count:,} pictures of the folder {root.name}, planned by its contents",
        "data": {
            "kind": "folder",
            "path": str(root.absolute()),
            "size": option.size,
            "channels": channels,
            "flip": mirroring.allowed,
            "classes": looked.classes,
            "max_bad": 0.5,
            "empty": "ignore",
            "background": background,
            **({"memory": True} if seen > looked.count and fits_memory(looked, option, channels) else {}),
            **({"validation": table.VALIDATION} if is_validated(looked, seen) else {}),
        },
        "tokenizer": tokenizer,
        "model": option.model,
        "training": {
            "images": seen,
            "batch_size": batch_for(seen),
            "warmup_images": round(table.WARM_UP * seen),
            **table.TRAINING,
        },
        "sampling": {**table.SAMPLING, **(table.GUIDANCE if len(looked.names) > 1 else {})},
    }
    recipe = parse(Recipe, override(raw, settings, Recipe.model_fields), where=f"the plan for {root}")
    lines = [
        *words.found(looked, mirroring, duplicates, background),
        *(f"note: {line}" for line in words.warnings(looked, duplicates, option.size)),
        f"plan: {words.tokenizer_loss(psnr, option.tokens, option.size)}"
        + (f"; {out / TOKENIZER_PICTURE} shows it" if out is not None else ""),
        f"  a {option.name} model, {chosen.parameters:,} parameters; about {seen:,} images "
        f"({passes_over(seen, looked.count)})"
        + ("" if chosen.rate is None else f" in {minutes_of(seconds / 60)}, at {chosen.rate:,.3g} a second"),
        *([f"  reading all pictures takes about {duration(reading)} of it"] if reading > 0.05 * seconds else []),
        f"expect: {words.expected(seen, looked.count, len(looked.names))}",
        *([] if out is None else words.afterwards(out, looked.names)),
    ]
    return FolderPlan(recipe, lines, rows)


def section(given: dict[str, Any], name: str) -> dict[str, Any]:
    """A section of the settings that were given; what is no section is refused later, with the whole recipe."""
    found = given.get(name, {})
    return found if isinstance(found, dict) else {}


def check_folder(root: Path) -> None:
    """Raise UsageError if a folder can't be one of pictures to plan for."""
    if place().size > 1:
        raise UsageError(
            f"recipe: {root} is a folder, for which one process makes the plan; start it without torchrun, stop it, "
            "and go on with all processes and --resume"
        )
    if is_run(root):
        raise UsageError(
            f"recipe: {root} is the folder of a run, not of pictures; go on with `seriatim train --resume --out {root}`"
            f", or repeat it with {root / 'recipe.yaml'}"
        )
    if first_file(root) is None:
        raise UsageError(f"recipe: {root} is an empty folder; name one with pictures, or with a folder for each class")


def name_of(root: Path) -> str:
    """A recipe's name for a folder: its own name, as far as a recipe may have it."""
    name = re.sub(r"[^\w\- ]+", "-", root.resolve().name).strip("- _")
    return name.encode()[: LONGEST_NAME - 20].decode(errors="ignore") or "pictures"


def size_of(option: Option, looked: Survey, given: Any) -> Any:
    """The size of an option for these pictures; None if they are too small for it. `given` is the user's."""
    if given is not None:
        return given if option.size == table.OPTIONS[0].size else None
    smallest = table.OPTIONS[0].size
    if option.size == smallest:
        return min(smallest, max(8, looked.short_side // option.patch * option.patch))
    return option.size if looked.short_side >= option.size else None


def sized(option: Option, size: Any) -> Sized:
    if type(size) is not int or not 1 <= size <= table.OTHER_PATCHES[-1][0]:
        raise ConfigError(f"data.size: {size!r} is not allowed with a folder of pictures; give one number of pixels")
    patch = option.patch if size == option.size else next(patch for most, patch in table.OTHER_PATCHES if size <= most)
    return Sized(**{**vars(option), "size": size, "patch": min(patch, size)})


def fits_memory(looked: Survey, option: Option, channels: int) -> bool:
    return looked.count * channels * option.size**2 <= table.IN_MEMORY


def is_validated(looked: Survey, images: int) -> bool:
    """Whether some pictures are held out, to see when the others are only learned by heart."""
    enough = looked.count >= table.VALIDATION_FROM and looked.each[0] >= table.VALIDATION_EACH
    return enough and images >= table.VALIDATION_PASSES * looked.count


# --- tokenizer ------------------------------------------------------------------------------------------------------


def fitted_tokenizer(
    looked: Survey, option: Sized, channels: int, background: Any
) -> tuple[dict[str, Any], float, list[Row]]:
    """The config of a tokenizer, its PSNR on pictures that it was not measured on, and rows that show what it loses."""
    pixels = decoded(looked, option.size, channels, background)
    held_out = max(1, round(HELD_OUT * len(pixels)))
    measured, others = (pixels[held_out:], pixels[:held_out]) if len(pixels) > 1 else (pixels, pixels)
    tokenizer: Tokenizer | None = None
    config: dict[str, Any] = {}
    psnr = 0.0
    for components in table.COMPONENTS:
        kept = option.components(components, channels)
        config = {"kind": "pixels", "patch": option.patch, "components": kept, "whiten": table.WHITEN}
        tokenizer = build_tokenizer({**config, "size": [option.size, option.size], "channels": channels})
        tokenizer.fit([to_float(measured)])
        psnr = float(psnr_of(back(tokenizer, others), to_float(others)).mean())
        if psnr >= table.LITTLE_ENOUGH:
            break
    assert tokenizer is not None, "the table has components"
    some = others[:SHOWN]
    sides = [as_pil(to_uint8(images)) for images in (to_float(some), back(tokenizer, some))]
    rows = [
        Row(text, images[i : i + COLUMNS])
        for i in range(0, len(some), COLUMNS)
        for text, images in zip(("original", "decoded"), sides, strict=True)
    ]
    return config, psnr, rows


def decoded(looked: Survey, size: int, channels: int, background: Any) -> Tensor:
    """Some pictures as training will read them: (n, c, S, S) uint8."""
    colour = as_colour(background, "data.background")
    files = [looked.path / name for name in looked.files[:MEASURED]]
    return torch.from_numpy(np.stack([load_pixels(file, (size, size), channels, colour) for file in files]))


def back(tokenizer: Tokenizer, pixels: Tensor) -> Tensor:
    """The pictures that the tokenizer gives back, rounded to 8 bits, in [-1, 1]."""
    decoded = tokenizer.decode(tokenizer.tokens(tokenizer.moments(to_float(pixels))))
    return to_float(to_uint8(decoded).permute(0, 3, 1, 2))

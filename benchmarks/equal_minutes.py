"""Trainings of equal processor time. What is done already is not done again, and a training goes on where it stopped.

FOLDER/budget.json    how many images the time allows, measured by a short training
FOLDER/run/           the run; its checkpoints are deleted when it is finished
FOLDER/spent.json     the processor time that it took, if it was not stopped on the way
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ablation_cells import read, refuse_other

from seriatim.core.files import write_json
from seriatim.data.caching import write_cache
from seriatim.training.config import Recipe
from seriatim.training.loop import train
from seriatim.training.setup import build_inputs

SAVES = 4  # checkpoints of a training, at least
SAVE_MINUTES = 3  # between checkpoints of a long training of a generator, at most
WARM, PROBED = 2, 20  # steps of the two short trainings whose difference tells the time of a step


def minutes_worth(minutes: float, size: int, training: Callable[[int, str, int], object], folder: Path) -> int:
    """How many images a training manages in the time, measured once and kept in `folder/budget.json`.

    `training(images, name, saves)` trains for so many images, in batches of `size`, into a folder of that name.
    """
    file = folder / "budget.json"
    if not refuse_other(file, {"minutes": minutes}):
        spent = []
        for number, steps in enumerate((WARM, WARM, WARM + PROBED)):  # the first also imports what training needs
            shutil.rmtree(folder / f"probe-{number}", ignore_errors=True)  # of a process that was stopped
            begin = time.process_time()
            training(steps * size, f"probe-{number}", 0)
            spent.append(time.process_time() - begin)
            shutil.rmtree(folder / f"probe-{number}")
        rate = PROBED * size / max(1e-3, spent[2] - spent[1])
        images = max(size, round(60 * minutes * rate))
        write_json(file, {"images": images, "images_per_second": rate, "settings": {"minutes": minutes}})
    return int(json.loads(file.read_text())["images"])


def train_for(minutes: float, recipe_of: Callable[[int, int], Recipe], folder: Path) -> None:
    """Train a generator into `folder/run` for the time; `recipe_of(images, save_images)` is its recipe."""
    run = folder / "run"
    if (run / "model").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)

    def training(images: int, name: str, saves: int) -> None:
        recipe = recipe_of(images, -(-images // saves) if saves else 0)
        train(recipe, folder / name, device="cpu", resume="auto", quiet=not saves)

    images = minutes_worth(minutes, recipe_of(1, 0).training.batch_size, training, folder)
    whole, begin = not run.exists(), time.process_time()
    training(images, "run", max(SAVES, round(minutes / SAVE_MINUTES)))
    write_json(folder / "spent.json", {"seconds": time.process_time() - begin if whole else None})
    shutil.rmtree(run / "checkpoints", ignore_errors=True)  # hundreds of megabytes that nobody goes on from


def facts_of(folder: Path) -> dict[str, Any]:
    """What a finished training tells: its images, their number in a second, seconds in all, and its last loss."""
    budget = read(folder / "budget.json")
    spent = read(folder / "spent.json") if (folder / "spent.json").exists() else {"seconds": None}
    log = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = log[-max(1, len(log) // 10) :]  # the last tenth: one line is of few images
    return {
        "images": budget["images"],
        "images_per_second": budget["images_per_second"],
        "seconds": spent["seconds"],
        "loss": sum(line["loss"] for line in last) / len(last),
    }


def cache_latents(recipe: Recipe, out: Path) -> None:
    """Encode the images of a recipe into the folder `out`, once."""
    if not out.exists():
        data, tokenizer = build_inputs(recipe)
        unfinished = out.with_name(f"{out.name}-unfinished")
        write_cache(data, tokenizer, unfinished, device="cpu")
        unfinished.rename(out)

"""Trainings of equal time. What is done already is not done again, and a training goes on where it stopped.

How long a step takes depends on what else the machine does. The speed of a training is therefore measured against that
of a reference, in turn, and the time is the reference's: its speed is measured once, and kept in OUT/clock.json. So
contestants get equal time although they are measured and trained at different hours, or on different machines.

OUT/clock.json        how many images in a second the reference trains on
FOLDER/budget.json    how many images the time allows for this training
FOLDER/run/           the run; its checkpoints are deleted when it is finished
FOLDER/spent.json     the processor time that it took, if it was not stopped on the way
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ablation_cells import read, refuse_other
from filelock import FileLock

from seriatim.core.files import write_json
from seriatim.data.caching import write_cache
from seriatim.training.config import Recipe, TokenizerRecipe
from seriatim.training.loop import train
from seriatim.training.setup import build_inputs

AnyRecipe = TypeVar("AnyRecipe", Recipe, TokenizerRecipe)

SAVES = 4  # checkpoints of a training, at least
SAVE_MINUTES = 3  # between checkpoints of a long training of a generator, at most
WARM, PROBED = 3, 8  # steps of a short training that are not timed, and those that are
ROUNDS = 3  # short trainings of a contestant and of the reference, in turn


@dataclass(frozen=True)
class Timed:
    """A training whose speed can be measured."""

    name: str
    batch_size: int
    training: Callable[[int, Path, int], object]  # takes images, folder and saves; logs every step if there are 0 saves

    def images_per_second(self, folder: Path) -> float:
        """The median over the timed steps of a short training in `folder`, which is deleted."""
        shutil.rmtree(folder, ignore_errors=True)  # left by a process that was stopped
        self.training((WARM + PROBED) * self.batch_size, folder, 0)
        rates = [line["images_per_second"] for line in metrics_of(folder)]
        shutil.rmtree(folder)
        return statistics.median(rates[WARM:])


def minutes_worth(minutes: float, timed: Timed, folder: Path, reference: Timed, out: Path) -> int:
    """How many images a training manages in the time, measured once and kept in `folder/budget.json`.

    The time is that of `reference`, whose clock is in `out` and which is measured in turn with `timed`.
    """
    file = folder / "budget.json"
    if not refuse_other(file, {"minutes": minutes}):
        folder.mkdir(parents=True, exist_ok=True)
        speed = clock(reference, out)
        ratios = [1.0]
        if timed.name != reference.name:
            probes = [folder / "probe", folder / "probe-reference"]
            ratios = [
                timed.images_per_second(probes[0]) / reference.images_per_second(probes[1]) for _ in range(ROUNDS)
            ]
        rate = speed * statistics.median(ratios)
        images = max(timed.batch_size, round(60 * minutes * rate))
        told = {"images": images, "images_per_second": rate, "ratios_to_reference": ratios}
        write_json(file, {**told, "settings": {"minutes": minutes}})
    return int(read(file)["images"])


def clock(reference: Timed, out: Path) -> float:
    """The images in a second of the reference, measured by the first process that asks."""
    file = out / "clock.json"
    out.mkdir(parents=True, exist_ok=True)
    with FileLock(out / "clock.lock"):
        if not file.exists():
            rates = [reference.images_per_second(out / "probe-clock") for _ in range(ROUNDS)]
            write_json(file, {"images_per_second": statistics.median(rates), "rounds": rates})
    return float(read(file)["images_per_second"])


def generator(recipe_of: Callable[[int, int], Recipe]) -> Timed:
    """The training of a generator; `recipe_of(images, save_images)` is its recipe."""
    first = recipe_of(1, 0)

    def training(images: int, folder: Path, saves: int) -> None:
        recipe = recipe_of(images, -(-images // saves) if saves else 0)
        recipe = recipe if saves else with_a_line_each_step(recipe)
        train(recipe, folder, device="cpu", resume="auto", quiet=not saves)

    return Timed(first.name, first.training.batch_size, training)


def with_a_line_each_step(recipe: AnyRecipe) -> AnyRecipe:
    """The recipe, with a line of metrics for every step, which tells the step's time."""
    settings = recipe.training.model_copy(update={"log_images": recipe.training.batch_size})
    return recipe.model_copy(update={"training": settings})


def train_for(minutes: float, recipe: Callable[[int, int], Recipe], folder: Path, reference: Timed, out: Path) -> None:
    """Train a generator into `folder/run` for the time; `recipe(images, save_images)` is its recipe."""
    run = folder / "run"
    if (run / "model").exists():
        return
    timed = generator(recipe)
    images = minutes_worth(minutes, timed, folder, reference, out)
    whole, begin = not run.exists(), time.process_time()
    timed.training(images, run, max(SAVES, round(minutes / SAVE_MINUTES)))
    write_json(folder / "spent.json", {"seconds": time.process_time() - begin if whole else None})
    shutil.rmtree(run / "checkpoints", ignore_errors=True)  # hundreds of megabytes that nobody goes on from


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def facts_of(folder: Path) -> dict[str, Any]:
    """What a finished training tells: its images, their number in a second, seconds in all, and its last loss."""
    budget = read(folder / "budget.json")
    spent = read(folder / "spent.json") if (folder / "spent.json").exists() else {"seconds": None}
    log = metrics_of(folder / "run")
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

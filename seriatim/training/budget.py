"""Turn a number of minutes into the amounts of a recipe, once, when a run begins.

The minutes are the time on the clock from the start of the command to the finished model: reading the data, measuring,
training, previews, checkpoints and the model's files. What a step, a preview and a checkpoint take is measured, and the
number of images follows. It is written into the run's recipe, so that a resumed run goes on to the same number.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from seriatim.core.device import DTYPES, synchronise
from seriatim.core.errors import Stopped, UsageError
from seriatim.core.files import explained
from seriatim.core.progress import Progress, duration, minutes_of, passes_over
from seriatim.core.stopping import StopRequest
from seriatim.core.terminal import say
from seriatim.training.config import MOST_IMAGES, AnyRecipe, Recipe, TokenizerRecipe, read_any
from seriatim.training.distributed import World
from seriatim.training.look import FACTORS, PREVIEWS, WITHOUT_CLASSES
from seriatim.training.precision import threads
from seriatim.training.run_folder import RECIPE
from seriatim.training.state import RunState, Trainables
from seriatim.training.task import Costs, Task
from seriatim.training.updates import gradients

LONGEST = 366 * 24 * 60.0  # minutes
MEASURING = 0.05  # the share of the time in which steps are measured
LEAST_MEASURING, MOST_MEASURING = 3.0, 20.0  # seconds of that
FEWEST_STEPS, MOST_STEPS = 3, 100  # that are measured after the first one, if they do not take too long
LOOKING = 0.15  # the share of the time that previews should take
MOST_LOOKING = 0.4  # the share that they take at most: otherwise there are fewer, or none
SAVING = 0.04  # the share of the time that checkpoints and the figures at each of them may take
TESTING = 0.06  # the share of the time that tests of a classifier may take
RESERVE = 0.05  # the share of the time that is left over, because what was measured is not exact
TRAINING = 0.5  # the least share of the minutes that is left for all of this after the data were read
MOST_SAVES, BETWEEN_SAVES = 8, 900.0  # checkpoints of a short run, and seconds between those of a long one
FEWEST_ROWS, MOST_ROWS = 4, 10  # classes of a preview
MOST_EACH, MOST_EACH_ALONE = 8, 4  # images of each class, and an eighth of the images without classes
LOGGED, BETWEEN_LINES = 100, 2.0  # lines of metrics, and the least seconds between two of them
END = 2.0  # seconds for the curves, the model's card and the end of the process
PROBE = 16 << 20  # bytes that are written to measure the disk
AMOUNTS = (  # the settings that a budget decides
    "images",
    "warmup_images",
    "log_images",
    "save_images",
    "sample_images",
    "sample_rows",
    "sample_each",
    "validate_images",
    "test_images",
)


@dataclass(frozen=True)
class Budget:
    """Minutes for a training, counted from `began`. Settings of `training` in `given` are left as they are."""

    minutes: float
    began: float = field(default_factory=time.monotonic)
    given: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not (isinstance(self.minutes, int | float) and 0 < self.minutes <= LONGEST):  # NaN fails too
            raise UsageError(
                f"minutes: {self.minutes!r} is not allowed; it must be above 0 and at most {LONGEST:,.0f} (a year)"
            )
        if "images" in self.given:
            raise UsageError(
                "minutes: can't go with training.images, since each says how long to train; leave one of the two out"
            )

    @property
    def seconds(self) -> float:
        return 60.0 * self.minutes

    def left(self) -> float:
        """The seconds that are left, but at least half of the budget, so that slow reading does not end a run."""
        return max(self.began + self.seconds - time.monotonic(), TRAINING * self.seconds)


def budget_of(minutes: float | Budget | None) -> Budget | None:
    """The budget that a caller means; minutes count from now."""
    return minutes if minutes is None or isinstance(minutes, Budget) else Budget(minutes)


def as_begun(out: Path, recipe: AnyRecipe, budget: Budget) -> AnyRecipe:
    """The recipe with the amounts that were decided when the run in `out` began."""
    first = read_any(str(out / RECIPE))
    if type(first) is not type(recipe):
        return recipe  # the run is refused later, with a reason
    say(
        f"the run in {out} goes on to the {first.training.images:,} images that were decided when it began; "
        f"--minutes {budget.minutes:g} changes nothing"
    )
    kept = {name: getattr(first.training, name) for name in AMOUNTS if hasattr(first.training, name)}
    changed: dict[str, Any] = {"training": recipe.training.model_copy(update=kept)}
    if isinstance(first, TokenizerRecipe) and isinstance(recipe, TokenizerRecipe):
        changed["objective"] = recipe.objective.model_copy(update={"gan_start": first.objective.gan_start})
    return recipe.model_copy(update=changed)


# --- measuring ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pace:
    """What was measured before the first step, in seconds."""

    image: float  # to train on an image, reading it included
    save: float  # to write a checkpoint
    costs: Costs
    steps: int = 0  # that were measured


def measured_pace(
    task: Task, run: RunState, world: World, stop: StopRequest, out: Path, seconds: float, *, quiet: bool = False
) -> Pace:
    """Measure what training takes, in about MEASURING of the `seconds`. Nothing of the task changes.

    All processes call this together.
    """
    before = task.recipe
    task.settle(before.model_copy(update={"training": before.training.model_copy(update={"images": MOST_IMAGES})}))
    try:
        with threads(run.threads), untouched(task.parts):
            most = min(MOST_MEASURING, max(LEAST_MEASURING, MEASURING * seconds))
            image, steps = seconds_of_an_image(task, run, world, stop, most, quiet=quiet)
            costs = task.costs(run, image, most)
    finally:
        task.settle(before)
    return Pace(image, world.first(lambda: seconds_to_save(task.parts, out)), costs, steps)


@contextlib.contextmanager
def untouched(parts: Trainables) -> Iterator[None]:
    """A context after which weights, averages and the optimiser are those of before; no update was made yet."""
    kept = [copy.deepcopy(module.state_dict()) for module in (parts.model, parts.average)]
    rates = [group["lr"] for group in parts.optimiser.param_groups]
    try:
        yield
    finally:
        for module, tensors in zip((parts.model, parts.average), kept, strict=True):
            module.load_state_dict(tensors)
        parts.optimiser.state.clear()
        parts.optimiser.zero_grad(set_to_none=True)
        for group, rate in zip(parts.optimiser.param_groups, rates, strict=True):
            group["lr"] = rate


def seconds_of_an_image(
    task: Task, run: RunState, world: World, stop: StopRequest, most: float, *, quiet: bool
) -> tuple[float, int]:
    """The mean seconds that a step takes for each image, and the number of steps that were measured.

    The first step also allocates and compiles, so it only counts where it is the only one.
    """
    settings, parts, dtype = task.recipe.training, task.parts, DTYPES[run.dtype]
    seconds: list[float] = []
    images: list[int] = []
    wanted = 1 + FEWEST_STEPS
    with (
        contextlib.closing(task.batches(RunState(dtype=run.dtype, threads=run.threads))) as batches,
        Progress(wanted, "measuring the speed", "steps", quiet=quiet or not world.main) as bar,
    ):
        while len(seconds) < wanted:
            begin = time.perf_counter()
            batch = next(batches)
            losses = task.losses(batch, dtype)
            asked_to_stop = stop.requested is not None
            nominal = task.nominal(batch)
            found = gradients(
                parts.trained, losses, nominal, settings.clip, world, stop=asked_to_stop, apart=parts.opponent
            )
            parts.update()
            task.updated()
            synchronise(world.device)
            if found.stop:
                raise world.told(
                    Stopped(f"{stop.requested or 'signal'}: stopped before the first step; begin it again")
                )
            seconds.append(world.first(lambda begin=begin: time.perf_counter() - begin))  # type: ignore[misc]
            images.append(len(batch.whole))
            if len(seconds) <= 2:  # the second step tells how many fit
                left = most - sum(seconds)
                wanted = len(seconds) + min(MOST_STEPS, max(FEWEST_STEPS if left > 0 else 0, int(left / seconds[-1])))
                bar.total = wanted
            bar.advance()
    first = 1 if len(seconds) > 1 else 0
    return sum(seconds[first:]) / sum(images[first:]), len(seconds) - first


def since(begin: float) -> float:
    return time.perf_counter() - begin


def seconds_to_save(parts: Trainables, out: Path) -> float:
    """About what writing and syncing a checkpoint will take, by the speed of the disk that holds `out`."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in parts.model.state_dict().values())
    trained = sum(parameter.numel() * parameter.element_size() for parameter in parts.trained)
    size = 2 * weights + 2 * trained  # with the averages, and two moments
    folder = next(place for place in (out, *out.absolute().parents) if place.is_dir())
    begin = time.perf_counter()
    with explained(folder), tempfile.TemporaryFile(prefix=".probe.", dir=folder) as file:
        file.write(bytes(PROBE))
        file.flush()
        os.fsync(file.fileno())
    return 0.2 + 1.5 * (time.perf_counter() - begin) * size / PROBE  # the sha256 of what was written is computed too


# --- deciding -------------------------------------------------------------------------------------------------------


def decided(recipe: AnyRecipe, budget: Budget, pace: Pace, left: float, classes: int) -> AnyRecipe:
    """The recipe with the amounts that fit into the `left` seconds."""
    costs, given, settings = pace.costs, budget.given, recipe.training
    batch = settings.batch_size
    rows, each = shape_of_previews(recipe, costs, LOOKING * left, classes, given)
    drawn = rows * each if classes else WITHOUT_CLASSES * each
    look = drawn * costs.sample + costs.look
    sweep = len(FACTORS) - 1 if classes and isinstance(recipe, Recipe) else 0  # more of the last preview
    looks = min(PREVIEWS, max(0, int(MOST_LOOKING * left / look) - sweep)) if look else 0
    save = pace.save + costs.judged
    saves = max(1, min(MOST_SAVES, int(SAVING * left / save)), int(left / BETWEEN_SAVES))
    tests = min(PREVIEWS, int(TESTING * left / costs.test)) if costs.test else 0
    aside, beside = costs.end + END, 0.0  # seconds once, and seconds for each image
    for name, count, cost in (("save_images", saves, save), ("sample_images", looks + sweep * bool(looks), look)):
        every: int | str = getattr(settings, name, 0) if name in given else "auto"
        if isinstance(every, str):
            aside += count * cost
        elif every:
            beside += cost / every
    aside += tests * costs.test
    wanted = (left * (1 - RESERVE) - aside) / (pace.image + beside)
    images = min(MOST_IMAGES, max(1, int(wanted / batch)) * batch)
    ratio = images / settings.images
    amounts: dict[str, Any] = {
        "images": images,
        "warmup_images": round(settings.warmup_images * ratio),
        "log_images": max(batch, math.ceil(images / LOGGED), min(images, int(BETWEEN_LINES / pace.image))),
        "save_images": math.ceil(images / saves),
        "sample_images": math.ceil(images / looks) if looks else 0,
        "sample_rows": rows,
        "sample_each": each,
        "validate_images": math.ceil(getattr(settings, "validate_images", 0) * ratio),
        "test_images": math.ceil(images / tests) if tests else 0,
    }
    kept = {name: value for name, value in amounts.items() if name not in given and hasattr(settings, name)}
    changed: dict[str, Any] = {"training": settings.model_copy(update=kept)}
    if isinstance(recipe, TokenizerRecipe):
        start = min(round(recipe.objective.gan_start * ratio), images - 1)
        changed["objective"] = recipe.objective.model_copy(update={"gan_start": start})
    return recipe.model_copy(update=changed)


def shape_of_previews(
    recipe: AnyRecipe, costs: Costs, seconds: float, classes: int, given: frozenset[str]
) -> tuple[int, int]:
    """The most classes of a preview, and the images of each, so that all previews take about so many seconds."""
    settings: Any = recipe.training
    sheets = PREVIEWS + (len(FACTORS) - 1 if classes else 0)
    room = int(min(1e6, max(0.0, seconds / sheets - costs.look) / max(1e-9, costs.sample)))  # images of each preview
    if classes:
        rows = min(classes, max(FEWEST_ROWS, min(MOST_ROWS, room)))
        each = max(1, min(MOST_EACH, room // rows))
    else:
        rows, each = MOST_ROWS, max(1, min(MOST_EACH_ALONE, room // WITHOUT_CLASSES))
    if "sample_rows" in given:
        rows = min(classes or settings.sample_rows, settings.sample_rows)
    return rows, settings.sample_each if "sample_each" in given else each


@dataclass(frozen=True)
class Fitted:
    """A recipe with the amounts that fit into a budget, and how they were found, for environment.json."""

    recipe: AnyRecipe
    about: dict[str, Any]


def fitted(
    task: Task, budget: Budget, run: RunState, world: World, stop: StopRequest, out: Path, *, quiet: bool = False
) -> Fitted:
    """Measure a task and decide the amounts of its recipe. All processes call this together."""
    pace = measured_pace(task, run, world, stop, out, budget.seconds, quiet=quiet)
    return world.first(lambda: fitted_at(task, budget, pace))


def fitted_at(task: Task, budget: Budget, pace: Pace) -> Fitted:
    """Decide the amounts now, and say them."""
    left = budget.left()
    recipe = decided(task.recipe, budget, pace, left, len(task.data.class_names))
    about = {
        "minutes": budget.minutes,
        "seconds_before": round(time.monotonic() - budget.began, 2),
        "seconds_left": round(left, 2),
        "seconds_per_image": pace.image,
        "measured_steps": pace.steps,
        "seconds_to_save": round(pace.save, 3),
        **{f"seconds_of_{name}": round(value, 4) for name, value in asdict(pace.costs).items()},
        "images": recipe.training.images,
    }
    say(told(recipe, budget, pace, task.data.count))
    return Fitted(recipe, about)


def told(recipe: AnyRecipe, budget: Budget, pace: Pace, count: int) -> str:
    """A line that says what the minutes have become."""
    images = recipe.training.images
    over = time.monotonic() - budget.began
    before = f", {duration(over)} of which are over" if over >= 1 else ""
    passes = f", {passes_over(images, count)}" if count else ""
    steps = f"{pace.steps} step{'s' * (pace.steps != 1)} were timed" if pace.steps else "no step was timed"
    return (
        f"{minutes_of(budget.minutes)}{before}: {images:,} images at {1 / pace.image:,.3g} a second ({steps}){passes}"
    )

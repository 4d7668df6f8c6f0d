"""The training loop for every kind of model, in one function that reads from top to bottom.

A kind of model is a `Task`, which has the batches, the loss and what is written at the end. The loop does everything
else: it resumes bitwise, measures dtype and threads, accumulates gradients, checks for values that are not finite,
writes checkpoints, logs and curves, and stops on a signal. Benchmarks, which have no run folder, use `updates.updates`.

Shapes: B images of a batch.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from seriatim.checkpoints.native import PARTS
from seriatim.checkpoints.unfinished import newest_whole
from seriatim.core.device import DTYPES
from seriatim.core.errors import ResourceError, Stopped, UsageError
from seriatim.core.files import write_text
from seriatim.core.processes import restarted
from seriatim.core.progress import Progress
from seriatim.core.schedules import learning_rate
from seriatim.core.stopping import StopRequest
from seriatim.core.terminal import say
from seriatim.data.base import ImageData
from seriatim.data.loader import Batch, WorkerLost
from seriatim.models.base import Loss
from seriatim.nn.onednn_training import prepare_training
from seriatim.training import state as checkpoints
from seriatim.training.blow_up import BlowUpGuard, way_out
from seriatim.training.config import AnyRecipe, dump
from seriatim.training.distributed import World, joined
from seriatim.training.heap import bound_compiled_products, return_heap
from seriatim.training.log import MetricsLog, NoLog, record_choice
from seriatim.training.micro_batch import repeated
from seriatim.training.not_finite import FiniteGuard
from seriatim.training.precision import fastest, threads
from seriatim.training.run_folder import Resume, check_out, is_run, occupied
from seriatim.training.setup import begin_run, changes_of, refuse_fewer_images
from seriatim.training.state import RunState, Trainables
from seriatim.training.trackers import Tracker, build_trackers
from seriatim.training.updates import gradients


class Task(ABC):
    """A kind of model and its data, in the form that the engine trains."""

    recipe: Any  # the engine replaces it by one that records everything measured or changed
    data: ImageData
    parts: Trainables
    total: int  # the number of images of the whole run
    accumulate = 1  # the number of forward and backward passes of each update, unless `micro_batch` says it
    micro_batch: int | None = None  # the number of images that one of these passes computes in each process
    splits = True  # whether `loss` can compute a part of a batch; otherwise it always computes the whole batch
    files: tuple[str, ...] = PARTS  # the files in the folder `model` that `finish` writes
    what = "a model"  # what that folder holds, for messages

    def check(self) -> None:  # noqa: B027
        """Raise an error, before anything is written, if a new run can't begin."""

    @abstractmethod
    def begin(self, stop: StopRequest) -> None:
        """Measure or read what training needs before its first step. It is not called when a run is resumed."""

    @abstractmethod
    def batches(self, run: RunState) -> Generator[Batch]:
        """Yield the batches that remain for the state `run`."""

    @abstractmethod
    def loss(self, batch: Batch, part: slice, dtype: torch.dtype) -> Loss:
        """The loss of the images `part` of a batch. Its `parts` are averaged like the loss and logged by name."""

    @abstractmethod
    def trial(self) -> Callable[[torch.dtype], Loss]:
        """A function that computes the loss of a first batch in a given dtype and has no side effects."""

    def largest_micro_batch(self, world: World) -> int:
        """How many images a process can compute at once; called for `training.micro_batch: auto`."""
        raise NotImplementedError(f"{type(self).__name__} lacks largest_micro_batch()")

    def slices(self, size: int) -> list[slice]:
        """Slices that split `size` images of this process into equal parts, of which the last may be smaller."""
        step = self.micro_batch or -(-size // self.accumulate)
        return [slice(i, min(i + step, size)) for i in range(0, size, step)]

    def losses(self, batch: Batch, dtype: torch.dtype) -> Iterator[Loss]:
        """Yield the loss of each part of a batch; `gradients` goes backward through one before it takes the next."""
        for part in self.slices(len(batch)):
            yield self.loss(batch, part, dtype)

    def spread(self, world: World) -> None:
        """Prepare the model for training by several processes. Raises UsageError if this kind of model can't be."""
        if world.size > 1:
            raise UsageError(
                f"train: WORLD_SIZE={world.size} is set, but {self.what} is trained by one process; start it without "
                "torchrun"
            )

    @abstractmethod
    def nominal(self, batch: Batch) -> float:
        """The expected count of a batch's loss; gradients are scaled to the true count before clipping."""

    @abstractmethod
    def finish(self, run: RunState, log: MetricsLog) -> None:
        """Write the trained model and other results."""

    @abstractmethod
    def curves(self, log: MetricsLog) -> None:
        """Draw the curves of the log."""

    def settings_in_force(self) -> AbstractContextManager[None]:
        """A context with the settings of torch and of the model's modules that hold while the run lasts."""
        return contextlib.nullcontext()

    def config(self, run: RunState) -> Mapping[str, Any] | None:  # noqa: ARG002
        """The config of the model for checkpoints, so that they can be used without the run; None writes no config."""
        return None

    def updated(self) -> None:
        """Do what follows an update of the weights, in all processes."""
        return None

    def tested(self, run: RunState, *, last: bool) -> dict[str, float]:  # noqa: ARG002
        """Figures on test images for the next line of the log; empty if none are due."""
        return {}

    def judged(self, before: int, run: RunState, stop: StopRequest, *, last: bool) -> dict[str, float]:  # noqa: ARG002
        """Figures on images that are not trained on, for a line of the log of their own; empty if none are due."""
        return {}

    def look(self, before: int, run: RunState, stop: StopRequest) -> None:  # noqa: ARG002
        """Draw sample pictures if they are due since `before` images were seen."""
        return None


@dataclass(frozen=True)
class TrainingResult:
    folder: Path  # the run folder; `folder / "model"` holds what was trained
    images: int
    seconds: float  # the time in the training loop
    images_per_second: float
    loss: float  # the mean in the last line of the log
    parameters: int
    dtype: str
    threads: int


def fit(
    task_of: Callable[[torch.device], Task],
    recipe: AnyRecipe,
    out: Path,
    *,
    device: str = "auto",
    resume: Resume = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> tuple[Any, TrainingResult]:
    """Train into the folder `out`, or with `resume` continue bitwise from the newest whole checkpoint in it.

    Without `resume`, `out` must be new or empty; with "auto" a run is resumed if there is one, and begun otherwise.
    With `overwrite` a run in `out` is replaced, and kept until the new one is finished. Returns the task with its
    trained parts, and the figures of the run.

    Raises UsageError if `out` holds anything but the run to resume or overwrite, if there is no run to resume, or if
    another process is training there; NumericsError if the loss or its gradient is not finite, before anything is
    updated, unless `training.on_nan` is "skip"; and Stopped on SIGTERM or SIGINT, after saving.

    Under torchrun all processes call this with the same arguments. What a process that was killed leaves is resumed
    when torchrun restarts them.
    """
    with joined(device) as world, contextlib.ExitStack() as stack:
        if restarted() and world.first(lambda: is_run(out)):  # the processes before these have begun the run
            resume, overwrite = True, False
        resuming = world.first(lambda: check_out(out, resume=resume, overwrite=overwrite))
        trackers: dict[str, Tracker] = {}
        world.first(lambda: trackers.update(build_trackers(recipe.training)))
        task = world.in_turn(lambda: task_of(world.device))
        if not resuming:
            world.first(task.check)
        settings, data, total = recipe.training, task.data, task.total
        if world.device.type == "cpu":
            bound_compiled_products()
            prepare_training(task.parts.model)

        def hold() -> None:
            stack.enter_context(occupied(out, task.files, task.what, overwrite=overwrite))

        world.first(hold)
        stop = stack.enter_context(StopRequest())
        stack.enter_context(task.settings_in_force())
        world.first(lambda: begin_run(out, recipe, data, resume=resuming))
        path = world.first(lambda: newest(out)) if resuming else None
        if path is None:
            run = world.first(lambda: begun(task, stop, out, world))
            world.copy_first(task.parts.model, task.parts.tokenizer)
        task.spread(world)
        parts = task.parts
        if path is not None:
            run = checkpoints.load(path, parts)
        world.first(lambda: refuse_fewer_images(total, run.seen, out))
        changes = world.first(lambda: changes_of(out, recipe, run.seen))  # empty for a new run
        if settings.dtype != "auto":
            run.dtype = settings.dtype
        task.micro_batch = run.micro_batch = repeated(getattr(settings, "micro_batch", None), run.micro_batch)
        measured = {"dtype": run.dtype, "threads": run.threads, "micro_batch": run.micro_batch}
        settings = settings.model_copy(update={key: measured[key] for key in measured if hasattr(settings, key)})
        task.recipe = recipe = recipe.model_copy(update={"training": settings, "changes": changes})
        world.first(lambda: write_text(out / "recipe.yaml", dump(recipe)))  # with what was measured, so that it repeats
        dtype = DTYPES[run.dtype]
        stack.enter_context(threads(run.threads))
        log = MetricsLog(out / "metrics.jsonl", run.seen) if world.main else NoLog()
        stack.callback(log.close)
        world.first(lambda: log.track(trackers, recipe))
        guard = BlowUpGuard(settings, out)
        finite = FiniteGuard(settings, data, parts.model, way_out(settings, out), world)
        began, started = run.seen, time.monotonic()
        logged, waited = started, 0.0

        def save() -> Path:
            tensors = checkpoints.tensors_of(parts, keep=world.main)

            def write() -> Path:
                path = checkpoints.save(out / "checkpoints", parts, run, task.config(run), tensors)
                checkpoints.prune(out / "checkpoints", settings.keep, path)
                return path

            return world.first(write)

        batches = stack.enter_context(contextlib.closing(task.batches(run)))
        with Progress(total, "training", "images", done=run.seen, quiet=quiet or not world.main) as bar:
            while run.seen < total:
                asked = time.perf_counter()
                try:
                    batch = next(batches)
                except WorkerLost as error:
                    if world.size > 1:  # the other processes are in the middle of this step, so nothing can be saved
                        raise
                    raise ResourceError(f"{error}; saved {save()}: go on with --resume") from error
                waited += time.perf_counter() - asked
                # --- one step
                size = len(batch.whole)
                rate = settings.learning_rate * learning_rate(
                    run.seen + size, total, settings.warmup_images, settings.schedule
                )
                for group in parts.optimiser.param_groups:
                    group["lr"] = rate * group.get("relative_rate", 1.0)
                losses = task.losses(batch, dtype)
                finite.begin_step()
                asked_to_stop = stop.requested is not None
                nominal = task.nominal(batch)
                found = gradients(
                    parts.trained, losses, nominal, settings.clip, world, stop=asked_to_stop, apart=parts.opponent
                )
                means = found.means
                skipped = finite.skips(run, batch, means["loss"], found.norm)
                if skipped:
                    parts.optimiser.zero_grad(set_to_none=True)
                else:
                    guard.check(run, means["loss"])
                    parts.update()
                    task.updated()
                    run.steps += 1
                    run.steps_since += 1
                    run.sums = {name: run.sums.get(name, 0.0) + value for name, value in means.items()}
                before, run.seen = run.seen, run.seen + size
                run.position = list(batch.after)
                last = run.seen >= total
                stopping = found.stop or (world.size == 1 and stop.requested is not None)
                # --- periodically
                figures = {} if stopping else task.judged(before, run, stop, last=last)
                if run.seen - run.since >= settings.log_images or last or figures:
                    now = time.monotonic()
                    means = {
                        name: value / run.steps_since for name, value in run.sums.items()
                    }  # {} if all were skipped
                    log.write(
                        images=run.seen,
                        **means,
                        **task.tested(run, last=last),
                        **figures,
                        learning_rate=rate,
                        **({} if skipped else {"gradient_norm": found.norm}),
                        **({"skipped": run.skipped} if run.skipped else {}),
                        images_per_second=(run.seen - max(run.since, began)) / max(1e-9, now - logged),
                        loader_share=waited / max(1e-9, now - logged),
                    )
                    bar.note = ", ".join(f"{name} {means[name]:.3f}" for name in ("loss", "accuracy") if name in means)
                    run.loss, run.since, run.steps_since, run.sums = means.get("loss", run.loss), run.seen, 0, {}
                    logged, waited = time.monotonic(), 0.0
                    return_heap()
                if not stopping:
                    task.look(before, run, stop)
                    stopping = world.size == 1 and stop.requested is not None  # others hear of it at the next step
                due = crossed(before, run.seen, settings.save_images) or (last and settings.save_images > 0)
                if due and not stopping:
                    save()
                    world.first(lambda: task.curves(log))
                if stopping and not last:
                    path = save()
                    raise world.told(
                        Stopped(
                            f"{stop.requested or 'signal'}: stopped after {run.seen} images, saved {path}; go on with "
                            "--resume"
                        )
                    )
                bar.advance(size)
        seconds = time.monotonic() - started
        task.finish(run, log)
        world.first(lambda: task.curves(log))
    speed = (run.seen - began) / seconds if run.seen > began else 0.0
    loss = math.nan if run.loss is None else run.loss
    parameters = sum(parameter.numel() for parameter in parts.trained)
    return task, TrainingResult(out, run.seen, seconds, speed, loss, parameters, run.dtype, run.threads)


def begun(task: Task, stop: StopRequest, out: Path, world: World) -> RunState:
    """The state of a new run, with the dtype and the number of threads that it will use, which are measured."""
    task.begin(stop)
    settings = task.recipe.training
    choose_micro_batch(task, world)
    count = settings.threads
    if count == "auto" and world.device.type == "cpu" and world.local_size > 1:
        count = max(1, len(os.sched_getaffinity(0)) // world.local_size)
    chosen = fastest(settings.dtype, count, world.device, task.trial())
    record_choice(out, chosen)
    task.parts.model.zero_grad(set_to_none=True)
    return RunState(dtype=chosen.dtype, threads=chosen.threads, micro_batch=task.micro_batch)


def choose_micro_batch(task: Task, world: World) -> None:
    """Find how many images a process computes at once, if the recipe leaves it open."""
    if getattr(task.recipe.training, "micro_batch", None) == "auto":
        task.micro_batch = task.largest_micro_batch(world)


def newest(out: Path) -> Path | None:
    """The newest whole checkpoint; None if there is none. Newer ones that are damaged are set aside.

    Both are reported.
    """
    folder = out / "checkpoints"
    checkpoints.sweep(folder)
    for says in checkpoints.set_damaged_aside(folder):
        say(f"stepping back: {says}")
    path, _ = newest_whole(folder)
    if path is None:
        say(f"no whole checkpoint in {folder}: beginning anew")
    else:
        say(f"resuming after {int(path.name):,} images from {path}")
    return path


def crossed(before: int, now: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, now]; False if `every` is 0."""
    return bool(every) and now // every > before // every

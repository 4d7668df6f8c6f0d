"""The training loop for every kind of model, in one function that reads from top to bottom.

A kind of model is a `Task`, which has the batches, the loss and what is written at the end. The loop does everything
else: it resumes bitwise, measures dtype and threads, accumulates gradients, and checks for values that are not finite.
What it does between two steps, such as saving checkpoints, is in `periodic`. Benchmarks, which have no run folder, use
`updates.updates`.

Shapes: B images of a batch.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from seriatim.checkpoints.unfinished import newest_whole
from seriatim.core.device import DTYPES
from seriatim.core.errors import ResourceError, UsageError
from seriatim.core.files import MANIFEST, write_text
from seriatim.core.ownership import json_of
from seriatim.core.processes import launch, restarted
from seriatim.core.progress import Progress
from seriatim.core.stopping import StopRequest
from seriatim.core.terminal import say
from seriatim.data.loader import WorkerLost
from seriatim.nn.onednn_training import prepare_training
from seriatim.training import state as checkpoints
from seriatim.training.blow_up import BlowUpGuard, way_out
from seriatim.training.budget import MEASURING, Budget, as_begun, budget_of, fitted
from seriatim.training.config import AnyRecipe, dump
from seriatim.training.distributed import World, joined
from seriatim.training.heap import bound_compiled_products
from seriatim.training.log import MetricsLog, NoLog, record_choice
from seriatim.training.micro_batch import repeated
from seriatim.training.not_finite import FiniteGuard
from seriatim.training.optim import rate_after, set_rate
from seriatim.training.periodic import Periodic
from seriatim.training.precision import ENOUGH, Choice, fastest, threads
from seriatim.training.run_folder import ENVIRONMENT, Resume, check_out, is_run, occupied
from seriatim.training.setup import begin_run, changes_of, refuse_fewer_images
from seriatim.training.state import RunState
from seriatim.training.task import Task
from seriatim.training.trackers import Tracker, build_trackers
from seriatim.training.updates import gradients


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
    task_of: Callable[[Any, torch.device], Task],
    recipe: AnyRecipe,
    out: Path,
    *,
    device: str = "auto",
    resume: Resume = False,
    overwrite: bool = False,
    quiet: bool = False,
    minutes: float | Budget | None = None,
    on_begin: Callable[[AnyRecipe, Path], None] | None = None,
) -> tuple[Any, TrainingResult]:
    """Train into the folder `out`, or with `resume` continue bitwise from the newest whole checkpoint in it.

    Without `resume`, `out` must be new or empty; with "auto" a run is resumed if there is one, and begun otherwise.
    With `overwrite` a run in `out` is replaced, and kept until the new one is finished. With `minutes` a new run trains
    for about so long: the amounts of the recipe are replaced by those that fit (`budget.py`), and a run that is resumed
    keeps those that were decided when it began. `on_begin` is called with the recipe and the folder of a new run,
    before its first step. Returns the task with its trained parts, and the figures of the run.

    Raises UsageError if `out` holds anything but the run to resume or overwrite, if there is no run to resume, or if
    another process is training there; NumericsError if the loss or its gradient is not finite, before anything is
    updated, unless `training.on_nan` is "skip"; and Stopped on SIGTERM or SIGINT, after saving.

    Under torchrun all processes call this with the same arguments. What a process that was killed leaves is resumed
    when torchrun restarts them.
    """
    budget = budget_of(minutes)
    with joined(device) as world, contextlib.ExitStack() as stack:
        if restarted() and world.first(lambda: begun_by_this_launch(out)):
            resume, overwrite = True, False
        resuming = world.first(lambda: check_out(out, resume=resume, overwrite=overwrite))
        trackers: dict[str, Tracker] = {}
        world.first(lambda: trackers.update(build_trackers(recipe.training)))
        if resuming and budget is not None:
            recipe = world.first(partial(as_begun, out, recipe, budget))
            budget = None
        task = world.in_turn(partial(task_of, recipe, world.device))
        if not resuming:
            world.first(task.check)
        data = task.data
        if world.device.type == "cpu":
            bound_compiled_products()
            prepare_training(task.parts.model)

        def hold() -> None:
            stack.enter_context(occupied(out, task.files, task.what, overwrite=overwrite))

        world.first(hold)
        stop = stack.enter_context(StopRequest())
        stack.enter_context(task.settings_in_force())
        if budget is None:  # otherwise the recipe is not known yet
            world.first(partial(begin_run, out, recipe, data, resume=resuming))
        path = world.first(lambda: newest(out)) if resuming else None
        if path is None:
            enough = math.inf if budget is None else MEASURING * budget.seconds
            run, choice = world.first(lambda: begun(task, stop, world, enough))
            world.copy_first(task.parts.model, task.parts.tokenizer)
        task.spread(world)
        parts = task.parts
        found = None
        if budget is not None:
            found = fitted(task, budget, run, world, stop, out, quiet=quiet)
            recipe = found.recipe
            task.settle(recipe)
            world.first(partial(begin_run, out, recipe, data, resume=False))
        if path is None:
            world.first(partial(record_choice, out, choice, None if found is None else found.about))
            if on_begin is not None:
                world.first(partial(on_begin, recipe, out))
        else:
            world.first(lambda: task.check_resumed(path))
            run = checkpoints.load(path, parts)
        settings, total = recipe.training, task.total
        world.first(lambda: refuse_fewer_images(total, run.seen, out))
        changes = world.first(lambda: changes_of(out, recipe, run.seen))  # empty for a new run
        if settings.dtype != "auto":
            run.dtype = settings.dtype
        if settings.threads != "auto":
            run.threads = int(settings.threads)
        elif world.device.type == "cpu":  # the run may have been begun by fewer processes on this machine
            run.threads = min(run.threads, share_of_cores(world))
        given = getattr(settings, "micro_batch", None)
        task.micro_batch = run.micro_batch = world.first(lambda: repeated(given, run.micro_batch))
        measured = {"dtype": run.dtype, "threads": run.threads, "micro_batch": run.micro_batch}
        settings = settings.model_copy(update={key: measured[key] for key in measured if hasattr(settings, key)})
        task.recipe = recipe = recipe.model_copy(update={"training": settings, "changes": changes})
        world.first(lambda: write_text(out / "recipe.yaml", dump(recipe)))  # with what was measured, so that it repeats
        dtype = DTYPES[run.dtype]
        stack.enter_context(threads(run.threads))
        log = MetricsLog(out / "metrics.jsonl", run.reported) if world.main else NoLog()
        stack.callback(log.close)
        world.first(lambda: log.track(trackers, recipe))
        guard = BlowUpGuard(settings, out, world)
        finite = FiniteGuard(settings, data, parts.model, way_out(settings, out), world)
        batches = stack.enter_context(contextlib.closing(task.batches(run)))
        began, started = run.seen, time.monotonic()
        with Progress(total, "training", "images", done=run.seen, quiet=quiet or not world.main) as bar:
            periodic = Periodic(task, run, out, world, stop, log, bar)
            if run.reported < run.seen:  # what was due when the run was stopped
                periodic.work()
            while run.seen < total:
                asked = time.perf_counter()
                try:
                    batch = next(batches)
                except WorkerLost as error:
                    if world.size > 1:  # the other processes are in the middle of this step, so nothing can be saved
                        raise
                    raise ResourceError(f"{error}; saved {periodic.save()}: go on with --resume") from error
                periodic.waited += time.perf_counter() - asked
                size = len(batch.whole)
                rate = rate_after(settings, run.seen + size, total)
                set_rate(parts.optimiser, rate)
                losses = task.losses(batch, dtype)
                finite.begin_step()
                asked_to_stop = stop.requested is not None
                nominal = task.nominal(batch)
                step = gradients(
                    parts.trained, losses, nominal, settings.clip, world, stop=asked_to_stop, apart=parts.opponent
                )
                if finite.skips(run, batch, step.means["loss"], step.norm):
                    parts.optimiser.zero_grad(set_to_none=True)
                    run.gradient_norm = None
                else:
                    guard.check(run, step.means["loss"])
                    parts.update()
                    task.updated()
                    run.steps += 1
                    run.steps_since += 1
                    run.sums = {name: run.sums.get(name, 0.0) + value for name, value in step.means.items()}
                    run.gradient_norm = step.norm
                run.seen += size
                run.position = list(batch.after)
                periodic.work(stopping=step.stop or (world.size == 1 and stop.requested is not None))
                bar.advance(size)
        seconds = time.monotonic() - started
        task.finish(run, log)
        world.first(lambda: task.curves(log))
    speed = (run.seen - began) / seconds if run.seen > began else 0.0
    loss = math.nan if run.loss is None else run.loss
    parameters = sum(parameter.numel() for parameter in parts.trained)
    return task, TrainingResult(out, run.seen, seconds, speed, loss, parameters, run.dtype, run.threads)


def begun_by_this_launch(out: Path) -> bool:
    """Whether processes that torchrun started before these have begun the run, rather than refused to replace it."""
    return is_run(out) and launch() is not None and json_of(out / ENVIRONMENT).get("launch") == launch()


def begun(task: Task, stop: StopRequest, world: World, enough: float = math.inf) -> tuple[RunState, Choice]:
    """The state of a new run, with the dtype and the number of threads that it will use, which are measured.

    Measuring them ends after about `enough` seconds.
    """
    task.begin(stop)
    settings = task.recipe.training
    choose_micro_batch(task, world)
    count = settings.threads
    if count == "auto" and world.device.type == "cpu" and world.local_size > 1:
        count = share_of_cores(world)
    chosen = fastest(settings.dtype, count, world.device, task.trial(), min(ENOUGH, enough))
    task.parts.model.zero_grad(set_to_none=True)
    return RunState(dtype=chosen.dtype, threads=chosen.threads, micro_batch=task.micro_batch), chosen


def share_of_cores(world: World) -> int:
    """The number of threads for each of the processes on this machine, so that all cores have one."""
    return max(1, len(os.sched_getaffinity(0)) // world.local_size)


def choose_micro_batch(task: Task, world: World) -> None:
    """Find how many images a process computes at once, if the recipe leaves it open."""
    if getattr(task.recipe.training, "micro_batch", None) == "auto":
        task.micro_batch = task.largest_micro_batch(world)


def newest(out: Path) -> Path | None:
    """The newest whole checkpoint; None if there is none. Newer ones that are damaged are set aside.

    Both are reported. Raises UsageError if there is none but a finished model, which training anew would replace.
    """
    folder = out / "checkpoints"
    checkpoints.sweep(folder)
    path, _ = newest_whole(folder)
    if path is None and os.path.lexists(out / "model" / MANIFEST):
        raise UsageError(
            f"out: {out} holds a finished run without a whole checkpoint, from which it could go on; use its model, "
            "choose another folder, or train again with --overwrite in the place of --resume"
        )
    for says in checkpoints.set_damaged_aside(folder):
        say(f"stepping back: {says}")
    if path is None:
        say(f"no whole checkpoint in {folder}: beginning anew")
    else:
        say(f"resuming after {int(path.name):,} images from {path}")
    return path

"""Measure what a recipe would take, without a run folder: `seriatim train RECIPE --dry-run`."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from seriatim.core.device import DTYPES, pick_dtype, plain_torch, synchronise
from seriatim.core.progress import Progress
from seriatim.core.stopping import StopRequest
from seriatim.data.loader import Batch
from seriatim.nn.onednn_training import prepare_training
from seriatim.training.budget import AMOUNTS, MEASURING, Budget, Pace, decided, seconds_to_save
from seriatim.training.distributed import ALONE
from seriatim.training.engine import choose_micro_batch
from seriatim.training.heap import bound_compiled_products
from seriatim.training.precision import fastest, threads
from seriatim.training.state import RunState
from seriatim.training.task import Task
from seriatim.training.updates import gradients

STEPS = 4  # steps that are timed, after one that is not
PATIENCE = 20.0  # seconds; if a step would take longer, a pass of one image is timed instead


@plain_torch(grad=True)
def measured_plan(
    task: Task, device: torch.device, *, seen: int = 0, budget: Budget | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Train a few steps in memory and return what they took; the task can't be used for a run afterwards.

    FLOPs are those of the matrix products and convolutions of a forward and a backward pass of one image, the
    tokenizer's included. A model that draws its masked share for each step is counted at the share of the first step.
    The time to the end is that of a run which has seen `seen` images. With a `budget` the images are those that a run
    would see which began now.
    """
    if device.type == "cpu":
        bound_compiled_products()
    settings = task.recipe.training
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        stack.enter_context(task.settings_in_force())
        task.begin(stop)
        choose_micro_batch(task, ALONE)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        dtype = pick_dtype("auto", device) if settings.dtype == "auto" else DTYPES[settings.dtype]
        count = torch.get_num_threads() if settings.threads == "auto" else int(settings.threads)
        run = RunState(dtype=next(name for name in DTYPES if DTYPES[name] == dtype), threads=count)
        batches = stack.enter_context(contextlib.closing(task.batches(run)))
        batch = next(batches)
        part = slice(0, 1 if task.splits else len(batch))
        with FlopCounterMode(display=False) as counter:
            task.loss(batch, part, dtype).mean.backward()
        if device.type == "cpu":
            prepare_training(task.parts.model)
        begin = time.perf_counter()
        task.loss(batch, part, dtype).mean.backward()
        synchronise(device)
        rate, steps = part.stop / (time.perf_counter() - begin), 0
        if len(batch) / rate <= PATIENCE:
            chosen = fastest(settings.dtype, settings.threads, device, task.trial())
            run = RunState(dtype=chosen.dtype, threads=chosen.threads)
            stack.enter_context(threads(run.threads))
            rate, steps = timed_steps(task, batch, batches, DTYPES[run.dtype], device, quiet=quiet)
        total, amounts = task.total, {}
        if budget is not None:
            costs = task.costs(run, 1 / rate, MEASURING * budget.seconds)
            pace = Pace(1 / rate, seconds_to_save(task.parts, Path.cwd()), costs, steps)
            fitting = decided(task.recipe, budget, pace, budget.left(), len(task.data.class_names)).training
            total = fitting.images
            amounts = {name: getattr(fitting, name) for name in AMOUNTS if hasattr(fitting, name)}
    return {
        **amounts,
        "flops_per_image": round(counter.get_total_flops() / part.stop),
        "images_per_second": rate,
        "measured_steps": steps,
        "dtype": run.dtype,
        "threads": run.threads,
        **({} if task.micro_batch is None else {"micro_batch": task.micro_batch}),
        "peak_memory_bytes": peak_memory(device),
        "seconds_to_the_end": max(0, total - seen) / rate,
    }


def timed_steps(
    task: Task, batch: Batch, batches: Iterator[Batch], dtype: torch.dtype, device: torch.device, *, quiet: bool
) -> tuple[float, int]:
    """The images per second of up to STEPS whole steps, reading included, and their number.

    The step before them is not timed, because it also compiles and allocates. It is if there is no other.
    """
    task.parts.optimiser.zero_grad(set_to_none=True)
    clip, images, steps, begin = task.recipe.training.clip, 0, 0, time.perf_counter()
    rate = 0.0
    with Progress(STEPS + 1, "measuring", "steps", quiet=quiet) as bar:
        for step in range(STEPS + 1):
            losses = task.losses(batch, dtype)
            gradients(task.parts.trained, losses, task.nominal(batch), clip, apart=task.parts.opponent)
            task.parts.update()
            task.updated()
            synchronise(device)
            images, steps = images + len(batch), max(1, step)
            rate = images / (time.perf_counter() - begin)
            if step == 0:
                images, begin = 0, time.perf_counter()
            bar.advance(1)
            following = next(batches, None)
            if following is None:
                break
            batch = following
    return rate, steps


def peak_memory(device: torch.device) -> int | None:
    """The largest number of bytes that tensors took on CUDA, or this process elsewhere; None if it is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

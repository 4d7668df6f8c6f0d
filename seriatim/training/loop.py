"""The training loop: one function, read top to bottom.

B images of a batch, L tokens, D features.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from seriatim.checkpoints.native import Bundle, bundle_config, save_bundle
from seriatim.checkpoints.unfinished import newest_whole
from seriatim.core.device import DTYPES, pick_device, plain_torch
from seriatim.core.errors import NumericsError, ResourceError, Stopped
from seriatim.core.files import write_text
from seriatim.core.keys import Keys
from seriatim.core.progress import Progress
from seriatim.core.random import derive_seed
from seriatim.core.schedules import learning_rate
from seriatim.core.terminal import say
from seriatim.models.base import Loss, SequenceModel
from seriatim.models.build import parameter_count
from seriatim.training import state as checkpoints
from seriatim.training.blow_up import BlowUpGuard, way_out
from seriatim.training.config import Recipe, dump
from seriatim.training.data import ImageData, Position
from seriatim.training.heap import bound_compiled_products, return_heap
from seriatim.training.loader import Batch, Loader, WorkerLost, batches_of, to_float
from seriatim.training.log import MetricsLog, loss_curve, model_card, record_choice
from seriatim.training.look import draw_samples
from seriatim.training.optim import adamw, averaged
from seriatim.training.precision import fastest, threads
from seriatim.training.run_folder import check_out, occupied
from seriatim.training.setup import begin_run, build, changes_of, fit_tokenizer, initialise_from, refuse_fewer_images
from seriatim.training.state import RunState, Trainables
from seriatim.training.stopping import StopRequest, refuse_many_processes


@dataclass(frozen=True)
class TrainingResult:
    folder: Path  # the run; `folder / "model"` is a model folder
    images: int
    seconds: float  # in the loop
    images_per_second: float
    loss: float  # mean of the last logged stretch
    parameters: int
    dtype: str
    threads: int


@plain_torch(grad=True)
def train(
    recipe: Recipe,
    out: Path | str,
    *,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> TrainingResult:
    """Train a recipe into the folder `out`; with `resume`, go on bitwise from the newest whole checkpoint in it.

    Without, `out` is new or empty; with `overwrite` a run in it is replaced, and kept until the new one is whole.

        out/recipe.yaml       the recipe with every default filled in
        out/data.json         how many images, their fingerprint, and which files were left out and why
        out/environment.json  versions and machine
        out/metrics.jsonl     loss, learning rate, images/s
        out/training.png      the loss curve
        out/samples/          grids at fixed seeds, and timeline.png (training.sample_images)
        out/checkpoints/      all that resuming needs (training.save_images)
        out/model/            the averaged weights, ready for `seriatim.load`

    Raises UsageError where `out` holds anything but the run that is to be resumed or overwritten, where there is no run
    to resume, or where another process trains there;
    NumericsError when the loss or its gradient is not finite, before anything is updated; Stopped, after saving, on
    SIGTERM or SIGINT.
    """
    refuse_many_processes()
    settings = recipe.training
    out = Path(out)
    check_out(out, resume=resume, overwrite=overwrite)
    data, tokenizer, model = build(recipe)
    where = pick_device(device)
    if where.type == "cpu":
        bound_compiled_products()
    with occupied(out, overwrite=overwrite), StopRequest() as stop, contextlib.ExitStack() as stack:
        begin_run(out, recipe, data, resume=resume)
        model.to(where).train()
        tokenizer.to(where)
        optimiser = adamw(model, settings.learning_rate, settings.betas, settings.weight_decay)
        average = averaged(model, settings.ema)
        parts = Trainables(model, average, optimiser, tokenizer)
        run = restore(out, parts) if resume else None
        if run is None and settings.init_from:
            initialise_from(settings.init_from, model, tokenizer, data.class_names)
            data.check_tokenizer(tokenizer)  # which now has that model's weights
        elif run is None:
            fit_tokenizer(tokenizer, data, quiet=quiet, stop=stop)

        image_keys, step_keys = Keys.of(recipe.seed, "train"), Keys.of(recipe.seed, "step")

        def loss_of(batch: Batch, part: slice, dtype: torch.dtype) -> Loss:
            # Every draw depends on (seed, first) alone, dropout's too: a resumed run draws what it would have drawn.
            first, size = batch.first + part.start, part.stop - part.start
            keys = image_keys.fold(torch.arange(first, first + size))  # image g of the run has (seed, "train", g)
            images = batch.images[part].to(where)
            labels = None if batch.labels is None else batch.labels[part]
            with torch.random.fork_rng(devices=[] if where.type == "cpu" else None):
                torch.manual_seed(derive_seed(recipe.seed, "dropout", first))
                with torch.no_grad():
                    moments = images if data.cached else tokenizer.moments(to_float(images))
                    tokens = tokenizer.tokens(moments, keys.fold("posterior"))  # (B, L, D)
                with torch.autocast(where.type, dtype=dtype, enabled=dtype != torch.float32):
                    return model(tokens, labels, keys, step_keys.fold(batch.first))

        if run is None:
            probe = next(iter(Loader(batches_of(data, recipe.seed, 0, settings.images, settings.batch_size), 0)))
            whole = slice(0, -(-len(probe) // settings.accumulate))
            chosen = fastest(settings.dtype, settings.threads, where, lambda dtype: loss_of(probe, whole, dtype))
            record_choice(out, chosen)
            run = RunState(dtype=chosen.dtype, threads=chosen.threads)
            model.zero_grad(set_to_none=True)
        refuse_fewer_images(settings.images, run.seen, out)
        changes = changes_of(out, recipe, run.seen)  # none where the run begins: its recipe was just written
        if settings.dtype != "auto":
            run.dtype = settings.dtype
        settings = settings.model_copy(update={"dtype": run.dtype, "threads": run.threads})
        recipe = recipe.model_copy(update={"training": settings, "changes": changes})
        write_text(out / "recipe.yaml", dump(recipe))  # what was measured included: it repeats this run
        dtype = DTYPES[run.dtype]
        stack.enter_context(threads(run.threads))
        log = MetricsLog(out / "metrics.jsonl", run.seen, settings.tensorboard)
        began, started = run.seen, time.monotonic()
        logged, waited = started, 0.0
        trained_on = {"count": data.count, "fingerprint": data.images_fingerprint()}

        def bundle() -> Bundle:
            provenance = {"recipe": recipe.model_dump(mode="json"), "images": run.seen, "data": trained_on}
            trained = cast(SequenceModel, average.module)
            return Bundle(trained, tokenizer, data.class_names, recipe.sampling, provenance, background=data.background)

        def save_checkpoint() -> Path:
            path = checkpoints.save(out / "checkpoints", parts, run, bundle_config(bundle()))
            checkpoints.prune(out / "checkpoints", settings.keep, path)
            return path

        position = Position(*run.position)
        batches = batches_of(data, recipe.seed, run.seen, settings.images, settings.batch_size, position)
        loader = Loader(batches, settings.workers)
        guard, cure = BlowUpGuard(settings, out), way_out(settings, out)

        def saved_if_lost(batches: Generator[Batch]) -> Generator[Batch]:
            try:
                yield from batches
            except WorkerLost as error:
                raise ResourceError(f"{error}; saved {save_checkpoint()}: go on with --resume") from error

        with Progress(settings.images, "training", "images", done=run.seen, quiet=quiet) as bar:
            for batch in stack.enter_context(contextlib.closing(saved_if_lost(iter(loader)))):
                # --- one step
                size = len(batch)
                factor = learning_rate(run.seen + size, settings.images, settings.warmup_images, settings.schedule)
                for group in optimiser.param_groups:
                    group["lr"] = settings.learning_rate * factor
                sums: dict[str, float] = {}
                count, nominal = 0.0, float(size * model.tokens)
                for part in slices(size, settings.accumulate):
                    # The sum over a nominal count: dividing by the true one is left until all parts are known.
                    loss = loss_of(batch, part, dtype)
                    check_finite("loss", loss.sum, run.seen, batch, data, cure)
                    (loss.sum / nominal).backward()
                    count += loss.count.item()
                    for name, value in (("loss", loss.sum), *((f"loss_{k}", v) for k, v in loss.parts.items())):
                        sums[name] = sums.get(name, 0.0) + value.detach().item()
                sums = {name: value / count for name, value in sums.items()}
                torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None], nominal / count)
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
                check_finite("gradient", norm, run.seen, batch, data, cure)
                guard.check(run, sums["loss"])
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
                average.update_parameters(model)
                before, run.seen, run.steps = run.seen, run.seen + size, run.steps + 1
                run.position = list(batch.after)
                run.sums = {name: run.sums.get(name, 0.0) + value for name, value in sums.items()}
                run.steps_since += 1
                last = run.seen >= settings.images
                # --- once in a while
                if run.seen - run.since >= settings.log_images or last:
                    now = time.monotonic()
                    means = {name: value / run.steps_since for name, value in run.sums.items()}
                    log.write(
                        images=run.seen,
                        **means,
                        learning_rate=settings.learning_rate * factor,
                        gradient_norm=norm.item(),
                        images_per_second=(run.seen - max(run.since, began)) / max(1e-9, now - logged),
                        loader_share=(loader.waited - waited) / max(1e-9, now - logged),
                    )
                    bar.note = f"loss {means['loss']:.3f}"
                    run.loss, run.since, run.steps_since, run.sums = means["loss"], run.seen, 0, {}
                    logged, waited = now, loader.waited
                    return_heap()
                if crossed(before, run.seen, settings.sample_images) and not stop.requested:
                    try:
                        draw_samples(bundle(), out / "samples", run.seen, recipe.seed, stop)
                    except NumericsError as error:  # training goes on: later weights may do better
                        say(f"no samples after {run.seen} images: {error}")
                due = crossed(before, run.seen, settings.save_images) or (last and settings.save_images > 0)
                if due and not stop.requested:
                    save_checkpoint()
                    loss_curve(log.rows, out / "training.png", recipe.name)
                if stop.requested and not last:
                    path = save_checkpoint()
                    raise Stopped(
                        f"{stop.requested}: stopped after {run.seen} images, saved {path}; go on with --resume"
                    )
                bar.advance(size)
        seconds = time.monotonic() - started
        log.close()
        rate = (run.seen - began) / seconds if run.seen > began else 0.0
        save_bundle(bundle(), out / "model", card=model_card(recipe, run.seen, parameter_count(model), log.rows, data))
        loss_curve(log.rows, out / "training.png", recipe.name)
    final = run.loss if run.loss is not None else math.nan
    return TrainingResult(out, run.seen, seconds, rate, final, parameter_count(model), run.dtype, run.threads)


def restore(out: Path, parts: Trainables) -> RunState | None:
    """The newest whole checkpoint into `parts`; says which, and which newer ones were damaged and are set aside."""
    folder = out / "checkpoints"
    checkpoints.sweep(folder)
    for says in checkpoints.set_damaged_aside(folder):
        say(f"stepping back: {says}")
    path, _ = newest_whole(folder)
    if path is None:
        say(f"no whole checkpoint in {folder}: beginning anew")
        return None
    run = checkpoints.load(path, parts)
    say(f"resuming after {run.seen:,} images from {path}")
    return run


def slices(size: int, parts: int) -> list[slice]:
    """`size` images in at most `parts` equal parts, the last perhaps smaller."""
    step = -(-size // parts)
    return [slice(i, min(i + step, size)) for i in range(0, size, step)]


def crossed(before: int, now: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, now]; never for 0."""
    return bool(every) and now // every > before // every


def check_finite(what: str, value: Tensor, seen: int, batch: Batch, data: ImageData, cure: str) -> None:
    """Stop before anything is updated."""
    number = value.detach().item()
    if not math.isfinite(number):
        names = batch.names[:8] or [data.name(int(i)) for i in batch.index[:8]]
        named = ", ".join(names) + (", ..." if len(batch) > 8 else "")
        raise NumericsError(
            f"the {what} is not finite ({number}) after {seen} images, in the batch of images {named}; nothing was "
            f"updated; {cure}"
        )
